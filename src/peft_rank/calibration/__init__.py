# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Runs a model over batches and collects the statistics that decompositions weigh by.

| statistic | value | for |
|---|---|---|
| `input_scale` (in,) | E over tokens of abs(x) | activation |
| `input_gram` (in, in) | E over tokens of x x^T | whitening |
| `fisher` (out, in) | E over samples of (dL/dw)^2 | fisher, fisher_two_sided, em, nesterov, anderson |
| `importance` (out, in) | E over samples of (w dL/dw)^2 | importance |

Knows neither what becomes of the statistics nor where the batches come from. Differences from the released code: means
instead of sums over batches, any batch size and length (ARS: batch 1); gradients of one sample each, not squares of a
batch's mean gradient, of the loss that the model computes itself (ARS shifts the labels twice), in evaluation mode and
without what earlier batches left (FWSVD has dropout, and gradients that add up).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from .batches import TokenMask, device_of, frozen, moved
from .collectors import GradientCollector, InputCollector
from .statistics import CalibrationStatistics, empty_statistics, statistics_for_config
from .targets import base_model, find_targets, weight_of


__all__ = ["CalibrationStatistics", "calibrate"]

_FLOAT16_LOSS_SCALE = 2.0**10


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    config: PeftConfig,
    max_bytes: int | None = None,
    progress: bool = True,
) -> CalibrationStatistics:
    """
    Collect what `config.decomposition` weighs by, for every module that `config` targets.

    The model runs in evaluation mode, on the devices where it is, and is afterwards as it was. Padding is left out: by
    `attention_mask`, in a decoder behind an encoder by `decoder_attention_mask` or labels of -100; tokens routed to
    experts are beyond that. A sample is a row of a batch; the loss of Fisher and importance is the model's own.

    Args:
        model (`torch.nn.Module`): Any model of linears and `Conv1D`, also one dispatched by `device_map`.
        batches (iterable of `dict`): Keyword arguments of the model, with `labels` for Fisher and importance, of any
            size; a `DataLoader` or a list. They are moved to the model's device and not changed.
        config ([`PeftConfig`]): A compression config; its targets and `decomposition` matter.
        max_bytes (`int`, *optional*): Memory for statistics while they are collected. Given, modules are done in groups
            that keep to it, at least one input each, with a run over the batches for each group; all results are on
            the CPU.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Returns:
        [`CalibrationStatistics`]: Of all targeted modules; without tensors for plain SVD, which needs none.

    Raises:
        ValueError: If there are no batches, no loss where one is needed, NaN on the way, or batches that can be read only
            once where they have to be read again.
        TypeError: If a target, a batch or the config is of a wrong type.

    Example:

        ```py
        >>> config = LowRankConfig(ratio=0.8, decomposition="whitening", target_modules="all-linear")
        >>> config.statistics = calibrate(model, batches, config=config)
        >>> model = get_peft_model(model, config)
        ```
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"`max_bytes` must be at least 1, got {max_bytes}. None means no limit.")
    kind = statistics_for_config(config)
    targets = find_targets(base_model(model), config)
    statistics = empty_statistics(targets)
    if kind is None:
        return statistics
    statistics.tensors[kind] = {}
    model = getattr(model, "_orig_mod", model)
    with torch.inference_mode(False), frozen(model), TokenMask(base_model(model)).watching() as masks:
        for label, modules in [("Calibrating", targets)]:
            collector = _collector(model, kind, modules, masks)
            with collector.hooks():
                for batch in moved(batches, device_of(model), label, progress):
                    collector.run(model, batch)
            _store(statistics, kind, collector, modules)
    return statistics


def _collector(
    model: nn.Module, kind: str, modules: dict[str, nn.Module], masks: TokenMask
) -> InputCollector | GradientCollector:
    if kind in ("input_scale", "input_gram"):
        return InputCollector(modules, kind, masks)
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    return GradientCollector(modules, masks, _FLOAT16_LOSS_SCALE if half else 1.0)


def _store(
    statistics: CalibrationStatistics,
    kind: str,
    collector: InputCollector | GradientCollector,
    modules: dict[str, nn.Module],
) -> None:
    statistics.samples = collector.samples
    for names, mean, tokens in collector.results():
        for name in names:
            if kind == "importance":
                with weight_of(modules[name]) as weight:
                    mean = mean * weight.to("cpu", mean.dtype).square()
            statistics.tensors[kind][name] = mean
            statistics.tokens[name] = tokens
