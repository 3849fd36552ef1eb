# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""From a budget of parameters to the ranks of factorized weights.

Knows shapes, spectra and budgets; neither models nor where a spectrum comes from. A weight of shape (out, in) costs
out * in parameters, its two factors of rank r cost r * (out + in). A module therefore climbs a ladder: from its lowest
rank, by multiples of `rank_multiple`, to the highest rank whose factors are still smaller than the weight, and from there
to the weight itself, which no factors beat any more. That last level is called dense and stands in the results as None.

Ranks below one multiple (halves of it, down to 1) are on the ladder of a module that is too small for one multiple, and
on every ladder where a budget cannot be met otherwise.

No budget is ever exceeded. What is left of it is less than one step of the ladder that the search ended at, unless every
module is dense. Everything is deterministic, so that every process comes to the same ranks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


Shape = tuple[int, int]

WIDE = 1024
"""Modules whose smaller side has this many features are worth the larger multiple on a GPU."""


class Level(NamedTuple):
    """A step of a module's ladder: `rank` None is the dense weight."""

    cost: int
    rank: int | None


def break_even(shape: Shape) -> int:
    """The highest rank whose factors are smaller than the weight of shape (out, in): r (out + in) < out * in."""
    out_features, in_features = shape
    return (out_features * in_features - 1) // (out_features + in_features)


def parameters(shape: Shape, rank: int | None) -> int:
    """Parameters of the factors of a rank, or of the dense weight where the rank is None."""
    return math.prod(shape) if rank is None else rank * sum(shape)


def default_multiple(shape: Shape, device: torch.device) -> int:
    """What ranks should be multiples of: 64 for weights of 1024 features or more on both sides on a CUDA device of
    compute capability 8 or more, where tensor cores are fed by tiles; else 8."""
    tiles = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return 64 if tiles and min(shape) >= WIDE else 8


