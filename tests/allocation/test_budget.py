# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The budget rule against a rank-by-rank transcription of what it promises."""

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_rank.allocation.budget import keep_top


def keep_one_by_one(scores: Tensor, budget: int, sizes: list[int], alive: Tensor, min_r: int) -> list[bool]:
    """First the best `min_r` of each module, then the best of the rest; lower index first among equals."""
    values = scores.tolist()
    kept: set[int] = set()
    start = 0
    for size in sizes:
        candidates = [i for i in range(start, start + size) if alive[i]]
        kept.update(sorted(candidates, key=lambda i: (-values[i], i))[:min_r])
        start += size
    rest = [i for i in range(len(values)) if alive[i] and i not in kept]
    kept.update(sorted(rest, key=lambda i: (-values[i], i))[: budget - len(kept)])
    return [i in kept for i in range(len(values))]


def test_matches_the_rule_taken_one_by_one() -> None:
    rng = np.random.default_rng(0)
    for case in range(300):
        sizes = rng.integers(0, 6, size=rng.integers(1, 8)).tolist()
        n = sum(sizes)
        pool = np.array([-np.inf, -1.0, 0.0, 0.0, 0.25, 1e30, np.inf]) if case % 2 else rng.normal(size=50)
        scores = torch.tensor(rng.choice(pool, size=n), dtype=torch.float64)
        alive = torch.tensor(rng.random(n) < 0.7, dtype=torch.bool)
        min_r = int(rng.integers(0, 4))
        floor = sum(min(min_r, int(part.sum())) for part in alive.split(sizes))
        for budget in {floor, int(alive.sum()), int(rng.integers(floor, int(alive.sum()) + 1))}:
            keep = keep_top(scores, budget, sizes, alive=alive, min_r=min_r)
            assert keep.dtype == torch.bool
            assert keep.sum() == budget
            assert keep.tolist() == keep_one_by_one(scores, budget, sizes, alive, min_r)


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([0.5, 0.7, 0.5, 0.5, 0.1])
    assert keep_top(scores, 3, [2, 3]).tolist() == [True, True, True, False, False]


def test_without_alive_every_rank_can_stay() -> None:
    assert keep_top(torch.tensor([-torch.inf, 1.0]), 2, [2]).all()


def test_alive_rank_beats_a_dead_one_of_higher_score() -> None:
    scores = torch.tensor([9.0, -torch.inf, 1.0])
    keep = keep_top(scores, 2, [3], alive=torch.tensor([False, True, True]))
    assert keep.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 4}, "`budget` must be between 0 .* and 3 .*, got 4"),
        ({"budget": -1}, "`budget` must be .*, got -1"),
        ({"budget": 1, "min_r": 1}, "`budget` must be between 2 .*min_r=1.*, got 1. Lower min_r"),
        ({"min_r": -1}, "`min_r` must be at least 0, got -1"),
        ({"group_sizes": [2, 3]}, "`group_sizes` must .* sum .*got 5"),
        ({"group_sizes": [5, -1]}, "`group_sizes` must be non-negative"),
        ({"alive": torch.ones(3, dtype=torch.bool)}, r"`alive` must be bool of shape \(4,\)"),
        ({"alive": torch.ones(4)}, "`alive` must be bool"),
        ({"scores": torch.tensor([1.0, torch.nan, 0.0, 0.0])}, "`scores` must not hold NaN"),
        ({"scores": torch.ones(2, 2)}, r"shape \(2, 2\)"),
        ({"budget": 5, "reference": True}, "`budget` must be between 0 and 4"),
    ],
)
def test_impossible_request_says_why(arguments: dict, message: str) -> None:
    valid = {
        "scores": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "budget": 2,
        "group_sizes": [2, 2],
        "alive": torch.tensor([True, True, False, True]),
    }
    with pytest.raises(ValueError, match=message):
        keep_top(**{**valid, **arguments})


def test_reference_follows_the_released_rule() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        n = int(rng.integers(2, 30))
        scores = rng.choice(np.array([0.0, 0.1, 0.1, 0.5, np.nan]), size=n)
        budget = int(rng.integers(0, n))
        threshold = np.sort(scores)[n - budget - 1]  # numpy sorts NaN last as well
        keep = keep_top(torch.tensor(scores), budget, [n], reference=True)
        assert keep.tolist() == (scores > threshold).tolist()


def test_reference_drops_all_ties_at_the_threshold() -> None:
    scores = torch.tensor([0.1, 0.5, 0.5, 0.9])
    assert keep_top(scores, 2, [4], reference=True).tolist() == [False, False, False, True]
    assert keep_top(scores, 4, [4], reference=True).all()
