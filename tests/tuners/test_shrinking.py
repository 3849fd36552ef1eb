# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Removing pruned ranks while an optimizer holds them equals masking them, and really frees memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers.optimization import Adafactor

from peft_rank import get_rank_pattern
from peft_rank.tuners.shrinking import can_slice_state, narrow, swap_parameters
from runs import DECISIONS, adam, adapted, assert_close, logits, steps_by_hand, weights
from tiny_models import TINY_MODELS


LLAMA = TINY_MODELS["llama"]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _named(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if re.search(pattern, name)]


def run(make: Callable, shrink: bool, last: int = 20, finalize: bool = True) -> tuple[PeftModel, Any]:
    model = adapted(LLAMA)
    optimizer = make(trained(model))
    print(model.base_model.resolve_schedule(20))
    steps_by_hand(model, LLAMA, 1, last, optimizer, shrink)
    if finalize:
        model.base_model.finalize(optimizer if shrink else None)
    return model, optimizer


EXACT = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=5e-3, weight_decay=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=5e-3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=5e-3, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=5e-3, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "groups": lambda p: torch.optim.AdamW([{"params": p[::2]}, {"params": p[1::2], "lr": 1e-3}], lr=5e-3),
}


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT.keys())
def test_shrinking_equals_masking(make: Callable) -> None:
    shrunk, masked = run(make, shrink=True)[0], run(make, shrink=False)[0]
    assert get_rank_pattern(shrunk) == get_rank_pattern(masked)
    assert_close(weights(shrunk), weights(masked), 1e-5)
    assert_close(logits(shrunk, LLAMA), logits(masked, LLAMA), 1e-5)


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT.keys())
def test_the_optimizer_holds_the_live_parameters(make: Callable) -> None:
    model, optimizer = run(make, shrink=True, last=DECISIONS[1], finalize=False)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    live = trained(model)
    assert {id(p) for p in held} == {id(p) for p in live} and len(held) == len(live)
    assert set(map(id, optimizer.state)) <= {id(p) for p in live}
    for parameter, state in optimizer.state.items():
        for value in state.values():
            assert not torch.is_tensor(value) or value.dim() == 0 or value.shape == parameter.shape


def test_memory_really_falls() -> None:
    def size(step: int) -> tuple[int, int]:
        model, optimizer = run(EXACT["adamw"], shrink=True, last=step, finalize=False)
        moments = sum(v.numel() for state in optimizer.state.values() for v in state.values() if v.dim() > 0)
        return sum(p.numel() for p in trained(model)), moments

    sizes = [size(step) for step in (4, 5, 10, 15)]
    assert all(moments == 2 * parameters for parameters, moments in sizes)
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[-1][0] < 0.6 * sizes[0][0]


def test_the_summary_reports_what_is_trained() -> None:
    model, optimizer = run(EXACT["adamw"], shrink=True, last=4, finalize=False)
    before = model.base_model.rank_summary()["parameters/trainable"]
    steps_by_hand(model, LLAMA, 5, 5, optimizer)
    after = model.base_model.rank_summary()["parameters/trainable"]
    assert after == sum(p.numel() for p in trained(model)) < before


def test_without_an_optimizer_ranks_are_masked_until_the_end() -> None:
    model, _ = run(EXACT["adamw"], shrink=False, finalize=False)
    widths = sum(p.numel() for name, p in model.named_parameters() if "salientlora_E" in name)
    assert widths == 56 and sum(get_rank_pattern(model).values()) == 28
    model.base_model.finalize()
    widths = sum(p.numel() for name, p in model.named_parameters() if "salientlora_E" in name)
    assert widths == 28 == sum(get_rank_pattern(model).values())


def test_an_optimizer_with_factored_state_keeps_masks() -> None:
    model, optimizer = run(lambda p: Adafactor(p, lr=1e-3, relative_step=False), shrink=True, finalize=False)
    assert {p.shape[0] for name, p in model.named_parameters() if "salientlora_E" in name} == {4}
    before = logits(model, LLAMA)
    model.base_model.finalize(optimizer)
    assert sum(p.numel() for name, p in model.named_parameters() if "salientlora_E" in name) == 28
    assert_close(logits(model, LLAMA), before, 1e-6)


