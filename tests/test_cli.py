# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The command `peft-rank`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_rank import export_lora, get_rank_pattern, rank_table
from peft_rank.cli import main
from peft_rank.reporting import rank_grid
from runs import adam, adapted, config, steps_by_hand
from tiny_models import TINY_MODELS, TinyModel


def make(tiny: TinyModel, folder: Path, steps: int = 20, **overrides: object) -> PeftModel:
    """The base model and an adapter in `folder`, after `steps` of the common schedule of twenty."""
    tiny.make_model().save_pretrained(folder / "base")
    model = adapted(tiny, init_weights=False, **overrides)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.base_model.resolve_schedule(20)
    optimizer = adam(model)
    steps_by_hand(model, tiny, 1, steps, optimizer)
    if steps == 20:
        model.base_model.finalize(optimizer)
    model.save_pretrained(folder / "adapter")
    return model.eval()


@pytest.fixture(scope="module")
def llama_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `adapter`, its `lora` export and the `merged` model."""
    folder = tmp_path_factory.mktemp("llama")
    model = make(TINY_MODELS["llama"], folder)
    export_lora(model, folder / "lora")
    model.merge_and_unload().save_pretrained(folder / "merged")
    return folder


def test_inspect(llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = make(llama, tmp_path)
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    out = capsys.readouterr().out
    assert "SALIENTLORA" in out
    assert "budget      2 a module, 28 in all" in out
    assert "state       finished" in out
    assert str(tmp_path / "base") in out
    assert str(rank_grid(dict(sorted(get_rank_pattern(model).items())))) in out
    assert f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} in the factors" in out
    assert " MB" in out


def test_inspect_tells_a_running_allocation_from_one_that_never_ran(
    llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = make(llama, tmp_path, steps=8)
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    out = capsys.readouterr().out
    assert "in the middle of the allocation" in out
    assert rank_table(model).summary in out
    with pytest.warns(UserWarning, match="never ran"):
        adapted(llama).save_pretrained(tmp_path / "never")
    assert main(["inspect", str(tmp_path / "never")]) == 0
    assert "never ran" in capsys.readouterr().out


def test_inspect_a_checkpoint_of_the_warmup(llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The learning rate starts at 0, so that all of E are still 0 after the first step."""
    model = adapted(llama)
    model.base_model.resolve_schedule(20)
    steps_by_hand(model, llama, 1, 1, torch.optim.SGD(model.parameters(), lr=0.0))
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "in the middle of the allocation" in out
    assert str(rank_grid(dict(sorted(get_rank_pattern(model).items())))) in out


def test_inspect_a_checkpoint_with_pruned_ranks(
    llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = adapted(llama)
    model.base_model.resolve_schedule(20)
    steps_by_hand(model, llama, 1, 10, adam(model), shrink=False)
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "in the middle of the allocation" in out
    assert str(rank_grid(dict(sorted(get_rank_pattern(model).items())))) in out


def test_inspect_works_without_the_base_model(llama: TinyModel, tmp_path: Path) -> None:
    make(llama, tmp_path)
    (tmp_path / "base").rename(tmp_path / "gone")
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "lora")]) == 0


@pytest.mark.parametrize("pad", [[], ["--pad"]], ids=["lora", "padded"])
def test_export_then_verify(tiny: TinyModel, pad: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make(tiny, tmp_path, modules_to_save=["classifier"] if tiny.task_type == "SEQ_CLS" else None)
    adapter, lora = str(tmp_path / "adapter"), str(tmp_path / "lora")
    assert main(["export", adapter, lora, *pad]) == 0
    assert main(["verify", adapter, lora, "--tolerance", "1e-5"]) == 0
    out = capsys.readouterr().out
    assert lora in out
    assert "the same model" in out


def test_export_names_another_base_model(llama_files: Path, tmp_path: Path) -> None:
    assert main(["export", str(llama_files / "adapter"), str(tmp_path / "lora"), "--base", "somebody/llama"]) == 0
    assert '"base_model_name_or_path": "somebody/llama"' in (tmp_path / "lora" / "adapter_config.json").read_text()


def test_export_warns_of_an_unfinished_allocation(
    llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make(llama, tmp_path, steps=8)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "lora")]) == 0
    assert "warning: The allocation has not finished" in capsys.readouterr().err


