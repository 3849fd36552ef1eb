# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Files of adapters, whole and damaged; loading into live models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_rank import RankAllocationCallback, get_rank_pattern
from peft_rank.tuners.names import exact_pattern, plain_name
from runs import Interrupted, StopAt, adapted, assert_close, config, logits, train, weights
from tiny_models import TINY_MODELS


LLAMA = TINY_MODELS["llama"]
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters in every stage: before, within (shrunk and masked) and after the allocation."""
    folder, result = tmp_path_factory.mktemp("files"), {}
    for optim in ("adamw_torch", "adafactor"):
        out = folder / optim
        with pytest.raises(Interrupted):
            callbacks = [RankAllocationCallback(log=False), StopAt(12)]
            train(adapted(LLAMA), LLAMA, out, callbacks=callbacks, optim=optim, save_strategy="steps", save_steps=2)
        result["masked" if optim == "adafactor" else "shrunk"] = out / "checkpoint-12"
        result["warmup"] = out / "checkpoint-2"
    model = adapted(LLAMA)
    train(model, LLAMA, folder / "whole")
    model.save_pretrained(folder / "finished")
    result["finished"] = folder / "finished"
    return result


STAGES = ["warmup", "shrunk", "masked", "finished"]


def reference(path: Path) -> torch.Tensor:
    """The outputs of an adapter, computed from its file without the package: W + scale * B diag(E) A."""
    model, tensors = LLAMA.make_model(), load_file(path / FILE)
    for name, module in model.named_modules():
        key = f"base_model.model.{name}.salientlora_"
        if f"{key}A" in tensors:
            A, E, B = (tensors[f"{key}{factor}"] for factor in "AEB")
            module.weight.data += 16.0 / 4 * B @ torch.diag(E) @ A
    return logits(model, LLAMA)


@pytest.mark.parametrize("stage", STAGES)
def test_every_loader_reads_every_stage(files: dict[str, Path], stage: str) -> None:
    path, expected = str(files[stage]), reference(files[stage])
    assert_close(logits(PeftModel.from_pretrained(LLAMA.make_model(), path), LLAMA), expected, 1e-5)
    lean = PeftModel.from_pretrained(LLAMA.make_model(), path, low_cpu_mem_usage=True)
    assert_close(logits(lean, LLAMA), expected, 1e-5)
    assert not any(p.is_meta for p in lean.parameters()) and not any(b.is_meta for b in lean.buffers())
    plain = LLAMA.make_model()
    plain.load_adapter(path)
    assert_close(logits(plain, LLAMA), expected, 1e-5)
    trainable = PeftModel.from_pretrained(LLAMA.make_model(), path, is_trainable=True)
    assert_close(logits(trainable, LLAMA), expected, 1e-5)
    assert_close(logits(lean.merge_and_unload(), LLAMA), expected, 1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("loader", ["peft", "transformers"])
def test_what_was_loaded_can_be_saved_again(files: dict[str, Path], stage: str, loader: str, tmp_path: Path) -> None:
    if loader == "peft":
        model = PeftModel.from_pretrained(LLAMA.make_model(), str(files[stage]))
    else:
        model = LLAMA.make_model()
        model.load_adapter(str(files[stage]))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path))
    assert_close(logits(again, LLAMA), reference(files[stage]), 1e-5)
    once_more = LLAMA.make_model()
    once_more.load_adapter(str(tmp_path))
    assert_close(logits(once_more, LLAMA), reference(files[stage]), 1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_the_rank_pattern_equals_the_saved_widths(files: dict[str, Path], stage: str) -> None:
    tensors = load_file(files[stage] / FILE)
    pattern = json.loads((files[stage] / "adapter_config.json").read_text())["rank_pattern"]
    for key, E in tensors.items():
        if key.endswith("salientlora_E"):
            name = plain_name(key.removesuffix(".salientlora_E"))
            assert pattern.get(exact_pattern(name), 4) == len(E)
    assert sum(key.endswith("_state") for key in tensors) == (stage != "finished")


@pytest.mark.parametrize("before", STAGES)
@pytest.mark.parametrize("after", STAGES)
def test_a_live_model_takes_on_any_stage(files: dict[str, Path], before: str, after: str) -> None:
    model = PeftModel.from_pretrained(LLAMA.make_model(), str(files[before]), is_trainable=True)
    model.load_adapter(str(files[after]), "default", is_trainable=True)
    assert_close(logits(model, LLAMA), reference(files[after]), 1e-5)
    tensors = load_file(files[after] / FILE)
    alive = sum(int((E != 0).sum()) for key, E in tensors.items() if key.endswith("salientlora_E"))
    assert sum(get_rank_pattern(model).values()) == alive


def test_a_second_adapter_can_be_loaded_beside(files: dict[str, Path]) -> None:
    model = PeftModel.from_pretrained(LLAMA.make_model(), str(files["finished"]), adapter_name="a")
    model.load_adapter(str(files["shrunk"]), adapter_name="b")
    assert_close(logits(model, LLAMA), reference(files["finished"]), 1e-5)
    model.set_adapter("b")
    assert_close(logits(model, LLAMA), reference(files["shrunk"]), 1e-5)


def test_the_state_dict_goes_into_another_model(files: dict[str, Path]) -> None:
    source = PeftModel.from_pretrained(LLAMA.make_model(), str(files["finished"]))
    target = adapted(LLAMA, seed=3)
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert_close(logits(target, LLAMA), logits(source, LLAMA), 1e-6)


# ---- damaged and foreign files ----


def damaged(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    shutil.copytree(source, target)
    tensors = load_file(target / FILE)
    change(tensors)
    save_file(tensors, target / FILE, metadata={"format": "pt"})
    return str(target)


def assert_untouched(model: PeftModel, path: str, error: type[Exception], match: str) -> None:
    """Loading fails and the model is as before, weights, ranks and its own allocation."""
    before, ranks, output = weights(model), get_rank_pattern(model), logits(model, LLAMA)
    state = dict(model.state_dict())
    with pytest.raises(error, match=match):
        model.load_adapter(path, "default", is_trainable=True)
    assert get_rank_pattern(model) == ranks
    assert_close(weights(model), before, 0)
    assert_close(model.state_dict(), state, 0)
    assert_close(logits(model, LLAMA), output, 0)


def live(files: dict[str, Path]) -> PeftModel:
    return PeftModel.from_pretrained(LLAMA.make_model(), str(files["shrunk"]), is_trainable=True)


def state_key(tensors: dict[str, torch.Tensor]) -> str:
    return next(key for key in tensors if key.endswith("_state"))


STATE_DAMAGE = {
    "random": lambda s: torch.randint(0, 256, s.shape, dtype=torch.uint8),
    "zeros": lambda s: torch.zeros_like(s),
    "cut": lambda s: s[: len(s) // 2].clone(),
    "empty": lambda s: s[:0].clone(),
    "header": lambda s: torch.cat([s[:20], 255 - s[20:40], s[40:]]),
}


@pytest.mark.parametrize("damage", STATE_DAMAGE.values(), ids=STATE_DAMAGE.keys())
def test_a_damaged_state_is_refused(files: dict[str, Path], tmp_path: Path, damage: Callable) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[state_key(tensors)] = damage(tensors[state_key(tensors)])

    path = damaged(files["shrunk"], tmp_path / "damaged", change)
    assert_untouched(live(files), path, ValueError, "state in the checkpoint is damaged.*earlier checkpoint")


def test_a_state_of_other_modules_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    other = load_file(files["warmup"] / FILE)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[state_key(tensors)] = other[state_key(other)]

    path = damaged(files["shrunk"], tmp_path / "damaged", change)
    assert_untouched(live(files), path, ValueError, "belongs to another model")


@pytest.mark.parametrize("size", [0, 5, 200, 5000])
def test_a_truncated_file_is_refused(files: dict[str, Path], tmp_path: Path, size: int) -> None:
    shutil.copytree(files["finished"], tmp_path / "cut")
    content = (tmp_path / "cut" / FILE).read_bytes()
    (tmp_path / "cut" / FILE).write_bytes(content[:size])
    assert_untouched(live(files), str(tmp_path / "cut"), safetensors.SafetensorError, "")


SHAPE_DAMAGE = {
    "A-columns": ("A", lambda t: t[:, :-1].clone()),
    "A-rows": ("A", lambda t: t[:-1].clone()),
    "E-longer": ("E", lambda t: torch.cat([t, t])),
    "B-rows": ("B", lambda t: t[:-2].clone()),
    "A-flat": ("A", lambda t: t.flatten()),
    "E-column": ("E", lambda t: t[:, None].clone()),
    "A-scalar": ("A", lambda t: t.sum()),
}


@pytest.mark.parametrize("damage", SHAPE_DAMAGE.values(), ids=SHAPE_DAMAGE.keys())
def test_factors_that_do_not_fit_are_refused_by_name(files: dict[str, Path], tmp_path: Path, damage: tuple) -> None:
    module = next(name for name, rank in get_rank_pattern(live(files)).items() if rank > 1)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = f"base_model.model.{module}.salientlora_{damage[0]}"
        tensors[key] = damage[1](tensors[key])

    path = damaged(files["shrunk"], tmp_path / "damaged", change)
    assert_untouched(live(files), path, ValueError, f"{module}.*nothing was loaded")


def test_an_adapter_of_another_model_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    wider = get_peft_model(LLAMA.make_model(hidden_size=48), config(LLAMA))
    with pytest.warns(UserWarning, match="never ran"):
        wider.save_pretrained(tmp_path)
    assert_untouched(live(files), str(tmp_path), ValueError, "another model")
    with pytest.raises((ValueError, RuntimeError), match="another model|size mismatch"):
        PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path))


def test_an_adapter_of_lora_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    get_peft_model(LLAMA.make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert_untouched(live(files), str(tmp_path), ValueError, "SalientLoRA")


def test_a_missing_factor_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    key = "base_model.model.model.layers.0.mlp.up_proj.salientlora_E"
    path = damaged(files["shrunk"], tmp_path / "damaged", lambda tensors: tensors.pop(key))
    assert_untouched(live(files), path, ValueError, "model.layers.0.mlp.up_proj")


# ---- forgetting the callback ----


def test_saving_an_adapter_that_was_never_allocated_warns(tmp_path: Path) -> None:
    model = adapted(LLAMA)
    with pytest.warns(UserWarning, match="never ran.*56 ranks instead of 28.*RankAllocationCallback"):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="never ran"):
        adapted(LLAMA).merge_and_unload()
    with pytest.warns(UserWarning, match="never ran"):
        adapted(LLAMA).merge_adapter()
    with pytest.raises(RuntimeError, match="never ran.*RankAllocationCallback.*update_and_allocate"):
        adapted(LLAMA).base_model.finalize()


def test_the_trainer_without_the_callback_warns_when_it_saves(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="never ran"):
        train(adapted(LLAMA), LLAMA, tmp_path, callbacks=[], max_steps=2).save_model(str(tmp_path))


@pytest.mark.parametrize("stage", ["finished", "shrunk"])
def test_saving_what_was_allocated_does_not_warn(
    files: dict[str, Path], stage: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for trainable in (False, True):
        model = PeftModel.from_pretrained(LLAMA.make_model(), str(files[stage]), is_trainable=trainable)
        model.save_pretrained(tmp_path)
        model.merge_and_unload()
    assert not [w for w in recwarn if "never ran" in str(w.message)]


def test_names() -> None:
    model = adapted(LLAMA)
    assert set(get_rank_pattern(model)) == {
        name for name, m in LLAMA.make_model().named_modules() if isinstance(m, nn.Linear) and name != "lm_head"
    }
    assert plain_name("base_model.model.a.b") == "a.b" == plain_name("a.b")
    assert exact_pattern("a.0.b") == r"^a\.0\.b"
