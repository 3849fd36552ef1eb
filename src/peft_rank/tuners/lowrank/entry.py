# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The entry of `config.json` that says which linears of a model are of limited rank.

transformers knows one place for what has to happen to a model between building it and loading its weights:
`quantization_config`. Whoever puts a `LowRankLinear` into a model writes the entry, so that a plain `save_pretrained`
leaves a directory that loads; `export.quantizer` reads it.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from .linear import LowRankLinear


QUANT_METHOD = "low_rank"


def low_rank_modules(model: nn.Module) -> dict[str, LowRankLinear]:
    """The linears of limited rank by their module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def read_entry(config: Any) -> dict[str, Any] | None:
    """The entry of a model's configuration, or `None` where there is none or one of another method."""
    entry = getattr(config, "quantization_config", None)
    entry = entry if isinstance(entry, dict) or entry is None else entry.to_dict()
    return entry if entry is not None and entry.get("quant_method") == QUANT_METHOD else None


def record_ranks(model: PreTrainedModel, **facts: Any) -> dict[str, Any]:
    """
    Write the ranks of a model into its configuration.

    Args:
        model (`transformers.PreTrainedModel`): The model; without a `LowRankLinear` the entry is removed.
        facts (*optional*): What else to record, as JSON: the method that chose the factors, say. Facts that were
            recorded before stay.

    Returns:
        `dict`: The entry.
    """
    modules = low_rank_modules(model)
    if not modules:
        if read_entry(model.config) is not None:
            del model.config.quantization_config
        return {}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    saved = sum(m.in_features * m.out_features - m.rank * (m.in_features + m.out_features) for m in modules.values())
    model.config.quantization_config = {
        **(read_entry(model.config) or {}),
        **facts,
        "quant_method": QUANT_METHOD,
        "ranks": {name: module.rank for name, module in modules.items()},
        "parameters": parameters,
        "dense_parameters": parameters + saved,
        "peft_rank_version": importlib.metadata.version("peft-rank"),
    }
    return model.config.quantization_config


def record_compression(model: nn.Module, config: PeftConfig) -> None:
    """Write the ranks and the method, once a tuner's compression is final; nothing where there is no place for it."""
    if isinstance(model, PreTrainedModel):
        decomposition = vars(config).get("decomposition")
        facts = {} if decomposition is None else {"decomposition": decomposition}
        record_ranks(model, method=config.peft_type.value, **facts)
