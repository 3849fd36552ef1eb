# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The regularizer against a literal transcription of its formula, differentiated by autograd in float64."""

from __future__ import annotations

import pytest
import torch

from peft_rank import orthogonality as module
from peft_rank.orthogonality import orthogonality, orthogonality_with_gradient


SHAPES = [(4, 8, 6), (1, 5, 3), (4, 8, 6), (3, 3, 9), (6, 4, 4)]  # (r, in, out); the last has more ranks than columns


def make_factors(shapes=SHAPES, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    down = [torch.randn(r, n, generator=generator) for r, n, _ in shapes]
    up = [torch.randn(m, r, generator=generator) for r, _, m in shapes]
    return down, up


def literal(down, up, alive=None) -> torch.Tensor:
    """1 / (2 M) * sum of ||A A^T - I||_F + ||B^T B - I||_F over the ranks that are alive."""
    total = torch.zeros((), dtype=torch.float64)
    for position, (A, B) in enumerate(zip(down, up, strict=True)):
        keep = slice(None) if alive is None or alive[position] is None else alive[position].bool()
        A, B = A.double()[keep], B.double()[:, keep]
        eye = torch.eye(len(A), dtype=torch.float64)
        total = total + torch.sqrt(((A @ A.T - eye) ** 2).sum()) + torch.sqrt(((B.T @ B - eye) ** 2).sum())
    return total / (2 * len(down))


def literal_gradient(down, up, alive=None, weight=1.0):
    down, up = ([factor.double().requires_grad_() for factor in factors] for factors in (down, up))
    gradients = torch.autograd.grad(weight * literal(down, up, alive), [*down, *up])
    return gradients[: len(down)], gradients[len(down) :]


ALIVE = {
    "all": None,
    "masks": [torch.tensor(mask) for mask in ([1, 0, 1, 1], [1], [0, 0, 1, 0], [1, 1, 0], [1, 0, 1, 0, 1, 1])],
    "some-masks": [None, None, torch.tensor([True, False, True, True]), None, torch.tensor([True] * 5 + [False])],
    "float-masks": [torch.tensor([1.0, 0.0, 1.0, 1.0]), None, None, torch.tensor([1.0, 1.0, 0.0]), None],
}


@pytest.mark.parametrize("alive", ALIVE.values(), ids=ALIVE.keys())
def test_value(alive) -> None:
    down, up = make_factors()
    torch.testing.assert_close(orthogonality(down, up, alive).double(), literal(down, up, alive), rtol=1e-6, atol=0)


@pytest.mark.parametrize("alive", ALIVE.values(), ids=ALIVE.keys())
def test_gradient(alive) -> None:
    down, up = make_factors()
    value, gradients = orthogonality_with_gradient(down, up, alive, weight=0.3)
    torch.testing.assert_close(value.double(), literal(down, up, alive), rtol=1e-6, atol=0)
    for actual, expected, factors in zip(gradients, literal_gradient(down, up, alive, 0.3), (down, up), strict=True):
        for one, other, factor in zip(actual, expected, factors, strict=True):
            assert one.shape == factor.shape
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_dead_ranks_get_no_gradient() -> None:
    down, up = make_factors()
    gradients = orthogonality_with_gradient(down, up, ALIVE["masks"])[1]
    for A, B, mask in zip(*gradients, ALIVE["masks"], strict=True):
        assert not A[mask == 0].any() and not B[:, mask == 0].any()
        assert A[mask == 1].any() and B[:, mask == 1].any()


def test_a_zero_factor_that_is_alive_is_not_orthonormal() -> None:
    """B starts at zero by default."""
    down, up = make_factors([(4, 8, 6)])
    up = [torch.zeros_like(up[0])]
    torch.testing.assert_close(orthogonality(down, up).double(), literal(down, up), rtol=1e-6, atol=0)


def test_modules_without_a_rank_count_but_add_nothing() -> None:
    down, up = make_factors([(4, 8, 6), (0, 8, 6), (0, 5, 3)])
    torch.testing.assert_close(orthogonality(down, up).double(), literal(down, up), rtol=1e-6, atol=0)
    gradients = orthogonality_with_gradient(down, up)[1]
    assert [g.shape for g in gradients[0]] == [(4, 8), (0, 8), (0, 5)]
    assert [g.shape for g in gradients[1]] == [(6, 4), (6, 0), (3, 0)]
    expected = literal_gradient(down, up)
    torch.testing.assert_close(gradients[0][0].double(), expected[0][0], rtol=1e-5, atol=1e-6)


def test_no_rank_left_at_all() -> None:
    down, up = make_factors([(0, 8, 6)])
    assert orthogonality(down, up).item() == 0
    down, up = make_factors([(3, 8, 6)])
    assert orthogonality(down, up, [torch.zeros(3)]).item() == 0
    assert not any(g.any() for pair in orthogonality_with_gradient(down, up, [torch.zeros(3)])[1] for g in pair)


@pytest.mark.parametrize("r", [1, 4, 16])
def test_orthonormal_factors_have_no_gradient(r: int) -> None:
    """Autograd of the norm is NaN or noise of full size there."""
    down = [torch.linalg.qr(torch.randn(32, r))[0].T.contiguous()]
    up = [torch.linalg.qr(torch.randn(48, r))[0]]
    assert orthogonality(down, up).item() < 1e-5
    gradients = [g for pair in orthogonality_with_gradient(down, up)[1] for g in pair]
    assert all(torch.isfinite(g).all() for g in gradients)
    full = [g for pair in orthogonality_with_gradient(*make_factors([(r, 32, 48)]))[1] for g in pair]
    assert max(g.norm() for g in gradients) < 0.3 * min(g.norm() for g in full)
    exact = [torch.eye(r, 32)]
    assert not any(g.any() for pair in orthogonality_with_gradient(exact, [torch.eye(48, r)])[1] for g in pair)


def test_masks_may_lie_elsewhere_than_the_factors() -> None:
    """Where a model was before it was moved; the meta device stands for a GPU."""
    down, up = ([factor.to("meta") for factor in factors] for factors in make_factors([(4, 8, 6)] * 3))
    alive = [torch.ones(4, device="meta"), torch.tensor([1, 0, 1, 1]), None]
    value, gradients = orthogonality_with_gradient(down, up, alive)
    assert value.device.type == orthogonality(down, up, alive).device.type == "meta"
    assert {gradient.device.type for pair in gradients for gradient in pair} == {"meta"}


def test_a_step_along_the_gradient_reduces_the_value() -> None:
    down, up = make_factors()
    before = orthogonality(down, up)
    gradients = orthogonality_with_gradient(down, up)[1]
    for factors, gradient in zip((down, up), gradients, strict=True):
        for factor, each in zip(factors, gradient, strict=True):
            factor.sub_(each, alpha=1e-2)
    assert orthogonality(down, up) < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_computed_in_float32(dtype: torch.dtype) -> None:
    down, up = ([factor.to(dtype) for factor in factors] for factors in make_factors())
    value = orthogonality(down, up)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), literal(down, up), rtol=1e-5, atol=0)


