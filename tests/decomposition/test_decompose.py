# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What holds for every method: shapes, dtypes, units, damaged and degenerate input, messages."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_rank.decomposition import STATISTIC, Factors, decompose, weighted_error, weighted_spectrum


METHODS = list(STATISTIC)
SHAPES = [(10, 17), (17, 10), (12, 12), (1, 9), (9, 1), (1, 1)]


def statistics_for(shape: tuple[int, int], seed: int = 0, tokens: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, shape[1], generator=generator) * torch.rand(shape[1], generator=generator)
    return {
        "input_scale": inputs.abs().mean(dim=0),
        "input_gram": inputs.T @ inputs,
        "weight_importance": torch.randn(shape, generator=generator).square(),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shapes_dtypes_and_untouched_input(method: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        weight = torch.randn(shape, dtype=dtype).requires_grad_()
        statistics = statistics_for(shape)
        before = {name: value.clone() for name, value in statistics.items()}
        rank = int(rng.integers(1, min(shape) + 1))
        up, down = decompose(weight, rank, method, **statistics)
        assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
        assert up.dtype == down.dtype == dtype
        assert up.is_contiguous() and down.is_contiguous()
        assert not up.requires_grad and not down.requires_grad
        for name, value in statistics.items():
            assert torch.equal(value, before[name]), f"{name} was modified"


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_exact_and_more_is_clamped(method: str) -> None:
    for shape in SHAPES:
        weight = torch.randn(shape)
        for rank in (min(shape), min(shape) + 1, 10_000):
            up, down = decompose(weight, rank, method, **statistics_for(shape))
            assert up.shape[1] == min(shape)
            torch.testing.assert_close(up @ down, weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_computed_in_float32(method: str) -> None:
    weight = torch.randn(24, 32).bfloat16()
    statistics = statistics_for((24, 32))
    expected = decompose(weight.float(), 6, method, **statistics)
    found = decompose(weight, 6, method, **statistics)
    assert torch.equal(found.up, expected.up.bfloat16())
    assert torch.equal(found.down, expected.down.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = decompose(weight.float(), 6, method, **statistics)
    assert torch.equal(inside.up, expected.up)


@pytest.mark.parametrize("method", METHODS)
def test_units_do_not_matter(method: str) -> None:
    weight = torch.randn(14, 11)
    statistics = statistics_for((14, 11))
    expected = decompose(weight, 4, method, **statistics)
    expected = expected.up @ expected.down
    for unit in (2.0**-100, 2.0**100):  # powers of two, which change no digit
        up, down = decompose(weight * unit, 4, method, **statistics)
        torch.testing.assert_close(up.double() @ down.double() / unit, expected.double(), atol=1e-5, rtol=0)
        scaled = {name: value * unit for name, value in statistics.items()}
        found = decompose(weight, 4, method, **scaled)
        torch.testing.assert_close(found.up @ found.down, expected, atol=1e-5, rtol=0)
        power = 0.5 if STATISTIC[method] else 0.0
        spectrum = weighted_spectrum(weight * unit, method, **scaled) / unit ** (1 + power)
        torch.testing.assert_close(spectrum, weighted_spectrum(weight, method, **statistics), rtol=1e-6, atol=0)


def degenerate(shape: tuple[int, int]) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Named weights and statistics that break inverses, Cholesky factors and quotients."""
    out_features, in_features = shape
    weight, usual = torch.randn(shape), statistics_for(shape)
    holes = weight.clone()
    holes[out_features // 2] = 0
    holes[:, in_features // 3] = 0
    twins = weight.clone()
    twins[:, 1] = twins[:, 0]
    dead_inputs = {name: value.clone() for name, value in usual.items()}
    dead_inputs["input_scale"][:2] = 0
    dead_inputs["input_gram"][:2] = 0
    dead_inputs["input_gram"][:, :2] = 0
    dead_inputs["weight_importance"][:, :2] = 0
    dead_inputs["weight_importance"][-1] = 0
    one = {name: torch.zeros_like(value) for name, value in usual.items()}
    one["input_scale"][0] = one["input_gram"][0, 0] = one["weight_importance"][0, 0] = 1e-12
    return {
        "zero weight": (torch.zeros(shape), usual),
        "zero row and column": (holes, usual),
        "duplicate columns": (twins, usual),
        "rank one": (weight[:, :1] @ weight[:1], usual),
        "dead inputs": (weight, dead_inputs),
        "few tokens": (weight, statistics_for(shape, tokens=3)),
        "zero statistics": (weight, {name: torch.zeros_like(value) for name, value in usual.items()}),
        "a single entry counts": (weight, one),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", degenerate((6, 6)))
def test_degenerate_input_stays_finite_and_sensible(method: str, case: str) -> None:
    for shape in [(12, 15), (15, 12), (12, 12)]:
        weight, statistics = degenerate(shape)[case]
        for rank in (1, 5, 12):
            up, down = decompose(weight, rank, method, **statistics)
            assert torch.isfinite(up).all() and torch.isfinite(down).all()
            error = float((up @ down - weight).norm())
            # ranks that the statistic has no use for serve the weight, so that nothing is made up; the two-sided one
            # may extrapolate rows and columns that do not count from those that do
            if method != "fisher_two_sided":
                assert error <= 1.5 * float(weight.norm()) + 1e-6
            if rank == 12:
                assert error <= 2e-3 * float(weight.norm()) + 1e-6
        spectrum = weighted_spectrum(weight, method, **statistics)
        assert torch.isfinite(spectrum).all()


def test_zero_statistics_mean_plain_svd() -> None:
    weight = torch.randn(9, 7)
    zeros = {name: torch.zeros_like(value) for name, value in statistics_for((9, 7)).items()}
    plain = decompose(weight, 3)
    for method in METHODS:
        found = decompose(weight, 3, method, **zeros)
        torch.testing.assert_close(found.up @ found.down, plain.up @ plain.down)
        if STATISTIC[method] is not None:
            assert not weighted_spectrum(weight, method, **zeros).any()
            assert weighted_error(weight, found, method, **zeros) == 0


def test_ranks_beyond_the_tokens_serve_the_weight() -> None:
    """With 4 tokens, rank 4 makes their outputs exact; the other ranks lower the error of the weight itself."""
    inputs = torch.randn(4, 20, dtype=torch.float64)
    weight = torch.randn(16, 20, dtype=torch.float64)
    gram = inputs.T @ inputs
    errors = []
    for rank in (4, 8, 12, 16):
        up, down = decompose(weight, rank, "whitening", input_gram=gram)
        assert ((weight - up @ down) @ inputs.T).norm() < 1e-6
        errors.append(float((weight - up @ down).norm()))
    assert all(after < 0.9 * before for before, after in pairwise(errors))


@pytest.mark.parametrize("method", METHODS)
def test_factors_of_a_zero_weight_can_be_trained(method: str) -> None:
    up, down = decompose(torch.zeros(6, 8), 3, method, **statistics_for((6, 8)))
    assert not (up @ down).any()
    assert up.norm(dim=0).amin() > 0.5, "with both factors at zero there would be no gradient"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "`rank` must be an integer between 1 and 5"),
    ({"rank": -3}, "`rank` must be an integer between 1 and 5"),
    ({"rank": 2.0}, "`rank` must be an integer"),
    ({"rank": True}, "`rank` must be an integer"),
    ({"method": "qr"}, "`method` must be one of svd, activation.*got 'qr'"),
    ({"method": "activation", "input_scale": None}, "`input_scale` of shape .7,. is needed.*calibrate"),
    ({"method": "whitening", "input_gram": None}, "`input_gram` of shape .7, 7. is needed.*calibrate"),
    ({"method": "em", "weight_importance": None}, "`weight_importance` of shape .5, 7. is needed.*calibrate"),
    ({"method": "activation", "input_scale": torch.ones(5)}, "`input_scale` must be of shape"),
    ({"method": "whitening", "input_gram": torch.ones(5, 5)}, "`input_gram` must be of shape"),
    ({"method": "fisher", "weight_importance": torch.ones(7, 5)}, "`weight_importance` must be of shape.*Conv1D"),
    ({"method": "fisher", "weight_importance": -torch.ones(5, 7)}, "`weight_importance` must not be negative"),
    ({"method": "activation", "input_scale": -torch.ones(7)}, "`input_scale` must not be negative"),
    ({"method": "whitening", "input_gram": -torch.eye(7)}, "`input_gram` must not be negative on its diagonal"),
    ({"method": "whitening", "input_gram": torch.ones(7, 7).triu()}, "`input_gram` must be symmetric"),
    ({"weight": torch.ones(5)}, "`weight` must be a matrix"),
    ({"weight": torch.ones(5, 0)}, "`weight` must be a matrix"),
    ({"weight": torch.ones(5, 7, dtype=torch.int8)}, "`weight` must be of a real floating dtype"),
    ({"weight": torch.full((5, 7), torch.nan)}, "`weight` must be finite, got 35 NaN or infinite of 35"),
    ({"method": "fisher", "weight_importance": torch.full((5, 7), torch.inf)}, "`weight_importance` must be finite"),
    ({"method": "whitening", "input_gram": torch.full((7, 7), torch.nan)}, "`input_gram` must be finite"),
    ({"method": "activation", "input_scale": torch.full((7,), torch.nan)}, "`input_scale` must be finite"),
    ({"alpha": -0.5}, "`alpha` must be at least 0"),
    ({"alpha": float("nan")}, "`alpha` must be at least 0"),
    ({"max_iterations": 0}, "`max_iterations` must be an integer of at least 1"),
    ({"dtype": torch.bfloat16}, "`dtype` must be torch.float32, torch.float64 or None"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[f"{i}-{m.split('`')[1]}" for i, (_, m) in enumerate(WRONG)])
def test_messages(wrong: dict[str, Any], message: str) -> None:
    arguments = {"weight": torch.randn(5, 7), "rank": 2, **statistics_for((5, 7)), **wrong}
    with pytest.raises(ValueError, match=message):
        decompose(**arguments)


def test_messages_about_factors() -> None:
    weight = torch.randn(5, 7)
    with pytest.raises(ValueError, match="`factors` must be .out, r. and .r, in."):
        weighted_error(weight, Factors(torch.ones(5, 2), torch.ones(3, 7)))
    with pytest.raises(ValueError, match="`factors` must multiply to the shape of the weight"):
        weighted_error(weight, Factors(torch.ones(7, 2), torch.ones(2, 5)))


def test_statistics_that_are_not_needed_are_not_read() -> None:
    broken = {"input_scale": torch.full((3,), torch.nan), "input_gram": torch.ones(1), "weight_importance": None}
    assert decompose(torch.randn(5, 7), 2, "svd", **broken).up.shape == (5, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", METHODS)
def test_cuda_agrees_with_the_cpu(method: str) -> None:
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for shape in [(96, 160), (160, 96), (128, 128)]:
            weight, statistics = torch.randn(shape), statistics_for(shape, tokens=64)
            expected = decompose(weight, 24, method, **statistics)
            found = decompose(weight.cuda(), 24, method, **statistics)  # statistics follow the weight
            assert found.up.is_cuda
            if method == "anderson":
                # its path is chaotic: a weight that differs by 1e-6 moves the product by 0.3, its error by 2 %
                errors = [
                    float(weighted_error(weight, Factors(*(f.cpu() for f in factors)), method, **statistics))
                    for factors in (expected, found, decompose(weight, 24, "fisher", **statistics))
                ]
                assert errors[1] == pytest.approx(errors[0], rel=0.05)
                assert errors[1] < errors[2]
                continue
            torch.testing.assert_close((found.up @ found.down).cpu(), expected.up @ expected.down, atol=5e-3, rtol=0)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
