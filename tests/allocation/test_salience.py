# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Salience against the released code's output, literal transcriptions of the formulas, and invariances."""

import math
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor

from peft_rank.allocation import graph
from peft_rank.allocation.budget import keep_top
from peft_rank.allocation.salience import influence, salience_scores


GOLDEN = Path(__file__).parents[1] / "golden" / "salientlora"
WINDOWS = sorted(path.stem for path in GOLDEN.glob("*.npz") if path.stem != "decycle_and_influence")
DECYCLED = [*map(str, range(10)), "_selfloop"]


def make_window(kind: str, steps: int, ranks: int, seed: int = 0) -> Tensor:
    """Noise has few edges, random walks have many, and series that grow together make a dense graph."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(ranks, generator=generator).mul(1.5).exp() * 1e-2
    noise = torch.randn(steps, ranks, generator=generator)
    if kind == "noise":
        return noise * scale
    if kind == "walk":
        return noise.cumsum(0) * scale
    powers = torch.rand(ranks, generator=generator) * 1.5 + 0.5
    return (torch.linspace(0, 1, steps)[:, None] ** powers + 0.01 * noise) * scale


def slopes_between(window: Tensor, beta: float, gamma: float, guard: float = 0.0) -> np.ndarray:
    """Transcribes the definition of an edge: (N, N) slopes, 0 where there is none. Assumes that all series vary."""
    deviation = window.double().numpy() - window.double().numpy().mean(0)
    covariance = deviation.T @ deviation
    norm = np.sqrt(np.diag(covariance))
    correlation = covariance / (np.outer(norm, norm) + guard)
    slope = covariance / (norm[:, None] ** 2 + guard)
    edges = np.where((correlation >= beta) & (slope >= gamma), slope, 0.0)
    np.fill_diagonal(edges, 0.0)
    return edges


def influence_by_recursion(edges: nx.DiGraph) -> list[float]:
    """Transcribes the recursion: a leaf counts as 1 in the sums and is itself stored as 0."""
    values = {}
    for node in reversed(list(nx.topological_sort(edges))):
        values[node] = sum(
            slope * (values[j] or 1.0) for j, slope in ((j, edges[node][j]["weight"]) for j in edges[node])
        )
    return [values[node] for node in range(len(values))]


def as_digraph(adjacency: np.ndarray) -> nx.DiGraph:
    return nx.from_numpy_array(adjacency, create_using=nx.DiGraph)


def without_cycles(edges: nx.DiGraph) -> nx.DiGraph:
    """Transcribes the paper's Algorithm 1."""
    edges = edges.copy()
    while True:
        try:
            cycle = nx.find_cycle(edges)
        except nx.NetworkXNoCycle:
            return edges
        edges.remove_edge(*min(cycle, key=lambda edge: edges.edges[edge]["weight"]))


def percentiles(values: np.ndarray) -> np.ndarray:
    below = (values[None] < values[:, None]).sum(1)
    ties = (values[None] == values[:, None]).sum(1)
    return (below + (ties - 1) / 2) / (len(values) - 1)


# ---- the released code ----


@pytest.mark.parametrize("name", WINDOWS)
def test_reference_reproduces_released_scores_and_masks(name: str) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    steps, modules, rank = golden["traj"].shape
    window = torch.tensor(golden["traj"]).reshape(steps, -1)
    scores = salience_scores(window, torch.tensor(golden["regu_loss"]), [rank] * modules, reference=True)
    assert scores.dtype == torch.float32
    if str(golden["error"]):  # no edge in the graph, where the released code has no score
        assert "TypeError" in str(golden["error"])
        assert influence(window).count_nonzero() == 0
        return
    np.testing.assert_allclose(scores.numpy(), golden["score"].reshape(-1), rtol=0, atol=2e-7)
    mask = keep_top(scores, int(golden["curr_rank"]), [rank] * modules, reference=True)
    np.testing.assert_array_equal(mask.numpy(), golden["mask"].reshape(-1).astype(bool))
    np.testing.assert_allclose(influence(window).numpy(), golden["influence"], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-5, 3e-6, 1e-6, 1e-9])
