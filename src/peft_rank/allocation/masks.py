# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Masks over singular values that gradients can move, and the losses that shape them.

One logit a rank. A mask is drawn in every optimizer step, hard in the forward pass and soft in the backward pass; what
is kept in the end follows from the logits alone. Modules of different rank share one tensor (modules, K) whose padding
has mask 0 and singular value 0.

Sources: Adaptive Rank Selections (ARS, NAACL 2024), equations 6 to 9; Learning to Low-Rank Compress (L2LRC,
https://huggingface.co/papers/2512.13733).

Differences from the released code: noise is an argument, so that processes, resumed runs and recomputed layers draw the
same; everything is computed in float32 whatever autocast says; alignment is the paper's sum (`reference=True`: the
code's mean); the compression loss gets the target that the user set (there 0.4, whatever was asked for).
"""

import math

import torch
from torch import Tensor


_TINY = 1e-20  # inside both logarithms, as released: uniform numbers of exactly 0 and 1 give finite noise
EVEN = math.log(math.log(2))  # logit of a rank that is as likely kept as not, -0.3665
_LARGEST = 20.0  # logit from which on a rank is kept with probability 1; the exponential overflows at 89


def uniform_noise(shape: tuple[int, ...], seed: int, step: int, device: torch.device | str | None = None) -> Tensor:
    """Uniform numbers in [0, 1) that depend on `seed`, `step` and position only: equal on every process and device.

    No generator, hence no state to save: whoever knows the step draws what an uninterrupted run drew. Each number is the
    upper 24 bits of its counter's SplitMix64 hash (Steele, Lea and Flood, 2014), exact in float32.

    Args:
        shape (`tuple[int, ...]`): Of the result.
        seed (`int`), step (`int`): Which numbers to draw; at least 0.
        device (`torch.device`, *optional*): Of the result.
    """
    numel = torch.Size(shape).numel()
    start = _mix(torch.tensor(seed, dtype=torch.int64)) + step  # streams of different seeds must not overlap
    # a number, not a tensor: nothing waits for the device
    counter = torch.arange(numel, device=device) + int(_mix(start))
    return (_shift(_mix(counter), 40).float() / 2**24).view(shape)


def _mix(x: Tensor) -> Tensor:
    """The hash, int64; products wrap around as unsigned ones would."""
    x = x - 0x61C8864680B583EB
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits for x read as unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def gumbel_mask(logits: Tensor, uniform: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Draws a mask: sigmoid((logit + noise) / tau), rounded (equation 9 of ARS).

    The noise is a single Gumbel variable, not a difference of two, so that a rank of logit l is kept with
    `keep_probability(l)`.

    Args:
        logits (`Tensor`): Any shape, any floating dtype; the mask bias is included.
        uniform (`Tensor`): Of the same shape, numbers in [0, 1].
        tau (`float`): Temperature, above 0.

    Returns:
        `tuple[Tensor, Tensor]`: The soft mask in (0, 1) and the hard one, 0 or 1, both float32 at least. The gradient
        of the hard mask is that of the soft one (straight through).

    Raises:
        ValueError: If shapes differ or `tau` is not positive.
    """
    if logits.shape != uniform.shape:
        raise ValueError(
            f"`uniform` must have the shape of `logits`, {tuple(logits.shape)}, got {tuple(uniform.shape)}."
        )
    if not tau > 0:
        raise ValueError(f"`tau` must be above 0, got {tau}. 0.4 is the usual; smaller is closer to a hard mask.")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    noise = -torch.log(-torch.log(uniform.to(logits.dtype) + _TINY) + _TINY)
    soft = torch.sigmoid((logits + noise) / tau)
    return soft, (soft.detach() > 0.5).to(soft.dtype) + (soft - soft.detach())


def keep_probability(logits: Tensor) -> Tensor:
    """Probability that `gumbel_mask` keeps a rank, 1 - exp(-exp(logit)), whatever the temperature; differentiable.

    One half at the logit `EVEN`, ln(ln 2) = -0.3665.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -torch.expm1(-torch.exp(logits.clamp(max=_LARGEST)))


def alignment_loss(mask: Tensor, singular_values: Tensor, reference: bool = False) -> Tensor:
    """How far a mask is from the prefix with as many ranks: || m * s - m' * s ||^2 (equation 7 of ARS).

    The prefix m' is a constant; the gradient flows through the mask alone.

    Args:
        mask (`Tensor`): Shape (K,), 0 or 1, or (modules, K) with the mean over modules as the result.
        singular_values (`Tensor`): Of the same shape, non-increasing. The loss grows with their square: scale them, for
            instance to a sum of squares of 1, where modules are to count alike.
        reference (`bool`, *optional*, defaults to `False`): The mean over the K ranks instead of their sum, as in the
            released code.

    Returns:
        `Tensor`: Scalar.

    Raises:
        ValueError: If shapes differ.
    """
    if mask.shape != singular_values.shape:
        raise ValueError(
            f"`singular_values` must have the shape of `mask`, {tuple(mask.shape)}, got {tuple(singular_values.shape)}."
        )
    kept = mask.detach().sum(dim=-1, keepdim=True)
    prefix = (torch.arange(mask.shape[-1], device=mask.device) < kept).to(mask.dtype)
    squares = ((mask - prefix) * singular_values).square()
    return (squares.mean(dim=-1) if reference else squares.sum(dim=-1)).mean()


def compression_loss(kept: Tensor, target: float) -> Tensor:
    """log(max(kept, target) / target), the R of equation 8 of ARS: zero, without gradient, below the target.

    Args:
        kept (`Tensor`): Scalar, parameters that are kept or their ratio.
        target (`float`): In the same unit, above 0.

    Returns:
        `Tensor`: Scalar.

    Raises:
        ValueError: If the target is not positive.
    """
    if not target > 0:
        raise ValueError(f"`target` must be above 0, got {target}.")
    return torch.log(torch.clamp(kept, min=target) / target)


def bounded_compression_loss(kept: Tensor, target: float) -> Tensor:
    """|kept - target| of two ratios: at most 1, and, unlike the mean of raw logits of the released L2LRC, not to be
    lowered without end. It also pulls back up what has shrunk too far."""
    return torch.abs(kept - target)


def total_variation_loss(probability: Tensor, sizes: Tensor) -> Tensor:
    """Sum over neighbouring ranks of |p_i - p_{i+1}|, averaged over modules: small where the kept ranks are contiguous.

    The paper names a total variation without a formula; this is taken on keep probabilities, which have no noise.

    Args:
        probability (`Tensor`): Shape (modules, K).
        sizes (`Tensor`): Shape (modules,), ranks of each module; what is beyond is padding.
    """
    inside = torch.arange(1, probability.shape[-1], device=probability.device) < sizes[:, None]
    return (probability.diff(dim=-1).abs() * inside).sum(dim=-1).mean()


def straight_through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """`value`, with the gradient of `gradient_of`."""
    return value.detach() + (gradient_of - gradient_of.detach())
