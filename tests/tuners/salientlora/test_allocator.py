# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The allocator: memory, clock, decisions, and a hand-written loop over the tuner."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback

from peft_rank import RankAllocationCallback, SalientLoRAConfig, get_rank_pattern
from peft_rank.allocation.budget import keep_top
from peft_rank.allocation.salience import salience_scores
from peft_rank.allocation.schedule import Decision
from peft_rank.tuners.salientlora.allocator import RankAllocator
from runs import DECISIONS, WARMUP, adam, adapted, assert_close, config, modules_of, steps_by_hand, train, weights
from tiny_models import TINY_MODELS


LLAMA = TINY_MODELS["llama"]
SIZES = [4, 4, 3, 4]


def make_allocator(sizes: Sequence[int] = SIZES, total: int | None = 40, **overrides) -> RankAllocator:
    settings = {"init_r": 4, "target_r": 1, "warmup_steps": 5, "allocation_steps": 25, "initial_window": 4}
    allocator = RankAllocator(SalientLoRAConfig(**{**settings, "final_window": 12, **overrides}), sizes)
    allocator.plan(total)
    return allocator


def series(step: int, n: int = 15) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(step)) * torch.arange(1, n + 1)


def gradients(step: int, n: int = 15) -> torch.Tensor:
    return series(1000 + step, n).flip(0)


def record(allocator: RankAllocator, step: int) -> None:
    values = series(step)[allocator.index].split(allocator.sizes)
    allocator.record(list(values), torch.tensor(1.0 / step), gradients(step)[allocator.index])


def test_recording_starts_after_the_warmup_and_ends_with_the_allocation() -> None:
    allocator = make_allocator([40] * 4, init_r=40, target_r=10)
    wanted = []
    for step in range(1, 41):
        if allocator.wants(step):
            wanted.append(step)
            allocator.record(list(series(step, 160)[allocator.index].split(allocator.sizes)), torch.tensor(1.0))
        decision = allocator.due(step)
        if decision:
            allocator.decide(decision)
            allocator.remove_dead()
    # windows reach their final length, and the budget its target, shortly before the end
    last = next(decision.step for decision in allocator.schedule.decisions() if decision.budget == 40)
    assert 20 < last <= 30 and wanted == list(range(6, last + 1))
    assert allocator.finished and allocator.total == allocator.target_total == 40
    assert allocator.recorded == last - 5 and allocator.window_length == 0


@pytest.mark.parametrize("remove", [True, False], ids=["removed", "masked"])
def test_decisions_are_those_of_the_pure_functions(remove: bool) -> None:
    """A literal loop over `salience_scores` and `keep_top`, on full-width series."""
    allocator = make_allocator()
    alive, start = torch.ones(15, dtype=torch.bool), 5
    for decision in allocator.schedule.decisions():
        steps = range(start + 1, decision.step + 1)
        for step in steps:
            if remove:
                record(allocator, step)
            else:
                values = (series(step) * alive).split(SIZES)
                allocator.record(list(values), torch.tensor(1.0 / step), gradients(step))
        window = torch.stack([series(step) for step in steps]) * sum(gradients(step).abs() for step in steps)
        scores = salience_scores(window, torch.tensor([1.0 / step for step in steps]), SIZES, alive=alive)
        alive = keep_top(scores, decision.budget, SIZES, alive=alive)
        allocator.decide(allocator.due(decision.step))
        if remove:
            masks = allocator.remove_dead()
            assert sum(int(mask.sum()) for mask in masks) == decision.budget
            assert torch.equal(allocator.index, alive.nonzero().squeeze(1))
        else:
            assert torch.equal(allocator.alive, alive)
        start = decision.step


def test_a_decision_waits_for_something_to_look_at() -> None:
    allocator = make_allocator()
    assert allocator.due(9) is None  # nothing recorded
    record(allocator, 12)
    assert allocator.due(8) is None
    decision = allocator.due(12)
    assert decision.step == 9  # delayed
    allocator.decide(decision)
    assert allocator.due(12) is None


def test_only_the_last_of_several_decisions_that_are_late_is_taken() -> None:
    allocator = make_allocator()
    record(allocator, 29)
    record(allocator, 35)
    assert allocator.due(35).step == 30 and allocator.due(35).budget == 4


def test_min_r_is_kept() -> None:
    allocator = make_allocator(target_r=2, min_r=1)
    for step in range(6, 31):
        record(allocator, step)
        if decision := allocator.due(step):
            allocator.decide(decision)
            allocator.remove_dead()
    assert min(allocator.sizes) >= 1 and sum(allocator.sizes) == 8


