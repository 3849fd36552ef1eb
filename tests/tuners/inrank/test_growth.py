# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Ranks of real layers grow as the rule says, and neither the function nor the optimizer notices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.optimization import Adafactor

from peft_rank import InRankConfig, get_rank_pattern
from peft_rank.allocation.growth import next_rank
from runs import assert_close
from runs_inrank import adam, adapted, factors, logits, steps_by_hand, widths
from tiny_models import TINY_MODELS, TinyModel


LLAMA, GPT2 = TINY_MODELS["llama"], TINY_MODELS["gpt2"]
FORMS = pytest.mark.parametrize("from_scratch", [False, True], ids=["added", "scratch"])


def product(layer: nn.Module) -> np.ndarray:
    A, B = (getattr(layer, part)["default"].detach().double() for part in ("inrank_A", "inrank_B"))
    return (B @ A).numpy()


@FORMS
def test_every_decision_is_the_literal_one(from_scratch: bool) -> None:
    """The singular values of the dense product, the rule from the paper, at the steps of the schedule."""
    model = adapted(LLAMA, from_scratch=from_scratch, explained_ratio=0.9)
    optimizer, tuner = adam(model), model.base_model
    decided = []
    for step in range(1, 9):
        model(**LLAMA.make_batch(8, seed=step)).loss.backward()
        optimizer.step()
        layers = tuner.adapter_layers("default")
        expected = {}
        for name, layer in layers.items():
            energy = np.square(np.linalg.svd(product(layer), compute_uv=False))
            current = layer.rank("default")
            explained = np.cumsum(energy) / energy.sum()  # of rank 1, 2, ...
            sufficient = [r for r in range(current, 13) if explained[r - 1] > 0.9]
            expected[name] = min(sufficient[0], current + 2, 12) if step in (2, 4, 6, 8) else current
        if tuner.update_and_allocate(step, optimizer):
            decided.append(step)
        optimizer.zero_grad()
        assert get_rank_pattern(model) == expected
        for rank, width in widths(model).values():
            assert width == min(rank + 2, 12)
    assert decided == [2, 4, 6, 8]
    assert sum(expected.values()) > 1.5 * len(expected)


@FORMS
def test_the_released_rule(from_scratch: bool) -> None:
    model = adapted(LLAMA, from_scratch=from_scratch, reference=True, criterion="variance", buffer_r=3, init_r=2)
    optimizer = adam(model)
    steps_by_hand(model, LLAMA, 1, 3, optimizer)
    model(**LLAMA.make_batch(8, seed=4)).loss.backward()
    optimizer.step()
    before = {
        n: (layer.rank("default"), product(layer)) for n, layer in model.base_model.adapter_layers("default").items()
    }
    model.base_model.update_and_allocate(4, optimizer)
    for name, (rank, weight) in before.items():
        values = torch.linalg.svdvals(torch.tensor(weight))
        assert get_rank_pattern(model)[name] == next_rank(values, rank, 3, 12, 0.8, "variance", reference=True)


@pytest.mark.parametrize("name", ["sequential", "flat", "shrink"])
def test_the_released_layer(name: str) -> None:
    """Weights that were scripted, and the ranks that the released layer had after each of its forward passes."""
    data = np.load(Path(__file__).parents[2] / "golden" / "inrank" / f"{name}.npz")
    down, up = torch.tensor(data["A"]), torch.tensor(data["B"])
    for (threshold, init, buffer, warmup, gap), modes in list(zip(data["conf"], data["modes"], strict=True))[::30]:
        steps = {"warmup_steps": int(warmup), "check_interval": int(gap)}
        ranks = {"init_r": int(init), "buffer_r": int(buffer), "explained_ratio": threshold}
        config = InRankConfig(
            target_modules=["0"], from_scratch=True, reference=True, criterion="variance", **steps, **ranks
        )
        tuner = get_peft_model(nn.Sequential(nn.Linear(40, 32)), config).base_model
        layer = tuner.model[0]
        for step, expected in enumerate(modes, start=1):
            width = layer.inrank_A["default"].shape[0]
            layer.inrank_A["default"].data = down[step - 1, :width].clone()
            layer.inrank_B["default"].data = up[step - 1, :, :width].clone()
            tuner.update_and_allocate(step)
            assert layer.rank("default") == expected


