# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What a stack of trainings is made of: the modules that all share, and what each trains of its own."""

from __future__ import annotations

import copy
from itertools import chain
from typing import NamedTuple

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn


ADAPTER = "default"
PREFIX = "base_model.model."


def share(model: nn.Module) -> nn.Module:
    """A copy of the modules that has the tensors of the original."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


class StackedLinear(nn.Module):
    """A linear of all trainings: `base`, which is frozen, and (K, r, in) `down`, (K, out, r) `up`; or, without a base,
    (K, out, in) `weight` and (K, out) `bias`."""

    def __init__(self, base: nn.Linear | None = None) -> None:
        super().__init__()
        self.base = base
        self.parts: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        # x: the rows of all trainings, one training after another
        first, second = self.parts.values()
        stacked = x.reshape(len(first), -1, x.shape[-1])
        if self.base is None:
            y = torch.baddbmm(second.unsqueeze(1), stacked, first.mT)
        else:
            frozen = self.base(x)
            hidden = torch.bmm(stacked, first.mT)
            y = torch.baddbmm(frozen.view(len(first), -1, frozen.shape[-1]), hidden, second.mT)
        return y.view(*x.shape[:-1], -1)


class Place(NamedTuple):
    """Where a parameter is: its module in the base model, what it is there, and its shape."""

    module: str
    part: str
    shape: torch.Size


def trained_parameters(model: PeftModel) -> dict[str, list[tuple[Place, nn.Parameter]]]:
    """What is trained: A, E and B of the adapted linears, and the linears that are trained in full as `other`."""
    found: dict[str, list[tuple[Place, nn.Parameter]]] = {"A": [], "E": [], "B": [], "other": []}
    for full_name, module in model.named_modules():
        name = full_name.removeprefix(PREFIX)
        if isinstance(module, BaseTunerLayer):
            prefix = "salientlora_" if hasattr(module, "salientlora_E") else "lora_"
            for kind in "AEB":
                parameter = getattr(module, prefix + kind, {ADAPTER: None})[ADAPTER]
                parameter = parameter.weight if isinstance(parameter, nn.Module) else parameter
                if parameter is not None:
                    found[kind].append((Place(name, kind, parameter.shape), parameter))
        elif isinstance(module, ModulesToSaveWrapper):
            for sub_name, linear in module.modules_to_save[ADAPTER].named_modules():
                for part, parameter in linear.named_parameters(recurse=False):
                    place = Place(".".join(filter(None, [name, sub_name])), part, parameter.shape)
                    found["other"].append((place, parameter))
    return {kind: entries for kind, entries in found.items() if entries}


def kept_parameters(model: PeftModel) -> int:
    """Trainable parameters that are left: AdaLoRA keeps its pruned ranks, which its rank pattern marks."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config: LoraConfig = model.active_peft_config
    if isinstance(config, AdaLoraConfig):
        for key, kept in (config.rank_pattern or {}).items():
            layer = model.base_model.model.get_submodule(key.removesuffix(f".lora_E.{ADAPTER}"))
            count -= kept.count(False) * (1 + layer.in_features + layer.out_features)
    return count
