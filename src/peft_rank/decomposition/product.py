# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The singular value decomposition of a product of two thin factors, without the product.

With QR factorisations of both factors, B A = Qb (Rb Ra^T) Qa^T: the singular values of the (out, in) product are those of
a (k, k) core, at a cost of O((in + out) k^2 + k^3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Truncation(NamedTuple):
    """A product B A cut to rank r, in balanced factors: `up` (out, r), `down` (r, in), and how they follow from the old
    ones, `up = B @ up_map` with (k, r) and `down = down_map @ A` with (r, k), except for directions without any weight."""

    up: Tensor
    down: Tensor
    up_map: Tensor
    down_map: Tensor


def product_spectrum(up: Tensor, down: Tensor) -> Tensor:
    """
    The singular values of `up @ down`, largest first; the remaining ones of the (out, in) matrix are zeros.

    Args:
        up (`Tensor`): Shape (out, k).
        down (`Tensor`): Shape (k, in).

    Returns:
        `Tensor`: Shape (min(k, in, out),), float64 on the CPU.

    Raises:
        ValueError: If a factor is not finite.
    """
    _, _, core = _core(up, down)
    return torch.linalg.svdvals(core)


def truncate_product(up: Tensor, down: Tensor, rank: int) -> Truncation:
    """
    The best approximation of `up @ down` of rank `rank`, by factors of equal norm in each of its directions.

    A direction whose singular value is zero keeps a row of `down` of the usual length and a zero column of `up`, so that
    it can still be trained; its columns of the maps are zero.

    Args:
        up (`Tensor`): Shape (out, k).
        down (`Tensor`): Shape (k, in).
        rank (`int`): At most min(k, in, out).

    Returns:
        `Truncation`: In the dtype of the factors, computed in float32 or better.

    Raises:
        ValueError: If a factor is not finite or `rank` is out of its range.
    """
    (out_features, width), in_features = up.shape, down.shape[1]
    if not 0 <= rank <= min(width, in_features, out_features):
        raise ValueError(
            f"`rank={rank}` must be between 0 and {min(width, in_features, out_features)}, for factors of shapes "
            f"{tuple(up.shape)} and {tuple(down.shape)}."
        )
    with torch.autocast(up.device.type, enabled=False):
        return _truncated(up, down, rank)


def _truncated(up: Tensor, down: Tensor, rank: int) -> Truncation:
    (q_up, r_up), (q_down, r_down), core = _core(up, down)
    left, values, right = (part.to(r_up) for part in torch.linalg.svd(core, full_matrices=False))
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    # singular vectors have no sign: the largest entry of each column of `up` is to be positive, however the factors round
    vectors = q_up @ left
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0].sign()
    left, right = left * signs, right * signs[:, None]
    alive = values > torch.finfo(values.dtype).eps * up.shape[1] * core.abs().amax().to(values)
    root = torch.where(alive, values, 0).sqrt()
    inverse = torch.where(alive, values, 1).rsqrt() * alive
    length = torch.where(alive, root, down.to(r_down).norm(dim=1).mean())  # (r,), of the rows of `down`
    return Truncation(
        up=((q_up @ left) * root).to(up.dtype),
        down=(length[:, None] * (right @ q_down.T)).to(down.dtype),
        up_map=r_down.T @ right.T * inverse,
        down_map=inverse[:, None] * (left.T @ r_up),
    )


def _core(up: Tensor, down: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """QR of B and of A^T, and Rb Ra^T in float64 on the CPU, where small decompositions are quick and repeatable."""
    dtype = torch.promote_types(torch.promote_types(up.dtype, down.dtype), torch.float32)
    up, down = up.detach().to(dtype), down.detach().to(dtype)
    q_up, r_up = torch.linalg.qr(up)  # (out, k), (k, k)
    q_down, r_down = torch.linalg.qr(down.T)  # (in, k), (k, k)
    core = r_up.to("cpu", torch.float64) @ r_down.to("cpu", torch.float64).T
    if not bool(core.isfinite().all()):
        raise ValueError("The product of the factors is not finite: check the weights and the loss for NaN.")
    return (q_up, r_up), (q_down, r_down), core
