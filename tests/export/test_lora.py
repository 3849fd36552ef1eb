# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Plain LoRA exports: the same model, for readers that do not know this package."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_rank import InRankConfig, LowRankConfig, SalientLoRAConfig, export_lora, get_rank_pattern
from peft_rank.export.lora import export_lora_files
from runs import adam, adapted, assert_close, config, logits, steps_by_hand
from tiny_models import TINY_MODELS, TinyModel


TOLERANCE = 1e-5
LOADER = Path(__file__).with_name("load_without_us.py")


@dataclass
class Run:
    """An adapter after its allocation, and what it was written to."""

    tiny: TinyModel
    model: PeftModel
    logits: torch.Tensor
    folder: Path


def pruned(tiny: TinyModel, **overrides: object) -> PeftModel:
    """An adapter that was pruned by hand, to rank 0 in two of its modules."""
    model = adapted(
        tiny, init_weights=False, warmup_steps=1, allocation_steps=5, initial_window=3, final_window=3, **overrides
    )
    layers = list(model.base_model.adapter_layers("default").values())
    with torch.no_grad():
        for layer in (layers[1], layers[-1]):
            layer.salientlora_E["default"].mul_(1e-3)
    model.base_model.resolve_schedule(7)
    optimizer = adam(model)
    steps_by_hand(model, tiny, 1, 7, optimizer)
    model.base_model.finalize(optimizer)
    return model.eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every architecture: its base model, the saved adapter, and the export in both forms."""
    made, root = {}, tmp_path_factory.mktemp("exports")
    for name, tiny in TINY_MODELS.items():
        folder = root / name
        tiny.make_model().save_pretrained(folder / "base")
        model = pruned(tiny)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / "adapter")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert export_lora(model, folder / "lora") == folder / "lora"
            assert export_lora(model, str(folder / "padded"), pad=True) == folder / "padded"
        made[name] = Run(tiny, model, logits(model, tiny), folder)
    return made


@pytest.fixture(params=TINY_MODELS)
def run(request: pytest.FixtureRequest, runs: dict[str, Run]) -> Run:
    return runs[request.param]


@pytest.fixture(scope="module")
def loaded_elsewhere(runs: dict[str, Run]) -> dict[str, torch.Tensor]:
    """Outputs of every export, loaded in every way by a fresh process that does not import the package."""
    root = next(iter(runs.values())).folder.parent
    folders = [str(run.folder) for run in runs.values()]
    command = [sys.executable, str(LOADER), str(root / "outputs.safetensors"), *folders]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(root / "outputs.safetensors")


def lora_config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


# ---- the same model ----


@pytest.mark.parametrize("form", ["lora", "padded"])
@pytest.mark.parametrize("way", ["peft", "transformers", "merged"])
def test_stock_readers_see_the_same_model(
    run: Run, form: str, way: str, loaded_elsewhere: dict[str, torch.Tensor]
) -> None:
    assert_close(loaded_elsewhere[f"{run.folder.name}/{form}/{way}"], run.logits, TOLERANCE)


def test_saved_and_merged_are_the_same_model(run: Run) -> None:
    reloaded = PeftModel.from_pretrained(run.tiny.make_model(), str(run.folder / "adapter"))
    assert_close(logits(reloaded, run.tiny), run.logits, TOLERANCE)
    assert_close(logits(reloaded.merge_and_unload(), run.tiny), run.logits, TOLERANCE)


def test_the_adapter_does_something(run: Run) -> None:
    with run.model.disable_adapter():
        assert (logits(run.model, run.tiny) - run.logits).abs().max() > 0.01


@pytest.mark.parametrize("pad", [False, True], ids=["lora", "padded"])
def test_files_alone_give_the_same_export(run: Run, pad: bool, tmp_path: Path) -> None:
    export_lora_files(run.folder / "adapter", tmp_path / "out", pad=pad)
    other = run.folder / ("padded" if pad else "lora")
    assert_close(
        load_file(tmp_path / "out" / "adapter_model.safetensors"), load_file(other / "adapter_model.safetensors"), 0
    )
    assert lora_config(tmp_path / "out") == lora_config(other)


# ---- what is in the files ----


def test_modules_ranks_and_scales(run: Run) -> None:
    ranks = get_rank_pattern(run.model)
    assert 0 in ranks.values(), "the test needs a module without any rank"
    saved, tensors = lora_config(run.folder / "lora"), load_file(run.folder / "lora" / "adapter_model.safetensors")
    widths = {key: len(value) for key, value in tensors.items() if "lora_A" in key}
    assert widths == {f"base_model.model.{name}.lora_A.weight": r for name, r in ranks.items() if r}
    assert saved["target_modules"] == sorted(name for name, r in ranks.items() if r)
    assert saved["r"] == saved["lora_alpha"] == max(ranks.values())
    assert saved["rank_pattern"] == saved["alpha_pattern"]
    assert saved["peft_type"] == "LORA"
    assert saved["task_type"] == run.tiny.task_type
    assert saved["fan_in_fan_out"] == run.tiny.conv1d
    assert saved["base_model_name_or_path"] == str(run.folder / "base")
    assert not saved["use_rslora"]


def test_padding_gives_one_rank(run: Run) -> None:
    largest = max(get_rank_pattern(run.model).values())
    saved, tensors = lora_config(run.folder / "padded"), load_file(run.folder / "padded" / "adapter_model.safetensors")
    assert saved["rank_pattern"] == saved["alpha_pattern"] == {}
    assert saved["r"] == saved["lora_alpha"] == largest
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {largest}
    assert {tensor.shape[1] for key, tensor in tensors.items() if "lora_B" in key} == {largest}


def test_the_model_is_left_as_it_was(llama: TinyModel, tmp_path: Path) -> None:
    model = pruned(llama)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    written = model.peft_config["default"].to_dict()
    export_lora(model, tmp_path / "lora")
    assert_close(model.state_dict(), before, 0)
    assert model.peft_config["default"].to_dict() == written


# ---- every kind of model and adapter ----


def reload(tiny: TinyModel, folder: Path) -> PeftModel:
    """The export in stock PEFT, where nothing may be worth a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(tiny.make_model(), str(folder))


