# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Errors of compressed modules against the plain formulas, and the table of a directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from peft_rank import LowRankConfig, calibrate, get_rank_pattern, plot_ranks, save_compressed
from peft_rank.export.compressed import add_picture
from peft_rank.reporting.compression import compressed_table, finish_compression, relative_errors
from tiny_models import TinyModel


@pytest.mark.parametrize("decomposition", ["svd", "activation", "whitening", "fisher", "em"])
def test_relative_errors(tiny: TinyModel, decomposition: str) -> None:
    model, batch = tiny.make_model(), tiny.make_batch(16)
    weights = {
        name: module.weight.detach().double().clone().T
        if isinstance(module, Conv1D)
        else module.weight.detach().double().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }
    config = LowRankConfig(rank=8, decomposition=decomposition, target_modules=list(tiny.target_modules))
    config.statistics = calibrate(model, [batch], config=config, progress=False)
    adapted = get_peft_model(model, config)
    errors = relative_errors(adapted)
    layers = adapted.base_model.factorized_layers()
    assert list(errors) == list(layers)
    assert errors
    for name, layer in layers.items():
        weight, left = weights[name], weights[name] - layer.product("default").double()
        (statistic,) = config.statistics.for_module(name).values() or (None,)

        def size(matrix: torch.Tensor, statistic: torch.Tensor | None = statistic) -> torch.Tensor:
            if decomposition == "svd":
                return matrix.square().sum()
            if decomposition == "activation":
                return (matrix.square() * statistic.double()).sum()
            if decomposition == "whitening":
                return (matrix @ statistic.double() * matrix).sum()
            if decomposition == "fisher":
                return (matrix.square() * statistic.double().mean(0)).sum()
            return (matrix.square() * statistic.double()).sum()

        assert errors[name] == pytest.approx(float((size(left) / size(weight)).sqrt()), rel=1e-4)
        assert 0 < errors[name] < 1


def test_what_is_not_compressed_has_no_errors(llama: TinyModel) -> None:
    with pytest.raises(TypeError, match="compression config"):
        relative_errors(get_peft_model(llama.make_model(), LoraConfig(target_modules=["q_proj"])))


def test_table_of_a_directory(llama: TinyModel, tmp_path: Path) -> None:
    adapted = get_peft_model(
        llama.make_model().to(torch.bfloat16), LowRankConfig(rank_pattern={"gate_proj": 8, "q_proj": 8})
    )
    errors = relative_errors(adapted)
    model = finish_compression(adapted)
    save_compressed(model, tmp_path / "with", max_shard_size="8KB")
    assert len(list((tmp_path / "with").glob("*.safetensors"))) > 1
    table = compressed_table(tmp_path / "with")
    assert {name: module.error for name, module in table.modules.items()} == errors
    gate = table.modules["model.layers.1.mlp.gate_proj"]
    assert (gate.shape, gate.rank, gate.itemsize) == ((64, 32), 8, 2)
    assert gate.megabytes == pytest.approx(8 * 96 * 2 / 1e6)
    assert gate.dense_megabytes == pytest.approx(64 * 32 * 2 / 1e6)
    line = next(line for line in str(table).splitlines() if "layers.1.mlp.gate_proj" in line)
    assert line.split() == [
        "model.layers.1.mlp.gate_proj",
        *["64", "x", "32", "8"],
        f"{gate.error:.4f}",
        *["0.004", "0.002"],
    ]
    assert str(table).splitlines()[-1].split()[:2] == ["4", "modules"]
    # which not every compressed model has
    model.config.quantization_config["errors"] = None
    save_compressed(model, tmp_path / "without")
    assert all(module.error is None for module in compressed_table(tmp_path / "without").modules.values())


def test_picture_of_a_directory(llama: TinyModel, tmp_path: Path) -> None:
    model = get_peft_model(llama.make_model(), LowRankConfig(rank=8, target_modules=["q_proj", "down_proj"]))
    ranks = get_rank_pattern(model)
    model = finish_compression(model)
    save_compressed(model, tmp_path)
    assert "ranks.png" not in (tmp_path / "README.md").read_text()
    add_picture(tmp_path)
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "README.md").read_text().count("](ranks.png)") == 1
    errors = [module.error for module in compressed_table(tmp_path).modules.values()]
    drawn = [
        sorted(t.get_text() for t in axes.texts if "layer" not in t.get_text())
        for axes in plot_ranks(tmp_path).axes[:2]
    ]
    assert drawn == [sorted(map(str, ranks.values())), sorted(f"{error:.2f}"[1:] for error in errors)]


def test_picture_of_a_directory_without_errors(llama: TinyModel, tmp_path: Path) -> None:
    model = get_peft_model(llama.make_model(), LowRankConfig(rank=8, target_modules=["q_proj"]))
    model.base_model.finalize()
    save_compressed(model, tmp_path)
    assert len(plot_ranks(tmp_path).axes) == 2  # the map of ranks and its bar
