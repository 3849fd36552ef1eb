# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Pieces of arithmetic that the layers of several methods share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a linear layer multiplies `x` in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def round_up(count: int, multiple: int) -> int:
    """The next multiple that is not below."""
    return -(-count // multiple) * multiple


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in that dtype; asking first is faster than a cast that does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def without_autocast(device: str) -> AbstractContextManager:
    """Autocast off on a type of device. Where it is off already nothing is entered, which takes longer than a product's
    launch."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


_AS_IT_IS = nullcontext()


class AddToGradient(Function):
    """The identity, whose backward adds a gradient that was computed beforehand, once.

    `pending[key][position]` is added to the gradient and replaced by None, so that of all the backward passes of an
    optimizer step (micro-batches, a module that is used twice) exactly one adds it. Recomputation in gradient
    checkpointing sees the same graph as the first forward, since only backward consumes.
    """

    @staticmethod
    def forward(
        ctx: Any, factor: torch.Tensor, pending: dict[str, list[torch.Tensor | None]], key: str, position: int
    ) -> torch.Tensor:
        ctx.pending, ctx.key, ctx.position = pending, key, position
        return factor.view_as(factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor):
        gradients = ctx.pending.get(ctx.key)
        addition = None if gradients is None else gradients[ctx.position]
        if addition is not None:
            gradients[ctx.position] = None
            grad_output = grad_output + addition.to(grad_output.dtype)
        return grad_output, None, None, None
