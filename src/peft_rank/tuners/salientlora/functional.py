# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The arithmetic of the SalientLoRA layer: functions of tensors, written for few kernels and little memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from peft_rank.orthogonality import join_ranks

from ..functional import in_dtype, round_up, without_autocast


# a product of half-precision matrices can be stored in float32 without a second pass
_MM_HAS_OUT_DTYPE = Version(torch.__version__).release >= (2, 8)
# elements that are cast in one piece: bounds the transient memory of `prepare_updates`
_CHUNK_NUMEL = 2**26
# ranks of half-precision copies
_ALIGNMENT = 8


class Factors(NamedTuple):
    """The factors of one adapter of one module: A (r, in), E (r,), B (out, r)."""

    A: torch.Tensor
    E: torch.Tensor
    B: torch.Tensor


class PreparedUpdate(NamedTuple):
    """The update of one module for one forward pass, as `LinearWithUpdate` takes it.

    `low` (in, r) is (diag(scaling * E) A)^T and `up` (r, out) is B^T, both in the dtype of the products and maybe with
    more ranks, which then are 0. The gradient of `low` goes to `folded`, (r, in), that of `up` to B.
    """

    B: torch.Tensor
    folded: torch.Tensor
    low: torch.Tensor
    up: torch.Tensor


def prepare_updates(factors: Sequence[Factors], scalings: Sequence[float], dtype: torch.dtype) -> list[PreparedUpdate]:
    """The updates of many modules in `dtype`, with a few kernels for all modules of one size instead of a few a module.

    Where a copy is made anyway, ranks are padded with zeros to a multiple of 8: half-precision products of other widths
    are slower.
    """
    copied = [B.dtype != dtype for _, _, B in factors]
    multiples = [_ALIGNMENT if copy and dtype.itemsize == 2 else 1 for copy in copied]
    widths = [round_up(len(E), multiple) for (_, E, _), multiple in zip(factors, multiples, strict=True)]
    ups = [B.detach().t() for _, _, B in factors]
    keys = [(B.shape[0], B.device, B.dtype) if copy else None for (_, _, B), copy in zip(factors, copied, strict=True)]
    for chunk in _chunks(keys, widths):
        width = [widths[i] for i in chunk]
        joined = join_ranks([factors[i].B for i in chunk], 1, width).to(dtype).t()  # (R, out)
        for i, up in zip(chunk, joined.split(width), strict=True):
            ups[i] = up
    lows: list[tuple] = [()] * len(factors)
    keys = [(A.shape[1], A.device, A.dtype, scaling) for (A, _, _), scaling in zip(factors, scalings, strict=True)]
    for chunk in _chunks(keys, widths):
        width = [widths[i] for i in chunk]
        E, A = [factors[i].E for i in chunk], [factors[i].A for i in chunk]
        *folded, joined = FoldedFactors.apply(scalings[chunk[0]], dtype, width, *E, *A)
        for i, *pair in zip(chunk, folded, joined.t().split(width, 1), strict=True):
            lows[i] = pair
    return [
        PreparedUpdate(B, folded, low, up) for (_, _, B), (folded, low), up in zip(factors, lows, ups, strict=True)
    ]


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


