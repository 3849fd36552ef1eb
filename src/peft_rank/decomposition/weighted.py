# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What a weight is worth rank by rank: decomposition, spectrum and error in the metric of a method.

Budgets across modules, learned or not, choose ranks with these; `metric.py` has the formulas and their sources.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .metric import ITERATIVE, STATISTIC, check_alpha, check_method, make_metric, split, working_statistic
from .svd import Factors, check_rank, check_weight, plain_arithmetic, working_copy


class WeightedSVD(NamedTuple):
    """`up @ down` is the weight, or its best approximation where only the leading ranks were asked for.

    Attributes:
        up (`Tensor`): Shape (out, r): R^-1 U. Orthonormal columns unless the method is two-sided.
        down (`Tensor`): Shape (r, in): U^T R W, singular values included.
        values (`Tensor`): Shape (min(out, in),), non-increasing: S, what each rank contributes to the weight in the
            metric; also those that were not asked for.
    """

    up: Tensor
    down: Tensor
    values: Tensor


def weighted_svd(
    weight: Tensor,
    method: str = "svd",
    *,
    rank: int | None = None,
    input_scale: Tensor | None = None,
    input_gram: Tensor | None = None,
    weight_importance: Tensor | None = None,
    alpha: float = 0.5,
    dtype: torch.dtype | None = None,
) -> WeightedSVD:
    """The decomposition behind the closed forms, for those who choose among the ranks themselves.

    Args:
        weight (`Tensor`): Shape (out, in), any floating dtype.
        method (`str`, *optional*, defaults to `"svd"`): One with a closed form; see `decompose`.
        rank (`int`, *optional*): Number of leading ranks to return; without it all min(out, in).
        input_scale, input_gram, weight_importance, alpha, dtype: As in `decompose`.

    Returns:
        `WeightedSVD`: Float32 or float64. Neither balanced nor rounded to the dtype of the weight.

    Raises:
        ValueError: As `decompose`, and if the method is iterative.
    """
    check_method(method)
    if method in ITERATIVE:
        closed = ", ".join(name for name in STATISTIC if name not in ITERATIVE)
        raise ValueError(
            f"`method` must be one of {closed}, got {method!r}, which has no singular values: use `decompose`."
        )
    check_alpha(alpha)
    check_weight(weight)
    rank = min(weight.shape) if rank is None else check_rank(rank, weight)
    with plain_arithmetic(weight.device):
        statistic = working_statistic(method, weight, input_scale, input_gram, weight_importance, dtype)
        work = working_copy(weight, weight, dtype)
        metric = make_metric(method, statistic, alpha, damping=torch.finfo(work.dtype).eps)
        peak = work.abs().amax()
        peak = torch.where(peak > 0, peak, torch.ones_like(peak))
        up, down, values = split(work / peak, metric, rank)
        return WeightedSVD(up, down * peak, values * (peak * metric.unit))


def weighted_spectrum(
    weight: Tensor,
    method: str = "svd",
    *,
    input_scale: Tensor | None = None,
    input_gram: Tensor | None = None,
    weight_importance: Tensor | None = None,
    alpha: float = 0.5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Singular values of the weight in the metric of a method: what a budget across modules compares.

    The sum of squares from place r on is the least `weighted_error` that any rank r can have, and, but for the damping,
    that of `decompose(weight, r, method)`. For whitening it is the squared error of the module's output, summed over
    the tokens that the Gram matrix sums over. An iterative method has no such values; it gets those of its start,
    "fisher" with alpha 0.5, whose losses count an entry with the mean importance of its column.

    Args:
        weight (`Tensor`): Shape (out, in), any floating dtype.
        method (`str`, *optional*, defaults to `"svd"`): See `decompose`.
        input_scale, input_gram, weight_importance, alpha, dtype: As in `decompose`.

    Returns:
        `Tensor`: Shape (min(out, in),), float64, non-increasing, on the device of the weight (on the CPU for Metal).

    Raises:
        ValueError: As `decompose`.
    """
    check_method(method)
    check_alpha(alpha)
    check_weight(weight)
    if method in ITERATIVE:
        method, alpha = "fisher", 0.5
    with plain_arithmetic(weight.device):
        statistic = working_statistic(method, weight, input_scale, input_gram, weight_importance, dtype)
        metric = make_metric(method, statistic, alpha)
        work = working_copy(weight, weight, dtype)
        peak = float(work.abs().amax())
        if peak == 0:
            return work.new_zeros(min(work.shape), dtype=torch.float64)
        return metric.values(work / peak) * (peak * metric.unit)


def weighted_error(
    weight: Tensor,
    factors: Factors,
    method: str = "svd",
    *,
    input_scale: Tensor | None = None,
    input_gram: Tensor | None = None,
    weight_importance: Tensor | None = None,
    alpha: float = 0.5,
) -> Tensor:
    """What a method minimises, in float64, for factors of any origin.

    Args:
        weight (`Tensor`): Shape (out, in).
        factors (`Factors`): Any pair `up` (out, r), `down` (r, in).
        method (`str`, *optional*, defaults to `"svd"`): Whose metric to take: the sum of squared differences; weighted
            by the scales of the columns, and rows, of the closed forms; over the output, for whitening; or each
            weighted by its importance, for the iterative methods.
        input_scale, input_gram, weight_importance, alpha: As in `decompose`.

    Returns:
        `Tensor`: Scalar, float64, in the units of the statistics.

    Raises:
        ValueError: As `decompose`, and if the factors do not fit the weight.
    """
    check_method(method)
    check_alpha(alpha)
    check_weight(weight)
    up, down = factors
    if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(f"`factors` must be (out, r) and (r, in), got {tuple(up.shape)} and {tuple(down.shape)}.")
    if (up.shape[0], down.shape[1]) != weight.shape:
        raise ValueError(
            f"`factors` must multiply to the shape of the weight, {tuple(weight.shape)}, got "
            f"{(up.shape[0], down.shape[1])}."
        )
    with plain_arithmetic(weight.device):
        work, up, down = (working_copy(tensor, weight, torch.float64) for tensor in (weight, up, down))
        difference = work - up @ down
        statistic = working_statistic(method, weight, input_scale, input_gram, weight_importance, torch.float64)
        if method in ITERATIVE:
            return (statistic * difference.square()).sum()
        if method == "whitening":
            return ((difference @ statistic) * difference).sum().clamp(min=0)
        metric = make_metric(method, statistic, alpha)
        return metric.apply(difference).square().sum() * metric.unit**2