@pytest.mark.parametrize("reference", [True, False])
def test_a_budget_above_what_is_left_keeps_all_of_it(reference: bool) -> None:
    """As after a resume under another plan, and where the released rule has kept fewer than its budget."""
    allocator = make_allocator(reference=reference)
    for step, budget in ((10, 6), (20, 9), (30, 5)):
        left = allocator.total
        for s in range(step - 4, step):
            record(allocator, s)
        keep = allocator.decide(Decision(step, 4, budget))
        assert keep.sum() == min(left, budget) == allocator.total
        allocator.remove_dead()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_dtype_is_recorded_in_float32(dtype: torch.dtype) -> None:
    allocator = make_allocator()
    allocator.record([v.to(dtype) for v in series(6).split(SIZES)], torch.tensor(0.5, dtype=dtype))
    assert allocator._window.dtype == torch.float32


def test_defaults_of_torch_change_nothing() -> None:
    usual, unusual = make_allocator(), None
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            unusual = make_allocator()
            for step in (6, 7, 8, 9):
                with torch.device("cpu"):
                    torch.set_default_dtype(torch.float32)
                    values, orthogonality, gradient = series(step), torch.tensor(1.0 / step), gradients(step)
                    record(usual, step)
                    torch.set_default_dtype(torch.bfloat16)
                unusual.record(list(values.split(SIZES)), orthogonality, gradient)
            assert torch.equal(usual.pack(), unusual.pack())
            unusual.decide(unusual.due(9))
            unusual.remove_dead()
            packed = unusual.pack()
            unusual.unpack(packed, unusual.sizes)
    finally:
        torch.set_default_dtype(before)
    usual.decide(usual.due(9))
    usual.remove_dead()
    assert torch.equal(usual.pack(), packed) and torch.equal(usual.index, unusual.index)


@pytest.mark.parametrize("step", [0, 5, 7, 9, 10, 20, 30])
def test_a_packed_state_goes_on_like_the_original(step: int) -> None:
    def advance(allocator: RankAllocator, first: int, last: int) -> None:
        for s in range(first, last + 1):
            allocator.last_step = s
            if allocator.wants(s):
                record(allocator, s)
            if decision := allocator.due(s):
                allocator.decide(decision)
                if s % 2:
                    allocator.remove_dead()

    allocator = make_allocator()
    advance(allocator, 1, step)
    restored = RankAllocator(allocator.config, allocator.sizes)
    restored.unpack(allocator.pack(), allocator.sizes)
    restored.plan(40)
    assert restored.last_step == step and restored.budget == allocator.budget
    for each in (allocator, restored):
        advance(each, step + 1, 40)
    assert torch.equal(allocator.index[allocator.alive], restored.index[restored.alive])
    assert torch.equal(allocator.pack(), restored.pack())


def test_a_refused_state_changes_nothing() -> None:
    allocator = make_allocator()
    record(allocator, 6)
    allocator.record(list(series(7).split(SIZES)), None)
    before = allocator.pack()
    for blob, sizes in ((torch.zeros(30, dtype=torch.uint8), SIZES), (make_allocator([2, 2]).pack(), SIZES)):
        with pytest.raises(ValueError, match="allocation state in the checkpoint"):
            allocator.unpack(blob, sizes)
        assert torch.equal(allocator.pack(), before)


# ---- a hand-written loop ----


def test_the_loop_of_the_documentation() -> None:
    model = adapted(LLAMA, warmup_steps=None, allocation_steps=None)
    batches, total_steps = [LLAMA.make_batch(8, seed=seed) for seed in range(20)], 20
    optimizer = adam(model)

    tuner = model.base_model
    print(tuner.resolve_schedule(total_steps))
    for step, batch in enumerate(batches, start=1):
        model(**batch).loss.backward()
        tuner.add_regularization_gradient()
        optimizer.step()
        tuner.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    tuner.finalize(optimizer)

    assert sum(get_rank_pattern(model).values()) == 2 * modules_of(model)
    assert tuner.rank_summary()["rank/total"] == 28 == tuner.rank_summary()["rank/budget"]


