# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Masks and their losses against the released code's values, the formulas written out, and simulation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_rank.allocation.masks import (
    alignment_loss,
    bounded_compression_loss,
    compression_loss,
    gumbel_mask,
    keep_probability,
    straight_through,
    total_variation_loss,
    uniform_noise,
)


GOLDEN = Path(__file__).parents[1] / "golden" / "ars"
LOSSES = sorted(GOLDEN.glob("losses_*.npz"))


def _load(name: str) -> dict[str, torch.Tensor]:
    archive = np.load(GOLDEN / f"{name}.npz")
    return {key: torch.from_numpy(archive[key]) for key in archive.files if archive[key].dtype.kind in "fiub"}


@pytest.mark.parametrize("tau", [0.1, 0.4, 0.5, 1.0])
def test_masks_and_their_gradient_as_released(tau: float) -> None:
    golden = _load("gumbel_sigmoid")
    logits = golden["logits"].requires_grad_()
    soft, hard = gumbel_mask(logits, golden["U"], tau)
    torch.testing.assert_close(soft.detach(), golden[f"soft_tau{tau}"], rtol=1e-5, atol=1e-6)
    assert torch.equal(hard.detach(), golden[f"hard_tau{tau}"])
    hard.backward(golden["upstream_grad"])
    torch.testing.assert_close(logits.grad, golden[f"grad_tau{tau}"], rtol=1e-4, atol=1e-6)


def test_uniform_numbers_of_zero_and_one_give_finite_masks() -> None:
    soft, hard = gumbel_mask(torch.zeros(2), torch.tensor([0.0, 1.0]), 0.4)
    assert hard.tolist() == [0.0, 1.0]
    assert torch.isfinite(soft).all()


def test_masks_are_float32_in_half_precision() -> None:
    """Noise in bfloat16 would have eight levels between 2 and 4."""
    logits, uniform = torch.linspace(-3, 3, 50), torch.rand(50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        soft, hard = gumbel_mask(logits.bfloat16(), uniform, 0.4)
    assert soft.dtype == hard.dtype == torch.float32
    assert torch.equal(soft, gumbel_mask(logits.bfloat16().float(), uniform, 0.4)[0])


@pytest.mark.parametrize("path", LOSSES, ids=lambda path: path.stem)
def test_losses_and_gradients_as_released(path: Path) -> None:
    golden = _load(path.stem)
    logits = [golden[f"logits{j}"].requires_grad_() for j in range(3)]
    masks = [gumbel_mask(logits[j], golden[f"U{j}"], 0.4)[1] for j in range(3)]
    for j, mask in enumerate(masks):
        assert torch.equal(mask.detach(), golden[f"mask{j}"])
    values = torch.stack([golden[f"E{j}"] for j in range(3)])
    align = alignment_loss(torch.stack(masks), values, reference=True)
    assert float(align) == pytest.approx(float(golden["r_align"]), rel=1e-5)
    one_by_one = [alignment_loss(mask, value, reference=True) for mask, value in zip(masks, values, strict=True)]
    assert float(sum(one_by_one)) / 3 == pytest.approx(float(align), rel=1e-6)
    gradients = torch.autograd.grad(align, logits, retain_graph=True)
    for j, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, golden[f"grad_r_align{j}"], rtol=1e-4, atol=1e-7)

    sides = [(int(golden[f"in_features{j}"]), int(golden[f"out_features{j}"])) for j in range(3)]
    kept = sum(mask.sum() * (m + n) for mask, (m, n) in zip(masks, sides, strict=True)) / sum(m * n for m, n in sides)
    for target in (0.2, 0.4, 0.8):
        loss = compression_loss(kept, target)
        assert float(loss) == pytest.approx(float(golden[f"R_loss_p{target}"]), rel=1e-5, abs=1e-7)
        gradients = torch.autograd.grad(loss, logits, retain_graph=True)
        for j, gradient in enumerate(gradients):
            expected = golden.get(f"grad_R_loss_p{target}_{j}", torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_alignment_is_the_papers_sum() -> None:
    mask, values = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]), torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    # three ranks are kept: the prefix is 1 1 1 0 0, and the second and fourth entries differ from it
    assert float(alignment_loss(mask, values)) == 4.0**2 + 2.0**2
    assert float(alignment_loss(mask, values, reference=True)) == (4.0**2 + 2.0**2) / 5
    assert float(alignment_loss(torch.tensor([1.0, 1.0, 0.0]), values[:3])) == 0.0


