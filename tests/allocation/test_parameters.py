# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Budgets of parameters spent on ranks, against enumeration of everything that could have been chosen."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from peft_rank.allocation.parameters import (
    align_rank,
    break_even,
    default_multiple,
    ladder,
    parameter_budget,
    parameters,
    repair_ranks,
    spectral_ranks,
    uniform_ranks,
)


# attention, feed-forward and a module too small for one multiple of 8
TINY = [(32, 32), (32, 32), (16, 32), (64, 32), (32, 64), (12, 10)]
LLAMA = ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 32


def cost(shapes, ranks):
    return sum(m * n if r is None else r * (m + n) for (m, n), r in zip(shapes, ranks, strict=True))


def dense(shapes):
    return sum(m * n for m, n in shapes)


def spectrum(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(min(shape), generator=generator, dtype=torch.float64).sort(descending=True).values
    return values ** (1 + 4 * torch.rand(1, generator=generator, dtype=torch.float64))


def dropped(spectra, ranks):
    return sum(0.0 if r is None else float(s[r:].square().sum()) for s, r in zip(spectra, ranks, strict=True))


def choices(shape, multiple):
    """All legal ranks of a module by definition: multiples whose factors are smaller than the weight, and dense."""
    m, n = shape
    ranks = [r for r in range(1, min(m, n) + 1) if r % multiple == 0 and r * (m + n) < m * n]
    return [*ranks, None]


def one_step(shapes, multiple):
    return max(multiple * sum(shape) for shape in shapes)


# --- ladders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (2, 20), (3, 5), (32, 32), (64, 48), (4096, 11008)])
def test_break_even_is_the_last_rank_that_pays(shape):
    (m, n), r = shape, break_even(shape)
    assert r * (m + n) < m * n <= (r + 1) * (m + n)


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (12, 10), (1, 9)])
@pytest.mark.parametrize("multiple", [1, 3, 8, 64])
def test_a_ladder_climbs_by_multiples_to_the_weight_itself(shape, multiple):
    levels = ladder(shape, multiple)
    costs = [level.cost for level in levels]
    assert costs == sorted(set(costs))
    assert levels[-1] == (math.prod(shape), None)
    assert all(level.cost == parameters(shape, level.rank) for level in levels)
    ranks = [level.rank for level in levels[:-1]]
    if multiple <= break_even(shape):
        assert ranks == [r for r in choices(shape, multiple) if r is not None]
    else:
        assert ranks == [r for r in (1, 2, 4, 8, 16, 32) if r <= multiple // 2 and r <= break_even(shape)]


def test_halves_of_a_multiple_come_below_it():
    assert [level.rank for level in ladder((64, 64), 8, halves=True)] == [1, 2, 4, 8, 16, 24, None]
    assert [level.rank for level in ladder((64, 64), 8)] == [8, 16, 24, None]


@pytest.mark.parametrize(
    ("rank", "multiple", "expected"),
    [
        (384, 64, 384),
        (1638, 64, 1664),
        (1600 + 32, 64, 1664),
        (1631, 64, 1600),
        (100, 64, 128),
        (40, 64, 40),  # below one multiple
        (1638, 1, 1638),
        (2047, 64, 1984),  # 2048 would cost what the weight costs
        (2048, 64, None),
        (5000, 64, None),
    ],
)
def test_a_given_rank_goes_to_the_nearest_multiple_that_pays(rank, multiple, expected):
    assert align_rank(rank, (4096, 4096), multiple) == expected


def test_small_modules_keep_the_rank_they_are_given():
    assert [align_rank(r, (12, 10), 8) for r in (1, 3, 5, 6)] == [1, 3, 5, None]


def test_tiles_are_for_wide_weights_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert default_multiple((4096, 1024), torch.device("cuda")) == 64
    assert default_multiple((4096, 1023), torch.device("cuda")) == 8
    assert default_multiple((4096, 4096), torch.device("cpu")) == 8
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert default_multiple((4096, 4096), torch.device("cuda")) == 8


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.77, 0.8, 1.0])
@pytest.mark.parametrize("others", [0, 1234])
def test_a_ratio_counts_everything(ratio, others):
    budget = parameter_budget(TINY, ratio, others=others)
    total = dense(TINY) + others
    assert ratio * total - 1 < budget + others <= ratio * total


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01, 0.01, math.nan])
def test_an_impossible_ratio_names_the_range(ratio):
    with pytest.raises(ValueError, match=rf"`ratio={ratio}` must be in \[0\.0\d+, 1\]"):
        parameter_budget(TINY, ratio)


