# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Which modules a configuration targets, found as PEFT finds them, and their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import align_module_device
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def base_model(model: nn.Module) -> nn.Module:
    """The model whose names the statistics use: inside of compilers and PEFT."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def find_targets(model: nn.Module, config: PeftConfig) -> dict[str, nn.Module]:
    """
    The modules that `get_peft_model(model, config)` would replace, in the order of the model. Changes neither.

    Args:
        model (`torch.nn.Module`): The base model.
        config ([`PeftConfig`]): Of a registered tuner type.

    Raises:
        ValueError: If nothing is targeted.
        TypeError: If a target is neither an `nn.Linear` nor a `Conv1D` with a floating-point weight.
    """
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    config = copy.copy(config)
    # of the tuner these read what belongs to its class alone
    config = tuner._prepare_adapter_config(tuner, config, BaseTuner.get_model_config(model))
    config = _maybe_include_all_linear_layers(config, model)
    targets = injected_modules(model, lambda name: is_targeted(tuner, config, name))
    if not targets:
        raise ValueError(
            f"No module of the model is targeted by `target_modules`={config.target_modules!r}"
            + (f" without `exclude_modules`={config.exclude_modules!r}" if config.exclude_modules else "")
            + ". Name modules of this model, or use 'all-linear'."
        )
    for name, module in targets.items():
        weight_shape(name, module)
    return targets


def is_targeted(tuner: type[BaseTuner], config: PeftConfig, name: str) -> bool:
    """Whether a configuration whose `target_modules` is resolved names a module."""
    found = tuner._check_target_module_exists(config, name)
    return bool(found) and not isinstance(found, _ExcludedModule)


def injected_modules(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, nn.Module]:
    """The modules that PEFT visits when it injects an adapter, those inside of an adapter not among them, by full name."""
    adapters: tuple[str, ...] = ()
    modules = {}
    for name, module in model.named_modules():
        if not name or (adapters and name.startswith(adapters)):
            continue
        if isinstance(module, BaseTunerLayer):
            adapters = (*adapters, f"{name}.")
        if wanted(name):
            modules[name] = module
    return modules


def linear(module: nn.Module) -> nn.Module:
    """The linear itself, inside of an adapter where it has one."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def weight_shape(name: str, module: nn.Module) -> tuple[int, int]:
    """(out, in), whatever the orientation of the stored weight.

    Raises:
        TypeError: If the module is not a linear of plain floating-point numbers.
    """
    module = linear(module)
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    if isinstance(module, nn.Linear):
        shape = module.out_features, module.in_features
        if module.weight.is_floating_point() and module.weight.shape == shape:
            return shape
    raise TypeError(
        f"Target module {name} is a {type(module).__name__}, which is not supported. Only `torch.nn.Linear` (not "
        "quantized) and `transformers.pytorch_utils.Conv1D` can be compressed. Leave it out of `target_modules`, or name "
        "it in `exclude_modules`."
    )


@contextmanager
def weight_of(module: nn.Module) -> Iterator[Tensor]:
    """The weight, (out, in), detached; brought back for the moment where accelerate has offloaded it."""
    module = linear(module)
    with align_module_device(module):
        weight = module.weight.detach()
        yield weight.T if isinstance(module, Conv1D) else weight


def sketch(module: nn.Module, entries: int = 64) -> Tensor | None:
    """Some entries of the weight, float32 on the CPU, to know it again by; None if it is not in memory."""
    with weight_of(module) as weight:
        if weight.device.type == "meta":
            return None
        spread = torch.linspace(0, weight.numel() - 1, min(entries, weight.numel()), dtype=torch.float64)
        places = spread.round().long().to(weight.device)
        return weight[places // weight.shape[1], places % weight.shape[1]].float().cpu()
