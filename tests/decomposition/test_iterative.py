# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""EM, Nesterov and Anderson: the formulas, monotony, fixed points, and that they are never worse than their start."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_rank.decomposition import ITERATIVE, decompose, iterative, weighted_error, weighted_svd


def problem(seed: int, shape: tuple[int, int] = (14, 19), spread: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
    importance = (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).exp()
    return weight, importance / importance.amax()


def loss(weight: Tensor, rank: int, method: str, importance: Tensor, **options: int) -> float:
    factors = decompose(weight, rank, method, weight_importance=importance, **options)
    return float(weighted_error(weight, factors, "em", weight_importance=importance))


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] @ np.diag(s[:rank]) @ v[:rank]


def em_by_the_book(w: np.ndarray, o: np.ndarray, rank: int, iterations: int) -> list[np.ndarray]:
    """X <- LR_k(O * W + (1 - O) * X) from the better of SVD and FWSVD; all iterates."""
    root = np.sqrt(o.sum(axis=0))
    starts = [truncated(w, rank), truncated(w * root, rank) / root]
    iterates = [min(starts, key=lambda x: (o * (w - x) ** 2).sum())]
    for _ in range(iterations):
        iterates.append(truncated(o * w + (1 - o) * iterates[-1], rank))
    return iterates


@pytest.mark.parametrize("seed", range(4))
def test_em_is_the_formula_and_never_rises(seed: int) -> None:
    weight, importance = problem(seed, spread=1.5)
    iterates = em_by_the_book(weight.numpy(), importance.numpy(), 4, 12)
    losses = []
    for iterations in range(1, 13):
        up, down = decompose(weight, 4, "em", weight_importance=importance, max_iterations=iterations)
        np.testing.assert_allclose((up @ down).numpy(), iterates[iterations], atol=1e-8)
        losses.append(loss(weight, 4, "em", importance, max_iterations=iterations))
    assert all(after <= before for before, after in pairwise(losses))


@pytest.mark.parametrize("method", ITERATIVE)
def test_first_step_is_that_of_em(method: str) -> None:
    weight, importance = problem(0)
    first = decompose(weight, 5, method, weight_importance=importance, max_iterations=1)
    em = decompose(weight, 5, "em", weight_importance=importance, max_iterations=1)
    torch.testing.assert_close(first.up @ first.down, em.up @ em.down)


def test_nesterov_is_the_formula_while_it_falls() -> None:
    weight, importance = problem(1)
    w, o = weight.numpy(), importance.numpy()
    x = previous = em_by_the_book(w, o, 4, 0)[0]
    for i in range(1, 6):
        v = x + (i - 1) / (i + 2) * (x - previous)
        x, previous = truncated(o * w + (1 - o) * v, 4), x
    up, down = decompose(weight, 4, "nesterov", weight_importance=importance, max_iterations=5)
    np.testing.assert_allclose((up @ down).numpy(), x, atol=1e-8)


@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_never_worse_than_the_start(method: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    for seed in range(12):
        shape = tuple(rng.integers(2, 24, size=2).tolist())
        weight, importance = problem(seed, shape, spread=float(rng.choice([0.1, 1.0, 4.0])))
        rank = int(rng.integers(1, min(shape) + 1))
        start = min(loss(weight, rank, "svd", importance), loss(weight, rank, "fisher", importance))
        reached = loss(weight, rank, method, importance, dtype=dtype)
        assert reached <= start * (1 + 1e-6) + 1e-11, (seed, shape, rank)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_acceleration_pays(spread: float) -> None:
    """At equal iterations; the local minimum that they run into is the same for these problems."""
    for seed in range(3):
        weight, importance = problem(seed, (24, 30), spread)
        em = loss(weight, 6, "em", importance)
        assert loss(weight, 6, "nesterov", importance) <= em
        assert loss(weight, 6, "anderson", importance) <= em


@pytest.mark.parametrize("method", ITERATIVE)
def test_fwsvd_is_the_fixed_point_for_equal_rows(method: str) -> None:
    weight, _ = problem(2)
    importance = torch.rand(1, 19, dtype=torch.float64).expand(14, 19).clone()
    fwsvd = decompose(weight, 5, "fisher", weight_importance=importance)
    reached = decompose(weight, 5, method, weight_importance=importance)
    torch.testing.assert_close(reached.up @ reached.down, fwsvd.up @ fwsvd.down, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ITERATIVE)
def test_uniform_importance_is_plain_svd(method: str) -> None:
    weight, _ = problem(3)
    reached = decompose(weight, 5, method, weight_importance=torch.full_like(weight, 0.25))
    plain = decompose(weight, 5)
    torch.testing.assert_close(reached.up @ reached.down, plain.up @ plain.down)


def test_missing_entries_are_completed() -> None:
    """A matrix of rank 2 from half of its entries, the others weighted zero: the textbook use."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(30, 2, generator=generator).double(), torch.randn(2, 24, generator=generator).double()
    seen = (torch.rand(30, 24, generator=generator) < 0.6).double()
    damaged = torch.where(seen > 0, up @ down, torch.zeros(()).double())
    for method in ("nesterov", "anderson"):
        found = decompose(damaged, 2, method, weight_importance=seen, max_iterations=400)
        torch.testing.assert_close(found.up @ found.down, up @ down, atol=1e-2, rtol=0)


def test_iterations_stop_when_the_objective_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    thin_svd = iterative.thin_svd
    monkeypatch.setattr(iterative, "thin_svd", lambda matrix: calls.append(1) or thin_svd(matrix))
    weight, importance = problem(0, spread=0.2)
    for method, most in {"em": 60, "nesterov": 60, "anderson": 30}.items():
        calls.clear()
        decompose(weight, 5, method, weight_importance=importance, max_iterations=10_000)
        assert len(calls) < most, method
        calls.clear()
        decompose(weight, 5, method, weight_importance=importance, max_iterations=3)
        assert len(calls) <= 6, method


def test_a_bad_mixture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The safeguard: with mixtures that lead astray, Anderson falls back to EM and stays monotone."""
    astray = lambda self: torch.linspace(-5.0, 5.0, len(self.residuals)).double()  # noqa: E731
    monkeypatch.setattr(iterative.AndersonStep, "_shares", astray)
    weight, importance = problem(4)
    em = loss(weight, 4, "em", importance, max_iterations=8)
    assert loss(weight, 4, "anderson", importance, max_iterations=8) == pytest.approx(em, rel=1e-9)


def test_solutions_are_stationary() -> None:
    """At the end the gradient of the objective in both factors vanishes."""
    weight, importance = problem(5, spread=0.5)
    found = decompose(weight, 4, "anderson", weight_importance=importance, max_iterations=300)
    up, down = (factor.clone().requires_grad_() for factor in found)
    (importance * (weight - up @ down).square()).sum().backward()
    assert max(float(up.grad.abs().amax()), float(down.grad.abs().amax())) < 1e-3
    assert weighted_svd(found.up @ found.down).values[4:].amax() < 1e-9  # rank 4
