# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Autograd functions of the SalientLoRA layer: pure functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable


class LinearWithUpdate(Function):
    """y = x W^T + b + scaling * x A^T diag(E) B^T, with W and b frozen.

    One node instead of a dozen: the update is accumulated into the base product (forward) and its gradient into the
    base gradient (backward) by the matrix products themselves, so that no activation-sized tensor is read or written
    for the sake of the adapter alone. E is folded into B, which is small, and the factors are cast to the dtype of the
    product, never the activation to theirs. Under autocast the product has autocast's dtype.

    Shapes: x (..., in), W (out, in), b (out,) or None, A (r, in), E (r,), B (out, r). Saves x, not more activations.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        A: torch.Tensor,
        E: torch.Tensor,
        B: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (tokens, in)
            weight = weight.to(dtype)
            low = A.to(dtype)
            scale = (E * scaling).to(B.dtype)
            up = torch.mul(B, scale, out=torch.empty_like(B, dtype=dtype, requires_grad=False))
            hidden = rows @ low.T  # (tokens, r)
            # an output that is a view could not be changed in place by whoever gets it
            result = torch.empty(*x.shape[:-1], weight.shape[0], dtype=dtype, device=x.device)
            flat = result.view(-1, weight.shape[0])  # (tokens, out)
            if bias is None:
                torch.mm(rows, weight.T, out=flat)
            else:
                torch.addmm(bias.to(dtype), rows, weight.T, out=flat)
            flat.addmm_(hidden, up.T)
        ctx.save_for_backward(rows, weight, low, up, hidden, scale, B)
        ctx.scaling = scaling
        ctx.input_shape = x.shape
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor):
        rows, weight, low, up, hidden, scale, B = ctx.saved_tensors
        with torch.autocast(grad_output.device.type, enabled=False):
            grad = grad_output.reshape(-1, grad_output.shape[-1])  # (tokens, out)
            grad_hidden = grad @ up  # (tokens, r)
            grad_x = grad_A = grad_E = grad_B = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ weight).addmm_(grad_hidden, low).view(ctx.input_shape)
            if ctx.needs_input_grad[3]:
                grad_A = grad_hidden.T @ rows
            if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
                grad_up = (grad.T @ hidden).to(B.dtype)  # (out, r), of B diag(scaling * E)
                grad_E = (grad_up * B).sum(0).mul_(ctx.scaling)
                grad_B = grad_up.mul_(scale)
        return grad_x, None, None, grad_A, grad_E, grad_B, None


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
