# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Budgets and snapshots of a search, without a model."""

import math

import pytest
import torch

from peft_rank import L2LRCConfig
from peft_rank.allocation.masks import keep_probability
from peft_rank.allocation.parameters import break_even
from peft_rank.tuners.search.functional import pad_rows
from peft_rank.tuners.search.state import SearchState


SHAPES = [(32, 32), (64, 32), (32, 64), (16, 32), (96, 48)]


def _state(prefix: bool = True, others: int = 50, multiple: int = 1, **settings) -> SearchState:
    config = L2LRCConfig(**{"target_ratio": 0.7, **settings})
    return SearchState(config, SHAPES, [multiple] * len(SHAPES), others, others, prefix)


def _logits(seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(min(shape), generator=generator).sort(descending=True).values for shape in SHAPES]
    return pad_rows([3 * row + shift for row in rows], float("-inf"))


def _spent(selection: list[torch.Tensor | None]) -> int:
    """Parameters, counted without the state."""
    pairs = zip(selection, SHAPES, strict=True)
    return sum(math.prod(shape) if ranks is None else len(ranks) * sum(shape) for ranks, shape in pairs)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("shift", [-20.0, -2.0, 0.0, 2.0, 20.0])
def test_the_budget_is_met_within_a_step_whatever_the_logits(multiple: int, ratio: float, shift: float) -> None:
    state = _state(multiple=multiple, target_ratio=ratio)
    dense = sum(map(math.prod, SHAPES))
    for seed in range(5):
        selection = state.choose(_logits(seed, shift), ratio)
        left = ratio * (dense + 50) - 50 - _spent(selection)
        assert 0 <= left < multiple * max(map(sum, SHAPES))
        for ranks, shape in zip(selection, SHAPES, strict=True):
            assert ranks is None or (len(ranks) <= break_even(shape) and len(ranks) % multiple == 0)


def test_what_is_likely_and_affordable_is_kept_as_it_is() -> None:
    """Ten of 32 ranks in each of the small modules cost less than the budget, and nothing has to be repaired."""
    state = _state(others=0, target_ratio=1.0)
    counts = [5, 7, 9, 3, 11]
    rows = [torch.where(torch.arange(min(s)) < n, 2.0, -2.0) for s, n in zip(SHAPES, counts, strict=True)]
    logits = pad_rows(rows, float("-inf"))
    assert state.likely(logits).tolist() == counts
    budget = sum(n * sum(shape) for n, shape in zip(counts, SHAPES, strict=True))
    assert float(state.ratio(state.likely(logits))) == pytest.approx(budget / sum(map(math.prod, SHAPES)))
    state.budgets[1.0] = budget
    assert [len(ranks) for ranks in state.choose(logits, 1.0)] == counts


def test_any_ranks_or_the_leading_ones() -> None:
    logits = _logits(0).flip(1)  # the last ranks are the likely ones
    logits = torch.where(torch.isinf(logits), -9.0, logits)
    for j, size in enumerate(map(min, SHAPES)):
        logits[j, size:] = float("-inf")
    prefix, free = _state(True).choose(logits, 0.7), _state(False).choose(logits, 0.7)
    for ranks in prefix:
        assert ranks is None or ranks.tolist() == list(range(len(ranks)))
    for row, ranks in zip(logits, free, strict=True):
        if ranks is not None:
            assert ranks.tolist() == sorted(ranks.tolist())
            dropped = set(range(int(torch.isfinite(row).sum()))) - set(ranks.tolist())
            assert min(row[ranks]) >= max(row[list(dropped)])


def test_a_module_counts_as_factors_or_as_its_weight_with_the_gradient_of_factors() -> None:
    state = _state(others=100)
    counts = torch.tensor([4.0, 32.0, 10.0, 16.0, 48.0], requires_grad=True)
    ratio = state.ratio(counts)
    kept = 4 * 64 + 64 * 32 + 10 * 96 + 16 * 32 + 96 * 48 + 100
    total = sum(map(math.prod, SHAPES)) + 100
    assert float(ratio) == pytest.approx(kept / total)
    ratio.backward()
    torch.testing.assert_close(counts.grad, torch.tensor([64.0, 96, 96, 48, 144]) / total)


def test_targets_are_reached_from_the_largest_to_the_smallest() -> None:
    state = _state(target_ratio=[0.5, 0.9], patience=2, tolerance=0.01)
    reached = []
    for step, shift in enumerate([20.0, 0.0, -20.0, 20.0, -20.0, -20.0], start=1):
        state.step = step
        reached.append(state.record(_logits(1, shift)))
        assert state.out_of_patience == (step == 6)
    assert reached == [None, 0.9, 0.5, None, None, None]
    assert set(state.snapshots) == {0.9, 0.5}
    total = sum(map(math.prod, SHAPES)) + 50
    for ratio, selection in state.snapshots.items():
        assert ratio * total - 50 - 144 < _spent(selection) <= ratio * total - 50


@pytest.mark.parametrize("prefix", [True, False])
def test_packed_and_unpacked(prefix: bool) -> None:
    state = _state(prefix, target_ratio=[0.8, 0.6])
    for step in range(1, 4):
        state.step = step
        state.record(_logits(2, -20.0))
    other = _state(prefix, target_ratio=[0.8, 0.6])
    other.unpack(state.pack())
    assert (other.step, other.recorded, other.met, other.target) == (3, 3, state.met, 0.6)
    for ratio, selection in state.snapshots.items():
        for mine, theirs in zip(selection, other.snapshots[ratio], strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="damaged"):
        other.unpack(state.pack()[:-3])


def test_keep_probability_of_padding_is_nothing() -> None:
    logits = _logits(0)
    assert float(keep_probability(logits)[0, 32:].sum()) == 0.0


@pytest.mark.parametrize("ratio", [0.01, 0.04])
def test_too_small_a_target(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"`target_ratio=.*must be in \[0\.0\d+, 1\].*rank 1"):
        _state(target_ratio=ratio, others=0)


def test_a_search_that_diverged() -> None:
    with pytest.raises(ValueError, match="NaN: the search diverged"):
        _state().choose(_logits(0) * float("nan"), 0.7)
