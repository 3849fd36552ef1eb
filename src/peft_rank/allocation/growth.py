# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""When a rank has to grow: how much of a product's spectrum it explains.

Knows neither layers nor training. The rule is that of InRank (https://huggingface.co/papers/2306.11250), section 4: of a
product B A of width rank + buffer, the rank has to explain a given share; if it does not, the smallest rank that does
takes its place.

Differences from the released code, all of them undone by `reference=True`:
- the share is one of the energy (the sum of squared singular values) by default; the code takes variances over all
  min(in, out) singular values, zeros included, so that the share depends on the width of the layer;
- where no rank within the buffer explains enough, the rank grows by the whole buffer, the code stops one short of it (and
  never grows by a buffer of 1, and fails with a buffer of 0);
- the rank may reach `max_r`; the code stops at `max_r - buffer - 1`.
"""

from __future__ import annotations

import torch
from torch import Tensor


CRITERIA = ("energy", "variance")
# a variance of less than this share of the energy is rounding: the spectrum is flat
_FLAT = 1e-12


def explained_ratio(
    singular_values: Tensor, rank: int, criterion: str = "energy", *, size: int | None = None
) -> float:
    """The share of a spectrum that its first `rank` values explain.

    With S(x) = sum x^2 for the criterion `"energy"`, and S(x) = sum x^2 - (sum x)^2 / D for `"variance"` (D times the
    variance of D values), the share is 1 - S(x without its first `rank` values) / S(x). D counts zeros: they change no
    sum, so that the nonzero values suffice.

    Args:
        singular_values (`Tensor`): Shape (k,), largest first.
        rank (`int`): How many of them explain; from k on, everything is explained.
        criterion (`str`, *optional*, defaults to `"energy"`): `"energy"` or `"variance"`. A variance may be explained to
            less than 0.
        size (`int`, *optional*): D, if `singular_values` lacks zeros.

    Returns:
        `float`: At most 1. Of a product that is zero everything is explained. Of a flat spectrum, which has no variance,
        the share of the energy.

    Raises:
        ValueError: If a value is not finite or an argument is out of its range.
    """
    if rank < 0:
        raise ValueError(f"`rank` must be at least 0, got {rank}.")
    shares = _shares(singular_values, criterion, size)
    return float(shares[min(rank, len(shares) - 1)])


def next_rank(
    singular_values: Tensor,
    current: int,
    buffer: int,
    max_r: int,
    threshold: float,
    criterion: str = "energy",
    reference: bool = False,
    *,
    size: int | None = None,
) -> int:
    """The rank after a check: the smallest from `current` on that explains more than `threshold`.

    Args:
        singular_values (`Tensor`): Shape (k,), those of the product of width `current + buffer`, largest first.
        current (`int`): The rank before; it never decreases.
        buffer (`int`): Growth is at most this.
        max_r (`int`): No rank above this is chosen.
        threshold (`float`): The share to explain, at most 1, see `explained_ratio`.
        criterion (`str`, *optional*, defaults to `"energy"`): See `explained_ratio`.
        reference (`bool`, *optional*, defaults to `False`): The released code's rule, where `max_r` is the allocated
            width: ranks of `current + buffer - 1` and of `max_r - buffer - 1` are never exceeded, and a spectrum
            without variance counts as unexplained.
        size (`int`, *optional*): See `explained_ratio`.

    Returns:
        `int`: `current` if it explains enough, is `max_r` or more, or has no buffer.

    Raises:
        ValueError: If a value is not finite or an argument is out of its range.
    """
    if current < 0 or buffer < 0:
        raise ValueError(f"`current` and `buffer` must be at least 0, got {current} and {buffer}.")
    if not threshold <= 1:
        raise ValueError(f"`threshold={threshold}` must be at most 1, a share of the spectrum.")
    shares = _shares(singular_values, criterion, size, literal=reference)
    last = min(current + buffer - 1, max_r - buffer - 1) if reference else min(current + buffer, max_r)
    for rank in range(current, last + 1):
        if shares[min(rank, len(shares) - 1)] > threshold:
            return rank
    return max(current, last)


def _shares(singular_values: Tensor, criterion: str, size: int | None, literal: bool = False) -> Tensor:
    """Shape (k + 1,), float64: what the first 0, 1, ... k values explain; 0 / 0 stays as it is if `literal`."""
    if singular_values.dim() != 1:
        raise ValueError(f"`singular_values` must have one dimension, got the shape {tuple(singular_values.shape)}.")
    if criterion not in CRITERIA:
        raise ValueError(f"`criterion={criterion!r}` must be one of {', '.join(map(repr, CRITERIA))}.")
    values = singular_values.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()):
        raise ValueError("`singular_values` must be finite: check the weights and the loss for NaN or infinity.")
    size = len(values) if size is None else size
    if size < len(values):
        raise ValueError(f"`size={size}` must be at least the number of singular values, {len(values)}.")
    squares, sums = _tails(values.square()), _tails(values)  # (k + 1,), of the values from each on
    if criterion == "variance" and size > 0:
        variances = squares - sums.square() / size
        if literal or variances[0] > _FLAT * squares[0]:
            squares = variances
    if literal or squares[0] > 0:
        return 1 - squares / squares[0]
    return torch.ones_like(squares)


def _tails(values: Tensor) -> Tensor:
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
