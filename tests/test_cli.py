# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The command `peft-rank`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peft_rank import (
    LowRankConfig,
    LowRankLinear,
    cli,
    export_lora,
    get_rank_pattern,
    load_compressed,
    rank_table,
    save_compressed,
)
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
    assert "budget      2 a module on average, 28 in 14 modules" in out
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
    model = adapted(llama, init_weights="gaussian")
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


FACTOR = "base_model.model.model.layers.0.mlp.down_proj.salientlora_{}"
DAMAGE = {
    "no E": lambda tensors: tensors.pop(FACTOR.format("E")),
    "no A": lambda tensors: tensors.pop(FACTOR.format("A")),
    "long E": lambda tensors: tensors.update({FACTOR.format("E"): torch.ones(7)}),
    "flat B": lambda tensors: tensors.update({FACTOR.format("B"): torch.ones(7)}),
    "no tensor": lambda tensors: tensors.clear(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["inspect", "export"])
def test_damaged_factors_are_named(
    command: str, damage: str, llama_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = shutil.copytree(llama_files / "adapter", tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    DAMAGE[damage](tensors)
    save_file(tensors, path)
    capsys.readouterr()
    assert main([command, str(folder), *([str(tmp_path / "lora")] if command == "export" else [])]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and ("model.layers.0.mlp.down_proj" in error or damage == "no tensor")


@pytest.mark.parametrize("content", ["[1, 2]", '"x"', "null", "\x00"])
@pytest.mark.parametrize("command", ["inspect", "export"])
def test_a_configuration_that_is_none_is_named(
    command: str, content: str, llama_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = shutil.copytree(llama_files / "adapter", tmp_path / "adapter") / "adapter_config.json"
    path.write_text(content)
    assert main([command, str(path.parent), *([str(tmp_path / "lora")] if command == "export" else [])]) == 2
    assert str(path) in capsys.readouterr().err


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


# --- compressed models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, a decoder with a tokenizer of words, and texts: `text.jsonl`, `text.txt`."""
    folder = tmp_path_factory.mktemp("decoder")
    save_with_tokenizer(TINY_MODELS["llama"], folder / "model")
    lines = [" ".join(f"w{(i + j) % 40}" for j in range(12)) for i in range(80)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"story": line}) for line in lines), encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def save_with_tokenizer(tiny: TinyModel, folder: Path) -> None:
    tiny.make_model().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *(f"w{i}" for i in range(40))])}, "?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="?").save_pretrained(folder)


SIZE = ["--ratio", "0.8", "--rank-multiple", "1", "--device", "cpu"]