def test_reference_keeps_the_released_guard(scale: float) -> None:
    """The constant in the denominators takes edges away from small singular values."""
    window = make_window("walk", 12, 120) * scale
    orthogonality = torch.linspace(2.0, 1.0, 12)
    edges = slopes_between(window, 0.9, 2.0, guard=1e-15)
    share = np.array(influence_by_recursion(as_digraph(edges)))
    weights = (1 / orthogonality - 1 / 2.0) / (1 - 1 / 2.0)
    magnitude = (weights[:, None] * window.abs()).sum(0).double().reshape(4, 30)
    expected = share / max(share.sum(), 1e-300) + (magnitude / magnitude.sum(1, keepdim=True)).reshape(-1).numpy()
    scores = salience_scores(window, orthogonality, [30] * 4, reference=True)
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)


def test_reference_lets_nan_spread_to_its_module_only() -> None:
    window = make_window("walk", 12, 40)
    window[3, 7] = torch.nan
    scores = salience_scores(window, torch.linspace(2, 1, 12), [10] * 4, reference=True)
    assert scores[:10].isnan().all()
    assert scores[10:].isfinite().all()


@pytest.mark.parametrize("name", DECYCLED)
def test_cycles_are_broken_as_released(name: str) -> None:
    golden = np.load(GOLDEN / "decycle_and_influence.npz")
    adjacency = golden[f"A{name}"]
    successors = [{int(j): float(row[j]) for j in row.nonzero()[0]} for row in adjacency]
    order = graph.break_cycles(successors)
    decycled = np.zeros_like(adjacency)
    for i, edges in enumerate(successors):
        for j, weight in edges.items():
            decycled[i, j] = weight
    np.testing.assert_array_equal(decycled, golden[f"decycled{name}"])
    if name != "_selfloop":
        values = graph.acyclic_path_sums(successors, order)
        stored = [2.0**value if edges else 0.0 for value, edges in zip(values, successors, strict=True)]
        np.testing.assert_allclose(stored, golden[f"influence{name}"], rtol=1e-12)


# ---- influence ----


@pytest.mark.parametrize("kind", ["noise", "walk", "growth"])
@pytest.mark.parametrize(("beta", "gamma"), [(0.9, 2.0), (0.5, 1.05), (0.0, 1.5), (0.8, 3.0)])
def test_influence_matches_the_recursion(kind: str, beta: float, gamma: float) -> None:
    window = make_window(kind, 15, 150)
    expected = np.array(influence_by_recursion(as_digraph(slopes_between(window, beta, gamma))))
    values = influence(window, correlation_threshold=beta, slope_threshold=gamma)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9)
    logs = influence(window, correlation_threshold=beta, slope_threshold=gamma, log=True)
    np.testing.assert_allclose(logs.exp().numpy(), expected, rtol=1e-9)
    assert torch.equal(logs == -torch.inf, values == 0)


@pytest.mark.parametrize("gamma", [1.0, 0.7, 0.3])
@pytest.mark.parametrize("kind", ["walk", "growth"])
def test_influence_with_cycles_matches_algorithm_1(kind: str, gamma: float) -> None:
    window = make_window(kind, 15, 30)
    window.div_(window.std(0)).mul_(torch.linspace(1, 2, 30))  # deviations close enough for edges both ways
    edges = as_digraph(slopes_between(window, 0.8, gamma))
    expected = influence_by_recursion(without_cycles(edges))
    values = influence(window, correlation_threshold=0.8, slope_threshold=gamma)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9)
    assert gamma == 1.0 or edges.number_of_edges() > without_cycles(edges).number_of_edges()


@pytest.mark.parametrize("kind", ["walk", "growth"])
def test_result_does_not_depend_on_the_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    window = make_window(kind, 12, 200)
    expected = influence(window, slope_threshold=1.2, log=True)
    monkeypatch.setattr(graph, "ROWS", 7)
    monkeypatch.setattr(graph, "COLUMNS", 5)
    monkeypatch.setattr(graph, "BAND_BITS", 4)
    torch.testing.assert_close(influence(window, slope_threshold=1.2, log=True), expected, rtol=1e-12, atol=1e-12)


