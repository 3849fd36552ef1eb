# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""From a budget of parameters to the ranks of factorized weights.

Knows shapes, spectra and budgets; neither models nor where a spectrum comes from. Levels and ladders are `ladders.py`'s.

No budget is ever exceeded. What is left of it is less than one step of the ladder that the search ended at, unless every
module is dense. Everything is deterministic, so that every process comes to the same ranks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .ladders import (
    TILE,
    Level,
    Shape,
    align_rank,
    break_even,
    default_multiple,
    ladder,
    ladders_within,
    least_parameters,
    parameters,
)


__all__ = [
    "TILE",
    "Level",
    "Shape",
    "align_rank",
    "break_even",
    "comparable",
    "default_multiple",
    "ladder",
    "parameter_budget",
    "parameters",
    "repair_ranks",
    "spectral_ranks",
    "uniform_ranks",
]


def parameter_budget(shapes: Sequence[Shape], ratio: float, *, others: int = 0) -> int:
    """
    What a ratio leaves for the factorized weights.

    Args:
        shapes (`Sequence[tuple[int, int]]`): (out, in) of every weight.
        ratio (`float`): Kept parameters / dense parameters, of the weights and the others together.
        others (`int`, *optional*, defaults to 0): Parameters that count and cannot shrink: biases, and with a ratio over
            the model whatever is not factorized.

    Returns:
        `int`: Parameters that the weights may have.

    Raises:
        ValueError: If the ratio cannot be reached, or is above 1; the message names the range.
    """
    dense, least = sum(map(math.prod, shapes)), least_parameters(shapes)
    total = dense + others
    # the lowest legal ratio, rounded up, so that the message can be followed to the letter
    lowest = math.ceil((least + others) / total * 1e4) / 1e4
    budget = math.floor(ratio * total) - others if 0 < ratio <= 1 else -1
    if budget < least:
        fixed = f", of which {others:,} cannot shrink" if others else ""
        raise ValueError(
            f"`ratio={ratio}` must be in [{lowest}, 1]: at rank 1 the {len(shapes)} targeted modules keep {least:,} of "
            f"their {dense:,} weights, and {total:,} parameters count{fixed}. Raise `ratio` or target more modules."
        )
    return budget


def uniform_ranks(shapes: Sequence[Shape], budget: int, *, rank_multiple: int | Sequence[int] = 8) -> list[int | None]:
    """
    Ranks at which every module keeps the same part of its parameters, as nearly as the ladders allow.

    The module that would keep the smallest part takes the next step, until one does not fit; then every other module may
    take one more.

    Args:
        shapes (`Sequence[tuple[int, int]]`): (out, in) of every weight.
        budget (`int`): Parameters that the weights may have together.
        rank_multiple (`int` or `Sequence[int]`, *optional*, defaults to 8): For all modules or for each.

    Returns:
        `list[int | None]`: A rank, or None for dense, for every module.

    Raises:
        ValueError: If the budget is below what rank 1 takes everywhere, or above the dense weights.
    """
    ladders = ladders_within(shapes, budget, rank_multiple)
    return _ranks(ladders, _level_with(ladders, budget))


def comparable(values: Tensor, amounts: bool) -> Tensor:
    """What [`spectral_ranks`] compares modules by.

    Args:
        values (`Tensor`): Singular values of a weight in the metric of a decomposition, (k,).
        amounts (`bool`): Take them as they are; otherwise relative to their norm, so that what a rank drops counts as the
            part of the whole that it is.
    """
    return values if amounts else values / torch.linalg.vector_norm(values).clamp(min=torch.finfo(values.dtype).tiny)


def spectral_ranks(
    spectra: Sequence[Tensor],
    shapes: Sequence[Shape],
    budget: int,
    *,
    rank_multiple: int | Sequence[int] = 8,
) -> list[int | None]:
    """
    Ranks that drop the least: the smallest sum of squared singular values beyond the ranks, for a budget.

    A choice of one level per module at the least loss for a cost: the steps along the lower convex hull of each module's
    (cost, loss) are taken in order of loss avoided per parameter, which is optimal if they meet the budget exactly.
    Otherwise what is left is spent on the best levels that fit, on the hull or not; the same is tried with the first step
    that did not fit taken first; and the better of the two, or the uniform ranks if these are better still, exceeds the
    optimum by less than what that step would have avoided.

    Args:
        spectra (`Sequence[Tensor]`): Singular values of every weight in the metric of a decomposition, shape
            (min(out, in),), as [`decomposition.weighted_spectrum`] gives them. Modules are compared in its units.
        shapes (`Sequence[tuple[int, int]]`): (out, in) of every weight.
        budget (`int`): Parameters that the weights may have together.
        rank_multiple (`int` or `Sequence[int]`, *optional*, defaults to 8): For all modules or for each.

    Returns:
        `list[int | None]`: A rank, or None for dense, for every module.

    Raises:
        ValueError: As `uniform_ranks`, and if a spectrum does not fit its weight or is not finite.
    """
    ladders = ladders_within(shapes, budget, rank_multiple)
    losses = [_losses(values, shape, steps) for values, shape, steps in zip(spectra, shapes, ladders, strict=True)]
    segments = sorted(segment for i, steps in enumerate(ladders) for segment in _hull(i, steps, losses[i]))
    greedy, missed = _follow(ladders, losses, segments, budget)
    candidates = [greedy, _level_with(ladders, budget)]
    if missed is not None:
        candidates.append(_follow(ladders, losses, segments, budget, missed)[0])
    best = min(candidates, key=lambda at: sum(losses[i][level] for i, level in enumerate(at)))
    return _ranks(ladders, best)


