# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What compression did to each module: rank, error, size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..decomposition import Factors, weighted_error
from ..export.directory import read_compressed
from ..tuners.lowrank.entry import record_ranks
from ..tuners.lowrank.model import CompressionTuner
from ..tuners.lowrank.plan import over_weights, statistics_by_module


@dataclass(frozen=True)
class CompressedModule:
    """
    One module.

    Args:
        shape (`tuple[int, int]`): (out, in) of the weight.
        rank (`int`): Of its factors.
        error (`float`, *optional*): || W - W' || / || W || in the metric that it was decomposed in.
        itemsize (`int`): Bytes a number.
    """

    shape: tuple[int, int]
    rank: int
    error: float | None
    itemsize: int

    @property
    def megabytes(self) -> float:
        """Of the factors."""
        return self.rank * sum(self.shape) * self.itemsize / 1e6

    @property
    def dense_megabytes(self) -> float:
        """Of the weight that they stand in for."""
        return self.shape[0] * self.shape[1] * self.itemsize / 1e6


@dataclass(frozen=True)
class CompressionTable:
    """
    The compressed modules of a model; prints as a table.

    Args:
        modules (`dict[str, CompressedModule]`): By name.
    """

    modules: dict[str, CompressedModule]

    def __str__(self) -> str:
        rows = [
            (
                name,
                f"{m.shape[0]} x {m.shape[1]}",
                str(m.rank),
                "" if m.error is None else f"{m.error:.4f}",
                f"{m.dense_megabytes:.3f}",
                f"{m.megabytes:.3f}",
            )
            for name, m in self.modules.items()
        ]
        before = sum(m.dense_megabytes for m in self.modules.values())
        after = sum(m.megabytes for m in self.modules.values())
        header = ("module", "weight", "rank", "error", "dense MB", "MB")
        total = (f"{len(rows)} modules", "", "", "", f"{before:.3f}", f"{after:.3f}")
        widths = [max(map(len, column)) for column in zip(header, *rows, total, strict=True)]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in (header, *rows, total)
        ]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

    __repr__ = __str__


@torch.no_grad()
def relative_errors(model: PeftModel, adapter_name: str = "default") -> dict[str, float]:
    """
    How far the factors of each module are from its weight, as a share of the weight, in the metric of the decomposition:
    for whitening the share of the output on the calibration data, for plain SVD that of the weight.

    Args:
        model ([`PeftModel`]): With a compression tuner, before `finalize()`, and with the statistics in its config.
        adapter_name (`str`, *optional*, defaults to `"default"`): The adapter.

    Raises:
        TypeError: If the model has no such tuner.
        ValueError: If the decomposition weighs by statistics, and there are none.
    """
    tuner = model.base_model
    if not isinstance(tuner, CompressionTuner):
        raise TypeError(f"Errors are those of a model that a compression config was applied to, got {type(tuner)}.")
    config, layers = tuner.peft_config[adapter_name], tuner.factorized_layers(adapter_name)
    statistics = statistics_by_module(layers, model, config)

    def relative_error(name: str, weight: Tensor) -> float:
        given = {key: tensor.to(weight.device) for key, tensor in statistics[name].items()}  # once for both
        error, size = (
            float(weighted_error(weight, factors, config.decomposition, alpha=config.alpha, **given))
            for factors in (layers[name].factors(adapter_name), _nothing(weight))
        )
        return (error / size) ** 0.5 if size else 0.0

    return over_weights(relative_error, layers, layers, statistics, "Measuring errors")


def finish_compression(model: PeftModel) -> PreTrainedModel:
    """
    The plain compressed model, after `finalize()`, with the errors of its modules on record: `save_compressed` keeps them, and
    [`compressed_table`] shows them.

    Args:
        model ([`PeftModel`]): As in [`relative_errors`], with the adapter `"default"`.
    """
    errors = relative_errors(model)
    model.base_model.finalize()
    plain = model.get_base_model()
    record_ranks(plain, errors=errors)
    return plain


def _nothing(weight: Tensor) -> Factors:
    return Factors(weight.new_zeros(weight.shape[0], 1), weight.new_zeros(1, weight.shape[1]))


def compressed_table(directory: str | Path) -> CompressionTable:
    """
    The modules of a saved compressed model; reads headers only.

    Args:
        directory (`str` or `Path`): What `save_compressed` wrote; errors are known if they were recorded.

    Raises:
        ValueError: If it holds no compressed model, or is damaged.
    """
    summary = read_compressed(directory)
    shapes: dict[str, tuple[list[int], int]] = {}
    for path in sorted(Path(directory).glob("model*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                found = file.get_slice(key)
                shapes[key] = found.get_shape(), _itemsize(found.get_dtype())
    errors: Mapping[str, Any] = summary.facts.get("errors") or {}
    modules = {}
    for name, rank in summary.ranks.items():
        (out_features, _), itemsize = shapes[f"{name}.up.weight"]
        (_, in_features), _ = shapes[f"{name}.down.weight"]
        modules[name] = CompressedModule((out_features, in_features), rank, errors.get(name), itemsize)
    return CompressionTable(modules)


def _itemsize(dtype: str) -> int:
    """Bytes of a number, by its name in safetensors: F32, BF16, ..."""
    return int(dtype.lstrip("BFUI").partition("_")[0]) // 8