class Wrapped(torch.optim.Optimizer):
    """Shares the groups of an optimizer that makes the steps, as wrappers do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.inner = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def _lbfgs(model: PeftModel) -> torch.optim.Optimizer:
    head = model.get_base_model().lm_head.weight.requires_grad_(True)
    return torch.optim.LBFGS([head, *(p for p in trained(model) if p is not head)], lr=1e-3, max_iter=1)


PARTIAL = {
    "only E": lambda model: torch.optim.AdamW(_named(model, "salientlora_E")),
    "all but E": lambda model: torch.optim.AdamW(_named(model, "salientlora_[AB]")),
    "own list": _lbfgs,
    "wrapper": lambda model: Wrapped(adam(model)),
}


@pytest.mark.parametrize("make", PARTIAL.values(), ids=PARTIAL.keys())
def test_an_optimizer_that_would_lose_parameters_keeps_masks(make: Callable) -> None:
    """Narrower parameters would not be in the other optimizer, in its own list or in the one that it wraps."""
    model = adapted(LLAMA)
    optimizer, factors = make(model), [p for name, p in model.named_parameters() if "salientlora" in name]
    for step in range(1, 21):
        loss = model(**LLAMA.make_batch(8, seed=step)).loss
        loss.backward()
        optimizer.step(lambda loss=loss: loss)
        model.base_model.update_and_allocate(step, optimizer)
        model.zero_grad()
    live = {id(p) for p in model.parameters()}
    assert sum(get_rank_pattern(model).values()) == 28 and all(id(p) in live for p in factors)


def test_the_last_policy_shrinks_at_the_end_of_the_allocation() -> None:
    model, widths = adapted(LLAMA), []
    optimizer = adam(model)
    model.base_model.resolve_schedule(20)
    for step in range(1, 18):
        model(**LLAMA.make_batch(8, seed=step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer, shrink="last")
        optimizer.zero_grad()
        widths.append(sum(p.numel() for name, p in model.named_parameters() if "salientlora_E" in name))
    assert widths == [56] * 14 + [28] * 3


def test_the_optimizer_can_be_saved_and_restored_after_shrinking() -> None:
    model, optimizer = run(EXACT["adamw"], shrink=True, last=12, finalize=False)
    fresh = EXACT["adamw"](trained(model))
    fresh.load_state_dict(optimizer.state_dict())
    for one, other in zip(trained(model), trained(model), strict=True):
        assert_close(fresh.state[one]["exp_avg"], optimizer.state[other]["exp_avg"], 0)


def test_the_loss_after_a_decision_is_that_of_the_masked_model() -> None:
    """A live graph is not broken: backward of a forward before the decision still works."""
    model, optimizer = run(EXACT["adamw"], shrink=True, last=4, finalize=False)
    retained = model(**LLAMA.make_batch()).loss
    steps_by_hand(model, LLAMA, 5, 5, optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        retained.backward()  # as after any optimizer step
    model(**LLAMA.make_batch()).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained(model) if p.numel())


# ---- the functions ----


def test_narrow_cuts_rows_or_columns() -> None:
    parameter = nn.Parameter(torch.arange(12.0).view(3, 4), requires_grad=False)
    index = torch.tensor([0, 2])
    rows, columns = narrow(parameter, 0, index), narrow(parameter, 1, index)
    assert_close(rows.data, parameter.data[[0, 2]], 0)
    assert_close(columns.data, parameter.data[:, [0, 2]], 0)
    assert not rows.requires_grad and rows.is_leaf and rows.data_ptr() != parameter.data_ptr()


def test_swap_keeps_order_options_and_scalars() -> None:
    first, second, third = (nn.Parameter(torch.randn(3, 2)) for _ in range(3))
    optimizer = torch.optim.AdamW([{"params": [first, second], "lr": 0.5}, {"params": [third]}])
    (first.sum() + second.square().sum()).backward()
    optimizer.step()
    moment, count = optimizer.state[second]["exp_avg"].clone(), optimizer.state[second]["step"].clone()
    index = torch.tensor([2, 0])
    new = narrow(second, 0, index)
    other = narrow(third, 0, index)  # never stepped: has no state
    swap_parameters(optimizer, {second: (new, 0, index), third: (other, 0, index)})
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(first), id(new)]
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(other)]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert second not in optimizer.state and other not in optimizer.state
    assert_close(optimizer.state[new]["exp_avg"], moment[[2, 0]], 0)
    assert_close(optimizer.state[new]["step"], count, 0)


def test_state_that_cannot_be_cut_is_started_anew() -> None:
    parameter = nn.Parameter(torch.randn(3, 2))
    optimizer = Adafactor([parameter], lr=0.1, relative_step=False)
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    index = torch.tensor([2, 0])
    new = narrow(parameter, 0, index)
    swap_parameters(optimizer, {parameter: (new, 0, index)})
    assert not optimizer.state
    before, new.grad = new.detach().clone(), torch.ones(2, 2)
    optimizer.step()
    assert (new != before).all()


def test_what_can_be_sliced() -> None:
    parameter = nn.Parameter(torch.randn(3, 2))
    parameter.grad = torch.ones(3, 2)
    for make, expected in [
        (lambda p: torch.optim.AdamW(p), True),
        (lambda p: torch.optim.SGD(p, lr=0.1), True),
        (lambda p: Adafactor(p, lr=0.1, relative_step=False), False),
    ]:
        optimizer = make([parameter])
        assert can_slice_state(optimizer, [parameter])  # nothing there yet
        optimizer.step()
        assert can_slice_state(optimizer, [parameter]) == expected