def test_the_least_ratio_that_the_message_names_is_legal():
    with pytest.raises(ValueError, match="parameters count, of which 20,000 cannot shrink") as error:
        parameter_budget(TINY, 0.5, others=20000)
    lowest = float(str(error.value).split("[")[1].split(",")[0])
    budget = parameter_budget(TINY, lowest, others=20000)
    assert cost(TINY, uniform_ranks(TINY, budget)) <= budget
    assert lowest - (20000 + sum(map(sum, TINY))) / (20000 + dense(TINY)) < 1e-4


@pytest.mark.parametrize("budget", [-1, 0, sum(map(sum, TINY)) - 1, dense(TINY) + 1])
def test_an_impossible_budget_names_the_range(budget):
    spectra = [spectrum(shape, i) for i, shape in enumerate(TINY)]
    for choose in (
        lambda: uniform_ranks(TINY, budget),
        lambda: spectral_ranks(spectra, TINY, budget),
        lambda: repair_ranks([3] * len(TINY), TINY, budget),
    ):
        with pytest.raises(ValueError, match=rf"must be between {sum(map(sum, TINY))} .* and {dense(TINY)}"):
            choose()


@pytest.mark.parametrize("multiple", [0, -8, [8, 8]])
def test_an_impossible_multiple_is_refused(multiple):
    with pytest.raises(ValueError, match="`rank_multiple` must be an integer of at least 1, or one for each of the 6"):
        uniform_ranks(TINY, 3000, rank_multiple=multiple)


def every_method(shapes, budget, multiple, seed=0):
    spectra = [spectrum(shape, seed + i) for i, shape in enumerate(shapes)]
    wishes = [random.Random(seed + i).uniform(0, min(shape)) for i, shape in enumerate(shapes)]
    yield "uniform", uniform_ranks(shapes, budget, rank_multiple=multiple)
    yield "spectral", spectral_ranks(spectra, shapes, budget, rank_multiple=multiple)
    yield "repair", repair_ranks(wishes, shapes, budget, rank_multiple=multiple)
    yield "scores", repair_ranks(wishes, shapes, budget, rank_multiple=multiple, scores=spectra)


@pytest.mark.parametrize("multiple", [1, 4, 8, 64, [8, 1, 4, 8, 3, 2]], ids=str)
@pytest.mark.parametrize("ratio", [0.06, 0.1, 0.25, 0.5, 0.77, 0.9, 0.99, 1.0])
def test_the_budget_is_never_exceeded_and_missed_by_less_than_a_step(multiple, ratio):
    budget = parameter_budget(TINY, ratio)
    steps = multiple if isinstance(multiple, list) else [multiple] * len(TINY)
    # no ladder has longer steps than these, the one to the dense weight included
    longest = max(max(1, step) * sum(shape) for step, shape in zip(steps, TINY, strict=True))
    for seed in range(5):
        for method, ranks in every_method(TINY, budget, multiple, seed):
            left = budget - cost(TINY, ranks)
            assert left >= 0, method
            assert left < longest or all(rank is None for rank in ranks), method
            for shape, rank, step in zip(TINY, ranks, steps, strict=True):
                assert rank is None or 1 <= rank <= break_even(shape), method
                lowest_aligned = sum(ladder(s, m)[0].cost for s, m in zip(TINY, steps, strict=True))
                if lowest_aligned <= budget and rank is not None and break_even(shape) >= step:
                    assert rank % step == 0, method


@pytest.mark.parametrize(("ratio", "multiple"), [(0.02, 8), (0.02, 64), (0.5, 64), (0.8, 8), (0.8, 64), (0.95, 64)])
def test_llama_7b(ratio, multiple):
    budget = parameter_budget(LLAMA, ratio)
    for method, ranks in every_method(LLAMA, budget, multiple):
        assert 0 <= budget - cost(LLAMA, ranks) < one_step(LLAMA, multiple), method


