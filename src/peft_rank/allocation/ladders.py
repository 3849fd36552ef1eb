# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The levels that a factorized weight can have, and what they cost.

A weight of shape (out, in) costs out * in parameters, its two factors of rank r cost r * (out + in). A module therefore
climbs a ladder: from its lowest rank, by multiples of `rank_multiple`, to the highest rank whose factors are still smaller
than the weight, and from there to the weight itself, which no factors beat any more. That last level is called dense and
has the rank None.

Ranks below one multiple (halves of it, down to 1) are on the ladder of a module that is too small for one multiple, and
on every ladder where a budget cannot be met otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


Shape = tuple[int, int]

TILE, WIDE = 64, 1024
"""The multiple on a GPU, for modules whose smaller side has so many features."""


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
    return TILE if tiles and min(shape) >= WIDE else 8


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


def least_parameters(shapes: Sequence[Shape]) -> int:
    """What the weights cost at rank 1, or dense where even that does not pay."""
    return sum(parameters(shape, 1 if break_even(shape) else None) for shape in shapes)


def ladders_within(shapes: Sequence[Shape], budget: int, rank_multiple: int | Sequence[int]) -> list[list[Level]]:
    """
    Ladders whose lowest levels the budget pays for.

    Raises:
        ValueError: If there are none, if the budget is above the dense weights, or `rank_multiple` fits no module.
    """
    multiples = [rank_multiple] * len(shapes) if isinstance(rank_multiple, int) else list(rank_multiple)
    if len(multiples) != len(shapes) or any(multiple < 1 for multiple in multiples):
        raise ValueError(
            f"`rank_multiple` must be an integer of at least 1, or one for each of the {len(shapes)} modules, got "
            f"{rank_multiple!r}."
        )
    least, dense = least_parameters(shapes), sum(map(math.prod, shapes))
    if not least <= budget <= dense:
        raise ValueError(
            f"`budget` must be between {least} (rank 1 in each of the {len(shapes)} modules) and {dense} (all dense) "
            f"parameters, got {budget}."
        )
    ladders = [ladder(shape, multiple) for shape, multiple in zip(shapes, multiples, strict=True)]
    if sum(steps[0].cost for steps in ladders) > budget:
        ladders = [ladder(shape, multiple, halves=True) for shape, multiple in zip(shapes, multiples, strict=True)]
    return ladders
