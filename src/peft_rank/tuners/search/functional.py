# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The masked product of a search step: a function of tensors, written for few and small matrix products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import pad

from ..functional import compute_dtype, in_dtype, round_up, without_autocast


SLOPE_THRESHOLD = 2.0**-10
"""A rank that is masked out, and whose mask's slope is less than this part of the steepest, is left out of a step. What it
would add to the gradient is below the rounding of half precision; drawn again, its mask may be steep in the next step."""

COMPACT_BELOW = 0.75
"""Copying the rows that are needed pays when they are fewer than this part."""

COMPACT_FROM = 2.0**38
"""Operations that copying has to spare a module on a GPU: with fewer, the host takes longer to launch the copies than the
GPU to multiply all rows. 4096 x 4096 with 60 % of the ranks masked out: some 3,400 tokens. Ranks without a slope, which
get no gradient where they are left out, get their small one then."""

ROW_MULTIPLE = 8
"""Half-precision products of other widths are several times slower."""


class StepMask(NamedTuple):
    """The mask of one module for one step.

    Attributes:
        mask (`Tensor`): (k,), 0 or 1 in the dtype of the products (float32 where that is float16), with the gradient of the
            soft mask.
        rows (`Tensor`, *optional*): (n,) int64: the ranks that the step needs, those in the mask first, and some that it
            does not need, to have a multiple of `ROW_MULTIPLE`; None for all.
        kept (`int`): How many of `rows` are in the mask.
    """

    mask: Tensor
    rows: Tensor | None
    kept: int


def needed_rows(soft: Tensor, hard: Tensor, sizes: list[int]) -> list[tuple[Tensor | None, int]]:
    """`rows` and `kept` of `StepMask` for every module.

    Args:
        soft (`Tensor`), hard (`Tensor`): (modules, K) masks, padded with 0.
        sizes (`list[int]`): Ranks of each module.
    """
    with torch.no_grad():
        inside = hard > 0.5
        needed = inside | (soft * (1 - soft) > SLOPE_THRESHOLD / 4)
        # one wait for the device in a step
        kept, counts = torch.stack([inside.sum(1), needed.sum(1)]).tolist()
        widths = [round_up(n, ROW_MULTIPLE) for n in counts]
        compact = [width < COMPACT_BELOW * size for width, size in zip(widths, sizes, strict=True)]
        if not any(compact):
            return [(None, 0)] * len(sizes)
        # stable: behind the needed ranks come those of the module, and only then its padding
        order = torch.argsort(inside.to(torch.uint8) + needed.to(torch.uint8), dim=1, descending=True, stable=True)
        return [(order[i, : widths[i]], kept[i]) if pays else (None, 0) for i, pays in enumerate(compact)]


def masked_product(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, step: StepMask) -> Tensor:
    """y = ((x down^T) * mask) up + bias, with frozen factors and bias, of which `step` says what they are for.

    The gradient of the mask is hidden state times its gradient, summed over tokens; factors get none, so that four
    products of a step are all. With more tokens than outputs the mask multiplies the factor instead of the hidden state.
    With `rows`, ranks outside of them are in no product, and forward and the gradient of x take the masked-in ones alone.

    Shapes: x (..., in), down (k, in), up (k, out), bias (out,) or None.
    """
    dtype, rows, tokens = compute_dtype(x), step.rows, x.numel() // x.shape[-1]
    if rows is not None and x.device.type != "cpu":
        spared = 4 * tokens * (down.shape[0] - rows.shape[0]) * (down.shape[1] + up.shape[1])
        rows = rows if spared >= COMPACT_FROM else None
    # a sum over tokens may be beyond float16, whose masks are in float32
    if rows is not None or not down.dtype == step.mask.dtype == dtype or tokens > up.shape[1]:
        return MaskedProduct.apply(x, step.mask, down, up, bias, rows, step.kept)
    # what autograd keeps of these is the hidden state alone; its own functions, of two dimensions, take the host a third of
    # the time
    hidden = torch.mm(in_dtype(x, dtype).reshape(-1, x.shape[-1]), down.t()) * step.mask
    result = torch.mm(hidden, up) if bias is None else torch.addmm(in_dtype(bias, dtype), hidden, up)
    return result.view(*x.shape[:-1], up.shape[1])


class MaskedProduct(Function):
    """`masked_product` where ranks are left out, or where autograd's functions would keep copies of factors, multiply the
    larger side or sum in float16."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        mask: Tensor,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        kept: int,
    ) -> Tensor:
        dtype = compute_dtype(x)
        with without_autocast(x.device.type):
            flat = in_dtype(x.reshape(-1, x.shape[-1]), dtype)  # (tokens, in)
            if rows is None:
                hidden = torch.mm(flat, in_dtype(down, dtype).t())  # (tokens, k)
                result = _product(hidden, in_dtype(mask, dtype), in_dtype(up, dtype))
            else:
                hidden = torch.mm(flat, in_dtype(down.index_select(0, rows), dtype).t())  # (tokens, n)
                result = _product_of_kept(hidden, up, rows, kept)
            if bias is not None:
                result += in_dtype(bias, dtype)
        ctx.save_for_backward(hidden, mask, down, up, rows)
        ctx.kept, ctx.shape, ctx.input_dtype = kept, x.shape, x.dtype
        return result.view(*x.shape[:-1], up.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):
        hidden, mask, down, up, rows = ctx.saved_tensors
        dtype = hidden.dtype
        grad_x = grad_mask = None
        with without_autocast(grad_output.device.type):
            grad = in_dtype(grad_output.reshape(-1, grad_output.shape[-1]), dtype)  # (tokens, out)
            selected = up if rows is None else up.index_select(0, rows)
            grad_hidden = torch.mm(grad, in_dtype(selected, dtype).t())  # (tokens, k or n)
            if ctx.needs_input_grad[1]:
                grad_mask = torch.sum(hidden * grad_hidden, dim=0, dtype=mask.dtype)
                if rows is not None:
                    grad_mask = torch.zeros_like(mask).index_copy_(0, rows, grad_mask)
            if ctx.needs_input_grad[0]:
                if rows is None:
                    grad_x = _product(grad_hidden, in_dtype(mask, dtype), in_dtype(down, dtype))
                else:
                    grad_x = _product_of_kept(grad_hidden, down, rows, ctx.kept)
                grad_x = in_dtype(grad_x.view(ctx.shape), ctx.input_dtype)
        return grad_x, grad_mask, None, None, None, None, None


def _product(hidden: Tensor, mask: Tensor, factor: Tensor) -> Tensor:
    """(hidden * mask) @ factor for hidden (tokens, k), mask (k,), factor (k, n)."""
    if hidden.shape[0] <= factor.shape[1]:
        return torch.mm(hidden * mask, factor)
    return torch.mm(hidden, factor * mask[:, None])


def _product_of_kept(hidden: Tensor, factor: Tensor, rows: Tensor, kept: int) -> Tensor:
    """hidden[:, :kept] @ factor[rows[:kept]] for hidden (tokens, n) and rows (n,), over a padded number of rows."""
    width = round_up(kept, ROW_MULTIPLE)
    selected = in_dtype(factor.index_select(0, rows[:width]), hidden.dtype)
    selected[kept:] = 0
    return torch.mm(hidden[:, :width], selected)


def pad_rows(rows: list[Tensor], value: float) -> Tensor:
    """(k_i,) tensors as one (n, max k), filled up with `value`."""
    sizes = [row.shape[0] for row in rows]
    size = max(sizes)
    if min(sizes) < size:
        rows = [pad(row, (0, size - len(row)), value=value) for row in rows]
    return torch.stack(rows)
