# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Replaces parameters by narrower or other ones while an optimizer holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer


Replacement = tuple[nn.Parameter, Callable[[str, torch.Tensor], torch.Tensor | None]]


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer behind accelerate's wrapper."""
    from accelerate.optimizer import AcceleratedOptimizer

    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def held(*optimizers: Optimizer) -> set[int]:
    """Ids of the parameters in groups of the optimizers."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return {id(parameter) for group in groups for parameter in group["params"]}


def hold(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all of these parameters are in groups of the optimizers."""
    known = held(*optimizers)
    return all(id(parameter) in known for parameter in parameters)


def can_follow(optimizer: Optimizer, parameters: list[nn.Parameter]) -> bool:
    """Whether the optimizer goes on exactly with narrower parameters in the place of these: it holds all that are trained,
    keeps none beside its groups and its state, and that state can be cut."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    beside = _kept_beside(optimizer)
    return (
        hold([optimizer], trained)
        and not any(id(parameter) in beside for parameter in trained)
        and can_slice_state(optimizer, parameters)
    )


def _kept_beside(optimizer: Optimizer) -> set[int]:
    """Ids of what the optimizer keeps in lists, mappings and optimizers of its own: LBFGS a list of its parameters, wrappers
    an optimizer that they wrap. Nobody could put another parameter there."""
    todo = [value for name, value in vars(optimizer).items() if name not in ("param_groups", "state")]
    found: set[int] = set()
    while todo:
        value = todo.pop()
        if id(value) in found:
            continue
        found.add(id(value))
        if isinstance(value, Mapping):
            todo.extend([*value.keys(), *value.values()])
        elif isinstance(value, (list, tuple, set)):
            todo.extend(value)
        elif isinstance(value, Optimizer):
            todo.extend(vars(value).values())
    return found


def can_slice_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> bool:
    """Whether the optimizer's state of these parameters can be cut like the parameters themselves.

    That is so if every tensor in it is elementwise (of the parameter's shape) or a scalar: Adam and its relatives, SGD,
    RMSprop. Factored (Adafactor) and quantized states have other shapes.
    """
    for parameter in parameters:
        for value in optimizer.state.get(parameter, {}).values():
            if torch.is_tensor(value) and value.dim() > 0 and value.shape != parameter.shape:
                return False
    return True


def forget_other_shapes(optimizer: Optimizer) -> None:
    """Drop the state of parameters that got another width since, as a checkpoint that is loaded into the model gives them:
    the optimizer starts it anew. Kernels may read past the end of such a state."""
    optimizer = unwrap_optimizer(optimizer)
    for parameter, state in list(optimizer.state.items()):
        tensors = [value for value in state.values() if torch.is_tensor(value) and value.dim() == parameter.dim()]
        if any(value.shape != parameter.shape for value in tensors):
            del optimizer.state[parameter]


@torch.no_grad()
def narrow(parameter: nn.Parameter, dim: int, index: torch.Tensor) -> nn.Parameter:
    """A new parameter with the rows (`dim=0`) or columns (`dim=1`) `index` of `parameter`."""
    data = parameter.detach().index_select(dim, index)
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


@torch.no_grad()
def replace_parameters(optimizer: Optimizer, replacements: Mapping[nn.Parameter, Replacement]) -> None:
    """
    Let `optimizer` go on with other parameters.

    Args:
        optimizer (`Optimizer`): Changed in place; its groups keep their order and options. State that is not elementwise,
            or that cannot be converted, is dropped, so that the optimizer starts it anew.
        replacements: For every old parameter the new one, and what makes its elementwise state, by name, from the old
            one's; it may return None, which drops all state of the parameter.
    """
    for group in optimizer.param_groups:
        group["params"] = [replacements[p][0] if p in replacements else p for p in group["params"]]
    for old, (new, convert) in replacements.items():
        if old not in optimizer.state:
            continue
        can_convert, state = can_slice_state(optimizer, [old]), optimizer.state.pop(old)
        if not can_convert:
            continue
        elementwise = {k: convert(k, v) for k, v in state.items() if torch.is_tensor(v) and v.shape == old.shape}
        if not any(value is None for value in elementwise.values()):
            optimizer.state[new] = {**state, **elementwise}


def swap_parameters(
    optimizer: Optimizer, replacements: Mapping[nn.Parameter, tuple[nn.Parameter, int, torch.Tensor]]
) -> None:
    """
    Let `optimizer` go on with narrower parameters, see `replace_parameters`.

    Args:
        optimizer (`Optimizer`): Changed in place.
        replacements: For every old parameter the new one, and the `dim` and `index` that it was cut by.
    """

    def cut(name: str, value: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        return value.index_select(dim, index)

    replace_parameters(
        optimizer,
        {old: (new, partial(cut, dim=dim, index=index)) for old, (new, dim, index) in replacements.items()},
    )
