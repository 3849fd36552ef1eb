# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Closed forms: literal float64 transcriptions of the papers' formulas, and that nothing of the same rank does better."""

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_rank.decomposition import (
    ITERATIVE,
    STATISTIC,
    Factors,
    decompose,
    weighted_error,
    weighted_spectrum,
    weighted_svd,
)


CLOSED = [method for method in STATISTIC if method not in ITERATIVE]
SHAPES = [(12, 20), (20, 12), (15, 15), (1, 6), (6, 1)]


def problem(shape: tuple[int, int], seed: int = 0, tokens: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """A float64 weight and all statistics; inputs of very unequal channels under "inputs"."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    tokens = 4 * in_features + 8 if tokens is None else tokens

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    inputs = normal(tokens, in_features) * normal(in_features).exp() @ (normal(in_features, in_features) * 0.3).exp()
    importance = (normal(out_features, 1) + normal(1, in_features) + 0.7 * normal(out_features, in_features)).exp()
    return normal(*shape), {
        "inputs": inputs,
        "input_scale": inputs.abs().mean(dim=0),
        "input_gram": inputs.T @ inputs,
        "weight_importance": importance,
    }


def paper_product(method: str, weight: Tensor, statistics: dict[str, Tensor], alpha: float, rank: int) -> np.ndarray:
    """The approximation as the papers write it, in their layout, inverses included."""
    w = weight.numpy()
    if method == "svd":
        left, right = np.eye(len(w)), np.eye(w.shape[1])
    elif method == "activation":  # ASVD: W S, S = diag(mean |x|^alpha)
        left, right = np.eye(len(w)), np.diag(statistics["input_scale"].numpy() ** alpha)
    elif method in ("fisher", "importance"):  # FWSVD: I^ W_p with W_p = W^T, I^ = diag(sqrt(sum_j F_ij))
        rows = statistics["weight_importance"].numpy().T.sum(axis=1)
        u, s, v = np.linalg.svd(np.diag(rows**alpha) @ w.T)
        a = np.linalg.inv(np.diag(rows**alpha)) @ u[:, :rank] @ np.diag(s[:rank])
        return (a @ v[:rank]).T
    elif method == "fisher_two_sided":
        fisher = statistics["weight_importance"].numpy()
        left, right = np.diag(fisher.sum(axis=1) ** alpha), np.diag(fisher.sum(axis=0) ** alpha)
    else:  # SVD-LLM: W S with the Cholesky factor S of the Gram matrix
        left, right = np.eye(len(w)), np.linalg.cholesky(statistics["input_gram"].numpy())
    u, s, v = np.linalg.svd(left @ w @ right)
    return np.linalg.inv(left) @ u[:, :rank] @ np.diag(s[:rank]) @ v[:rank] @ np.linalg.inv(right)


def needed(method: str, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    name = STATISTIC[method]
    return {} if name is None else {name: statistics[name]}


@pytest.mark.parametrize("method", CLOSED)
def test_formulas(method: str) -> None:
    for seed, shape in enumerate(SHAPES):
        weight, statistics = problem(shape, seed)
        rank = max(1, min(shape) // 3)
        for alpha in (0.5, 1.0, 0.3):
            up, down = decompose(weight, rank, method, alpha=alpha, **needed(method, statistics))
            expected = paper_product(method, weight, statistics, alpha, rank)
            np.testing.assert_allclose((up @ down).numpy(), expected, atol=1e-7, err_msg=f"{shape} {alpha}")


@pytest.mark.parametrize("method", CLOSED)
def test_tail_of_the_spectrum_is_the_error(method: str) -> None:
    for seed, shape in enumerate(SHAPES):
        weight, statistics = problem(shape, seed)
        given = needed(method, statistics)
        spectrum = weighted_spectrum(weight, method, **given)
        assert spectrum.shape == (min(shape),)
        assert (spectrum.diff() <= 0).all()
        for rank in range(1, min(shape) + 1):
            error = weighted_error(weight, decompose(weight, rank, method, **given), method, **given)
            tail = spectrum[rank:].square().sum()
            torch.testing.assert_close(error, tail, rtol=1e-9, atol=1e-12 * float(spectrum[0] ** 2))


@pytest.mark.parametrize("tokens", [100, 7], ids=["full rank", "fewer tokens than features"])
def test_whitening_is_best_on_its_inputs(tokens: int) -> None:
    weight, statistics = problem((14, 18), tokens=tokens)
    inputs = statistics.pop("inputs")
    rank = 5

    def output_error(factors: Factors) -> float:
        return float(((weight - factors.up @ factors.down) @ inputs.T).square().sum())

    best = output_error(decompose(weight, rank, "whitening", **statistics))
    dropped = weighted_spectrum(weight, "whitening", **statistics)[rank:].square().sum()
    outputs = torch.linalg.svdvals(weight @ inputs.T)
    assert best == pytest.approx(float(dropped), rel=1e-6)
    assert best == pytest.approx(float(outputs[rank:].square().sum()), rel=1e-6)
    for method in STATISTIC:
        assert best <= output_error(decompose(weight, rank, method, **statistics)) * (1 + 1e-9), method
    for _ in range(100):
        up = torch.randn(14, rank, dtype=torch.float64)
        best_down = torch.linalg.lstsq(up, weight).solution  # each random output space at its best
        assert best <= output_error(Factors(up, best_down))


def test_gradient_descent_does_not_beat_whitening() -> None:
    weight, statistics = problem((10, 12), seed=3)
    inputs = statistics["inputs"] / statistics["inputs"].std()
    gram = inputs.T @ inputs
    best = float(weighted_error(weight, decompose(weight, 3, "whitening", input_gram=gram), "whitening",
                                input_gram=gram))  # fmt: skip
    start = decompose(weight, 3)
    up, down = (factor.clone().requires_grad_() for factor in start)
    optimizer = torch.optim.LBFGS([up, down], max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = ((weight - up @ down) @ inputs.T).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    reached = float(weighted_error(weight, Factors(up, down), "whitening", input_gram=gram))
    assert best <= reached * (1 + 1e-9)
    assert reached == pytest.approx(best, rel=1e-3), "the comparison is idle unless descent comes close"


@pytest.mark.parametrize("method", ["fisher", "fisher_two_sided"])
def test_fisher_is_optimal_where_its_metric_is_the_weighting(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 13, generator=generator, dtype=torch.float64)
    columns = torch.randn(1, 13, generator=generator, dtype=torch.float64).exp()
    rows = torch.randn(9, 1, generator=generator, dtype=torch.float64).exp()
    importance = (columns.expand(9, 13) if method == "fisher" else rows * columns).clone()
    factors = decompose(weight, 4, method, weight_importance=importance)
    best = float(weighted_error(weight, factors, "em", weight_importance=importance))

    spectrum = weighted_spectrum(weight, method, weight_importance=importance)
    assert best == pytest.approx(float(spectrum[4:].square().sum()), rel=1e-9)
    for other in STATISTIC:
        statistics = {"input_scale": columns[0], "input_gram": torch.eye(13).double(), "weight_importance": importance}
        rival = decompose(weight, 4, other, **statistics, max_iterations=10)
        assert best <= float(weighted_error(weight, rival, "em", weight_importance=importance)) * (1 + 1e-9), other


def test_ranks_are_nested_and_balanced() -> None:
    weight, statistics = problem((16, 11))
    for method in CLOSED:
        given = needed(method, statistics)
        full, part = decompose(weight, 11, method, **given), decompose(weight, 4, method, **given)
        torch.testing.assert_close(full.up[:, :4], part.up)
        torch.testing.assert_close(full.down[:4], part.down)
        torch.testing.assert_close(full.up.norm(dim=0), full.down.norm(dim=1))
    up, down = decompose(weight, 11)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(up.T @ up, values.diag())
    torch.testing.assert_close(down @ down.T, values.diag())


def test_weighted_svd_is_the_weight_rank_by_rank() -> None:
    weight, statistics = problem((8, 13))
    for method in CLOSED:
        given = needed(method, statistics)
        up, down, values = weighted_svd(weight, method, **given)
        torch.testing.assert_close(up @ down, weight)
        torch.testing.assert_close(values, weighted_spectrum(weight, method, **given), rtol=1e-9, atol=1e-12)
        for rank in range(8):  # each value is the error that its rank takes away
            term = Factors(up[:, rank : rank + 1], down[rank : rank + 1])
            nothing = torch.zeros_like(weight)
            size = weighted_error(nothing, term, method, **given).sqrt()
            torch.testing.assert_close(size, values[rank], rtol=1e-6, atol=1e-9)
        leading = weighted_svd(weight, method, rank=3, **given)
        torch.testing.assert_close(leading.up, up[:, :3])
        torch.testing.assert_close(leading.down, down[:3])
        assert torch.equal(leading.values, values), "what the others are worth comes with them"
    with pytest.raises(ValueError, match="`method` must be one of svd, .*got 'em', which has no singular values"):
        weighted_svd(weight, "em", **needed("em", statistics))


def test_iterative_methods_have_the_spectrum_of_fisher() -> None:
    weight, statistics = problem((8, 13))
    importance = statistics["weight_importance"]
    expected = weighted_spectrum(weight, "fisher", weight_importance=importance)
    for method in ITERATIVE:
        spectrum = weighted_spectrum(weight, method, weight_importance=importance, alpha=0.9)
        assert torch.equal(spectrum, expected)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (60, 60)])
def test_whitening_survives_channels_of_extreme_size(shape: tuple[int, int]) -> None:
    """A channel thousands of times larger than the rest, as transformers have, must not drown it in float32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    inputs = torch.randn(500, shape[1], generator=generator) * torch.logspace(0.5, -2, shape[1])
    inputs[:, 3] *= 2000
    gram = inputs.T @ inputs
    best = torch.linalg.svdvals(weight.double() @ inputs.double().T)[10:].square().sum()
    factors = decompose(weight.double(), 10, "whitening", input_gram=gram, dtype=torch.float32)
    reached = ((weight.double() - factors.up @ factors.down) @ inputs.double().T).square().sum()
    torch.testing.assert_close(reached, best, rtol=1e-4, atol=0)
    tail = weighted_spectrum(weight, "whitening", input_gram=gram)[10:].square().sum()
    torch.testing.assert_close(tail, best, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("dead", "eigendecompositions"), [(0, 1), (2, 2)])
def test_root_of_the_gram_matrix(dead: int, eigendecompositions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Cholesky factor, unless dead inputs make the matrix singular: at scale a second eigendecomposition is dear."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(30, 12, generator=generator), torch.randn(50, 12, generator=generator)
    inputs[:, :dead] = 0
    calls, exact = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(matrix.shape) or exact(matrix))
    spectrum = weighted_spectrum(weight, "whitening", input_gram=inputs.T @ inputs)
    expected = torch.linalg.svdvals(weight.double() @ inputs.double().T)
    torch.testing.assert_close(spectrum, expected[:12], rtol=1e-5, atol=1e-5)
    assert calls == [(12, 12)] * eigendecompositions