def repair_ranks(
    desired: Sequence[float | None],
    shapes: Sequence[Shape],
    budget: int,
    *,
    rank_multiple: int | Sequence[int] = 8,
    scores: Sequence[Tensor] | None = None,
) -> list[int | None]:
    """
    Ranks that somebody wished for, learned ones say, moved onto the ladders and to a budget.

    Every module starts at the level nearest to its wish. While that costs too much, modules step down, then modules step
    up while something fits. Without scores the module furthest above (below) its wish in proportion steps down (up), so
    that the ranks stay proportional to the wishes. With scores the step whose ranks score least (most) per parameter is
    taken.

    Args:
        desired (`Sequence[float]`): Wished rank of every module, 0 or more; at or above its break-even rank, and None,
            mean dense.
        shapes (`Sequence[tuple[int, int]]`): (out, in) of every weight.
        budget (`int`): Parameters that the weights may have together.
        rank_multiple (`int` or `Sequence[int]`, *optional*, defaults to 8): For all modules or for each.
        scores (`Sequence[Tensor]`, *optional*): Of every module the worth of each of its ranks, first rank first, at
            least 0, shape (min(out, in),).

    Returns:
        `list[int | None]`: A rank, or None for dense, for every module.

    Raises:
        ValueError: As `uniform_ranks`, and if a wish is negative or not finite or scores do not fit their weights.
    """
    ladders = ladders_within(shapes, budget, rank_multiple)
    wishes = [_wish(rank, shape) for rank, shape in zip(desired, shapes, strict=True)]
    at = [
        min(range(len(steps)), key=lambda level: (abs(steps[level].cost / sum(shape) - wish), level))
        for steps, wish, shape in zip(ladders, wishes, shapes, strict=True)
    ]
    if scores is None:

        def excess(i: int, level: Level) -> float:
            return level.cost / (sum(shapes[i]) * max(wishes[i], 1e-9))

        _descend(ladders, at, budget, lambda i, low, high: -excess(i, high))
        return _ranks(ladders, _climb(ladders, at, budget, excess))

    # what is lost beyond a rank
    losses = [_tail(values, shape, "scores") for values, shape in zip(scores, shapes, strict=True)]

    def worth(i: int, low: Level, high: Level) -> float:
        beyond = 0.0 if high.rank is None else losses[i][high.rank]
        return (losses[i][low.rank] - beyond) / (high.cost - low.cost)

    _descend(ladders, at, budget, worth)
    below = [{high: low for low, high in pairwise(steps)} for steps in ladders]
    return _ranks(ladders, _climb(ladders, at, budget, lambda i, level: -worth(i, below[i][level], level)))


def _ranks(ladders: Sequence[Sequence[Level]], at: Sequence[int]) -> list[int | None]:
    return [steps[level].rank for steps, level in zip(ladders, at, strict=True)]


def _left(ladders: Sequence[Sequence[Level]], at: Sequence[int], budget: int) -> int:
    return budget - sum(steps[level].cost for steps, level in zip(ladders, at, strict=True))


def _level_with(ladders: Sequence[Sequence[Level]], budget: int) -> list[int]:
    """Levels at which all modules keep the same part, as nearly as possible."""
    return _climb(ladders, [0] * len(ladders), budget, lambda i, level: level.cost / ladders[i][-1].cost)


def _climb(
    ladders: Sequence[Sequence[Level]], at: list[int], budget: int, key: Callable[[int, Level], float]
) -> list[int]:
    """Steps up, that of the smallest key first, which is given the module and the level that it would reach. After the
    first step that does not fit, every other module takes one more at the most."""
    left = _left(ladders, at, budget)
    queue = [(key(i, steps[at[i] + 1]), i) for i, steps in enumerate(ladders) if at[i] + 1 < len(steps)]
    heapq.heapify(queue)
    last_round = False
    while queue:
        _, i = heapq.heappop(queue)
        steps, level = ladders[i], at[i] + 1
        cost = steps[level].cost - steps[level - 1].cost
        if cost > left:
            last_round = True
            continue
        at[i], left = level, left - cost
        if not last_round and level + 1 < len(steps):
            heapq.heappush(queue, (key(i, steps[level + 1]), i))
    return at