@FORMS
def test_opening_ranks_preserves_the_function(tiny: TinyModel, from_scratch: bool) -> None:
    model = adapted(tiny, from_scratch=from_scratch, init_weights=False, explained_ratio=1.0)
    tuner, before = model.base_model, logits(model, tiny)
    old = widths(model)
    for step in (2, 4):
        assert tuner.update_and_allocate(step)
    assert all(width[1] == old[name][1] + 4 for name, width in widths(model).items())
    after = logits(model, tiny)
    assert (after - before).norm() <= 1e-6 * before.norm()
    for layer in tuner.adapter_layers("default").values():
        added = layer.inrank_B["default"][:, 3:]
        assert torch.equal(added, torch.zeros_like(added))
        norms = layer.inrank_A["default"].detach().norm(dim=1)
        assert norms[3:].mean() == pytest.approx(norms[:3].mean().item(), rel=0.5)


@FORMS
def test_new_ranks_learn(from_scratch: bool) -> None:
    model = adapted(LLAMA, from_scratch=from_scratch, explained_ratio=1.0, init_weights=False)
    optimizer = adam(model)
    steps_by_hand(model, LLAMA, 1, 2, optimizer)
    start = factors(model)
    steps_by_hand(model, LLAMA, 3, 3, optimizer)
    for name, value in factors(model).items():
        new = (value - start[name])[:, 3:5] if name.endswith("B") else (value - start[name])[3:5]
        if name.endswith("B"):
            assert new.abs().min() > 0, f"{name}: new columns have not changed"
    steps_by_hand(model, LLAMA, 4, 5, optimizer)
    for name, value in factors(model).items():
        if name.endswith("A"):
            assert not torch.equal(value[3:5], start[name][3:5]), f"{name}: new rows have not changed"


MAKERS = {
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0),
    "adamw-foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0, foreach=True),
    "adamw-fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0, fused=True),
    "amsgrad": lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_the_first_steps_of_new_ranks_are_not_too_long(make: Callable) -> None:
    """With moments of 0 and the step count of the old ranks Adam's first step is 3.16 times the learning rate."""
    rate = 1e-3
    model = adapted(LLAMA, explained_ratio=1.0, init_weights=False, warmup_steps=50, check_interval=60)
    optimizer = make([p for p in model.parameters() if p.requires_grad], rate)
    steps_by_hand(model, LLAMA, 1, 59, optimizer)
    steps_by_hand(model, LLAMA, 60, 60, optimizer)
    for _ in range(5):
        before = factors(model)
        steps_by_hand(model, LLAMA, 61, 61, optimizer)
        for name, value in factors(model).items():
            change = (value - before[name])[:, 3:] if name.endswith("B") else (value - before[name])[3:]
            assert change.abs().max() < 1.6 * rate


def test_moments_of_old_ranks_are_kept_and_those_of_new_ones_start() -> None:
    model = adapted(LLAMA, explained_ratio=1.0, init_weights=False)
    optimizer = adam(model)
    steps_by_hand(model, LLAMA, 1, 1, optimizer)
    model(**LLAMA.make_batch(8)).loss.backward()
    optimizer.step()
    layer = next(iter(model.base_model.adapter_layers("default").values()))
    old = {part: dict(optimizer.state[getattr(layer, part)["default"]]) for part in layer.adapter_layer_names}
    model.base_model.update_and_allocate(2, optimizer)
    for part, dim in (("inrank_A", 0), ("inrank_B", 1)):
        state = optimizer.state[getattr(layer, part)["default"]]
        assert state["step"] == old[part]["step"] == 2
        for key in ("exp_avg", "exp_avg_sq"):
            kept, new = state[key].split([3, 2], dim)
            assert torch.equal(kept, old[part][key])
            mean = old[part][key].mean(dim, keepdim=True) if key == "exp_avg_sq" else torch.zeros(1)
            assert torch.equal(new, mean.expand_as(new).contiguous())


