# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Two processes under DDP train what one process trains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel

from tiny_models import TinyModel


pytestmark = pytest.mark.distributed

STRICT = {"ddp_find_unused_parameters": False}  # DDP raises if a parameter has no gradient
RUNS = [
    {"name": "ddp", "arguments": {"save_strategy": "steps", "save_steps": 6, **STRICT}},
    {"name": "accumulated", "accumulation": 2},
    {"name": "resumed-within", "resume": "ddp/checkpoint-6", "seed": 1},
    {"name": "resumed-after", "resume": "ddp/checkpoint-18", "seed": 1},
    {"name": "further", "adapter": "ddp/adapter", "arguments": STRICT},
    {"name": "twice", "times": 2},
]
SAME = ("ddp", "accumulated", "resumed-within", "resumed-after")


@pytest.fixture(scope="module")
def double(launch: Callable) -> Callable:
    return launch("ddp", RUNS)


@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_what_one_trains(single: Callable, double: Callable, name: str) -> None:
    one, two = single("plain"), double(name)
    assert (two.seen["engine"], two.seen["processes"]) == ("DistributedDataParallel", 2)
    one.check_same(two)


def test_the_schedule_ends_at_the_budget_in_several_decisions(single: Callable) -> None:
    totals = single("plain").seen["totals"]
    assert sorted(set(totals), reverse=True) == [56, 35, 18, 14]
    assert totals.index(35) + 1 == 4
    assert totals.index(14) + 1 == 16


def test_the_regularizer_makes_a_difference(single: Callable) -> None:
    """Or the comparisons above would not notice its absence."""
    with_it, without = single("plain"), single("unregularized")
    assert with_it.distance(without) > 0.01
    assert with_it.seen["summary"]["orthogonality"] < 0.7 * without.seen["summary"]["orthogonality"]


@pytest.mark.parametrize("name", [run["name"] for run in RUNS])
def test_the_processes_agree_bit_for_bit(double: Callable, name: str) -> None:
    main, other = double(name).processes
    assert main["pattern"] == other["pattern"]
    assert main["totals"] == other["totals"]
    for key, factor in main["factors"].items():
        torch.testing.assert_close(other["factors"][key], factor, rtol=0, atol=0)


def test_every_parameter_takes_part_though_modules_end_without_ranks(double: Callable) -> None:
    """Masked in the first run, gone in the second; DDP would have raised in both."""
    assert 0 in double("ddp").seen["pattern"].values()
    shapes = {factor.shape for factor in double("further").adapter.values()}
    assert torch.Size([0]) in shapes


def test_a_finished_adapter_trains_further(single: Callable, double: Callable) -> None:
    one, two = single("further"), double("further")
    assert set(two.seen["totals"]) == {14}
    assert double("ddp").distance(two) > 0.01
    assert one.distance(two) < 1e-5


def test_training_twice_goes_on_averaging_gradients(double: Callable) -> None:
    """DDP knows the parameters that it was made with; that they agree is tested above."""
    once, twice = double("ddp"), double("twice")
    assert twice.seen["pattern"] == once.seen["pattern"]
    assert once.distance(twice) > 0.01


def test_what_is_saved_and_exported_is_compact_and_equal(double: Callable, llama: TinyModel) -> None:
    run = double("ddp")
    held_out = llama.make_batch(4, seed=7)
    assert sum(len(factor) for key, factor in run.adapter.items() if key.endswith("_E")) == 14
    for folder in ("adapter", "lora"):
        model = PeftModel.from_pretrained(llama.make_model(), run.folder / folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(**held_out).logits, run.seen["logits"], rtol=0, atol=2e-5)