class FoldedFactors(Function):
    """diag(scaling * E) A of many modules with one number of inputs, one below the other: (R, in), in `dtype`, rounded
    once. E goes to A, not to B, because the parts of its gradient then are rows, which parameters take as they are.

    Before it, (width, in) for each module, come stand-ins without content: what receives the gradient of the module's
    part, in the dtype of A. The part itself, in half precision, would have its gradient rounded. The gradients of all E
    and A are then computed together.

    Saves no tensors, as gradient checkpointing counts those: of a whole model this runs outside of a checkpointed block,
    and inside of it when the block is recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any, scaling: float, dtype: torch.dtype, widths: list[int], *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        E, A = factors[: len(widths)], factors[len(widths) :]
        scale = join_ranks(E, 0, widths).mul_(scaling).unsqueeze(1)  # (R, 1)
        joined = join_ranks(A, 0, widths)  # (R, in)
        low = torch.mul(joined, scale, out=torch.empty_like(joined, dtype=dtype))
        ctx.A, ctx.scale, ctx.scaling, ctx.widths = A, scale, scaling, widths
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(low)
        return *(joined.new_empty_strided((width, joined.shape[1]), (0, 0)) for width in widths), low

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None):
        count = len(ctx.widths)
        used = [i for i in range(count) if gradients[i] is not None]
        grad_E: list[torch.Tensor | None] = [None] * count
        grad_A: list[torch.Tensor | None] = [None] * count
        if used:
            widths = [ctx.widths[i] for i in used]
            scale = ctx.scale if len(used) == count else torch.cat([ctx.scale.split(ctx.widths)[i] for i in used])
            gradient = torch.cat([gradients[i] for i in used])  # (R, in)
            of_scale = (gradient * join_ranks([ctx.A[i] for i in used], 0, widths)).sum(1).mul_(ctx.scaling)
            for i, E, A in zip(used, of_scale.split(widths), gradient.mul_(scale).split(widths), strict=True):
                r = len(ctx.A[i])
                grad_E[i], grad_A[i] = (E, A) if r == len(E) else (E[:r], A[:r])
        return None, None, None, *grad_E, *grad_A


class LinearWithUpdate(Function):
    """y = x W^T + b + scaling * x A^T diag(E) B^T, with W and b frozen; the update as `prepare_updates` returns it.

    One node instead of a dozen: the update is accumulated into the base product (forward) and its gradient into the
    base gradient (backward) by the matrix products themselves, so that no activation-sized tensor is read or written
    for the sake of the adapter alone. E is folded into A, which is small, and the factors are cast to the dtype of the
    product, never the activation to theirs. Under autocast the product has autocast's dtype.

    Shapes: x (..., in), W (out, in), b (out,) or None; of the update see `PreparedUpdate`. Saves x, not more activations.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        B: torch.Tensor,
        folded: torch.Tensor,
        low: torch.Tensor,
        up: torch.Tensor,
    ) -> torch.Tensor:
        with without_autocast(x.device.type):
            dtype = low.dtype
            # each for itself: under autocast a half-precision activation meets a float32 weight
            rows = in_dtype(x.reshape(-1, x.shape[-1]), dtype)  # (tokens, in)
            weight = in_dtype(weight, dtype)
            # an output that is a view could not be changed in place by whoever gets it
            result = torch.empty(*x.shape[:-1], weight.shape[0], dtype=dtype, device=x.device)
            flat = result.view(-1, weight.shape[0])  # (tokens, out)
            if bias is None:
                torch.mm(rows, weight.t(), out=flat)
            else:
                torch.addmm(in_dtype(bias, dtype), rows, weight.t(), out=flat)
            hidden = torch.mm(rows, low)  # (tokens, r)
            flat.addmm_(hidden, up)
        ctx.save_for_backward(rows, weight, low, up, hidden)
        ctx.r, ctx.factor_dtype, ctx.in_shape = B.shape[1], B.dtype, x.shape
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor):
        rows, weight, low, up, hidden = ctx.saved_tensors
        needs_x, _, _, needs_B, needs_low, _, _ = ctx.needs_input_grad
        grad_x = grad_B = grad_low = None
        with without_autocast(grad_output.device.type):
            grad = grad_output.reshape(-1, grad_output.shape[-1])  # (tokens, out)
            if needs_x or needs_low:
                grad_hidden = torch.mm(grad, up.t())  # (tokens, r)
            if needs_x:
                grad_x = torch.mm(grad, weight).addmm_(grad_hidden, low.t()).view(ctx.in_shape)
            if needs_low:
                grad_low = _product(grad_hidden.t(), rows, ctx.factor_dtype)
            if needs_B:
                grad_B = _product(grad.t(), hidden, ctx.factor_dtype)
                grad_B = grad_B if grad_B.shape[1] == ctx.r else grad_B[:, : ctx.r]
        return grad_x, None, None, grad_B, grad_low, None, None


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`a @ b`, stored in `dtype`."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if _MM_HAS_OUT_DTYPE and a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


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