def _descend(
    ladders: Sequence[Sequence[Level]], at: list[int], budget: int, key: Callable[[int, Level, Level], float]
) -> None:
    """Steps down until the budget is met, that of the smallest key first, which is given the module and the levels below
    and above the step."""
    left = _left(ladders, at, budget)
    queue = [(key(i, steps[at[i] - 1], steps[at[i]]), i) for i, steps in enumerate(ladders) if at[i]]
    heapq.heapify(queue)
    while left < 0:
        _, i = heapq.heappop(queue)
        steps = ladders[i]
        left += steps[at[i]].cost - steps[at[i] - 1].cost
        at[i] -= 1
        if at[i]:
            heapq.heappush(queue, (key(i, steps[at[i] - 1], steps[at[i]]), i))


def _wish(rank: float | None, shape: Shape) -> float:
    """A wished rank, not above the rank whose factors would cost what the dense weight costs."""
    dense = math.prod(shape) / sum(shape)
    if rank is None:
        return dense
    if not 0 <= rank < math.inf:
        raise ValueError(f"`desired` must hold ranks of 0 or more, or None for dense, got {rank} for shape {shape}.")
    return dense if rank > break_even(shape) else float(rank)


def _tail(values: Tensor, shape: Shape, name: str) -> list[float]:
    """Sums of `values`, shape (k,), from each place on, and 0 at the end: k + 1 floats."""
    if values.shape != (min(shape),) or not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"`{name}` must hold {min(shape)} finite values for a weight of shape {shape}, got "
            f"{int(torch.isfinite(values).sum())} finite ones in a tensor of shape {tuple(values.shape)}."
        )
    sums = values.detach().to("cpu", torch.float64).flip(0).cumsum(0).flip(0)
    return [*sums.tolist(), 0.0]


def _losses(values: Tensor, shape: Shape, steps: Sequence[Level]) -> list[float]:
    """What each level drops; nothing where it is dense."""
    tail = _tail(values.detach().to("cpu", torch.float64).square(), shape, "spectra")
    return [0.0 if level.rank is None else tail[level.rank] for level in steps]


def _hull(module: int, steps: Sequence[Level], losses: Sequence[float]) -> list[tuple[float, int, int]]:
    """Steps along the lower convex hull of (cost, loss), steepest first: (- loss avoided per parameter, module, level)."""

    def slope(low: int, high: int) -> float:
        return (losses[high] - losses[low]) / (steps[high].cost - steps[low].cost)

    hull = [0]
    for level in range(1, len(steps)):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], level):
            hull.pop()
        hull.append(level)
    return [(slope(low, high), module, high) for low, high in pairwise(hull)]


def _follow(
    ladders: Sequence[Sequence[Level]],
    losses: Sequence[Sequence[float]],
    segments: Sequence[tuple[float, int, int]],
    budget: int,
    forced: tuple[int, int] | None = None,
) -> tuple[list[int], tuple[int, int] | None]:
    """Levels after taking every segment that fits, and the first (module, level) that did not; one can be forced."""
    at, closed, missed = [0] * len(ladders), set(), None
    if forced is not None and ladders[forced[0]][forced[1]].cost - ladders[forced[0]][0].cost <= _left(
        ladders, at, budget
    ):
        at[forced[0]] = forced[1]
        closed.add(forced[0])
    left = _left(ladders, at, budget)
    for _, module, level in segments:
        cost = ladders[module][level].cost - ladders[module][at[module]].cost
        if module not in closed and cost <= left:
            at[module], left = level, left - cost
        elif module not in closed:
            # the hull of this module ends here
            closed.add(module)
            missed = missed or (module, level)
    _spend(ladders, losses, at, left)
    return at, missed


def _spend(ladders: Sequence[Sequence[Level]], losses: Sequence[Sequence[float]], at: list[int], left: int) -> None:
    """Spend what is left on the levels that avoid the most loss per parameter among those that fit."""
    while True:
        best = None
        for i, steps in enumerate(ladders):
            for level in range(at[i] + 1, len(steps)):
                cost = steps[level].cost - steps[at[i]].cost
                if cost > left:
                    break
                gain = (losses[i][at[i]] - losses[i][level]) / cost
                if best is None or gain > best[0]:
                    best = (gain, i, level, cost)
        if best is None:
            return
        _, i, level, cost = best
        at[i], left = level, left - cost
