# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The regularizer that keeps the factors of B diag(E) A orthonormal: its value and its gradient.

    R = 1 / (2 M) * sum over the M modules of (||A A^T - I||_F + ||B^T B - I||_F)

(AdaLoRA, https://huggingface.co/papers/2303.10512, eq. 4; SalientLoRA, NeurIPS 2024). The norms are not squared, as in
the released code of both. The gradient is written out, so that it needs no autograd graph and no loss: it can be added
to the gradients once per optimizer step. Factors of equal shape are batched into one product.

Differences from the released code: only living ranks take part (there, ranks that were pruned stay in the sum), and
the gradient vanishes, instead of being NaN or rounding noise of full size, where a factor is orthonormal to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch


# elements of one stack: bounds the memory of a step, and is large enough to fill an accelerator
_STACK_NUMEL = 2**26


def _by_shape(factors: Sequence[torch.Tensor]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yields positions and a float32 stack (g, r, n) for groups of equally shaped factors (r, n) with r > 0."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for position, factor in enumerate(factors):
        if factor.shape[0] > 0:
            groups[(factor.shape, factor.device)].append(position)
    for (shape, _), positions in groups.items():
        size = max(1, _STACK_NUMEL // shape.numel())
        for start in range(0, len(positions), size):
            chunk = positions[start : start + size]
            yield chunk, torch.stack([factors[position] for position in chunk]).float()


def _residuals(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(g, r, n) -> F F^T - I (g, r, r) and its Frobenius norm (g, 1, 1); a zero row is a dead rank and has no target."""
    gram = torch.bmm(stack, stack.mT)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.sub_((diagonal > 0).to(diagonal.dtype))
    return gram, torch.linalg.matrix_norm(gram, keepdim=True)


def _rows(down: Sequence[torch.Tensor], up: Sequence[torch.Tensor], alive: Sequence[torch.Tensor | None]):
    """All factors with ranks as rows, (r, n) each, rows of dead ranks set to zero."""
    if not len(down) == len(up) == len(alive):
        raise ValueError(
            f"`down`, `up` and `alive` must have one entry a module, got {len(down)}, {len(up)} and {len(alive)}."
        )
    rows = [*down, *(factor.mT for factor in up)]
    masks = [*alive, *alive]
    return [row if mask is None else row * mask[:, None] for row, mask in zip(rows, masks, strict=True)]


@torch.no_grad()
def orthogonality(
    down: Sequence[torch.Tensor], up: Sequence[torch.Tensor], alive: Sequence[torch.Tensor | None] | None = None
) -> torch.Tensor:
    """Value of the regularizer.

    Args:
        down (`Sequence[torch.Tensor]`): A of every module, (r, in_features).
        up (`Sequence[torch.Tensor]`): B of every module, (out_features, r).
        alive (`Sequence[torch.Tensor | None]`, *optional*): (r,) bool of every module; `None` stands for all alive.

    Returns:
        `torch.Tensor`: Scalar, float32, on the device of the first factor. 0 where no rank is alive.
    """
    if not down:
        raise ValueError("`down` is empty: the regularizer needs the factors of at least one module.")
    factors = _rows(down, up, alive or [None] * len(down))
    total = torch.zeros((), dtype=torch.float32, device=down[0].device)
    for _, stack in _by_shape(factors):
        total += _residuals(stack)[1].sum().to(total.device)
    return total / (2 * len(down))


@torch.no_grad()
def orthogonality_gradient(
    down: Sequence[torch.Tensor],
    up: Sequence[torch.Tensor],
    alive: Sequence[torch.Tensor | None] | None = None,
    weight: float = 1.0,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradient of `weight * orthogonality(down, up, alive)`.

    d ||F F^T - I||_F / dF = 2 (F F^T - I) F / ||F F^T - I||_F, for F = A and F = B^T.

    Args:
        down, up, alive: As in [`orthogonality`].
        weight (`float`): Factor of the regularizer in the loss.

    Returns:
        `tuple[list[torch.Tensor], list[torch.Tensor]]`: Gradients of `down` and of `up`, each with the shape of its
        factor, float32; 0 for dead ranks.
    """
    factors = _rows(down, up, alive or [None] * len(down))
    gradients = [torch.zeros_like(factor, dtype=torch.float32) if factor.shape[0] == 0 else None for factor in factors]
    for positions, stack in _by_shape(factors):
        residual, norm = _residuals(stack)
        # a residual within rounding of 0 has no direction; the floor lets its gradient vanish
        floor = torch.finfo(norm.dtype).eps * 8 * stack.shape[1]
        gradient = torch.bmm(residual, stack) * (weight / len(down) / norm.clamp_min(floor))
        for position, each in zip(positions, gradient, strict=True):
            gradients[position] = each
    return gradients[: len(down)], [gradient.mT for gradient in gradients[len(down) :]]
