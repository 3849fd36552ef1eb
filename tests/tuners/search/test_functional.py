# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The masked product against autograd on the plain expression."""

import pytest
import torch
from torch import Tensor

from peft_rank.allocation.masks import gumbel_mask, uniform_noise
from peft_rank.tuners.search.functional import StepMask, masked_product, needed_rows
from peft_rank.tuners.search.graph import SharedGraph, versions
from runs import assert_close


K, IN, OUT = 48, 56, 64


def _problem(tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    logits = torch.linspace(6, -12, K, dtype=torch.float64)
    return {
        "x": make(2, tokens // 2, IN),
        "logits": logits,
        "down": make(K, IN),
        "up": make(K, OUT),
        "bias": make(OUT),
        "weight": make(2, tokens // 2, OUT),
    }


def _masks(logits: Tensor) -> tuple[Tensor, Tensor]:
    soft, hard = gumbel_mask(logits[None], uniform_noise((1, K), 0, 0), 0.4)
    return soft, hard[0]


@pytest.mark.parametrize("tokens", [6, 100])  # fewer and more than either side of the factors
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients(tokens: int, compact: bool, bias: bool) -> None:
    given = _problem(tokens)
    x, logits = given["x"].requires_grad_(), given["logits"].requires_grad_()
    added = given["bias"] if bias else None
    soft, hard = _masks(logits)
    (rows, kept), *_ = needed_rows(soft, hard[None], [K])
    assert kept == int(hard.sum())
    assert len(rows) < K
    needed = (rows, kept) if compact else (None, 0)
    result = masked_product(x, given["down"], given["up"], added, StepMask(hard, *needed))
    found = torch.autograd.grad((result * given["weight"]).sum(), [x, logits], retain_graph=True)

    expected = ((x @ given["down"].T) * hard) @ given["up"] + (0 if added is None else added)
    wanted = torch.autograd.grad((expected * given["weight"]).sum(), [x, logits])
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(found[0], wanted[0])
    # ranks that are left out had next to no slope; the largest gradient is some hundreds
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-9, atol=0.1 if compact else 1e-9)


def test_rows_are_the_kept_ranks_and_those_with_a_slope() -> None:
    soft, hard = _masks(_problem(6)["logits"])
    ((rows, kept),) = needed_rows(soft, hard[None], [K])
    slope = soft[0] * (1 - soft[0])
    assert set(rows[:kept].tolist()) == set(hard.nonzero().flatten().tolist())
    needed = {rank for rank in range(K) if hard[rank] == 1 or slope[rank] > 2**-12}
    # filled up to a multiple of 8, which products in half precision want
    assert needed <= set(rows.tolist()) <= set(range(K))
    assert len(set(rows.tolist())) == len(rows) == -(-len(needed) // 8) * 8
    # most ranks are needed: copying them would cost more than it spares
    soft, hard = _masks(torch.linspace(6, 3, K))
    assert needed_rows(soft, hard[None], [K]) == [(None, 0)]


def test_filled_up_rows_are_of_the_module_and_add_nothing() -> None:
    """Beside a larger module, whose padding they must not come from; one whose mask is empty is nothing."""
    sizes = [20, 40]
    logits = torch.full((2, 40), -50.0)
    logits[0, [3, 19]], logits[0, 20:] = 9.0, float("-inf")
    soft, hard = gumbel_mask(logits, torch.full((2, 40), 0.5), 0.4)
    found = needed_rows(soft, hard, sizes)
    assert [(rows.tolist(), kept) for rows, kept in found] == [([3, 19, 0, 1, 2, 4, 5, 6], 2), ([], 0)]
    x = torch.randn(5, 7, dtype=torch.float64)
    for size, mask, (rows, kept) in zip(sizes, hard.double(), found, strict=True):
        down, up = torch.randn(size, 7, dtype=torch.float64), torch.randn(size, 9, dtype=torch.float64)
        result = masked_product(x, down, up, None, StepMask(mask[:size], rows, kept))
        torch.testing.assert_close(result, x @ down.T * mask[:size] @ up)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision(how: str) -> None:
    given = _problem(64, torch.float32 if how == "autocast" else torch.bfloat16)
    x, logits = given["x"].requires_grad_(), given["logits"].requires_grad_()
    _, hard = _masks(logits.float())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        result = masked_product(x, given["down"], given["up"], given["bias"], StepMask(hard, None, 0))
    assert result.dtype == torch.bfloat16
    (result.float() * given["weight"].float()).sum().backward()
    assert x.grad.dtype == x.dtype
    exact = {key: value.detach().double() for key, value in given.items()}
    exact_logits = exact["logits"].requires_grad_()
    expected = ((exact["x"] @ exact["down"].T) * _masks(exact_logits)[1]) @ exact["up"] + exact["bias"]
    (expected * exact["weight"]).sum().backward()
    assert float((result - expected).norm() / expected.norm()) < 0.01
    assert float((logits.grad - exact_logits.grad).norm() / exact_logits.grad.norm()) < 0.02


def test_the_gradient_of_a_mask_may_be_beyond_float16() -> None:
    """15 tokens of 8,000 each."""
    x, down, up = torch.full((15, 16), 1.0), torch.full((4, 16), 5.0), torch.full((4, 16), 6.25)
    mask = torch.ones(4, requires_grad=True)
    step = StepMask(mask, None, 0)
    masked_product(x.half(), down.half(), up.half(), None, step).sum().backward()
    assert_close(mask.grad, torch.full((4,), 15 * 80.0 * 100.0), 0)


def test_factors_get_no_gradient_and_no_input_gradient_is_computed_in_vain() -> None:
    given = _problem(6)
    logits = given["logits"].requires_grad_()
    _, hard = _masks(logits)
    result = masked_product(given["x"], given["down"], given["up"], None, StepMask(hard, None, 0))
    result.sum().backward()
    assert logits.grad is not None
    assert given["x"].grad is given["down"].grad is given["up"].grad is None


def test_versions_change_with_values_and_with_storage() -> None:
    parameter = torch.nn.Parameter(torch.randn(14, 32))
    before, old = versions([parameter]), parameter.data
    assert before == versions([parameter])
    parameter.data = old.clone()
    assert versions([parameter]) != before
    before = versions([parameter])
    with torch.no_grad():
        parameter.add_(1)
    assert versions([parameter]) != before


def test_a_shared_graph_is_used_often_and_adds_what_is_pending_once() -> None:
    parameter = torch.randn(3, 4, requires_grad=True)
    between = 2 * parameter
    made = 5 * between
    pending = [(between, torch.ones(3, 4))]
    twice = SharedGraph.apply([made], pending, parameter) + SharedGraph.apply([made], pending, parameter)
    assert_close(twice, 2 * made, 0)
    twice.sum().backward()
    assert_close(parameter.grad, torch.full((3, 4), 2 * 10.0 + 2.0), 0)
    assert pending == []
    SharedGraph.apply([made], pending, parameter).sum().backward()
    assert_close(parameter.grad, torch.full((3, 4), 32.0), 0)