def test_verify_a_merged_model(llama_files: Path) -> None:
    assert main(["verify", str(llama_files / "adapter"), str(llama_files / "merged")]) == 0


def test_verify_finds_a_difference(llama_files: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", str(llama_files / "adapter"), str(llama_files / "base")]) == 1
    assert "NOT the same model" in capsys.readouterr().out


def test_verify_without_a_task_type(llama: TinyModel, tmp_path: Path) -> None:
    make(llama, tmp_path, task_type=None)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "lora")]) == 0
    assert main(["verify", str(tmp_path / "adapter"), str(tmp_path / "lora")]) == 0


def test_verify_with_another_number_of_labels(
    deberta: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    deberta.make_model().save_pretrained(tmp_path / "base")
    three = {"num_labels": 3, "ignore_mismatched_sizes": True}
    base_model = deberta.model_class.from_pretrained(tmp_path / "base", **three)
    model = get_peft_model(base_model, config(deberta, init_r=2, init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    model.eval().merge_and_unload().save_pretrained(tmp_path / "merged")
    files = [str(tmp_path / "adapter"), str(tmp_path / "lora")]
    assert main(["export", *files]) == 0
    base = ["--base", str(tmp_path / "base")]
    assert main(["verify", *files, *base]) == 0
    assert main(["verify", files[0], str(tmp_path / "merged"), *base]) == 0
    assert main(["verify", *files, *base, "--num-labels", "3"]) == 0
    capsys.readouterr()
    assert main(["verify", *files, *base, "--num-labels", "5"]) == 2
    assert "--num-labels" in capsys.readouterr().err


def test_errors_are_one_line_and_code_2(
    llama: TinyModel, llama_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    get_peft_model(llama.make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    make(llama, tmp_path / "unfinished", steps=8)
    cut = tmp_path / "unfinished" / "adapter"
    tensors = load_file(cut / "adapter_model.safetensors")
    tensors = {key: value[:-9] if key.endswith("_state") else value for key, value in tensors.items()}
    save_file(tensors, cut / "adapter_model.safetensors")
    capsys.readouterr()
    adapter = str(llama_files / "adapter")
    for arguments, message in [
        (["inspect", str(tmp_path / "missing")], "no adapter directory"),
        (["inspect", str(tmp_path / "empty")], "no adapter directory"),
        (["inspect", str(tmp_path / "damaged")], "not valid JSON"),
        (["inspect", str(tmp_path / "lora")], "of type LORA"),
        (["inspect", str(cut)], "allocation state"),
        (["export", adapter, adapter], "Name another directory"),
        (["verify", adapter, str(tmp_path / "missing")], "missing"),
        (["verify", adapter, adapter, "--base", str(tmp_path / "missing")], "missing"),
    ]:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert message in error[0], error


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["export", "one"]])
def test_wrong_usage_is_code_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: peft-rank" in capsys.readouterr().err


def test_it_runs_as_a_module(llama_files: Path) -> None:
    command = [sys.executable, "-m", "peft_rank.cli", "inspect", str(llama_files / "adapter")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SALIENTLORA" in done.stdout
    # bitsandbytes, where it is installed, tells of optional kernels when it is imported
    assert not [line for line in done.stderr.splitlines() if "kernels" not in line]


def test_a_model_that_gives_nan_is_not_the_same(llama_files: Path, tmp_path: Path) -> None:
    model = TINY_MODELS["llama"].make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    assert main(["verify", str(llama_files / "adapter"), str(tmp_path)]) == 1