def test_no_array_is_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    correlated = graph.SeriesBatch.correlated

    def recorded(*args: object) -> Tensor:
        result = correlated(*args)
        sizes.append(tuple(result.shape[1:]))
        return result

    monkeypatch.setattr(graph.SeriesBatch, "correlated", recorded)
    monkeypatch.setattr(graph, "ROWS", 16)
    monkeypatch.setattr(graph, "COLUMNS", 64)
    influence(make_window("growth", 12, 500))
    assert len(sizes) > 31
    assert max(rows for rows, _ in sizes) == 16
    assert max(columns for _, columns in sizes) == 64


def test_chain_by_hand() -> None:
    """Edges x -> 3x, 3x -> 10x, x -> 10x of slopes 3, 10 / 3, 10: I(3x) = 10 / 3 and I(x) = 3 * 10 / 3 + 10."""
    series = torch.tensor([0.0, 1.0, -0.5, 2.0], dtype=torch.float64)
    window = torch.stack([series, 3 * series, 10 * series], dim=1)
    torch.testing.assert_close(influence(window), torch.tensor([20.0, 10 / 3, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("gamma", [1.05, 1.05001])
def test_logarithm_stays_finite_beyond_float64(gamma: float) -> None:
    """Multiples by 1.06 of one series: I_k = 2^(k - 1) * 1.06^k counted from the largest, far beyond 1e308."""
    count = 3000
    exponent = torch.arange(count, dtype=torch.float64)
    series = torch.tensor([0.0, 1.0, -0.5, 2.0], dtype=torch.float64)
    window = series[:, None] * 1.06**-exponent
    logs = influence(window, slope_threshold=gamma, log=True)
    expected = (exponent - 1) * math.log(2) + exponent * math.log(1.06)
    assert logs[0] == -torch.inf
    torch.testing.assert_close(logs[1:], expected[1:], rtol=1e-10, atol=1e-10)
    assert influence(window, slope_threshold=gamma)[-1] == torch.inf
    scores = salience_scores(window, torch.ones(4), [count], slope_threshold=gamma, salience_lambda=0.0)
    torch.testing.assert_close(scores, exponent / (count - 1))


def test_ranks_that_are_not_alive_have_no_edges() -> None:
    window = make_window("walk", 12, 60)
    alive = torch.rand(60) < 0.6
    values = influence(window, alive=alive)
    torch.testing.assert_close(values[alive], influence(window[:, alive]))
    assert (values[~alive] == 0).all()


# ---- the default score ----


@pytest.mark.parametrize("graph_scope", ["model", "module"])
@pytest.mark.parametrize("magnitude_scope", ["model", "module"])
@pytest.mark.parametrize("seed", range(3))
def test_default_score_matches_its_definition(graph_scope: str, magnitude_scope: str, seed: int) -> None:
    sizes = [12, 0, 30, 1, 17]
    window = make_window("walk", 14, 60, seed)
    orthogonality = torch.rand(14) + 0.5
    alive = torch.rand(60) < 0.8
    scores = salience_scores(
        window,
        orthogonality,
        sizes,
        alive=alive,
        salience_lambda=0.6,
        graph_scope=graph_scope,
        magnitude_scope=magnitude_scope,
    )
    inverse = 1 / orthogonality.double()
    weights = (inverse - inverse.min()) / (inverse.max() - inverse.min())
    magnitude = (weights[:, None] * window.double().abs()).sum(0)
    logs = torch.zeros(60, dtype=torch.float64)
    for index in torch.arange(60).split(sizes) if graph_scope == "module" else [torch.arange(60)]:
        kept = index[alive[index]]
        edges = as_digraph(slopes_between(window[:, kept], 0.9, 2.0)) if len(kept) else nx.DiGraph()
        logs[kept] = torch.tensor([math.log(value or 1.0) for value in influence_by_recursion(edges)]).double()
    if magnitude_scope == "module":
        parts = zip(magnitude.split(sizes), alive.split(sizes), strict=True)
        magnitude = torch.cat([part / part[kept].mean() for part, kept in parts])
    expected = 0.6 * percentiles(magnitude[alive].numpy()) + 0.4 * percentiles(logs[alive].numpy().round(9))
    np.testing.assert_allclose(scores[alive].numpy(), expected, atol=1e-12)
    assert (scores[~alive] == -torch.inf).all()


def test_lambda_selects_the_term() -> None:
    window, orthogonality = make_window("walk", 12, 50), torch.linspace(2, 1, 12)
    magnitude = salience_scores(window, orthogonality, [50], salience_lambda=1.0)
    domain = salience_scores(window, orthogonality, [50], salience_lambda=0.0)
    np.testing.assert_allclose(domain.numpy(), percentiles(influence(window).clamp(min=1).numpy()), atol=1e-12)
    torch.testing.assert_close(
        salience_scores(window, orthogonality, [50], salience_lambda=0.3), 0.3 * magnitude + 0.7 * domain
    )


def test_equal_orthogonality_weighs_steps_equally() -> None:
    window = make_window("noise", 12, 50)
    expected = percentiles(window.double().abs().sum(0).numpy())
    for orthogonality in (torch.full((12,), 0.3), torch.zeros(12), 1 + 1e-7 * torch.rand(12)):
        scores = salience_scores(window, orthogonality, [50], salience_lambda=1.0)
        np.testing.assert_allclose(scores.numpy(), expected, atol=1e-12)


def test_more_orthogonal_steps_weigh_more() -> None:
    window = torch.tensor([[1.0, 0.0, 0.4], [0.0, 1.0, 0.4]])
    scores = salience_scores(window, torch.tensor([2.0, 1.0]), [3], salience_lambda=1.0)
    assert scores.argsort(descending=True).tolist() == [1, 2, 0]


@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90])
def test_scores_do_not_depend_on_the_unit(factor: float) -> None:
    window, orthogonality = make_window("walk", 12, 80), torch.rand(12) + 0.1
    expected = salience_scores(window, orthogonality, [40, 40])
    torch.testing.assert_close(salience_scores(window * factor, orthogonality * 8, [40, 40]), expected)


@pytest.mark.parametrize("reference", [False, True])
def test_scores_move_with_the_ranks(reference: bool) -> None:
    window, orthogonality = make_window("growth", 12, 80), torch.rand(12) + 0.1
    within = torch.cat([torch.randperm(40), 40 + torch.randperm(40)])
    modules_swapped = torch.arange(80).roll(40)
    expected = salience_scores(window, orthogonality, [40, 40], reference=reference)
    for order in (within, modules_swapped):
        scores = salience_scores(window[:, order], orthogonality, [40, 40], reference=reference)
        torch.testing.assert_close(scores, expected[order])


DEGENERATE = {
    "zero": torch.zeros(12, 40),
    "constant": torch.full((12, 40), 0.1),
    "one step": make_window("noise", 1, 40),
    "two steps": make_window("noise", 2, 40),
    "all equal": torch.linspace(0.1, 1, 12)[:, None].expand(12, 40),
    "zero module": make_window("walk", 12, 40).masked_fill(torch.arange(40) < 10, 0.0),
    "tiny": make_window("walk", 12, 40) * 1e-30,
    "huge": make_window("walk", 12, 40) * 1e30,
    "all magnitudes": make_window("walk", 12, 40) * torch.logspace(-30, 30, 40),
    "half": make_window("walk", 12, 40).half(),
    "one rank of three": make_window("walk", 12, 40).masked_fill(torch.arange(40) % 3 > 0, 0.0),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("graph_scope", ["model", "module"])
def test_scores_are_finite_and_in_range(case: str, graph_scope: str) -> None:
    window = DEGENERATE[case]
    for orthogonality in (torch.linspace(2, 1, len(window)), torch.ones(len(window)), torch.zeros(len(window))):
        scores = salience_scores(
            window, orthogonality, [10] * 4, graph_scope=graph_scope, magnitude_scope=graph_scope, slope_threshold=1.5
        )
        assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("value", [0.1, 1e-20, 12345.678])
def test_constant_series_have_no_edges(value: float) -> None:
    """Neither rounding in their mean nor a flicker of the last bit, here in step with a true series, makes an edge."""
    window = make_window("walk", 12, 40)
    window[:, 1] = (torch.arange(12) >= 6).float()
    window[:, ::2] = value
    window[6:, ::4] = torch.nextafter(torch.tensor(value), torch.tensor(torch.inf))
    logs = influence(window, log=True)
    assert (logs[::2] == -torch.inf).all()
    torch.testing.assert_close(logs[1::2], influence(window[:, 1::2], log=True))


def test_no_edges_leave_the_magnitude_to_decide() -> None:
    window = make_window("noise", 100, 30)
    assert influence(window).count_nonzero() == 0
    scores = salience_scores(window, torch.linspace(2, 1, 100), [30], salience_lambda=0.1)
    magnitude = salience_scores(window, torch.linspace(2, 1, 100), [30], salience_lambda=1.0)
    torch.testing.assert_close(scores, 0.1 * magnitude + 0.9 * 0.5)


def test_nothing_alive_and_nothing_at_all() -> None:
    dead = salience_scores(make_window("walk", 12, 5), torch.ones(12), [5], alive=torch.zeros(5, dtype=torch.bool))
    assert (dead == -torch.inf).all()
    assert salience_scores(torch.zeros(12, 0), torch.ones(12), [0, 0]).shape == (0,)
    assert influence(torch.zeros(12, 0)).shape == (0,)


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": torch.zeros(12)}, r"`window` must be .*\(steps, ranks\).*\(12,\)"),
        ({"window": torch.zeros(12, 8, dtype=torch.long)}, "`window` must be floating point.*int64"),
        ({"window": torch.zeros(0, 8), "orthogonality": torch.ones(0)}, "`window` must .* one step or more"),
        ({"window": torch.full((12, 8), torch.nan)}, "`window` must be finite.*learning rate"),
        ({"window": torch.full((12, 8), torch.inf)}, "`window` must be finite"),
        ({"orthogonality": torch.ones(11)}, "`orthogonality` must hold .* 12 steps"),
        ({"orthogonality": torch.full((12,), torch.nan)}, "`orthogonality` must be finite"),
        ({"orthogonality": -torch.ones(12)}, "`orthogonality` must be at least 0"),
        ({"group_sizes": [4, 5]}, "`group_sizes` must .* 8 ranks.* sum of 9"),
        ({"group_sizes": [9, -1]}, "`group_sizes` must be non-negative"),
        ({"alive": torch.ones(8)}, "`alive` must be bool"),
        ({"alive": torch.ones(7, dtype=torch.bool)}, r"`alive` must be bool of shape \(8,\)"),
        ({"correlation_threshold": 1.1}, "`correlation_threshold` must be between 0 and 1, got 1.1"),
        ({"slope_threshold": 0.0}, "`slope_threshold` must be above 0 and finite, got 0.0"),
        ({"slope_threshold": math.nan}, "`slope_threshold` must be above 0"),
        ({"salience_lambda": -0.1}, "`salience_lambda` must be between 0 and 1, got -0.1"),
        ({"graph_scope": "layer"}, "`graph_scope` must be one of .*'model', 'module'.*got 'layer'"),
        ({"magnitude_scope": ""}, "`magnitude_scope` must be one of"),
    ],
)
def test_illegal_argument_is_named(arguments: dict, message: str) -> None:
    valid = {"window": make_window("walk", 12, 8), "orthogonality": torch.ones(12), "group_sizes": [4, 4]}
    with pytest.raises(ValueError, match=message):
        salience_scores(**{**valid, **arguments})


def test_influence_checks_its_window() -> None:
    with pytest.raises(ValueError, match="`window` must be finite"):
        influence(torch.full((12, 8), torch.nan))