def test_everything_is_dense_at_ratio_one():
    for _, ranks in every_method(TINY, dense(TINY), 8):
        assert ranks == [None] * len(TINY)


def test_results_do_not_depend_on_the_order_of_modules_of_different_worth():
    order = [3, 0, 5, 1, 4, 2]
    shapes = [(32, 48), (48, 32), (64, 32), (64, 64), (24, 80), (40, 40)]
    spectra = [spectrum(shape, i) for i, shape in enumerate(shapes)]
    budget = parameter_budget(shapes, 0.6)
    ranks = spectral_ranks(spectra, shapes, budget, rank_multiple=2)
    shuffled = spectral_ranks([spectra[i] for i in order], [shapes[i] for i in order], budget, rank_multiple=2)
    assert shuffled == [ranks[i] for i in order]


# --- uniform ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_uniform_ranks_keep_the_same_part_of_every_module(ratio):
    ranks = uniform_ranks(LLAMA, parameter_budget(LLAMA, ratio), rank_multiple=64)
    for shape, rank in zip(LLAMA, ranks, strict=True):
        step = 64 * sum(shape) / math.prod(shape)
        assert abs(parameters(shape, rank) / math.prod(shape) - ratio) <= step


def test_uniform_ranks_of_equal_modules_differ_by_one_step():
    shapes = [(256, 256)] * 10
    ranks = uniform_ranks(shapes, parameter_budget(shapes, 0.55), rank_multiple=8)
    assert set(ranks) == {64, 72}  # 0.5 and 0.5625
    assert sum(ranks) * 512 <= 0.55 * 10 * 256**2 < (sum(ranks) + 8) * 512


# --- spectra ----------------------------------------------------------------------------------------------------------