@pytest.mark.parametrize("decomposition", ["svd", "whitening", "fisher"])
def test_compress_inspect_export_verify(
    decoder_files: Path, decomposition: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    dense, out, again = str(decoder_files / "model"), str(tmp_path / "compressed"), str(tmp_path / "dense")
    text = ["--text", str(decoder_files / "text.txt"), "--samples", "8", "--length", "16"]
    assert main(["compress", dense, out, *SIZE, "--decomposition", decomposition, *text]) == 0
    printed = capsys.readouterr().out
    model = load_compressed(out)
    before = TINY_MODELS["llama"].make_model().num_parameters()
    assert f"{before:,} -> {model.num_parameters():,} parameters" in printed
    assert AutoTokenizer.from_pretrained(out).pad_token == "?"
    assert Path(out, "ranks.png").is_file()
    assert "](ranks.png)" in Path(out, "README.md").read_text()

    assert main(["inspect", out]) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM" in shown
    assert decomposition in shown
    assert f"{model.num_parameters():,} of {before:,}" in shown
    ranks = {name: m.rank for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert str(rank_grid(dict(sorted(ranks.items())))) in shown
    for name, rank in ranks.items():
        line = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert line in printed
        assert line.split()[4] == str(rank)
        assert 0 < float(line.split()[5]) < 1

    assert main(["export", out, again]) == 0
    assert main(["verify", out, again, "--tolerance", "1e-5"]) == 0
    assert main(["verify", out, out, "--tolerance", "0"]) == 0
    assert main(["verify", out, dense]) == 1
    plain = type(model).from_pretrained(again)
    assert not any(isinstance(module, LowRankLinear) for module in plain.modules())
    assert AutoTokenizer.from_pretrained(again).pad_token == "?"


def test_compress_by_name_and_without_a_tokenizer(llama: TinyModel, tmp_path: Path) -> None:
    llama.make_model().save_pretrained(tmp_path / "model")
    ranks = ["--rank-pattern", "q_proj=8", r"layers\.1\.mlp\.gate_proj=16", "--rank-multiple", "1"]
    assert main(["compress", str(tmp_path / "model"), str(tmp_path / "out"), *ranks, "--device", "cpu"]) == 0
    found = {n: m.rank for n, m in load_compressed(tmp_path / "out").named_modules() if isinstance(m, LowRankLinear)}
    assert found == {
        "model.layers.0.self_attn.q_proj": 8,
        "model.layers.1.self_attn.q_proj": 8,
        "model.layers.1.mlp.gate_proj": 16,
    }


def test_compress_refuses_what_it_can_before_the_model_is_loaded(
    decoder_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli, "_load", None)
    model = str(decoder_files / "model")
    for out, how in ((model, []), (str(decoder_files / "text.txt"), []), ("out", ["--decomposition", "fisher"])):
        assert main(["compress", model, out, *SIZE, *how]) == 2
        assert "peft-rank: error" in capsys.readouterr().err


def test_compress_shows_no_warnings_for_developers(
    decoder_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["compress", str(decoder_files / "model"), str(tmp_path / "out"), *SIZE]) == 0
    assert "deprecated" not in capsys.readouterr().err


def test_compress_an_encoder(tmp_path: Path, decoder_files: Path) -> None:
    save_with_tokenizer(TINY_MODELS["bert"], tmp_path / "model")
    text = ["--text", str(decoder_files / "text.jsonl"), "--text-column", "story", "--samples", "16", "--length", "8"]
    arguments = ["compress", str(tmp_path / "model"), str(tmp_path / "out"), *SIZE, *text]
    assert main([*arguments, "--decomposition", "whitening", "--exclude-modules", "pooler.dense"]) == 0
    names = [n for n, m in load_compressed(tmp_path / "out").named_modules() if isinstance(m, LowRankLinear)]
    assert len(names) == 12
    assert all(name.startswith("bert.encoder.layer") for name in names)


def test_compress_with_saved_statistics(
    decoder_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture, llama: TinyModel
) -> None:
    arguments = ["compress", str(decoder_files / "model")]
    how = [*SIZE, "--decomposition", "whitening", "--allocation", "spectral"]
    text = ["--text", str(decoder_files / "text.txt"), "--samples", "8", "--length", "16", "--max-bytes", "20000"]
    kept = str(tmp_path / "statistics.safetensors")
    assert main([*arguments, str(tmp_path / "first"), *how, *text, "--save-statistics", kept]) == 0
    assert "Calibrating (1/" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "second"), *how, "--statistics", kept]) == 0
    assert main(["verify", str(tmp_path / "first"), str(tmp_path / "second"), "--tolerance", "0"]) == 0
    llama.make_model(seed=1).save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert main(["compress", str(tmp_path / "other"), str(tmp_path / "third"), *how, "--statistics", kept]) == 2
    assert "belong to another model" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_inspect_and_verify_a_lowrank_adapter(llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    llama.make_model().save_pretrained(tmp_path / "base")
    base_model = llama.model_class.from_pretrained(tmp_path / "base")
    model = get_peft_model(
        base_model, LowRankConfig(rank=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "adapter")
    model.base_model.finalize()
    save_compressed(model, tmp_path / "compressed")
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    out = capsys.readouterr().out
    assert "LOWRANK" in out
    assert "state       finished" in out
    assert "total rank 32, 8 a module, 4 modules" in out
    assert main(["verify", str(tmp_path / "adapter"), str(tmp_path / "compressed")]) == 0
    assert main(["verify", str(tmp_path / "adapter"), str(tmp_path / "base")]) == 1
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "lora")]) == 2
    assert "save_compressed" in capsys.readouterr().err


def test_errors_of_compressed_models(decoder_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, text = str(decoder_files / "model"), str(decoder_files / "text.txt")
    good, out = str(tmp_path / "good"), str(tmp_path / "out")
    assert main(["compress", model, good, *SIZE]) == 0
    (tmp_path / "cut").mkdir()
    for path in Path(good).iterdir():
        (tmp_path / "cut" / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    save_with_tokenizer(TINY_MODELS["t5"], tmp_path / "t5")
    capsys.readouterr()
    whitening = ["--decomposition", "whitening"]
    for arguments, message in [
        (["compress", model, out, "--device", "cpu"], "One of `rank`, `ratio` and `rank_pattern`"),
        (["compress", model, out, *SIZE, "--rank", "3"], "Give only one"),
        (["compress", model, out, *SIZE, *whitening], "--text FILE"),
        (["compress", model, out, *SIZE, *whitening, "--text", str(tmp_path / "no.txt")], "no.txt"),
        (["compress", model, out, *SIZE, *whitening, "--text", text, "--length", "100000"], "fewer than the 100000"),
        (["compress", model, out, *SIZE, *whitening, "--statistics", "no.safetensors"], "does not exist"),
        (["compress", str(tmp_path / "t5"), out, *SIZE, *whitening, "--text", text], "calibrate"),
        (["compress", model, out, *SIZE, "--target-modules", "query"], "target"),
        (["compress", model, model, *SIZE], "Name another directory"),
        (["compress", good, out, *SIZE], "densify"),
        (["compress", model, text, *SIZE], "is a file"),
        (["compress", str(tmp_path / "missing"), out, *SIZE], "missing"),
        (["inspect", str(tmp_path / "cut")], "damaged"),
        (["export", str(tmp_path / "cut"), out], "damaged"),
        (["export", good, good], "Name another directory"),
        (["export", good, out, "--pad"], "--pad"),
        (["inspect", model], "no adapter directory"),
    ]:
        assert main(arguments) == 2, arguments
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peft-rank: error")]
        assert len(lines) == 1
        assert message in lines[0], lines
    assert not Path(out).exists()
    with pytest.raises(SystemExit):
        main(["compress", model, out, "--rank-pattern", "q_proj"])
    assert "NAME=RANK" in capsys.readouterr().err