@FORMS
def test_only_open_ranks_and_the_buffer_exist(from_scratch: bool) -> None:
    model = adapted(LLAMA, from_scratch=from_scratch, max_r=None)
    optimizer = adam(model)
    for step in range(1, 9):
        model(**LLAMA.make_batch(8, seed=step)).loss.backward()
        optimizer.step()
        for name, layer in model.base_model.adapter_layers("default").items():
            rank, width = widths(model)[name]
            assert width == min(rank + 2, min(layer.in_features, layer.out_features) // 2)
            for part, shape in (("inrank_A", (width, layer.in_features)), ("inrank_B", (layer.out_features, width))):
                parameter = getattr(layer, part)["default"]
                assert parameter.shape == parameter.grad.shape == optimizer.state[parameter]["exp_avg"].shape == shape
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    live = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == live
    assert {id(p) for p in optimizer.state} <= live
    if from_scratch:
        dense = sum(
            layer.in_features * layer.out_features for layer in model.base_model.adapter_layers("default").values()
        )
        start = adapted(LLAMA, from_scratch=True)
        assert (
            sum(p.numel() for p in start.parameters())
            < sum(p.numel() for p in LLAMA.make_model().parameters()) - dense / 2
        )


@FORMS
def test_weight_decay_takes_nothing_from_ranks_that_are_opened_later(from_scratch: bool) -> None:
    """What opens is drawn at that time, in the norm of what is there; the columns of B are 0 whatever the decay."""
    model = adapted(LLAMA, from_scratch=from_scratch, explained_ratio=1.0, init_weights=False)
    optimizer = adam(model, weight_decay=1.0)
    steps_by_hand(model, LLAMA, 1, 4, optimizer)
    for layer in model.base_model.adapter_layers("default").values():
        rows = layer.inrank_A["default"].detach().norm(dim=1)
        assert rows[5:].mean() == pytest.approx(rows[:5].mean().item(), rel=0.5)


def test_the_last_rows_do_not_depend_on_the_random_state() -> None:
    seen = []
    for seed in (1, 2):
        model = adapted(LLAMA, init_weights=False, explained_ratio=1.0)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        model.base_model.update_and_allocate(2)
        assert torch.equal(torch.get_rng_state(), state)
        seen.append(factors(model))
    assert_close(seen[0], seen[1], 0)
    drawn = [value[3:] for name, value in seen[0].items() if name.endswith("A") and value.shape[1] == 32]
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])


@FORMS
def test_stage_two_is_the_best_product_of_the_found_rank(from_scratch: bool) -> None:
    model = adapted(LLAMA, from_scratch=from_scratch, growth_steps=6)
    optimizer, tuner = adam(model), model.base_model
    steps_by_hand(model, LLAMA, 1, 5, optimizer)
    model(**LLAMA.make_batch(8, seed=6)).loss.backward()
    optimizer.step()
    before = {name: product(layer) for name, layer in tuner.adapter_layers("default").items()}
    assert not tuner.allocation_finished
    assert tuner.update_and_allocate(6, optimizer)
    assert tuner.allocation_finished
    for name, layer in tuner.adapter_layers("default").items():
        rank, width = widths(model)[name]
        assert rank == width
        u, s, v = np.linalg.svd(before[name])
        np.testing.assert_allclose(product(layer), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-6)
        A, B = layer.inrank_A["default"].detach(), layer.inrank_B["default"].detach()
        torch.testing.assert_close(A @ A.T, B.T @ B, atol=1e-5, rtol=1e-4)
        assert layer.inrank_A["default"].shape == optimizer.state[layer.inrank_A["default"]]["exp_avg"].shape
    assert not tuner.update_and_allocate(7, optimizer)
    losses = steps_by_hand(model, LLAMA, 8, 30, optimizer)
    assert losses[-1] < losses[0]


def test_moments_are_rotated_with_the_product() -> None:
    """Without a buffer to lose, momentum in the new basis moves the product as it did in the old one."""
    out_features, in_features, rank = 7, 9, 3
    model = adapted(LLAMA)
    layer = next(iter(model.base_model.adapter_layers("default").values()))
    torch.manual_seed(0)
    up, down = nn.Parameter(torch.randn(out_features, rank)), nn.Parameter(torch.randn(rank, in_features))
    layer.inrank_A["default"], layer.inrank_B["default"] = down, up
    layer.in_features, layer.out_features, layer.inrank_r["default"] = in_features, out_features, rank
    gradient = torch.randn(out_features, in_features)  # of the product, the same in every step
    optimizer = torch.optim.SGD([up, down], lr=0.0, momentum=0.9)
    for _ in range(3):
        (up @ down * gradient).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    from peft_rank.decomposition.product import truncate_product
    from peft_rank.tuners.shrinking import replace_parameters

    replace_parameters(optimizer, layer.truncate("default", truncate_product(up, down, rank)))
    new_up, new_down = layer.inrank_B["default"], layer.inrank_A["default"]
    torch.testing.assert_close(new_up @ new_down, up @ down, atol=1e-5, rtol=1e-5)
    total = 1 + 0.9 + 0.81
    torch.testing.assert_close(
        optimizer.state[new_up]["momentum_buffer"], total * gradient @ new_down.T, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        optimizer.state[new_down]["momentum_buffer"], total * new_up.T @ gradient, atol=1e-4, rtol=1e-4
    )


