# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The regularizer that keeps the factors of B diag(E) A orthonormal: its value and its gradient.

    R = 1 / (2 M) * sum over the M modules of (||A A^T - I||_F + ||B^T B - I||_F)

(AdaLoRA, https://huggingface.co/papers/2303.10512, eq. 4; SalientLoRA, NeurIPS 2024). The norms are not squared, as in
the released code of both. The gradient is written out, so that it needs no autograd graph and no loss: it can be added
to the gradients once per optimizer step. Factors of similar shape are batched into one product.

Differences from the released code: only living ranks take part (there, ranks that were pruned stay in the sum), and the
gradient vanishes, instead of being NaN or rounding noise of full size, where a factor is orthonormal to rounding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch


# elements of one stack: bounds the memory of a step, and is large enough to fill an accelerator
_STACK_NUMEL = 2**26


def join_ranks(factors: Sequence[torch.Tensor], rank_dim: int, widths: Sequence[int]) -> torch.Tensor:
    """The factors one after another along their ranks, each padded with zeros to its width; in one piece of memory."""
    parts, paddings = [], {}
    for factor, width in zip(factors, widths, strict=True):
        parts.append(factor)
        missing = width - factor.shape[rank_dim]
        if missing:
            if missing not in paddings:  # a model has hundreds of factors, and few differences
                shape = list(factor.shape)
                shape[rank_dim] = missing
                numel = math.prod(shape)
                zeros = _zeros(1 << (numel - 1).bit_length(), factor.device, factor.dtype)
                paddings[missing] = zeros[:numel].view(shape)
            parts.append(paddings[missing])
    return torch.cat(parts, rank_dim)


@lru_cache(maxsize=64)
def _zeros(numel: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(numel, device=device, dtype=dtype)


@lru_cache(maxsize=1024)
def _filled(sizes: tuple[int, ...], width: int, device: torch.device) -> torch.Tensor:
    """(g, width), 1 in the first `sizes[i]` places of row i. Kept: making it waits for the device."""
    places = torch.arange(width)
    return (places < torch.tensor(sizes)[:, None]).to(device, torch.float32)


def _stacks(
    factors: Sequence[torch.Tensor], alive: Sequence[torch.Tensor | None], rank_dim: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Yields, for groups of similarly shaped factors: positions, the factors as a float32 stack (g, ..., ...) with
    dead and missing ranks set to 0, and which ranks are alive, (g, r) or a single 1."""
    if len(alive) != len(factors):
        raise ValueError(f"`alive` must have one entry a module, got {len(alive)} for {len(factors)} modules.")
    groups: dict[tuple, list[int]] = defaultdict(list)
    for position, factor in enumerate(factors):
        r, other = factor.shape[rank_dim], factor.shape[1 - rank_dim]
        if r > 0:
            # together up to the next power of 2: few groups, and little waste
            groups[(max(r - 1, 7).bit_length(), other, factor.device, factor.dtype)].append(position)
    for (_, other, device, _), positions in groups.items():
        width = max(factors[position].shape[rank_dim] for position in positions)
        size = max(1, _STACK_NUMEL // (width * other))
        for start in range(0, len(positions), size):
            chunk = positions[start : start + size]
            sizes = [factors[position].shape[rank_dim] for position in chunk]
            widths = [width] * len(chunk)
            stack = join_ranks([factors[position] for position in chunk], rank_dim, widths).float()
            # (g, width, in) or (g, out, width)
            stack = stack.view(-1, width, other) if rank_dim == 0 else stack.view(other, -1, width).transpose(0, 1)
            masks = torch.ones((), device=device)
            given = [alive[position] for position in chunk]
            if any(mask is not None for mask in given):
                # masks may lie where a model was before it was moved; cast together, since a model has hundreds
                given = [
                    _filled((r,), r, device)[0] if mask is None else mask.to(device)
                    for mask, r in zip(given, sizes, strict=True)
                ]
                masks = join_ranks(given, 0, widths).float().view(-1, width)
                stack = stack * masks.unsqueeze(2 if rank_dim == 0 else 1)
            elif min(sizes) < width:
                masks = _filled(tuple(sizes), width, device)
            yield chunk, stack, masks


def _residual(stack: torch.Tensor, alive: torch.Tensor, rank_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gram matrix of the ranks minus the identity, (g, r, r), 0 for dead ranks, and its Frobenius norm (g, 1, 1)."""
    gram = torch.bmm(stack, stack.mT) if rank_dim == 0 else torch.bmm(stack.mT, stack)
    gram.diagonal(dim1=-2, dim2=-1).sub_(alive)
    return gram, torch.linalg.matrix_norm(gram, keepdim=True)


def _check(down: Sequence[torch.Tensor], up: Sequence[torch.Tensor]) -> None:
    if not down or len(down) != len(up):
        raise ValueError(
            f"`down` and `up` must have one entry a module, of one module or more; got {len(down)} and {len(up)}."
        )


@torch.no_grad()
def orthogonality(
    down: Sequence[torch.Tensor], up: Sequence[torch.Tensor], alive: Sequence[torch.Tensor | None] | None = None
) -> torch.Tensor:
    """Value of the regularizer.

    Args:
        down (`Sequence[torch.Tensor]`): A of every module, (r, in_features).
        up (`Sequence[torch.Tensor]`): B of every module, (out_features, r).
        alive (`Sequence[torch.Tensor | None]`, *optional*): (r,) of every module, true where a rank is alive; `None`
            stands for all alive.

    Returns:
        `torch.Tensor`: Scalar, float32, on the device of the first factor. 0 where no rank is alive.

    Raises:
        ValueError: If the sequences are empty or differ in length.
    """
    _check(down, up)
    total = torch.zeros((), dtype=torch.float32, device=down[0].device)
    for rank_dim, factors in enumerate((down, up)):
        for _, stack, masks in _stacks(factors, alive or [None] * len(down), rank_dim):
            total = total + _residual(stack, masks, rank_dim)[1].sum().to(total.device)
    return total / (2 * len(down))


@torch.no_grad()
def orthogonality_with_gradient(
    down: Sequence[torch.Tensor],
    up: Sequence[torch.Tensor],
    alive: Sequence[torch.Tensor | None] | None = None,
    weight: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Value of the regularizer and gradient of `weight` times it.

    d ||F F^T - I||_F / dF = 2 (F F^T - I) F / ||F F^T - I||_F, for F = A and F = B^T.

    Args:
        down, up, alive: As in [`orthogonality`].
        weight (`float`): Factor of the regularizer in the loss.
        dtype (`torch.dtype`, *optional*): Of the gradients, by default float32, which everything is computed in.

    Returns:
        `tuple[torch.Tensor, tuple[list[torch.Tensor], list[torch.Tensor]]]`: The value as [`orthogonality`] returns it,
        without the weight; and gradients of `down` and of `up`, each with the shape of its factor, 0 for dead ranks.

    Raises:
        ValueError: If the sequences are empty or differ in length.
    """
    _check(down, up)
    dtype = dtype or torch.float32
    total = torch.zeros((), dtype=torch.float32, device=down[0].device)
    gradients: tuple[list, list] = ([None] * len(down), [None] * len(up))
    for rank_dim, factors in enumerate((down, up)):
        for position, factor in enumerate(factors):
            if factor.shape[rank_dim] == 0:
                gradients[rank_dim][position] = torch.zeros_like(factor, dtype=dtype)
        for positions, stack, masks in _stacks(factors, alive or [None] * len(down), rank_dim):
            residual, norm = _residual(stack, masks, rank_dim)
            total = total + norm.sum().to(total.device)
            # a residual within rounding of 0 has no direction; the floor lets its gradient vanish
            floor = torch.finfo(norm.dtype).eps * 8 * residual.shape[1]
            residual *= weight / len(down) / norm.clamp_min(floor)
            gradient = torch.bmm(residual, stack) if rank_dim == 0 else torch.bmm(stack, residual)
            for position, each in zip(positions, gradient.to(dtype).unbind(), strict=True):
                r = factors[position].shape[rank_dim]
                gradients[rank_dim][position] = each if r == each.shape[rank_dim] else each.narrow(rank_dim, 0, r)
    return total / (2 * len(down)), gradients
