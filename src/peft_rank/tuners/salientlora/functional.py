# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The arithmetic of the SalientLoRA layer: functions of tensors, written for few kernels and little memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from peft_rank.orthogonality import join_ranks


# a product of half-precision matrices can be stored in float32 without a second pass
_MM_HAS_OUT_DTYPE = Version(torch.__version__).release >= (2, 8)
# elements that are cast in one piece: bounds the transient memory of `cast_factors`
_CHUNK_NUMEL = 2**26
# ranks of half-precision copies
_ALIGNMENT = 8


class Factors(NamedTuple):
    """The factors of one adapter of one module: A (r, in), E (r,), B (out, r)."""

    A: torch.Tensor
    E: torch.Tensor
    B: torch.Tensor


class CastFactors(NamedTuple):
    """What the products of a forward pass use: A in their dtype, `scaling * E`, and B scaled by it in their dtype. They
    may have more ranks than the factors, which then are 0."""

    low: torch.Tensor
    scale: torch.Tensor
    up: torch.Tensor


class PreparedUpdate(NamedTuple):
    """The update of one module for one forward pass of the whole model: the last arguments of `LinearWithUpdate`."""

    dtype: torch.dtype
    update: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, CastFactors]


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a linear layer multiplies `x` in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@torch.no_grad()
def cast_factors(factors: Sequence[Factors], scalings: Sequence[float], dtype: torch.dtype) -> list[CastFactors]:
    """`CastFactors` of many modules, with a few kernels for all modules of one size instead of a few a module.

    Where a copy is made anyway, ranks are padded with zeros to a multiple of 8: half-precision products of other widths
    are slower.
    """
    copied = [A.dtype != dtype for A, _, _ in factors]
    multiples = [_ALIGNMENT if copy and dtype.itemsize == 2 else 1 for copy in copied]
    widths = [-(-len(E) // multiple) * multiple for (_, E, _), multiple in zip(factors, multiples, strict=True)]
    lows = [A for A, _, _ in factors]
    ups: list[tuple] = [()] * len(factors)
    keys = [(A.shape[1], A.device, A.dtype) if copy else None for (A, _, _), copy in zip(factors, copied, strict=True)]
    for chunk in _chunks(keys, widths):
        width = [widths[i] for i in chunk]
        joined = join_ranks([factors[i].A for i in chunk], 0, width).to(dtype)  # (R, in)
        for i, low in zip(chunk, joined.split(width), strict=True):
            lows[i] = low
    keys = [(B.shape[0], B.device, B.dtype, scaling) for (_, _, B), scaling in zip(factors, scalings, strict=True)]
    for chunk in _chunks(keys, widths):
        width = [widths[i] for i in chunk]
        scale = join_ranks([factors[i].E for i in chunk], 0, width).mul_(scalings[chunk[0]])  # (R,)
        up = _scaled(join_ranks([factors[i].B for i in chunk], 1, width), scale, dtype)  # (out, R)
        for i, *pair in zip(chunk, scale.split(width), up.split(width, 1), strict=True):
            ups[i] = pair
    return [CastFactors(low, *up) for low, up in zip(lows, ups, strict=True)]


def _chunks(keys: Sequence[tuple | None], widths: Sequence[int]) -> Iterator[list[int]]:
    """Positions of equal keys, whose first entry is the size of the other dimension, in pieces of bounded size; those
    without a key are left out."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        if key is not None:
            groups[key].append(position)
    for (size, *_), positions in groups.items():
        chunk, total = [], 0
        for position in positions:
            if chunk and (total + widths[position]) * size > _CHUNK_NUMEL:
                yield chunk
                chunk, total = [], 0
            chunk.append(position)
            total += widths[position]
        yield chunk


def _scaled(B: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`B * scale` in `dtype`, rounded once."""
    return torch.mul(B, scale, out=torch.empty_like(B, dtype=dtype, requires_grad=False))


def _float32_product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if a.dtype == dtype:
        return a @ b
    if _MM_HAS_OUT_DTYPE and a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _without_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class LinearWithUpdate(Function):
    """y = x W^T + b + scaling * x A^T diag(E) B^T, with W and b frozen.

    One node instead of a dozen: the update is accumulated into the base product (forward) and its gradient into the
    base gradient (backward) by the matrix products themselves, so that no activation-sized tensor is read or written
    for the sake of the adapter alone. E is folded into B, which is small, and the factors are cast to the dtype of the
    product, never the activation to theirs. Under autocast the product has autocast's dtype.

    Shapes: x (..., in), W (out, in), b (out,) or None, A (r, in), E (r,), B (out, r). Saves x, not more activations.
    `cast` are the factors as `cast_factors` returns them, if somebody has them already.
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
        cast: CastFactors | None,
    ) -> torch.Tensor:
        dtype = compute_dtype(x) if cast is None else cast.low.dtype
        with _without_autocast(x.device.type):
            rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
            # each for itself: under autocast a half-precision activation meets a float32 weight
            rows = rows if rows.dtype == dtype else rows.to(dtype)
            weight = weight if weight.dtype == dtype else weight.to(dtype)
            if cast is None:
                scale = E * scaling
                cast = CastFactors(A.to(dtype), scale, _scaled(B, scale, dtype))
            low, scale, up = cast
            hidden = rows @ low.T  # (tokens, r)
            # an output that is a view could not be changed in place by whoever gets it
            result = torch.empty(*x.shape[:-1], weight.shape[0], dtype=dtype, device=x.device)
            flat = result.view(-1, weight.shape[0])  # (tokens, out)
            if bias is None:
                torch.mm(rows, weight.T, out=flat)
            else:
                torch.addmm(bias if bias.dtype == dtype else bias.to(dtype), rows, weight.T, out=flat)
            flat.addmm_(hidden, up.T)
        ctx.save_for_backward(rows, weight, low, up, hidden, scale, B)
        ctx.scaling = scaling
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor):
        rows, weight, low, up, hidden, scale, B = ctx.saved_tensors
        needs_x, _, _, needs_A, needs_E, needs_B, _, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_E = grad_B = None
        with _without_autocast(grad_output.device.type):
            grad = grad_output.reshape(-1, grad_output.shape[-1])  # (tokens, out)
            grad_hidden = grad @ up  # (tokens, r)
            if needs_x:
                grad_x = (grad @ weight).addmm_(grad_hidden, low).view(*grad_output.shape[:-1], weight.shape[1])
            r = B.shape[1]
            if needs_A:
                grad_A = _float32_product(grad_hidden.T, rows, B.dtype)[:r]
            if needs_E or needs_B:
                grad_up = _float32_product(grad.T, hidden, B.dtype)[:, :r]  # (out, r), of B diag(scaling * E)
                grad_E = (grad_up * B).sum(0).mul_(ctx.scaling)
                grad_B = grad_up * scale[:r]
        return grad_x, None, None, grad_A, grad_E, grad_B, None, None


class MaskRanks(Function):
    """E * mask, without a saved tensor: gradient checkpointing counts those, and E is masked outside of a checkpointed
    block in the forward pass and inside of it when the block is recomputed."""

    @staticmethod
    def forward(ctx: Any, E: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.mask = mask
        return E * mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor):
        return grad_output * ctx.mask, None


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
