# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Products of thin factors, against the decomposition of the product itself."""

from __future__ import annotations

import pytest
import torch

from peft_rank.decomposition.product import product_spectrum, truncate_product


SHAPES = [(20, 30, 6), (30, 20, 6), (7, 5, 5), (5, 4, 9), (12, 12, 1)]


def factors(out_features: int, in_features: int, width: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.logspace(0, -2, width, dtype=dtype)
    return torch.randn(out_features, width, dtype=dtype) * scale, torch.randn(width, in_features, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_spectrum_of_the_core(shape: tuple[int, int, int]) -> None:
    up, down = factors(*shape)
    expected = torch.linalg.svdvals(up @ down)
    found = product_spectrum(up, down)
    torch.testing.assert_close(found, expected[: len(found)], atol=1e-12, rtol=1e-10)
    assert (expected[len(found) :] < 1e-10).all()


def test_spectrum_in_half_precision_is_that_of_the_rounded_factors() -> None:
    up, down = factors(20, 30, 6, torch.bfloat16)
    expected = torch.linalg.svdvals(up.double() @ down.double())[:6]
    torch.testing.assert_close(product_spectrum(up, down), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_is_the_best_one_and_balanced(shape: tuple[int, int, int]) -> None:
    up, down = factors(*shape)
    u, s, v = torch.linalg.svd(up @ down, full_matrices=False)
    for rank in range(min(shape) + 1):
        cut = truncate_product(up, down, rank)
        torch.testing.assert_close(cut.up @ cut.down, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-11, rtol=0)
        values = torch.diag(s[:rank])
        torch.testing.assert_close(cut.up.T @ cut.up, values, atol=1e-10, rtol=0)
        torch.testing.assert_close(cut.down @ cut.down.T, values, atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_maps_lead_from_the_old_factors_to_the_new(shape: tuple[int, int, int]) -> None:
    up, down = factors(*shape)
    cut = truncate_product(up, down, min(shape))
    torch.testing.assert_close(up @ cut.up_map, cut.up, atol=1e-9, rtol=0)
    torch.testing.assert_close(cut.down_map @ down, cut.down, atol=1e-9, rtol=0)


def test_directions_without_weight_can_still_be_trained() -> None:
    up, down = factors(20, 30, 6)
    up[:, 2:] = 0
    cut = truncate_product(up, down, 4)
    torch.testing.assert_close(cut.up @ cut.down, up @ down, atol=1e-10, rtol=0)
    assert (cut.up[:, 2:] == 0).all()
    torch.testing.assert_close(cut.down[2:].norm(dim=1), down.norm(dim=1).mean().expand(2))
    assert (cut.up_map[:, 2:] == 0).all()
    assert (cut.down_map[2:] == 0).all()
    nothing = truncate_product(torch.zeros(20, 6), torch.randn(6, 30), 3)
    assert (nothing.up == 0).all()
    assert (nothing.down.norm(dim=1) > 1).all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="`rank=7` must be between 0 and 6"):
        truncate_product(*factors(20, 30, 6), 7)
    up, down = factors(20, 30, 6)
    up[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        product_spectrum(up, down)
