# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""A compression that is final: plain modules in the model, of which an adapter's file can still be written and read."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import _get_submodules
from torch import Tensor, nn

from ..names import plain_name


FACTORS = {"lowrank_down": "down.weight", "lowrank_up": "up.weight"}
BIAS = {"base_layer.bias": "up.bias"}
"""What a `FactorizedLinear` and a `LowRankLinear` call the same."""


def settle_trained_modules(model: nn.Module) -> list[str]:
    """Put what `modules_to_save` trained into the model for good; returns the names of these modules."""
    names = []
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            parent, _, child_name = _get_submodules(model, name)
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            setattr(parent, child_name, plain)
            names.append(name)
    return names


def entries_inside(names: Collection[str], model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state dict that belong to modules of these names in the base model."""
    inside = tuple(f"{key}." for key, _ in model.named_modules() if plain_name(key) in names)
    return {key: tensor for key, tensor in state_dict.items() if key.startswith(inside)}


def renamed_entries(
    names: Collection[str], model: nn.Module, state_dict: Mapping[str, Tensor], *, biases: bool
) -> dict[str, tuple[str, Tensor]]:
    """
    What an adapter's file calls the entries of final modules.

    Args:
        names (`Collection[str]`): Names in the base model of [`LowRankLinear`]s.
        model (`torch.nn.Module`): The model that the state dict is of.
        state_dict (`Mapping[str, Tensor]`): Its parameters.
        biases (`bool`): Biases, too.

    Returns:
        `dict[str, tuple[str, Tensor]]`: Key in the state dict -> key in the file, and value.

    Raises:
        RuntimeError: If a module is no plain `LowRankLinear` any more.
    """
    found = {}
    for name, _ in model.named_modules():
        if plain_name(name) not in names:
            continue
        for in_file, in_model in {**FACTORS, **(BIAS if biases else {})}.items():
            key = f"{name}.{in_model}"
            if key in state_dict:
                found[key] = f"{name}.{in_file}", state_dict[key]
            elif in_file in FACTORS:
                raise RuntimeError(
                    f"{plain_name(name)} has no {in_model} of its own any more: its factors were adapted or quantized, and "
                    "what this adapter was cannot be saved. Save the adapters on the factors; or merge them and call "
                    "`save_compressed(model, directory)`."
                )
    return found


def warn_of_unsaved(model: nn.Module, saved: Collection[str]) -> None:
    """Tell of trained parameters that are no part of an adapter's file."""
    left = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in saved]
    if left:
        warnings.warn(
            f"The adapter does not hold {len(left)} parameters that are trained, {left[0]} for one. "
            "`save_compressed(model, directory)` writes the whole model.",
            stacklevel=3,
        )
