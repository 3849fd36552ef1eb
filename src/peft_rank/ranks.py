# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Reads the ranks off a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal, TypeVar, overload

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .tuners.adaptive import AdaptiveRankTuner, RankLayer
from .tuners.lowrank import LowRankLinear
from .tuners.lowrank.model import CompressionTuner
from .tuners.names import exact_pattern, plain_name


LayerT = TypeVar("LayerT", bound=RankLayer)


@overload
def get_rank_pattern(
    model: nn.Module, *, for_lora: Literal[False] = False, adapter_name: str | None = None
) -> dict[str, int]: ...


@overload
def get_rank_pattern(
    model: nn.Module, *, for_lora: Literal[True], adapter_name: str | None = None
) -> tuple[dict[str, int], list[str] | str]: ...


def get_rank_pattern(
    model: nn.Module, *, for_lora: bool = False, adapter_name: str | None = None
) -> dict[str, int] | tuple[dict[str, int], list[str] | str]:
    """
    The rank of every adapted module, or of every module of a compressed model.

    Args:
        model (`torch.nn.Module`): A model with an adapter of this package, or one of [`LowRankLinear`]s.
        for_lora (`bool`): Return what a `LoraConfig` takes: allocation as a search, plain LoRA as the product.
        adapter_name (`str`, *optional*): The adapter, by default the first active one.

    Returns:
        `dict[str, int]`: Module name in the base model -> rank; 0 for modules that have no rank left. Modules that
        stayed dense in a compression are left out. With
        `for_lora=True` instead `(rank_pattern, exclude_modules)`: `LoraConfig` refuses rank 0, so these modules are
        excluded, by a list of their names or, where a name would exclude others too, by a regular expression.

    Raises:
        TypeError: If the model has no such adapter.

    Example:

        ```py
        >>> rank_pattern, exclude_modules = get_rank_pattern(model, for_lora=True)
        >>> LoraConfig(rank_pattern=rank_pattern, exclude_modules=exclude_modules, target_modules=...)
        ```
    """
    ranks = _compressed_ranks(model)
    if ranks is None:
        adapter_name, layers = adapter_layers(model, adapter_name)
        ranks = {name: layer.rank(adapter_name) for name, layer in layers.items()}
        # None: what a search leaves dense
        ranks = {name: rank for name, rank in ranks.items() if rank is not None}
    if not for_lora:
        return ranks
    kept = {name: r for name, r in ranks.items() if r}
    dropped = [name for name, r in ranks.items() if not r]
    return {exact_pattern(name): r for name, r in kept.items()}, exact_modules(dropped, kept)


def _compressed_ranks(model: nn.Module) -> dict[str, int] | None:
    """Ranks of a model that is compressed for good or not at all, without adapters; None if it has adapters."""
    modules = list(bare_model(model).named_modules())
    if any(isinstance(module, RankLayer) for _, module in modules):
        return None
    ranks = {plain_name(name): module.rank for name, module in modules if isinstance(module, LowRankLinear)}
    # a compression may leave every module dense
    return (
        ranks
        if ranks or any(isinstance(module, (CompressionTuner, AdaptiveRankTuner)) for _, module in modules)
        else None
    )


def exact_modules(names: Iterable[str], others: Collection[str]) -> list[str] | str:
    """
    What selects these modules in PEFT and none of the others: their full names, which most readers understand, or, as a
    name in a list also selects longer paths that end with it, a regular expression where there is such a path.
    """
    names = list(names)
    endings = tuple(f".{name}" for name in names)
    if any(other.endswith(endings) for other in others):
        return "|".join(map(re.escape, names))
    return names


def bare_model(model: nn.Module) -> nn.Module:
    """The model that names its modules as PEFT does: inside of engines and compilers, outside of tuners."""
    for module in model.modules():
        if isinstance(module, PeftModel):
            return module
        if isinstance(module, BaseTuner):
            return module.model
    return getattr(model, "_orig_mod", model)


def adapter_layers(
    model: nn.Module, adapter_name: str | None = None, layer_class: type[LayerT] = RankLayer
) -> tuple[str, dict[str, LayerT]]:
    """
    The layers that hold an adapter.

    Args:
        model (`torch.nn.Module`): A model with an adapter of this package.
        adapter_name (`str`, *optional*): The adapter, by default the first active one.
        layer_class (`type`): Only layers of this method.

    Returns:
        `tuple[str, dict[str, RankLayer]]`: The adapter's name, and its layers by module name in the base model.

    Raises:
        TypeError: If the model has no such adapter.
    """
    modules = bare_model(model).named_modules()
    layers = {plain_name(name): module for name, module in modules if isinstance(module, layer_class)}
    if not layers:
        kind = "" if layer_class is RankLayer else f" made of {layer_class.__name__}"
        raise TypeError(
            f"{type(model).__name__} has no adapter of peft_rank{kind}. Pass what `get_peft_model` or "
            "`PeftModel.from_pretrained` returned."
        )
    if adapter_name is None:
        adapter_name = next(iter(layers.values())).active_adapters[0]
    found = {name: layer for name, layer in layers.items() if adapter_name in layer.adapters()}
    if not found:
        known = sorted({name for layer in layers.values() for name in layer.adapters()})
        raise TypeError(f"The model has no adapter {adapter_name!r}; its adapters are {', '.join(known)}.")
    return adapter_name, found