def align_rank(rank: int, shape: Shape, multiple: int) -> int | None:
    """
    A rank that somebody asked for, fit for the hardware.

    Args:
        rank (`int`): At least 1.
        shape (`tuple[int, int]`): (out, in) of the weight.
        multiple (`int`): At least 1.

    Returns:
        `int | None`: The nearest multiple whose factors are smaller than the weight, the higher one of two. A rank below
        one multiple stays as it is, and so does every rank of a module too small for one. None, the dense weight, where
        the factors of `rank` itself would not be smaller.
    """
    highest = break_even(shape)
    if rank > highest:
        return None
    if rank < multiple:
        return rank
    return min((rank + multiple // 2) // multiple, highest // multiple) * multiple


def ladder(shape: Shape, multiple: int, halves: bool = False) -> list[Level]:
    """
    Every level that a module can have, cheapest first.

    Args:
        shape (`tuple[int, int]`): (out, in) of the weight.
        multiple (`int`): What ranks are multiples of.
        halves (`bool`, *optional*, defaults to `False`): Start below one multiple, at 1, even where one multiple fits.
    """
    highest = break_even(shape)
    ranks = list(range(multiple, highest + 1, multiple))
    if halves or not ranks:
        below, rank = [], multiple // 2
        while rank >= 1:
            below.append(rank)
            rank //= 2
        ranks = [rank for rank in reversed(below) if rank <= highest] + ranks
    return [Level(parameters(shape, rank), rank) for rank in [*ranks, None]]


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
    dense, least = sum(map(math.prod, shapes)), _least(shapes)
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
    ladders = _ladders(shapes, budget, rank_multiple)
    return _ranks(
        ladders, _climb(ladders, [0] * len(ladders), budget, lambda i, level: level.cost / ladders[i][-1].cost)
    )


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
    (cost, loss) are taken in order of loss avoided per parameter, which is optimal whenever the last one fits exactly.
    Otherwise what is left is spent on the best levels that fit, on the hull or not, and the loss exceeds the optimum by
    less than what the first step that did not fit would have avoided.

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
    ladders = _ladders(shapes, budget, rank_multiple)
    losses = [_losses(values, shape, steps) for values, shape, steps in zip(spectra, shapes, ladders, strict=True)]
    at = [0] * len(ladders)
    left = budget - sum(steps[0].cost for steps in ladders)
    segments = sorted(
        (segment for i, steps in enumerate(ladders) for segment in _hull(i, steps, losses[i])),
        key=lambda segment: (-segment[0], segment[1], segment[2]),
    )
    closed = set()
    for _, module, level in segments:
        cost = ladders[module][level].cost - ladders[module][at[module]].cost
        if module in closed or cost > left:
            # the hull of this module ends here
            closed.add(module)
        else:
            at[module], left = level, left - cost
    _spend(ladders, losses, at, left)
    return _ranks(ladders, at)


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
    ladders = _ladders(shapes, budget, rank_multiple)
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

    # negative, and 0 at the dense end: what is lost beyond a level
    losses = [_tail(values, shape, "scores") for values, shape in zip(scores, shapes, strict=True)]

    def worth(i: int, low: Level, high: Level) -> float:
        beyond = 0.0 if high.rank is None else losses[i][high.rank]
        return (losses[i][low.rank] - beyond) / (high.cost - low.cost)

    _descend(ladders, at, budget, worth)
    below = [{high: low for low, high in pairwise(steps)} for steps in ladders]
    return _ranks(ladders, _climb(ladders, at, budget, lambda i, level: -worth(i, below[i][level], level)))


def _least(shapes: Sequence[Shape]) -> int:
    return sum(parameters(shape, 1 if break_even(shape) else None) for shape in shapes)


def _ladders(shapes: Sequence[Shape], budget: int, rank_multiple: int | Sequence[int]) -> list[list[Level]]:
    """Ladders whose lowest levels the budget pays for."""
    multiples = [rank_multiple] * len(shapes) if isinstance(rank_multiple, int) else list(rank_multiple)
    if len(multiples) != len(shapes) or any(multiple < 1 for multiple in multiples):
        raise ValueError(
            f"`rank_multiple` must be an integer of at least 1, or one for each of the {len(shapes)} modules, got "
            f"{rank_multiple!r}."
        )
    least, dense = _least(shapes), sum(map(math.prod, shapes))
    if not least <= budget <= dense:
        raise ValueError(
            f"`budget` must be between {least} (rank 1 in each of the {len(shapes)} modules) and {dense} (all dense) "
            f"parameters, got {budget}."
        )
    ladders = [ladder(shape, multiple) for shape, multiple in zip(shapes, multiples, strict=True)]
    if sum(steps[0].cost for steps in ladders) > budget:
        ladders = [ladder(shape, multiple, halves=True) for shape, multiple in zip(shapes, multiples, strict=True)]
    return ladders


def _ranks(ladders: Sequence[Sequence[Level]], at: Sequence[int]) -> list[int | None]:
    return [steps[level].rank for steps, level in zip(ladders, at, strict=True)]


def _climb(
    ladders: Sequence[Sequence[Level]], at: list[int], budget: int, key: Callable[[int, Level], float]
) -> list[int]:
    """Steps up, that of the smallest key first, which is given the module and the level that it would reach. After the
    first step that does not fit, every other module takes one more at the most."""
    left = budget - sum(steps[level].cost for steps, level in zip(ladders, at, strict=True))
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
    used = sum(steps[level].cost for steps, level in zip(ladders, at, strict=True))
    queue = [(key(i, steps[at[i] - 1], steps[at[i]]), i) for i, steps in enumerate(ladders) if at[i]]
    heapq.heapify(queue)
    while used > budget:
        _, i = heapq.heappop(queue)
        steps = ladders[i]
        used -= steps[at[i]].cost - steps[at[i] - 1].cost
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
    """Steps along the lower convex hull of (cost, loss), steepest first: (loss avoided per parameter, module, level)."""

    def slope(low: int, high: int) -> float:
        return (losses[low] - losses[high]) / (steps[high].cost - steps[low].cost)

    hull = [0]
    for level in range(1, len(steps)):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], level):
            hull.pop()
        hull.append(level)
    return [(slope(low, high), module, high) for low, high in pairwise(hull)]


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
