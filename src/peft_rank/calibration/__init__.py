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

import warnings
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from .batches import TokenMask, device_of, frozen, moved
from .collectors import GradientCollector, InputCollector
from .statistics import CalibrationStatistics, empty_statistics, listed, statistics_for_config
from .targets import base_model, find_targets, linear, weight_of, weight_shape


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
    base = base_model(model)
    targets = find_targets(base, config)
    statistics = empty_statistics(targets)
    if kind is None:
        return statistics
    statistics.tensors[kind] = {}
    model = getattr(model, "_orig_mod", model)
    with torch.inference_mode(False), frozen(model), TokenMask(base).watching() as masks:
        groups = [targets] if max_bytes is None else _groups(model, batches, kind, targets, max_bytes, masks)
        for i, modules in enumerate(groups, start=1):
            label = "Calibrating" if len(groups) == 1 else f"Calibrating ({i}/{len(groups)})"
            collector = _collector(model, kind, modules, masks)
            with collector.hooks():
                for batch in moved(batches, device_of(model), label, progress):
                    collector.run(model, batch)
            _store(statistics, kind, collector, modules)
    _judge(statistics, kind, masks.unmasked)
    return statistics


def _collector(
    model: nn.Module, kind: str, modules: dict[str, nn.Module], masks: TokenMask
) -> InputCollector | GradientCollector:
    if kind in ("input_scale", "input_gram"):
        return InputCollector(modules, kind, masks)
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    return GradientCollector(modules, masks, _FLOAT16_LOSS_SCALE if half else 1.0)


def _groups(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    kind: str,
    targets: dict[str, nn.Module],
    max_bytes: int,
    masks: TokenMask,
) -> list[dict[str, nn.Module]]:
    """Modules to be done together: as many as `max_bytes` holds the statistics of, in order, but at least one input."""
    sizes = {name: _bytes(kind, name, module) for name, module in targets.items()}
    if sum(sizes.values()) <= max_bytes:
        return [targets]
    if iter(batches) is batches:
        raise ValueError(
            f"`max_bytes`={max_bytes} takes several runs over the batches, but `batches` is a generator, which can be read "
            "only once. Give a list or a DataLoader, or leave `max_bytes` out."
        )
    together = [[name] for name in targets]
    if kind in ("input_scale", "input_gram"):
        together = _sharing(model, batches, targets, masks)
    groups: list[dict[str, nn.Module]] = []
    free = 0
    for names in together:
        if sizes[names[0]] > free or not groups:
            groups.append({})
            free = max_bytes
        groups[-1] |= {name: targets[name] for name in names}
        free -= sizes[names[0]]
    return groups


def _bytes(kind: str, name: str, module: nn.Module) -> int:
    out_features, in_features = weight_shape(name, module)
    numel = {"input_scale": in_features, "input_gram": in_features**2}.get(kind, out_features * in_features)
    return numel * max(4, linear(module).weight.element_size())


def _sharing(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], targets: dict[str, nn.Module], masks: TokenMask
) -> list[list[str]]:
    """Modules that get the same input in the first batch, in order."""
    probe = InputCollector(targets, "input_scale", masks)
    with probe.hooks():
        for batch in moved(islice(batches, 1), device_of(model), "", progress=False):
            probe.run(model, batch)
    together = [list(names) for names, _ in probe.results()]
    called = {name for names in together for name in names}
    return together + [[name] for name in targets if name not in called]


def _store(
    statistics: CalibrationStatistics,
    kind: str,
    collector: InputCollector | GradientCollector,
    modules: dict[str, nn.Module],
) -> None:
    statistics.samples = collector.samples
    statistics.tokens |= {name: collector.tokens[name] for name in modules}
    for names, mean in collector.results():
        if kind == "importance":
            with weight_of(modules[names[0]]) as weight:
                mean = mean * weight.to("cpu", mean.dtype).square()
        statistics.tensors[kind] |= dict.fromkeys(names, mean)


def _judge(statistics: CalibrationStatistics, kind: str, unmasked: set[str]) -> None:
    """Warn of modules that the data was too little for, and put zeros where nothing was found."""
    tokens, shapes, found = statistics.tokens, statistics.shapes, statistics.tensors[kind]
    if not any(tokens.values()):
        raise ValueError("No targeted module saw a token: the batches are empty, or masked altogether.")
    unused = [name for name, seen in tokens.items() if not seen]
    if unused:
        warnings.warn(
            f"{len(unused)} modules saw no token: {listed(unused)}. Their statistics are zero, so that all ranks count the "
            "same to them. Calibrate on more data, or name them in `exclude_modules`.",
            stacklevel=3,
        )
    few = [
        name for name, (_, in_features) in shapes.items() if kind == "input_gram" and 0 < tokens[name] < in_features
    ]
    if few:
        warnings.warn(
            f"{len(few)} modules saw fewer tokens than they have input features: {listed(few)} (the first: {tokens[few[0]]} "
            f"of {shapes[few[0]][1]}). Directions that no token had count for nothing. Calibrate on more data: ten times "
            "the features is a good start.",
            stacklevel=3,
        )
    if unmasked:
        warnings.warn(
            f"Padding could not be told from tokens in {len(unmasked)} modules, whose input has no batch dimension, as in "
            f"experts: {listed(sorted(unmasked))}. Calibrate on texts of one length, or with batches of one.",
            stacklevel=3,
        )
    silent = [name for name in shapes if name not in found and tokens[name]]
    if silent:
        warnings.warn(f"The loss does not depend on {len(silent)} modules: {listed(silent)}.", stacklevel=3)
    for name, (out_features, in_features) in shapes.items():
        if name not in found:
            shape = {"input_scale": (in_features,), "input_gram": (in_features, in_features)}
            found[name] = torch.zeros(shape.get(kind, (out_features, in_features)))
    statistics.tensors[kind] = {name: found[name] for name in shapes}