def best_by_enumeration(spectra, shapes, budget, multiple):
    return min(
        dropped(spectra, ranks)
        for ranks in itertools.product(*(choices(shape, multiple) for shape in shapes))
        if cost(shapes, ranks) <= budget
    )


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_of_ranks_drops_less_where_all_steps_cost_the_same(seed):
    """Square modules of one size whose weight costs one step more than the last rank: greedy is exact."""
    shapes = [(16, 16)] * 4  # ranks 2, 4, 6, dense: each step costs 64
    spectra = [spectrum(shape, 100 * seed + i) for i, shape in enumerate(shapes)]
    # without a jump: spectra that end where factors stop to pay
    for values in spectra:
        values[8:] = 0
    ratio = random.Random(seed).choice([0.3, 0.4, 0.5, 0.7, 0.9])
    budget = parameter_budget(shapes, ratio)
    ranks = spectral_ranks(spectra, shapes, budget, rank_multiple=2)
    best = best_by_enumeration(spectra, shapes, budget, 2)
    assert dropped(spectra, ranks) == pytest.approx(best, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_of_ranks_drops_much_less(seed):
    """Any shapes: the distance to the optimum is less than one step of the convex hull avoids."""
    chance = random.Random(seed)
    shapes = [(chance.randint(4, 20), chance.randint(4, 20)) for _ in range(4)]
    spectra = [spectrum(shape, 100 * seed + i) for i, shape in enumerate(shapes)]
    budget = parameter_budget(shapes, chance.uniform(0.45, 0.95))
    ranks = spectral_ranks(spectra, shapes, budget, rank_multiple=1)
    assert cost(shapes, ranks) <= budget
    best, found = best_by_enumeration(spectra, shapes, budget, 1), dropped(spectra, ranks)
    assert best <= found + 1e-12
    most = max(gain for values, shape in zip(spectra, shapes, strict=True) for gain in hull_steps(values, shape))
    assert found - best < most


def hull_steps(values, shape):
    """What each step between neighbours on the lower convex hull of (cost, loss) avoids, by the hull's definition."""
    points = [(cost([shape], [rank]), dropped([values], [rank])) for rank in choices(shape, 1)]

    def below_all_chords(k):
        (x, y) = points[k]
        chords = itertools.product(points[:k], points[k + 1 :])
        return all(y < left[1] + (x - left[0]) * (right[1] - left[1]) / (right[0] - left[0]) for left, right in chords)

    hull = [points[k][1] for k in range(len(points)) if below_all_chords(k)]
    return [high - low for high, low in itertools.pairwise(hull)]


def test_most_choices_are_the_best_there_is():
    exact = 0
    for seed in range(60):
        chance = random.Random(seed)
        shapes = [(chance.randint(6, 16), chance.randint(6, 16)) for _ in range(4)]
        spectra = [spectrum(shape, 100 * seed + i) for i, shape in enumerate(shapes)]
        budget = parameter_budget(shapes, chance.uniform(0.5, 0.9))
        ranks = spectral_ranks(spectra, shapes, budget, rank_multiple=1)
        best, found = best_by_enumeration(spectra, shapes, budget, 1), dropped(spectra, ranks)
        uniform = dropped(spectra, uniform_ranks(shapes, budget, rank_multiple=1))
        assert found <= uniform + 1e-12
        exact += found <= best * 1.02 + 1e-12
    assert exact >= 45, exact


def test_a_weight_of_few_ranks_gives_its_parameters_away():
    flat, steep = torch.ones(64), torch.cat([torch.ones(8), torch.zeros(56)])
    shapes = [(64, 64), (64, 64)]
    ranks = spectral_ranks([flat, steep], shapes, parameter_budget(shapes, 0.65), rank_multiple=8)
    assert ranks == [None, 8]


def test_a_jump_to_the_weight_itself_is_taken_where_it_pays():
    """Flat spectra: the weight avoids 1/16 of the loss per 16 parameters, factors 1/32."""
    shapes = [(32, 32)] * 4
    ranks = spectral_ranks([torch.ones(32)] * 4, shapes, parameter_budget(shapes, 0.6), rank_multiple=1)
    best = best_by_enumeration([torch.ones(32)] * 4, shapes, parameter_budget(shapes, 0.6), 5)
    assert ranks.count(None) == 2
    assert dropped([torch.ones(32)] * 4, ranks) <= best


@pytest.mark.parametrize("values", [torch.ones(31), torch.full((32,), torch.nan), torch.ones(32, 1)])
def test_a_spectrum_that_does_not_fit_is_refused(values):
    with pytest.raises(ValueError, match="`spectra` must hold 32 finite values for a weight of shape"):
        spectral_ranks([values], [(32, 32)], 500)


# --- learned ranks ----------------------------------------------------------------------------------------------------


def test_wishes_that_meet_the_budget_stay():
    wishes = [8, 8, 8, 16, 16, 4]
    budget = cost(TINY, wishes)
    assert repair_ranks(wishes, TINY, budget, rank_multiple=8) == wishes
    scores = [torch.ones(min(shape)) for shape in TINY]
    assert repair_ranks(wishes, TINY, budget, rank_multiple=8, scores=scores) == wishes
    assert repair_ranks([7.6, 8.3, None, 15, 17, 4], TINY, dense(TINY), rank_multiple=8)[2] is None


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.3])
def test_repaired_ranks_stay_proportional_to_the_wishes(factor):
    shapes = [(512, 512)] * 3
    wishes = [40, 80, 160]
    budget = int(factor * cost(shapes, wishes))
    ranks = repair_ranks(wishes, shapes, budget, rank_multiple=4)
    assert budget - cost(shapes, ranks) < 4 * 1024
    assert all(abs(rank / wish - factor) <= 4 / wish for rank, wish in zip(ranks, wishes, strict=True))


def test_scores_say_which_module_gives():
    shapes = [(64, 64), (64, 64)]
    worthy, idle = torch.ones(64), torch.full((64,), 0.1)
    assert repair_ranks([16, 16], shapes, 24 * 128, rank_multiple=8, scores=[worthy, idle]) == [16, 8]
    assert repair_ranks([16, 16], shapes, 40 * 128, rank_multiple=8, scores=[idle, worthy]) == [16, 24]


def test_a_wish_above_break_even_is_dense():
    assert repair_ranks([16, 3], [(32, 32)] * 2, 1024 + 192, rank_multiple=1) == [None, 3]


@pytest.mark.parametrize("wish", [-1, math.inf, math.nan])
def test_impossible_wishes_are_refused(wish):
    with pytest.raises(ValueError, match="`desired` must hold ranks of 0 or more, or None"):
        repair_ranks([wish], [(32, 32)], 500)
