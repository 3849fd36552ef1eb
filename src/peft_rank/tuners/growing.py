# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Replaces the factors of a product by wider or by rotated ones while an optimizer, and DDP, hold them."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from peft_rank.decomposition.product import Truncation

from .shrinking import Replacement, held


# elementwise state of optimizers that is known to follow its parameter: means of gradients, and of their squares
FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")

_stepped: WeakSet[Optimizer] = WeakSet()
_hooks: list[RemovableHandle] = []


@torch.no_grad()
def widened(parameter: nn.Parameter, dim: int, addition: Tensor) -> tuple[nn.Parameter, Replacement]:
    """
    A parameter with further rows (`dim=0`) or columns (`dim=1`), and how its moments follow.

    The new entries' first moment starts at 0. Their second moment starts at the mean over the present rows or columns:
    Adam corrects the bias of moments that start at 0 by the number of steps that a whole parameter has been through,
    which is no longer small, so that a second moment of 0 would make the first steps of the new entries
    (1 - beta1) / sqrt(1 - beta2) = 3.2 times the learning rate.

    Args:
        parameter (`torch.nn.Parameter`): Not changed.
        dim (`int`): Where to add.
        addition (`Tensor`): The new rows or columns.

    Returns:
        The new parameter, and what `replace_parameters` takes for the old one.
    """
    added = addition.to(parameter.device, parameter.dtype)
    new = nn.Parameter(torch.cat([parameter.detach(), added], dim), requires_grad=parameter.requires_grad)

    def convert(name: str, value: Tensor) -> Tensor | None:
        if name in FIRST_MOMENTS:
            rest = torch.zeros_like(added, dtype=value.dtype)
        elif name in SECOND_MOMENTS:
            rest = value.mean(dim, keepdim=True).expand_as(added)
        else:
            return None
        return torch.cat([value, rest], dim)

    return new, (new, convert)


@torch.no_grad()
def rotated(up: nn.Parameter, down: nn.Parameter, cut: Truncation) -> tuple[Replacement, Replacement]:
    """
    The factors of a truncated product as parameters, and how the moments of the old ones follow.

    With B' = B M and A' = N A, the gradients are dL/dB' = dL/dB N^T and dL/dA' = M^T dL/dA: so are their means. Means of
    squares follow by the squared entries of M and N, which neglects correlations between the old rows.

    Args:
        up (`torch.nn.Parameter`), down (`torch.nn.Parameter`): The old factors, not changed.
        cut (`Truncation`): What `truncate_product` made of them.

    Returns:
        What `replace_parameters` takes for `up` and for `down`.
    """

    def convert_up(name: str, value: Tensor) -> Tensor | None:
        return _moment(name, value, lambda value, power: value @ cut.down_map.to(value).pow(power).T)

    def convert_down(name: str, value: Tensor) -> Tensor | None:
        return _moment(name, value, lambda value, power: cut.up_map.to(value).pow(power).T @ value)

    return (
        (nn.Parameter(cut.up, requires_grad=up.requires_grad), convert_up),
        (nn.Parameter(cut.down, requires_grad=down.requires_grad), convert_down),
    )


def _moment(name: str, value: Tensor, follow) -> Tensor | None:
    with torch.autocast(value.device.type, enabled=False):
        if name in FIRST_MOMENTS:
            return follow(value, 1)
        return follow(value, 2) if name in SECOND_MOMENTS else None


def remember_optimizers() -> None:
    """From now on, `optimizers_of` knows the optimizers that make steps. Repeating it changes nothing."""
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(lambda optimizer, *args: _stepped.add(optimizer)))


def optimizers_of(parameters: Iterable[nn.Parameter]) -> list[Optimizer]:
    """The optimizers that made a step and hold some of the parameters, for loops that do not pass theirs. All of them: which
    will make the next step, and which is merely not gone yet, cannot be told."""
    wanted = {id(parameter) for parameter in parameters}
    return [optimizer for optimizer in _stepped if wanted & held(optimizer)]


def active_data_parallel() -> DistributedDataParallel | None:
    """The DDP wrapper whose forward is running."""
    return DistributedDataParallel._get_active_ddp_module()


def rebuild_data_parallel(wrapper: DistributedDataParallel) -> None:
    """
    Let DDP average the gradients of the parameters that its module has now: it only knows those that it was made with.

    The wrapper is initialised again in place, with its own options, since training loops hold on to it. That compares the
    shapes of all parameters between the processes, and sends those of the first to the others. To be called between a
    step of the optimizer and the next forward, by all processes.

    Raises:
        RuntimeError: If communication hooks are registered, which would be lost.
    """
    check_rebuildable(wrapper)
    options = vars(wrapper)
    kept = {
        name: options[name] for name in ("training", "broadcast_buffers", "forward_sync_buffers") if name in options
    }
    wrapper.__init__(
        wrapper.module,
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        dim=wrapper.dim,
        process_group=wrapper.process_group,
        bucket_cap_mb=max(1, wrapper.bucket_bytes_cap // 2**20),
        find_unused_parameters=wrapper.find_unused_parameters,
        gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
        static_graph=wrapper.static_graph,
    )
    vars(wrapper).update(kept)


def check_rebuildable(wrapper: DistributedDataParallel) -> None:
    """Raises `RuntimeError` if `rebuild_data_parallel` would lose something."""
    if wrapper._comm_hooks:
        raise RuntimeError(
            "Ranks cannot grow under DDP with a communication hook, which would be lost when the parameters change. Train "
            "without one (`ddp_comm_hook` of accelerate's `DistributedDataParallelKwargs`) until the ranks are found."
        )