def test_large_groups_are_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    down, up = make_factors([(4, 8, 6)] * 7)
    value, gradients = orthogonality(down, up), orthogonality_with_gradient(down, up)[1]
    monkeypatch.setattr(module, "_STACK_NUMEL", 70)  # two of the seven at a time
    torch.testing.assert_close(orthogonality(down, up), value)
    torch.testing.assert_close(orthogonality_with_gradient(down, up)[1], gradients)


def test_inputs_are_not_changed_and_take_no_part_in_autograd() -> None:
    down, up = ([factor.requires_grad_() for factor in factors] for factors in make_factors())
    copies = [factor.detach().clone() for factor in (*down, *up)]
    value, gradients = (
        orthogonality(down, up, ALIVE["masks"]),
        orthogonality_with_gradient(down, up, ALIVE["masks"])[1],
    )
    assert not value.requires_grad and not any(g.requires_grad for pair in gradients for g in pair)
    assert all(torch.equal(a, b) for a, b in zip((*down, *up), copies, strict=True))


@pytest.mark.parametrize("function", [orthogonality, orthogonality_with_gradient])
def test_wrong_numbers_of_factors_are_refused(function) -> None:
    down, up = make_factors()
    with pytest.raises(ValueError, match="`down`"):
        function([], [])
    with pytest.raises(ValueError, match="`up`"):
        function(down, up[:-1])
    with pytest.raises(ValueError, match="`alive`"):
        function(down, up, [None])
