# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Singular value decompositions that hold on every device, and what all decompositions share: factors and arithmetic.

Knows matrices only; what makes one entry matter more than another is `metric.py`'s.

Differences from the released code of this family: it calls `torch.svd_lowrank(q=full rank)`, a randomized method that
is slower than the exact decomposition when nothing is left out, and gives other factors at each call. Here the
decomposition is exact and deterministic.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Two matrices in place of one, `weight ~ up @ down`.

    Attributes:
        up (`Tensor`): Shape (out, r), the weight of the second linear layer.
        down (`Tensor`): Shape (r, in), the weight of the first.
    """

    up: Tensor
    down: Tensor


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Without gradients and autocast: a training loop may call us inside either."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product at the full precision of its dtype. On CUDA it is taken in float64, because float32 would become
    TF32, three digits, wherever training has allowed that."""
    if left.is_cuda:
        return (left.double() @ right.double()).to(left.dtype)
    return left @ right


def working_copy(tensor: Tensor, like: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor as decompositions compute with it: detached, on the device of `like`, in `dtype` or else in the dtype of
    `like`, float32 at least. Metal has neither float64 nor all decompositions: the CPU stands in for it.

    Raises:
        ValueError: If `dtype` is neither None nor float32 nor float64.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(
            f"`dtype` must be torch.float32, torch.float64 or None, got {dtype}: decompositions need single precision "
            "at least. The factors are returned in the dtype of the weight in any case."
        )
    dtype = torch.promote_types(like.dtype, torch.float32) if dtype is None else dtype
    # moved before it is widened: together the sender would widen, and more bytes travel
    return tensor.detach().to("cpu" if like.device.type == "mps" else like.device).to(dtype)


def check_finite(name: str, tensor: Tensor, remedy: str) -> None:
    """Refuses NaN and infinity.

    Raises:
        ValueError: If there are any.
    """
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        broken = tensor.numel() - int(finite.sum())
        raise ValueError(f"`{name}` must be finite, got {broken} NaN or infinite of {tensor.numel()} values: {remedy}")


def check_weight(weight: Tensor) -> None:
    """Refuses what is not a finite real matrix.

    Raises:
        ValueError: If shape, dtype or values are wrong.
    """
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"`weight` must be a matrix of shape (out, in), both at least 1, got shape {tuple(weight.shape)}."
        )
    if not weight.is_floating_point():
        raise ValueError(f"`weight` must be of a real floating dtype, got {weight.dtype}: dequantize it first.")
    check_finite("weight", weight, "the checkpoint is damaged or its training diverged.")


def check_rank(rank: int, weight: Tensor) -> int:
    """The rank, clamped to the smaller side of the weight.

    Raises:
        ValueError: If it is not an integer of at least 1.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(
            f"`rank` must be an integer between 1 and {min(weight.shape)} (the smaller side of the weight; more is "
            f"clamped), got {rank!r}. A module that should vanish has no factors: drop it instead."
        )
    return min(rank, *weight.shape)


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact decomposition without the vectors of the null space.

    On CUDA the driver `gesvda` is several times faster than the others for the shapes of a transformer, but loses
    orthogonality where singular values vanish: its answer is checked, and the default driver steps in. Elsewhere there
    is no driver to choose. What does not converge is tried once more, transposed, in float64, on the CPU.

    Args:
        matrix (`Tensor`): Shape (m, n), float32 or float64, entries of moderate size.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: Left vectors (m, k), non-increasing singular values (k,), right vectors
        (k, n), where k = min(m, n).

    Raises:
        torch.linalg.LinAlgError: If the second attempt does not converge either.
    """
    if matrix.shape[0] < matrix.shape[1]:  # tall ones are what the drivers are made for
        right, values, left = thin_svd(matrix.mT)
        return left.mT, values, right.mT
    if matrix.is_cuda:
        fast = _fast_svd(matrix)
        if fast is not None:
            return fast
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        right, values, left = torch.linalg.svd(matrix.mT.double().cpu(), full_matrices=False)
        return left.mT.to(matrix), values.to(matrix), right.mT.to(matrix)


def _fast_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """`gesvda` on a tall CUDA matrix, or None where its answer is no decomposition."""
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False, driver="gesvda")
    except torch.linalg.LinAlgError:
        return None
    tolerance = 1e3 * torch.finfo(matrix.dtype).eps
    error = torch.linalg.matrix_norm(product(left * values, right) - matrix)
    skew = product(left.mT, left)
    skew.diagonal().sub_(1)
    # comparisons with NaN are false, which is what is wanted
    good = (error <= tolerance * torch.linalg.matrix_norm(matrix)) & (skew.abs().amax() <= tolerance)
    return (left, values, right) if bool(good) else None


def singular_values(matrix: Tensor) -> Tensor:
    """Non-increasing singular values (k,), k = min(m, n), of a matrix (m, n)."""
    if matrix.is_cuda:  # its drivers for values alone are slower than `gesvda` with vectors
        return thin_svd(matrix)[1]
    try:
        return torch.linalg.svdvals(matrix)
    except torch.linalg.LinAlgError:
        return thin_svd(matrix)[1]


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), not decreasing, and eigenvectors (n, n) of a symmetric matrix (n, n).

    What does not converge, as on CUDA where many eigenvalues coincide, is tried once more in float64 on the CPU.

    Raises:
        torch.linalg.LinAlgError: If the second attempt does not converge either.
    """
    try:
        return tuple(torch.linalg.eigh(matrix))
    except torch.linalg.LinAlgError:
        values, vectors = torch.linalg.eigh(matrix.double().cpu())
        return values.to(matrix), vectors.to(matrix)


def orthonormal(matrix: Tensor) -> Tensor:
    """Q of the decomposition Q R of a tall matrix (m, k), R with a positive diagonal.

    Columns that are nearly orthogonal, if of very different length, are made so through the Cholesky factor of their Gram
    matrix, which is all products; others by reflections, which take several times as long.
    """
    lengths = torch.linalg.vector_norm(matrix, dim=0)
    columns = matrix / torch.where(lengths > 0, lengths, 1)
    root, failed = torch.linalg.cholesky_ex(columns.mT @ columns)
    if not int(failed) and bool(root.diagonal().amin() > 0.9):
        return torch.linalg.solve_triangular(root.mT, columns, upper=True, left=False)
    found, upper = torch.linalg.qr(matrix)
    return torch.where(upper.diagonal() < 0, -found, found)


def balanced(up: Tensor, down: Tensor) -> Factors:
    """Gives both halves of every rank the same norm, which leaves the product as it is.

    For a plain SVD this is the square root of the singular value on either side. Balanced factors train alike, and
    stay in the range of float16 whatever units the statistics had. A rank that is zero stays as it is.

    Args:
        up (`Tensor`): Shape (out, r).
        down (`Tensor`): Shape (r, in).

    Returns:
        `Factors`: Of the same shapes.
    """
    norms_up = torch.linalg.vector_norm(up, dim=0)  # (r,)
    norms_down = torch.linalg.vector_norm(down, dim=1)  # (r,)
    alive = (norms_up > 0) & (norms_down > 0)
    shift = torch.where(alive, norms_down, 1).sqrt() / torch.where(alive, norms_up, 1).sqrt()
    return Factors(up * shift, down / shift.unsqueeze(1))