def test_padding_counts_nothing() -> None:
    mask, values = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3.0, 2.0, 1.0])
    padded = torch.stack([torch.cat([mask, torch.zeros(2)]), torch.zeros(5)])
    loss = alignment_loss(padded, torch.stack([torch.cat([values, torch.zeros(2)]), torch.ones(5)]))
    assert float(loss) == pytest.approx(float(alignment_loss(mask, values)) / 2)
    probability = torch.tensor([[0.9, 0.4, 0.6, 0.3], [0.5, 0.25, 7.0, -7.0]])
    variation = total_variation_loss(probability, torch.tensor([4, 2]))
    assert float(variation) == pytest.approx((0.5 + 0.2 + 0.3 + 0.25) / 2)


@pytest.mark.parametrize("logit", [-2.0, math.log(math.log(2.0)), 0.0, 0.7, 3.0])
def test_keep_probability_by_simulation(logit: float) -> None:
    draws = 200_000
    _, hard = gumbel_mask(torch.full((draws,), logit), uniform_noise((draws,), seed=1, step=0), 0.4)
    expected = 1 - math.exp(-math.exp(logit))
    assert float(hard.mean()) == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / draws))
    assert float(keep_probability(torch.tensor(logit))) == pytest.approx(expected, rel=1e-5)


def test_keep_probability_has_a_finite_gradient_everywhere() -> None:
    logits = torch.tensor([-200.0, -5.0, 0.0, 30.0, 1e4], requires_grad=True)
    probability = keep_probability(logits)
    probability.sum().backward()
    assert probability.tolist()[-2:] == [1.0, 1.0]
    assert torch.isfinite(logits.grad).all()
    assert float(logits.grad[2]) == pytest.approx(math.exp(-1.0), rel=1e-5)


def test_losses_of_the_budget() -> None:
    kept = torch.tensor(0.9, requires_grad=True)
    assert float(compression_loss(kept, 0.6)) == pytest.approx(math.log(1.5))
    assert float(bounded_compression_loss(kept, 0.6)) == pytest.approx(0.3)
    (gradient,) = torch.autograd.grad(compression_loss(kept, 0.95), kept)
    assert float(gradient) == 0.0
    (gradient,) = torch.autograd.grad(bounded_compression_loss(kept, 0.95), kept)
    assert float(gradient) == -1.0


def test_straight_through_has_one_value_and_the_other_gradient() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    y = straight_through(7 * x, 3 * x)
    y.backward()
    assert (float(y), float(x.grad)) == (14.0, 3.0)


def _splitmix(x: int) -> int:
    """The published algorithm on unsigned integers of 64 bits."""
    full = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & full
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & full
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & full
    return x ^ (x >> 31)


def test_noise_is_the_published_hash() -> None:
    noise = uniform_noise((3, 4), seed=42, step=7).flatten().tolist()
    start = _splitmix(_splitmix(42) + 7)
    assert noise == [(_splitmix((start + i) % 2**64) >> 40) / 2**24 for i in range(12)]


def test_noise_is_uniform_and_differs_by_seed_and_step() -> None:
    draws = {(seed, step): uniform_noise((4096,), seed, step) for seed in (0, 1) for step in (0, 1, 2)}
    for key, noise in draws.items():
        assert 0 <= float(noise.min()) <= float(noise.max()) < 1
        counts = torch.histc(noise, 16, 0, 1)  # 256 expected, deviation 15.5
        assert float((counts - 256).abs().max()) < 70
        for other, values in draws.items():
            if other != key:
                # also shifted against each other: streams do not overlap
                assert not set(noise[:64].tolist()) <= set(values.tolist())
                assert abs(float(torch.corrcoef(torch.stack([noise, values]))[0, 1])) < 0.08


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: gumbel_mask(torch.zeros(3), torch.zeros(4), 0.4),
            r"`uniform` must have the shape.*\(3,\), got \(4,\)",
        ),
        (lambda: gumbel_mask(torch.zeros(3), torch.zeros(3), 0.0), "`tau` must be above 0, got 0.0"),
        (lambda: alignment_loss(torch.zeros(3), torch.zeros(4)), "`singular_values` must have the shape of `mask`"),
        (lambda: compression_loss(torch.tensor(1.0), 0.0), "`target` must be above 0, got 0.0"),
    ],
)
def test_wrong_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
