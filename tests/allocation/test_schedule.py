# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The schedule against the released code's traces, the paper's formulas, and what must hold for any run."""

import csv
import random
from itertools import pairwise
from pathlib import Path

import pytest

from peft_rank.allocation.schedule import AllocationSchedule, Decision


GOLDEN = Path(__file__).parents[1] / "golden" / "salientlora"
# total, warm-up, released final phase, modules, initial rank, target rank
TRACES = [(1000, 0, 200, 12, 12, 4), (1000, 100, 200, 6, 8, 8), (300, 100, 150, 6, 12, 2), (400, 40, 80, 4, 8, 2)]
TRACES += [(600, 60, 120, 18, 12, 4)]
# The GLUE settings of the paper's scripts: warm-up, allocation.
GLUE = {"cola": (800, 2000), "mnli": (8000, 35000), "mrpc": (600, 1000), "qnli": (2000, 8500), "rte": (600, 1500)}


@pytest.mark.parametrize("trace", TRACES, ids=str)
def test_reference_reproduces_released_trace(trace: tuple[int, ...]) -> None:
    total, warmup, final, modules, rank, target = trace
    name = f"schedule_total{total}_iw{warmup}_fw{final}_nmat{modules}_r{rank}_target{target}.csv"
    with (GOLDEN / name).open() as file:
        expected = [
            (int(row["step"]), int(row["curr_rank"])) for row in csv.DictReader(file) if row["mask_ind"] == "1"
        ]
    schedule = AllocationSchedule(
        warmup, total - final - warmup, total, 10, 200, modules * rank, modules * target, reference=True
    )
    decisions = schedule.decisions()
    assert [(decision.step, decision.budget) for decision in decisions] == expected
    assert [decision.step for decision in decisions] == [
        warmup + sum(earlier.window for earlier in decisions[: k + 1]) for k in range(len(decisions))
    ]


def test_reference_on_cola_misses_the_target_as_released() -> None:
    decisions = AllocationSchedule(800, 2000, 26725, 10, 200, 1080, 144, reference=True).decisions()
    budgets = {decision.step: decision.budget for decision in decisions}
    expected = {810: 1023, 853: 981, 963: 888, 1110: 771, 1341: 612, 1680: 429, 2133: 270, 2675: 176}
    assert {step: budgets[step] for step in expected} == expected
    assert decisions[-1].step == 2675


def test_cola_by_default() -> None:
    schedule = AllocationSchedule(800, 2000, 26725, 10, 200, 1080, 144)
    decisions = schedule.decisions()
    # T(10 / 2000) = round(200 - 190 * 0.995^3) = 13 and b = int(1080 - 13 / 200 * 936) = 1019, by hand.
    assert decisions[0] == Decision(step=810, window=10, budget=1019)
    assert decisions[1].step == 823
    assert decisions[-1] == Decision(step=2800, window=37, budget=144)
    assert str(schedule) == (
        "ranks 1080 -> 144 in 21 decisions over steps 801-2800 (windows 10 to 200 steps), then fixed until step 26725"
    )


@pytest.mark.parametrize("task", GLUE)
def test_glue_settings_end_exactly_at_the_target(task: str) -> None:
    warmup, allocation = GLUE[task]
    last = AllocationSchedule(warmup, allocation, warmup + allocation, 10, 200, 1080, 144).decisions()[-1]
    assert (last.step, last.budget) == (warmup + allocation, 144)


def test_any_schedule_covers_the_phase_and_meets_the_budget() -> None:
    rng = random.Random(0)
    for _ in range(1500):
        warmup, allocation = rng.randrange(50), rng.randrange(1, rng.choice([4, 30, 600]))
        shortest = rng.randrange(1, 30)
        longest = shortest + rng.choice([0, 1, 50, 400])
        initial = rng.randrange(2, 2000)
        target = rng.randrange(1, initial)
        total = warmup + allocation + rng.randrange(5)
        schedule = AllocationSchedule(warmup, allocation, total, shortest, longest, initial, target)
        decisions = schedule.decisions()

        covered = [s for d in decisions for s in range(d.step - d.window + 1, d.step + 1)]
        assert covered == list(range(warmup + 1, warmup + allocation + 1)), schedule
        assert (decisions[-1].step, decisions[-1].budget) == (warmup + allocation, target)
        budgets = [initial, *(decision.budget for decision in decisions)]
        assert all(before >= after for before, after in pairwise(budgets)), schedule
        assert len(decisions) == 1 or decisions[-1].window >= 3, schedule

        expected_window = shortest
        for decision in decisions[:-1]:
            assert decision.window == expected_window
            c = (decision.step - warmup) / allocation
            expected_window = round(longest + (shortest - longest) * (1 - c) ** 3)
            assert decision.budget == int(initial - expected_window / longest * (initial - target))


@pytest.mark.parametrize("allocation", [1, 2, 9, 10, 12])
def test_phase_shorter_than_two_windows_has_one_decision(allocation: int) -> None:
    schedule = AllocationSchedule(5, allocation, 100, 10, 200, 60, 8)
    assert schedule.decisions() == [Decision(step=5 + allocation, window=allocation, budget=8)]
    assert "in 1 decision over" in str(schedule)


def test_last_window_of_three_steps_stands_alone_and_of_two_is_joined() -> None:
    assert [d.window for d in AllocationSchedule(0, 13, 13, 10, 10, 60, 8).decisions()] == [10, 3]
    assert [d.window for d in AllocationSchedule(0, 12, 12, 10, 10, 60, 8).decisions()] == [12]


def test_equal_totals_mean_no_decision() -> None:
    schedule = AllocationSchedule(0, 0, 100, 10, 200, 60, 60)
    assert schedule.decisions() == []
    assert "no allocation" in str(schedule)
    assert AllocationSchedule(0, 50, 100, 10, 200, 60, 60).decisions() == []


VALID = {
    "warmup_steps": 10,
    "allocation_steps": 50,
    "total_steps": 100,
    "initial_window": 10,
    "final_window": 20,
    "initial_total": 60,
    "target_total": 8,
}


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("warmup_steps", -1, "at least 0"),
        ("warmup_steps", 0.1, "integer"),
        ("allocation_steps", 0, "at least 1"),
        ("allocation_steps", True, "integer"),
        ("total_steps", 59, "at least 60"),
        ("initial_window", 0, "at least 1"),
        ("final_window", 9, "at least 10"),
        ("initial_total", 0, "at least 1"),
        ("target_total", 61, "between 1 and 60"),
        ("target_total", 0, "between 1 and 60"),
    ],
)
def test_illegal_field_is_named_with_value_and_range(field: str, value: object, legal: str) -> None:
    with pytest.raises(ValueError, match=rf"`{field}` must be .*{legal}.*, got {value}\. \w+"):
        AllocationSchedule(**{**VALID, field: value})
