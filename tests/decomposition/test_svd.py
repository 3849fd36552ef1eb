# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Drivers that fail: what is checked, and who steps in."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_rank.decomposition import svd


EXACT_SVD = torch.linalg.svd
EXACT_EIGH = torch.linalg.eigh


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that converges in float64 only."""

    def in_float64(exact: Any) -> Any:
        def solve(matrix: Tensor, **options: Any) -> Any:
            if matrix.dtype == torch.float32:
                raise torch.linalg.LinAlgError("did not converge")
            return exact(matrix, **options)

        return solve

    for name in ("svd", "svdvals", "eigh"):
        monkeypatch.setattr(torch.linalg, name, in_float64(getattr(torch.linalg, name)))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.usefixtures("stubborn")
def test_what_does_not_converge_is_tried_in_float64(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    left, values, right = svd.thin_svd(matrix)
    assert left.dtype == values.dtype == right.dtype == torch.float32
    torch.testing.assert_close(left * values @ right, matrix)
    torch.testing.assert_close(svd.singular_values(matrix), values)


@pytest.mark.usefixtures("stubborn")
def test_eigenvectors_that_do_not_converge() -> None:
    root = torch.randn(8, 5)
    values, vectors = svd.symmetric_eigen(root @ root.T)
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(vectors * values @ vectors.T, root @ root.T, atol=1e-5, rtol=0)


def _fast(matrix: Tensor, spoil: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def gesvda(given: Tensor, **options: Any) -> Any:
        assert options == {"full_matrices": False, "driver": "gesvda"}
        return spoil(*EXACT_SVD(given, full_matrices=False))

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", gesvda)
        return svd._fast_svd(matrix)


def test_answers_of_the_fast_driver_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(30, 20)
    assert _fast(matrix, lambda *answer: answer, monkeypatch) is not None
    assert _fast(torch.zeros(30, 20), lambda *answer: answer, monkeypatch) is not None
    wrong = {
        "NaN": lambda left, values, right: (left * torch.nan, values, right),
        "values": lambda left, values, right: (left, values * 1.01, right),
        "skew": lambda left, values, right: (
            left * torch.linspace(1, 1.1, 20),
            values / torch.linspace(1, 1.1, 20),
            right,
        ),
    }
    for name, spoil in wrong.items():
        assert _fast(matrix, spoil, monkeypatch) is None, name


def test_balanced_leaves_the_product() -> None:
    up, down = torch.randn(7, 4), torch.randn(4, 5) * 1e6
    down[2] = 0
    factors = svd.balanced(up, down)
    torch.testing.assert_close(factors.up @ factors.down, up @ down, rtol=1e-5, atol=1.0)
    alive = torch.tensor([0, 1, 3])
    torch.testing.assert_close(factors.up.norm(dim=0)[alive], factors.down.norm(dim=1)[alive])
    assert torch.equal(factors.up[:, 2], up[:, 2]), "a dead rank keeps its direction, so that it can be trained"


@pytest.mark.parametrize("reflections", [0, 1])
@pytest.mark.parametrize("size", [1e-100, 1.0, 1e100])
def test_orthonormal_columns(reflections: int, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of lengths that differ by fourteen orders of magnitude, and where some columns are nothing but rounding."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(60, 20, dtype=torch.float64, generator=generator))
    matrix = (
        (q + 1e-3 * torch.randn(60, 20, dtype=torch.float64, generator=generator)) * torch.logspace(0, -14, 20) * size
    )
    if reflections:
        matrix[:, 15] = matrix[:, 14]
        matrix[:, 19] = 0
    calls, exact = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: calls.append(0) or exact(matrix))
    found = svd.orthonormal(matrix)
    assert len(calls) == reflections
    torch.testing.assert_close(found.T @ found, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-13)
    upper = found.T @ matrix
    torch.testing.assert_close(found @ upper / size, matrix / size, rtol=0, atol=1e-14)
    assert (upper.diagonal()[:15] > 0).all()
    assert upper.tril(-1).abs().amax() < 1e-13 * size
    torch.testing.assert_close(svd.orthonormal(matrix[:, :5]), found[:, :5], rtol=0, atol=1e-13)
