# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The growth rule against its literal form, the released code's recorded decisions, and its own promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from peft_rank.allocation.growth import explained_ratio, next_rank


GOLDEN = Path(__file__).parents[1] / "golden" / "inrank"
MAX_RANK = 16  # width that the recorded layer allocates
SEQUENCES = ("sequential", "flat", "shrink")


def literal_ratio(values: np.ndarray, rank: int, criterion: str) -> float:
    """1 - f(s with its first values set to 0) / f(s), as it is written."""
    rest = values.copy()
    rest[:rank] = 0
    spread = (lambda x: np.var(x, ddof=1)) if criterion == "variance" else (lambda x: np.square(x).sum())
    return 1 - spread(rest) / spread(values)


def spectrum(n: int, zeros: int = 0, seed: int = 0) -> np.ndarray:
    values = np.sort(np.random.default_rng(seed).exponential(size=n))[::-1]
    return np.concatenate([values, np.zeros(zeros)])


@pytest.mark.parametrize("criterion", ["energy", "variance"])
@pytest.mark.parametrize("zeros", [0, 1, 40])
def test_closed_form_equals_the_literal_one(criterion: str, zeros: int) -> None:
    values = spectrum(9, zeros)
    for rank in range(len(values) + 1):
        expected = literal_ratio(values, rank, criterion)
        assert explained_ratio(torch.tensor(values), rank, criterion) == pytest.approx(expected, abs=1e-12)
        short = torch.tensor(values[:9])
        assert explained_ratio(short, rank, criterion, size=9 + zeros) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "ratio", "criterion"),
    [
        ("s", "ratio", "variance"),
        ("s", "frobenius_energy_ratio", "energy"),
        ("s_zero_tail", "ratio_zero_tail", "variance"),
    ],
)
def test_ratios_equal_the_recorded_ones(values: str, ratio: str, criterion: str) -> None:
    data = np.load(GOLDEN / "explained_ratio.npz")
    found = [explained_ratio(torch.tensor(data[values]), k, criterion) for k in range(len(data[ratio]))]
    np.testing.assert_allclose(found, data[ratio], atol=2e-7)


def recorded_decisions(name: str) -> tuple[np.ndarray, dict]:
    """Singular values of every forward and width, as the released layer takes them of its products, and the records."""
    data = dict(np.load(GOLDEN / f"{name}.npz"))
    down, up = torch.tensor(data["A"]), torch.tensor(data["B"])
    spectra = {
        width: torch.linalg.svdvals(down[:, :width].transpose(1, 2) @ up[:, :, :width].transpose(1, 2))
        for width in range(1, MAX_RANK + 1)
    }
    return spectra, data


@pytest.mark.parametrize("name", SEQUENCES)
def test_decisions_equal_the_released_ones(name: str) -> None:
    spectra, data = recorded_decisions(name)
    decided = 0
    for (threshold, init, buffer, warmup, gap), modes in zip(data["conf"], data["modes"], strict=True):
        init, buffer, warmup, gap = map(int, (init, buffer, warmup, gap))
        current = init
        for forward in range(1, len(modes) + 1):
            if forward > warmup and forward % gap == 0:
                values = spectra[current + buffer][forward - 1]
                current = next_rank(values, current, buffer, MAX_RANK, threshold, "variance", reference=True)
                decided += 1
            assert current == modes[forward - 1]
    assert decided == data["decision_made"].sum() > 9000


@pytest.mark.parametrize("name", SEQUENCES)
def test_recorded_ratios(name: str) -> None:
    """The released layer keeps the ratio of the last index that it tried, in float32."""
    spectra, data = recorded_decisions(name)
    for (_, init, buffer, *_), modes, ratios, made in zip(
        data["conf"], data["modes"], data["ratio"], data["decision_made"], strict=True
    ):
        before = np.concatenate([[init], modes[:-1]]).astype(int)
        for forward in np.flatnonzero(made)[::7]:
            values = spectra[before[forward] + int(buffer)][forward]
            found = explained_ratio(values, int(modes[forward]), "variance")
            assert found == pytest.approx(ratios[forward], abs=2e-6)


