# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Ranks that grow under DDP on two processes: what one process does, with parameters that really are widened and cut."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from peft import PeftModel

import peft_rank  # noqa: F401 - registers the adapter's type
from tiny_models import TinyModel


pytestmark = pytest.mark.distributed

ARGUMENTS = {"save_strategy": "steps", "save_steps": 5, "ddp_find_unused_parameters": False, "max_grad_norm": 1.0}
COMMON = {"method": "inrank", "arguments": ARGUMENTS}


def scratch(run: dict) -> dict:
    config = {"from_scratch": True, "init_weights": True, "explained_ratio": 1.0}
    # a whole model amplifies rounding more than adapters do
    arguments = {**run["arguments"], "learning_rate": 3e-3}
    return {**run, "name": f"{run['name']}-scratch", "config": config, "arguments": arguments}


ONE = {"name": "added", **COMMON}
ACCUMULATED = {"name": "accumulated", "accumulation": 2, **COMMON}
RESUMED = {"name": "resumed", "resume": "added/checkpoint-5", "seed": 1, **COMMON}
RESUMED_SCRATCH = {**scratch(RESUMED), "resume": "added-scratch/checkpoint-5"}


@pytest.fixture(scope="module")
def one(launch: Callable) -> Callable:
    return launch("inrank-single", [ONE, scratch(ONE)], processes=1)


@pytest.fixture(scope="module")
def two(launch: Callable) -> Callable:
    return launch("inrank-ddp", [ONE, ACCUMULATED, RESUMED, scratch(ONE), RESUMED_SCRATCH])


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("added", "added"),
        ("accumulated", "added"),
        ("resumed", "added"),
        ("added-scratch", "added-scratch"),
        ("resumed-scratch", "added-scratch"),
    ],
)
def test_two_processes_train_what_one_trains(one: Callable, two: Callable, name: str, reference: str) -> None:
    alone, both = one(reference), two(name)
    assert (both.seen["engine"], both.seen["processes"]) == ("DistributedDataParallel", 2)
    weights, loss = (1e-3, 1e-4) if "scratch" in name else (2e-5, 1e-5)
    alone.check_same(both, weights, loss)


def test_ranks_grow_several_times(one: Callable) -> None:
    for name in ("added", "added-scratch"):
        totals = one(name).seen["totals"]
        assert all(after >= before for before, after in pairwise(totals))
        assert len(set(totals)) > 2
        assert totals[11:] == [totals[11]] * 9


@pytest.mark.parametrize("name", ["added", "resumed", "added-scratch", "resumed-scratch"])
def test_the_processes_agree_bit_for_bit(two: Callable, name: str) -> None:
    main, other = two(name).processes
    assert main["pattern"] == other["pattern"]
    assert main["totals"] == other["totals"]
    torch.testing.assert_close(main["logits"], other["logits"], rtol=0, atol=0)
    for key, factor in main["factors"].items():
        torch.testing.assert_close(other["factors"][key], factor, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["added", "added-scratch"])
def test_what_is_saved_is_compact_and_loads(two: Callable, llama: TinyModel, name: str) -> None:
    run = two(name)
    widths = {key: len(value) for key, value in run.adapter.items() if key.endswith("inrank_A")}
    assert sum(widths.values()) == run.seen["totals"][-1]
    model = PeftModel.from_pretrained(
        llama.make_model(seed=2 if "scratch" in name else 0), run.folder / "adapter"
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**llama.make_batch(4, seed=7)).logits, run.seen["logits"], rtol=0, atol=2e-5)