class Totals(TrainerCallback):
    """The total rank after every step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, *args: Any, model: PeftModel, **kwargs: Any) -> None:
        self.seen.append(sum(get_rank_pattern(model).values()))


def test_the_loop_has_the_budgets_of_the_trainer(tmp_path: Path) -> None:
    totals = Totals()
    train(adapted(LLAMA), LLAMA, tmp_path, callbacks=[RankAllocationCallback(log=False), totals])
    model, by_hand = adapted(LLAMA), []
    optimizer = adam(model)
    model.base_model.resolve_schedule(20)
    for step in range(1, 21):
        steps_by_hand(model, LLAMA, step, step, optimizer)
        by_hand.append(sum(get_rank_pattern(model).values()))
    assert by_hand == totals.seen


def test_fractions_without_resolve_schedule_are_refused() -> None:
    model = adapted(LLAMA, warmup_steps=None, allocation_steps=None)
    with pytest.raises(RuntimeError, match="resolve_schedule.*RankAllocationCallback"):
        model.base_model.update_and_allocate(1)


def test_steps_need_no_resolve_schedule() -> None:
    model = adapted(LLAMA)
    steps_by_hand(model, LLAMA, 1, 15, adam(model))
    assert sum(get_rank_pattern(model).values()) == 28


def test_total_steps_in_the_configuration_stand_in_for_resolve_schedule() -> None:
    model = adapted(LLAMA, warmup_steps=None, allocation_steps=None, total_steps=20)
    steps_by_hand(model, LLAMA, 1, 12, adam(model))
    assert sum(get_rank_pattern(model).values()) == 28


def test_calling_twice_for_a_step_does_nothing_the_second_time() -> None:
    once, twice = adapted(LLAMA), adapted(LLAMA)
    for model, times in ((once, 1), (twice, 2)):
        optimizer = adam(model)
        model.base_model.resolve_schedule(20)
        for step in range(1, 21):
            model(**LLAMA.make_batch(8, seed=step)).loss.backward()
            optimizer.step()
            decided = [model.base_model.update_and_allocate(step, optimizer) for _ in range(times)]
            assert decided[0] == (step in (5, 10, 15)) and not any(decided[1:])
            optimizer.zero_grad()
    assert_close(weights(once), weights(twice), 0)


def test_finalize_twice_is_harmless() -> None:
    model = adapted(LLAMA)
    optimizer = adam(model)
    steps_by_hand(model, LLAMA, 1, 20, optimizer)
    model.base_model.finalize(optimizer)
    before, pattern = weights(model), dict(model.peft_config["default"].rank_pattern)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.base_model.finalize(optimizer)
    assert_close(weights(model), before, 0)
    assert model.peft_config["default"].rank_pattern == pattern


def test_finalize_without_any_step_raises() -> None:
    for last in (0, 3):
        model = adapted(LLAMA)
        steps_by_hand(model, LLAMA, 1, last, adam(model))
        with pytest.raises(RuntimeError, match="never ran"):
            model.base_model.finalize()


def test_a_frozen_adapter_is_left_alone() -> None:
    model = adapted(LLAMA)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert model.base_model.update_and_allocate(1) is False
    model.base_model.finalize()
    assert sum(get_rank_pattern(model).values()) == 56


@pytest.mark.parametrize("scope", ["model", "module"])
@pytest.mark.parametrize("slope", [0.5, 2.0])
def test_every_option_of_the_scores_meets_the_budget(scope: str, slope: float) -> None:
    options = {"graph_scope": scope, "magnitude_scope": scope, "slope_threshold": slope, "min_r": 1}
    model = adapted(LLAMA, **options)
    optimizer = adam(model)
    steps_by_hand(model, LLAMA, 1, 20, optimizer)
    ranks = get_rank_pattern(model)
    assert sum(ranks.values()) == 28 and min(ranks.values()) >= 1


@pytest.mark.parametrize("start", [True, False, "gaussian"])
@pytest.mark.parametrize("gradient", ["random", "zero", "none"])
def test_what_ranks_are_compared_by(start: str | bool, gradient: str) -> None:
    """The first-order change of the loss without the rank, |E| times the mean of |dL/dE| since the last decision; E alone
    where that starts at 0, and where gradients say nothing (B is still 0) or are gone (`zero_grad` came first)."""
    model = adapted(LLAMA, init_weights=start, salience_lambda=1.0, warmup_steps=0, allocation_steps=6)
    tuner = model.base_model
    tuner.resolve_schedule(6)
    allocator = tuner.allocator("default")
    parameters = [layer.stored("default").E for layer in tuner.adapter_layers("default").values()]
    for E in parameters:
        torch.nn.init.normal_(E)
    values = torch.cat([E.detach().abs() for E in parameters])
    alive, seen = torch.ones(len(values), dtype=torch.bool), torch.zeros(len(values))
    budgets = {decision.step: decision.budget for decision in allocator.decisions}
    assert len(budgets) > 1
    for step in range(1, 7):
        if gradient != "none":
            for E in parameters:
                E.grad = torch.randn_like(E) * (gradient == "random")
            seen += torch.cat([E.grad.abs() for E in parameters])
        # E alone, though something has been trained, is told of
        gone = step in budgets and start is False and gradient != "random"
        with pytest.warns(UserWarning, match="by E alone") if gone else nullcontext():
            tuner.update_and_allocate(step)
        if step in budgets:
            worth = values * seen if start != "gaussian" and seen.any() else values
            kept = torch.where(alive, worth, -1.0).topk(budgets[step]).indices
            alive = torch.zeros_like(alive).index_fill_(0, kept, True)
            seen = torch.zeros_like(seen)
            assert torch.equal(allocator.alive, alive)


def test_an_early_end_compares_by_the_gradients_of_the_last_window() -> None:
    """When a decision has just been taken and gradients are gone."""
    model = adapted(LLAMA, salience_lambda=1.0)
    tuner, optimizer = model.base_model, adam(model)
    steps_by_hand(model, LLAMA, 1, DECISIONS[0] - 1, optimizer)
    seen = tuner.allocator("default")._gradient.clone()
    model(**LLAMA.make_batch(8, seed=0)).loss.backward()
    layers = tuner.adapter_layers("default").values()
    seen += torch.cat([layer.stored("default").E.grad.abs() for layer in layers])
    alive = tuner.allocator("default").alive
    assert tuner.update_and_allocate(DECISIONS[0]) and 28 < alive.sum() < 56
    optimizer.zero_grad()
    values = torch.cat([layer.stored("default").E.detach().abs() for layer in layers])
    kept = torch.where(alive, values * seen, -1.0).topk(28).indices
    with pytest.warns(UserWarning, match="cut short"):
        tuner.finalize(compact=False)
    assert torch.equal(tuner.allocator("default").alive.nonzero().squeeze(1), kept.sort().values)


def test_gradients_that_went_missing_are_told_of_and_not_replaced_by_old_ones() -> None:
    """Each window is weighed by its own gradients, or by none."""
    model = adapted(LLAMA, salience_lambda=1.0)
    tuner, optimizer = model.base_model, adam(model)
    steps_by_hand(model, LLAMA, 1, DECISIONS[0], optimizer)
    allocator = tuner.allocator("default")
    assert allocator.gradient is not None
    layers = tuner.adapter_layers("default").values()
    for step in range(DECISIONS[0] + 1, DECISIONS[1]):
        tuner.update_and_allocate(step)
        assert allocator.gradient is None
    alive, values = allocator.alive, torch.cat([layer.stored("default").E.detach().abs() for layer in layers])
    with pytest.warns(UserWarning, match="by E alone"):
        tuner.update_and_allocate(DECISIONS[1])
    kept = torch.where(alive, values, -1.0).topk(allocator.total).indices
    assert torch.equal(allocator.alive.nonzero().squeeze(1), kept.sort().values)
    # back again in the middle of a window
    tuner.update_and_allocate(DECISIONS[1] + 1)
    seen = [layer.stored("default").E for layer in layers]
    for E in seen:
        E.grad = torch.randn_like(E)
    tuner.update_and_allocate(DECISIONS[1] + 2)
    assert torch.equal(allocator.gradient, torch.cat([E.grad.abs() for E in seen]))
    for E in seen:
        E.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuner.update_and_allocate(DECISIONS[2])


class Gradients(TrainerCallback):
    """Looks into the memory of the allocation while it runs."""

    def __init__(self) -> None:
        self.sum, self.changed = 0.0, []

    def on_step_end(self, args: Any, state: Any, control: Any, model: PeftModel, **kwargs: Any) -> None:
        found = model.base_model.allocator("default")._gradient
        before, self.sum = self.sum, 0.0 if found is None else float(found.sum())
        if self.sum != before:
            self.changed.append(state.global_step)


def test_the_trainer_leaves_gradients_to_compare_by(tmp_path: Path) -> None:
    seen = Gradients()
    train(adapted(LLAMA), LLAMA, tmp_path, callbacks=[RankAllocationCallback(log=False), seen], max_grad_norm=1.0)
    assert seen.changed == list(range(WARMUP + 1, DECISIONS[-1] + 1))


def test_a_constant_window_meets_the_budget() -> None:
    """Singular values that never move: a learning rate of zero."""
    model = adapted(LLAMA)
    steps_by_hand(model, LLAMA, 1, 20, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0))
    assert sum(get_rank_pattern(model).values()) == 28


def test_reference_mode_trains_saves_and_is_never_above_its_last_budget(tmp_path: Path) -> None:
    model = adapted(LLAMA, reference=True, warmup_steps=4, allocation_steps=60)
    optimizer = adam(model)
    print(model.base_model.resolve_schedule(80))
    steps_by_hand(model, LLAMA, 1, 80, optimizer)
    model.base_model.finalize(optimizer)
    budget = (
        config(LLAMA, reference=True, warmup_steps=4, allocation_steps=60).schedule(80, 56, 28).decisions()[-1].budget
    )
    assert 0 < sum(get_rank_pattern(model).values()) <= budget
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path))
    assert get_rank_pattern(loaded) == get_rank_pattern(model)


def test_reference_mode_resumes_after_its_allocation(tmp_path: Path) -> None:
    """Its last decision may leave more ranks than the target."""
    settings = {"reference": True, "warmup_steps": 14, "allocation_steps": 12}
    model = adapted(LLAMA, **settings)
    train(model, LLAMA, tmp_path / "a", save_strategy="steps", save_steps=28, max_steps=32)
    again = adapted(LLAMA, **settings)
    train(again, LLAMA, tmp_path / "b", max_steps=32, resume=str(tmp_path / "a" / "checkpoint-28"))
    assert sum(get_rank_pattern(model).values()) > 28
    assert_close(weights(again), weights(model), 1e-6)


def regularizer(model: PeftModel) -> torch.Tensor:
    """1 / (2 M) * sum of ||A A^T - I||_F + ||B^T B - I||_F over the living ranks, literally."""
    terms = []
    for layer in model.base_model.adapter_layers("default").values():
        A, _, B = (factor.detach().double() for factor in layer.stored("default"))
        keep = layer.salientlora_mask.get("default", torch.ones(len(A))).bool()
        for F in (A[keep], B[:, keep].T):
            terms.append(torch.sqrt(((F @ F.T - torch.eye(len(F), dtype=F.dtype)) ** 2).sum()))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("loop", ["regularized", "resumed", "not regularized", "weight of 0", "every other step"])
def test_the_window_holds_the_regularizer_after_every_step(
    loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a loop that regularizes, the value comes with the next step's gradient, also from a checkpoint."""
    windows: list[torch.Tensor] = []

    def scores(window: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        windows.append(values.clone())
        return salience_scores(window, values, *args, **kwargs)

    monkeypatch.setattr("peft_rank.tuners.salientlora.allocator.salience_scores", scores)
    model = adapted(LLAMA, init_weights=False, orth_reg_weight=0.0 if loop == "weight of 0" else 0.3)
    model.base_model.resolve_schedule(40)
    expected: list[torch.Tensor] = []
    for step in range(1, DECISIONS[-1] + 1):
        tuner = model.base_model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        model(**LLAMA.make_batch(8, seed=step)).loss.backward()
        if loop != "not regularized" and (loop != "every other step" or step % 2):
            tuner.add_regularization_gradient()
        optimizer.step()
        expected.append(regularizer(model))
        tuner.update_and_allocate(step)
        optimizer.zero_grad()
        if loop == "resumed" and step == DECISIONS[1] - 2:
            model.save_pretrained(tmp_path)
            model = PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path), is_trainable=True).train()
            model.base_model.resolve_schedule(40)
    starts = [WARMUP, *DECISIONS[:-1]]
    for values, first, last in zip(windows, starts, DECISIONS, strict=True):
        wanted = torch.stack(expected[first:last])
        if loop == "every other step":
            # where no gradient came, the value is of the step after
            assert len(values) == len(wanted) and values[-1].item() == pytest.approx(wanted[-1].item(), rel=1e-5)
        else:
            torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=0)


def test_the_summary_of_a_deep_copy_is_its_own() -> None:
    model = get_peft_model(LLAMA.make_model(), config(LLAMA))
    steps_by_hand(model, LLAMA, 1, 4, adam(model))
    other = copy.deepcopy(model)
    steps_by_hand(other, LLAMA, 5, 5, adam(other))
    assert model.base_model.rank_summary()["rank/total"] == 56 > other.base_model.rank_summary()["rank/total"]