def test_ranks_and_moments_are_exact_within_autocast() -> None:
    """A loop that keeps autocast on around the whole step, which costs its forward pass alone the precision."""
    model = adapted(LLAMA, growth_steps=7)
    optimizer = adam(model)
    steps_by_hand(model, LLAMA, 1, 6, optimizer)
    expected = copy.deepcopy((model, optimizer.state_dict()["state"]))
    layers = model.base_model.adapter_layers("default").values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.base_model.update_and_allocate(7, optimizer)
    assert not any(layer.is_growing("default") for layer in layers)
    again, _ = expected
    for_again = adam(again)
    for_again.load_state_dict({**for_again.state_dict(), "state": expected[1]})
    again.base_model.update_and_allocate(7, for_again)
    assert_close(factors(model), factors(again), 1e-6)
    assert_close(optimizer.state_dict()["state"], for_again.state_dict()["state"], 1e-6)


OTHERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
    "groups": lambda p: torch.optim.AdamW([{"params": p[::2]}, {"params": p[1::2], "lr": 1e-3}], lr=5e-3),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_other_optimizers_go_on(make: Callable) -> None:
    model = adapted(LLAMA)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(trained)
    groups = [len(group["params"]) for group in optimizer.param_groups]
    losses = steps_by_hand(model, LLAMA, 1, 11, optimizer)
    model.base_model.finalize(optimizer)
    losses += steps_by_hand(model, LLAMA, 12, 15, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == groups
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(np.isfinite(losses))


def test_widths_are_rounded_up() -> None:
    model = adapted(LLAMA, rank_multiple=4, growth_steps=6, explained_ratio=0.9)
    optimizer = adam(model)
    assert set(widths(model).values()) == {(1, 4)}
    steps_by_hand(model, LLAMA, 1, 5, optimizer)
    ranks = get_rank_pattern(model)
    assert {width % 4 for _, width in widths(model).values()} == {0}
    steps_by_hand(model, LLAMA, 6, 6, optimizer)
    assert get_rank_pattern(model).keys() == ranks.keys()
    assert {rank % 4 for rank in get_rank_pattern(model).values()} == {0}


def test_a_zero_product_waits() -> None:
    model = adapted(LLAMA)
    for step in range(1, 7):
        model.base_model.update_and_allocate(step)
    assert set(widths(model).values()) == {(1, 3)}


@FORMS
def test_a_diverged_product_is_named(from_scratch: bool) -> None:
    model = adapted(LLAMA, from_scratch=from_scratch)
    layers = model.base_model.adapter_layers("default")
    name = list(layers)[3]
    layers[name].inrank_B["default"].data[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=f"product of {name} is not finite after step 2.*diverged"):
        model.base_model.update_and_allocate(2)


def test_ranks_that_are_given_stay() -> None:
    model = adapted(LLAMA, rank_pattern={"q_proj": 5, "k_proj": 0}, explained_ratio=1.0, init_weights=False)
    for step in range(1, 5):
        model.base_model.update_and_allocate(step)
    for name, (rank, width) in widths(model).items():
        if name.endswith("q_proj"):
            assert (rank, width) == (5, 5)
        elif name.endswith("k_proj"):
            assert (rank, width) == (0, 0)
        else:
            assert (rank, width) == (5, 7)


def test_without_a_buffer_ranks_are_fixed() -> None:
    model = adapted(GPT2, init_r=6, buffer_r=0, from_scratch=True)
    assert "ranks fixed at 48 in 8 modules" in model.base_model.resolve_schedule(10)
    optimizer = adam(model)
    losses = steps_by_hand(model, GPT2, 1, 12, optimizer)
    assert losses[-1] < losses[0]
    assert set(widths(model).values()) == {(6, 6)}
    model.base_model.finalize(optimizer)


# ---- who forgets what ----


def test_an_optimizer_that_is_not_passed_is_found() -> None:
    """As loops written for AdaLoRA call it."""
    losses, seen = [], []
    for passed in (True, False):
        model = adapted(LLAMA, growth_steps=8)
        optimizer = adam(model)
        for step in range(1, 13):
            loss = model(**LLAMA.make_batch(8, seed=step)).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step, *([optimizer] if passed else []))
            optimizer.zero_grad()
            losses.append(loss.item())
        seen.append(widths(model))
    assert losses[:12] == losses[12:]
    assert seen[0] == seen[1]


