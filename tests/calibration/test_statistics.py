# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Statistics as an object: what it gives, which model it belongs to, and its file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from peft_rank import CalibrationStatistics, calibrate
from peft_rank.decomposition import decompose
from tiny_models import TinyModel


pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than they have input features")
NAME = "model.layers.0.self_attn.q_proj"


@dataclass
class Config(LoraConfig):
    decomposition: str = field(default="whitening")


def collect(tiny: TinyModel, decomposition: str = "whitening", **model: int) -> CalibrationStatistics:
    config = Config(target_modules=list(tiny.target_modules), decomposition=decomposition)
    return calibrate(tiny.make_model(**model), [tiny.make_batch(4)], config=config, progress=False)


def test_for_module_feeds_decompose(llama: TinyModel) -> None:
    weight = llama.make_model().get_submodule(NAME).weight.detach()
    for method in ("svd", "activation", "whitening", "fisher", "importance", "em"):
        factors = decompose(weight, 4, method, **collect(llama, method).for_module(NAME, method))
        assert factors.up.shape == (32, 4)


def test_for_module_errors(llama: TinyModel) -> None:
    statistics = collect(llama)
    with pytest.raises(ValueError, match=r"No statistics for module 'lm_head'.*q_proj.*and 6 more.*`target_modules`"):
        statistics.for_module("lm_head")
    with pytest.raises(ValueError, match=r"'fisher' needs the statistic 'fisher'.*input_gram.*decomposition='fisher'"):
        statistics.for_module(NAME, "fisher")
    # both are a weight_importance, but not the same
    with pytest.raises(ValueError, match="needs the statistic 'fisher'.*calibrated were importance"):
        collect(llama, "importance").for_module(NAME, "em")
    with pytest.raises(ValueError, match="calibrated were none"):
        collect(llama, "svd").for_module(NAME, "whitening")
    assert statistics.for_module(NAME, "svd") == {}
    both = collect(llama, "fisher")
    both.tensors |= collect(llama, "importance").tensors
    with pytest.raises(ValueError, match="say which `method`"):
        both.for_module(NAME)
    assert both.for_module(NAME, "importance")["weight_importance"] is both.tensors["importance"][NAME]


@pytest.mark.parametrize("decomposition", ["svd", "activation", "whitening", "fisher", "importance"])
def test_round_trip(llama: TinyModel, decomposition: str, tmp_path: Path) -> None:
    saved = collect(llama, decomposition)
    path = tmp_path / "new folder" / "statistics.safetensors"
    saved.save(path)
    loaded = CalibrationStatistics.load(path)
    assert (loaded.names, loaded.tokens, loaded.samples) == (saved.names, saved.tokens, saved.samples)
    assert loaded.shapes == saved.shapes
    for name in saved.names:
        torch.testing.assert_close(loaded.for_module(name), saved.for_module(name), rtol=0, atol=0)
    loaded.check(llama.make_model())
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_shared_memory_is_stored_once(llama: TinyModel, tmp_path: Path) -> None:
    statistics = collect(llama)
    statistics.save(tmp_path / "statistics.safetensors")
    with safe_open(tmp_path / "statistics.safetensors", framework="pt") as file:
        grams = [key for key in file.keys() if key.startswith("input_gram")]  # noqa: SIM118
    assert len(grams) == 8
    loaded = CalibrationStatistics.load(tmp_path / "statistics.safetensors").tensors["input_gram"]
    assert loaded[NAME] is loaded[NAME.replace("q_proj", "v_proj")]


def _to_bfloat16(model: nn.Module) -> nn.Module:
    return model.to(torch.bfloat16)


def _through_half(model: nn.Module) -> nn.Module:
    return model.half().float()


def _adapted(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)


@pytest.mark.parametrize("change", [_to_bfloat16, _through_half, _adapted, _compiled])
def test_same_model_in_other_clothes(llama: TinyModel, change: Callable[[nn.Module], nn.Module]) -> None:
    collect(llama).check(change(llama.make_model()))


def test_wrong_model(llama: TinyModel) -> None:
    statistics = collect(llama)
    with pytest.raises(ValueError, match=r"belong to another model.*not the weights of model\.layers\.0.*and 6 more"):
        statistics.check(llama.make_model(seed=1))
    with pytest.raises(
        ValueError, match=r"the weight of .*gate_proj was \(64, 32\) \(out, in\), here it is \(48, 32\)"
    ):
        statistics.check(llama.make_model(intermediate_size=48))
    with pytest.raises(ValueError, match=r"has no module model\.layers\.1"):
        statistics.check(llama.make_model(num_hidden_layers=1))


def test_fine_tuned_model_is_another_one(llama: TinyModel) -> None:
    statistics, model = collect(llama), llama.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(**llama.make_batch(4)).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="another model"):
        statistics.check(model)


def test_wrong_files(llama: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    with pytest.raises(FileNotFoundError, match=r"does not exist.*save\(path\)"):
        CalibrationStatistics.load(path)
    collect(llama).save(path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"garbage" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            CalibrationStatistics.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no statistics"):
        CalibrationStatistics.load(path)