@pytest.mark.parametrize("criterion", ["energy", "variance"])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_the_smallest_sufficient_rank(criterion: str, threshold: float) -> None:
    for seed in range(20):
        values = torch.tensor(spectrum(12, seed=seed))
        for current in (0, 2, 5):
            found = next_rank(values, current, 12 - current, 12, threshold, criterion)
            assert current <= found <= 12
            assert found == 12 or explained_ratio(values, found, criterion) > threshold
            if found > current:
                assert explained_ratio(values, found - 1, criterion) <= threshold


def test_never_decreases_and_stops_at_the_largest_rank() -> None:
    steep, flat = torch.tensor([1.0, 1e-3, 1e-3, 1e-3]), torch.ones(4)
    assert next_rank(steep, 3, 1, 8, 0.9, "energy") == 3
    assert next_rank(flat, 3, 1, 3, 0.99, "energy") == 3
    assert next_rank(flat, 5, 1, 3, 0.99, "energy") == 5
    assert next_rank(flat, 2, 2, 3, 0.9, "energy") == 3


def test_growth_is_at_most_the_buffer() -> None:
    flat = torch.ones(6)
    for buffer in range(4):
        assert next_rank(flat, 2, buffer, 20, 0.99, "energy") == 2 + buffer
        released = next_rank(flat, 2, buffer, 20, 0.99, "energy", reference=True)
        assert released == 2 + max(0, buffer - 1)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("criterion", ["energy", "variance"])
def test_no_buffer_no_growth(criterion: str, reference: bool) -> None:
    """The released code fails here."""
    assert next_rank(torch.tensor([2.0, 1.0]), 2, 0, 8, 0.99, criterion, reference) == 2
    assert next_rank(torch.tensor([2.0, 1.0]), 2, 4, 5, 0.99, criterion, reference=True) == 2


@pytest.mark.parametrize("criterion", ["energy", "variance"])
@pytest.mark.parametrize("zero", [torch.zeros(5), torch.zeros(0)])
def test_a_product_of_zero_is_explained(criterion: str, zero: torch.Tensor) -> None:
    assert explained_ratio(zero, 0, criterion) == explained_ratio(zero, 3, criterion) == 1.0
    assert next_rank(zero, 2, 3, 8, 0.9, criterion) == 2


def test_a_flat_spectrum_has_no_variance_but_energy() -> None:
    """The released ratio is -inf there, so that the rank would grow for ever."""
    for values in (torch.ones(8), 0.3 * torch.ones(8), torch.ones(8) + 1e-8 * torch.arange(8)):
        assert explained_ratio(values, 4, "variance") == pytest.approx(0.5)
        assert next_rank(values, 1, 7, 8, 0.7, "variance") == 6
        assert next_rank(values, 1, 4, 8, 0.7, "variance", reference=True) == 3


def test_zeros_do_not_matter_to_the_energy_but_to_the_variance() -> None:
    values, wide = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    assert explained_ratio(values, 1) == explained_ratio(wide, 1) == pytest.approx(9 / 14)
    assert explained_ratio(values, 1, "variance") != explained_ratio(wide, 1, "variance")
    # the wider the layer, the closer the two
    assert explained_ratio(values, 1, "variance", size=10**6) == pytest.approx(9 / 14, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: explained_ratio(torch.ones(3), -1), "`rank` must be at least 0"),
        (lambda: explained_ratio(torch.ones(3), 1, "entropy"), "`criterion='entropy'` must be one of 'energy'"),
        (lambda: explained_ratio(torch.ones(3, 1), 1), "one dimension"),
        (lambda: explained_ratio(torch.tensor([1.0, torch.nan]), 1), "must be finite"),
        (lambda: explained_ratio(torch.ones(3), 1, size=2), "`size=2` must be at least"),
        (lambda: next_rank(torch.ones(3), 1, -1, 3, 0.9, "energy"), "`buffer` must be at least 0"),
        (lambda: next_rank(torch.tensor([torch.inf]), 1, 1, 3, 0.9, "energy"), "must be finite"),
        (lambda: next_rank(torch.ones(3), 1, 1, 3, 90), "`threshold=90` must be at most 1"),
        (lambda: next_rank(torch.ones(3), 1, 1, 3, float("nan")), "`threshold=nan` must be at most 1"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