@pytest.mark.parametrize("bias", ["all", "salientlora_only"])
@pytest.mark.parametrize("name", ["bert", "opt"])
def test_trained_biases_and_heads(bias: str, name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    model = pruned(tiny, bias=bias, modules_to_save=["classifier"] if name == "bert" else ["lm_head"])
    export_lora(model, tmp_path / "lora")
    assert_close(logits(reload(tiny, tmp_path / "lora"), tiny), logits(model, tiny), TOLERANCE)
    loaded = tiny.make_model()
    loaded.load_adapter(str(tmp_path / "lora"))
    assert_close(logits(loaded, tiny), logits(model, tiny), TOLERANCE)


def test_masks_of_a_running_allocation_are_respected(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama, init_weights=False)
    model.base_model.resolve_schedule(20)
    steps_by_hand(model, llama, 1, 8, adam(model), shrink=False)
    ranks = get_rank_pattern(model)
    assert sum(ranks.values()) < 4 * len(ranks)
    assert model.base_model.adapter_layers("default")[next(iter(ranks))].salientlora_A["default"].shape[0] == 4
    with pytest.warns(UserWarning, match="has not finished"):
        export_lora(model, tmp_path / "lora")
    widths = [len(v) for k, v in load_file(tmp_path / "lora" / "adapter_model.safetensors").items() if "lora_A" in k]
    assert sum(widths) == sum(ranks.values())
    assert_close(logits(reload(llama, tmp_path / "lora"), llama), logits(model, llama), TOLERANCE)
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.warns(UserWarning, match="has not finished"):
        export_lora_files(tmp_path / "checkpoint", tmp_path / "from_files")
    assert_close(logits(reload(llama, tmp_path / "from_files"), llama), logits(model, llama), TOLERANCE)


def test_each_of_several_adapters(llama: TinyModel, tmp_path: Path) -> None:
    model = pruned(llama)
    model.add_adapter("other", config(llama, init_r=3, target_r=3, init_weights=False))
    outputs = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        outputs[name] = logits(model, llama)
        export_lora(model, tmp_path / name, adapter_name=name)
        export_lora(model, tmp_path / f"active_{name}")
    for name, expected in outputs.items():
        assert_close(logits(reload(llama, tmp_path / name), llama), expected, TOLERANCE)
        assert_close(logits(reload(llama, tmp_path / f"active_{name}"), llama), expected, TOLERANCE)


def test_models_without_a_peft_model(llama: TinyModel, tmp_path: Path) -> None:
    injected = llama.make_model()
    injected.add_adapter(config(llama, init_r=3, target_r=3, init_weights=False))
    expected = logits(injected, llama)
    export_lora(injected, tmp_path / "injected")
    assert_close(logits(reload(llama, tmp_path / "injected"), llama), expected, TOLERANCE)
    model = pruned(llama)
    export_lora(model.base_model, tmp_path / "tuner")
    export_lora(nn.Sequential(model), tmp_path / "wrapped")
    for name in ("tuner", "wrapped"):
        assert_close(logits(reload(llama, tmp_path / name), llama), logits(model, llama), TOLERANCE)


def test_low_precision_factors_are_multiplied_in_float32(llama: TinyModel, tmp_path: Path) -> None:
    settings = config(llama, init_r=3, target_r=3, init_weights=False)
    model = get_peft_model(llama.make_model().to(torch.bfloat16), settings, autocast_adapter_dtype=False)
    export_lora(model, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, layer in model.base_model.adapter_layers("default").items():
        A, E, B = (getattr(layer, f"salientlora_{factor}")["default"].detach().float() for factor in "AEB")
        product = tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
        torch.testing.assert_close(product, settings.scaling * (B * E) @ A, rtol=0, atol=1e-6)


class Twins(nn.Module):
    """The name of one module is the end of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["proj"](self.proj(x))


def test_only_the_right_one_of_two_modules_whose_names_end_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Twins()
    state = base.state_dict()
    settings = SalientLoRAConfig(init_r=2, target_r=2, init_weights=False, target_modules=r"proj")
    model = get_peft_model(base, settings)
    x = torch.randn(3, 4)
    export_lora(model, tmp_path / "lora")
    assert lora_config(tmp_path / "lora")["auto_mapping"]["base_model_class"] == "Twins"
    fresh = Twins()
    fresh.load_state_dict({key.replace("proj.base_layer", "proj"): v for key, v in state.items() if "lora" not in key})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "lora"))
    assert loaded.base_model.targeted_module_names == ["proj"]
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-6)


# ---- refusals, and what a failure leaves behind ----


def test_what_cannot_be_exported(llama: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no adapter of peft_rank"):
        export_lora(llama.make_model(), tmp_path / "lora")
    with pytest.raises(TypeError, match="no adapter of peft_rank"):
        export_lora(get_peft_model(llama.make_model(), LoraConfig(target_modules=["q_proj"])), tmp_path / "lora")
    model = pruned(llama)
    with pytest.raises(TypeError, match="no adapter 'missing'"):
        export_lora(model, tmp_path / "lora", adapter_name="missing")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        export_lora(model, tmp_path / "lora")
    model.unmerge_adapter()
    export_lora(model, tmp_path / "lora")


@pytest.mark.parametrize("config", [InRankConfig(init_r=2), LowRankConfig(rank=2)], ids=["inrank", "lowrank"])
def test_other_methods_are_refused_with_the_way_out(config: PeftConfig, llama: TinyModel, tmp_path: Path) -> None:
    config.target_modules = ["q_proj"]
    with pytest.raises(TypeError, match=r"only SalientLoRA becomes plain LoRA exactly.*merge_and_unload"):
        export_lora(get_peft_model(llama.make_model(), config), tmp_path / "lora")
    model = get_peft_model(llama.make_model(), LowRankConfig(rank=2, target_modules=["q_proj"]))
    model.base_model.finalize()
    with pytest.raises(TypeError, match=r"LowRankLinear.*save_compressed"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_an_adapter_without_any_rank(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama, rank_pattern=dict.fromkeys(llama.target_modules, 0))
    with pytest.raises(ValueError, match="nothing to export"):
        export_lora(model, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


def test_other_files_stay(llama: TinyModel, tmp_path: Path) -> None:
    model = pruned(llama)
    target = tmp_path / "project"
    target.mkdir()
    files = {"notes.txt": "mine", "README.md": "# My project\n"}
    for name, text in files.items():
        (target / name).write_text(text)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"README\.md is not the card"):
            export_lora(model, target)
    assert {name: (target / name).read_text() for name in files} == files
    assert_close(logits(reload(llama, target), llama), logits(model, llama), TOLERANCE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project"]


def test_exporting_again_keeps_the_words_of_the_card(llama: TinyModel, tmp_path: Path) -> None:
    model = pruned(llama)
    path = export_lora(model, tmp_path / "lora") / "README.md"
    path.write_text(path.read_text().replace("---\n\n#", "license: mit\n---\n\n#", 1) + "\nMy words.\n")
    export_lora(model, tmp_path / "lora", pad=True)
    card = path.read_text()
    assert "license: mit" in card
    assert "My words." in card
    assert ", in every module" in card
    assert card.count("## Plain LoRA") == 1


def test_an_adapter_of_another_kind_is_not_overwritten(llama: TinyModel, tmp_path: Path) -> None:
    model = pruned(llama)
    model.save_pretrained(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with pytest.raises(ValueError, match="SALIENTLORA"):
        export_lora(model, tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    with pytest.raises(ValueError, match="is a file"):
        export_lora(model, tmp_path / "adapter" / "README.md")


def test_a_failure_leaves_nothing_half_written(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    model = pruned(llama)
    monkeypatch.setattr(LoraConfig, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export_lora(model, tmp_path / "lora")
    assert not list(tmp_path.iterdir())