class Pending(NamedTuple):
    """What the backward pass of one module's factors does beside.

    Attributes:
        armed (`dict[str, list[Tensor | None]]`): By adapter, what is added to the gradients of A and B: once, and then None.
        watched (`dict[str, Tensor | None]`): By adapter, where the gradient of E is added up, in float32.
        mask (`Tensor`, *optional*): (r,), 0 for pruned ranks, in the dtype of E.
    """

    armed: dict[str, list[torch.Tensor | None]]
    watched: dict[str, torch.Tensor | None]
    mask: torch.Tensor | None


def with_pending(adapter_name: str, factors: Sequence[Factors], pending: Sequence[Pending]) -> list[Factors]:
    """The factors of many modules with E masked and all that is pending in their backward, in one node of the graph."""
    count = len(factors)
    A, E, B = zip(*factors, strict=True)
    found = PendingGradients.apply(adapter_name, pending, *A, *E, *B)
    return [Factors(*found[i::count]) for i in range(count)]


class PendingGradients(Function):
    """The identity on A and B and E * mask, whose backward adds and watches gradients, see `Pending`.

    Of all the backward passes of an optimizer step (micro-batches, a module that is used twice) exactly one adds.
    Saves no tensors, as `MaskRanks`.
    """

    @staticmethod
    def forward(ctx: Any, key: str, pending: Sequence[Pending], *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.key, ctx.pending = key, pending
        ctx.set_materialize_grads(False)
        count = len(pending)
        E = [e.view_as(e) for e in factors[count : 2 * count]]
        masks = {i: module.mask for i, module in enumerate(pending) if module.mask is not None}
        replace(E, masks, torch._foreach_mul)
        return *(A.view_as(A) for A in factors[:count]), *E, *(B.view_as(B) for B in factors[2 * count :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None):
        key, count, found = ctx.key, len(ctx.pending), list(gradients)
        masks, additions, watching = {}, {}, []
        for i, module in enumerate(ctx.pending):
            E = found[count + i]
            if E is not None and key in module.watched:
                watching.append((module.watched, E))
            if E is not None and module.mask is not None:
                masks[count + i] = module.mask
            armed = module.armed.get(key, (None, None))
            for j, position in enumerate((i, 2 * count + i)):
                if found[position] is not None and armed[j] is not None:
                    additions[position] = in_dtype(armed[j], found[position].dtype)
                    armed[j] = None
        _watch(key, watching)
        replace(found, masks, torch._foreach_mul)
        replace(found, additions, torch._foreach_add)
        return None, None, *found


def _watch(key: str, watching: Sequence[tuple[dict[str, torch.Tensor | None], torch.Tensor]]) -> None:
    """Add gradients to what is watched, in float32."""
    by_device: dict[torch.device, list[tuple]] = defaultdict(list)
    for pair in watching:
        by_device[pair[1].device].append(pair)
    for pairs in by_device.values():
        together = torch.cat([E for _, E in pairs]).float()
        for (watched, _), part in zip(pairs, together.split([E.numel() for _, E in pairs]), strict=True):
            before = watched[key]
            watched[key] = part if before is None else before + part


def replace(tensors: list[torch.Tensor], others: dict[int, torch.Tensor], operation: Callable) -> None:
    """Put `operation(tensor, other)` in the place of the tensors at these positions, with few kernels for all."""
    if others:
        results = operation([tensors[i] for i in others], list(others.values()))
        for i, result in zip(others, results, strict=True):
            tensors[i] = result