def test_all_optimizers_that_were_not_passed_follow() -> None:
    """One that is not used any more, but not gone either, says nothing of the one that is; and factors may be shared out."""
    model = adapted(LLAMA, growth_steps=8, explained_ratio=1.0, init_weights=False)
    down, up = (
        [p for n, p in model.named_parameters() if f"inrank_{letter}" in n and p.requires_grad] for letter in "AB"
    )
    stale, *current = (torch.optim.AdamW(parameters, lr=5e-3) for parameters in (down + up, down, up))
    for step in range(1, 13):
        model(**LLAMA.make_batch(8, seed=step)).loss.backward()
        before = factors(model)
        for optimizer in (stale, *current) if step == 1 else current:
            optimizer.step()
        assert not any(torch.equal(value, before[name]) for name, value in factors(model).items()), step
        model.base_model.update_and_allocate(step)
        for optimizer in (stale, *current):
            optimizer.zero_grad()
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for optimizer in current for p in optimizer.param_groups[0]["params"]} == trained
        assert {id(p) for p in stale.param_groups[0]["params"]} == trained
    assert {width for _, width in widths(model).values()} == {9}


def test_no_optimizer_is_left_behind() -> None:
    model = adapted(LLAMA, explained_ratio=1.0, init_weights=False)
    model(**LLAMA.make_batch(8)).loss.backward()
    with pytest.raises(RuntimeError, match=r"update_and_allocate\(step, optimizer\)"):
        model.base_model.update_and_allocate(2)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(RuntimeError, match="with the optimizer that holds them"):
        model.base_model.update_and_allocate(4, other)
    assert set(widths(model).values()) == {(1, 3)}


def test_growth_that_never_ran() -> None:
    model = adapted(LLAMA)
    with pytest.raises(RuntimeError, match="never checked.*RankAllocationCallback"):
        model.base_model.finalize()


@pytest.mark.parametrize(("steps", "planned"), [(1, False), (1, True), (5, True)])
def test_growth_that_was_cut_short(steps: int, planned: bool) -> None:
    model = adapted(LLAMA, init_weights=False)
    if planned:
        model.base_model.resolve_schedule(20)
    optimizer = adam(model)
    steps_by_hand(model, LLAMA, 1, steps, optimizer)
    with pytest.warns(UserWarning, match=f"cut short at step {steps}"):
        model.base_model.finalize(optimizer)
    assert all(rank == width for rank, width in widths(model).values())
    assert model.base_model.clock("default").checks >= 1


def test_plans() -> None:
    model = adapted(LLAMA)
    plan = model.base_model.resolve_schedule(40)
    assert "ranks of 14 modules grow from 14, up to 168" in plan
    assert "ranks fixed from step 20 of 40 on" in plan
    with pytest.raises(ValueError, match="No check fits in between `warmup_steps=1`"):
        model.base_model.resolve_schedule(2)
    with pytest.raises(ValueError, match="`total_steps=0` must be at least 1"):
        model.base_model.resolve_schedule(0)
    ratio = adapted(LLAMA, growth_ratio=0.3)
    with pytest.raises(RuntimeError, match="`resolve_schedule` was not called.*growth_ratio=0.3"):
        ratio.base_model.update_and_allocate(1)
    assert "from step 12 of 40 on" in ratio.base_model.resolve_schedule(40)
    with pytest.raises(ValueError, match="`growth_steps=30` must be at most the 20 steps"):
        adapted(LLAMA, growth_steps=30).base_model.resolve_schedule(20)
    with pytest.raises(ValueError, match="global_step=-1"):
        model.base_model.update_and_allocate(-1)


def test_late_checks_are_taken_once() -> None:
    model = adapted(LLAMA, explained_ratio=1.0, init_weights=False)
    tuner = model.base_model
    assert not tuner.update_and_allocate(0)
    assert not tuner.update_and_allocate(1)
    tuner.skip_step(2)
    assert tuner.update_and_allocate(3), "the check of step 2 waits for a step that is not skipped"
    assert not tuner.update_and_allocate(3)
    assert tuner.update_and_allocate(4)
    assert tuner.rank_summary()["rank/total"] == 14 * 5


def test_deepspeed_is_refused_while_ranks_grow() -> None:
    model = adapted(LLAMA)
    with pytest.raises(RuntimeError, match="cannot grow under DeepSpeed"):
        model.base_model.arm_regularization()
    adapted(LLAMA, buffer_r=0).base_model.arm_regularization()


def test_summary() -> None:
    model = adapted(LLAMA)
    assert model.base_model.rank_summary() == {
        "rank/total": 14,
        "rank/mean": 1.0,
        "rank/budget": 168,
        "rank/width": 42,
        "parameters/trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    steps_by_hand(model, LLAMA, 1, 2, adam(model))
    assert 0.8 < model.base_model.rank_summary()["rank/explained"] <= 1
