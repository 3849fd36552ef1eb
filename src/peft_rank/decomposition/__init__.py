# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""One matrix into two: pure functions of tensors that know nothing of models, calibration or files."""

import torch
from torch import Tensor

from .iterative import minimise
from .metric import ITERATIVE, STATISTIC, check_alpha, check_method, make_metric, split, working_statistic
from .svd import Factors, balanced, check_rank, check_weight, plain_arithmetic, working_copy
from .weighted import WeightedSVD, weighted_error, weighted_spectrum, weighted_svd


__all__ = [
    "ITERATIVE",
    "STATISTIC",
    "Factors",
    "WeightedSVD",
    "decompose",
    "weighted_error",
    "weighted_spectrum",
    "weighted_svd",
]


def decompose(
    weight: Tensor,
    rank: int,
    method: str = "svd",
    *,
    input_scale: Tensor | None = None,
    input_gram: Tensor | None = None,
    weight_importance: Tensor | None = None,
    alpha: float = 0.5,
    max_iterations: int = 30,
    dtype: torch.dtype | None = None,
) -> Factors:
    """Replaces a weight by two factors whose product approximates it.

    Deterministic. Computes in float32 or better, whatever the dtype of the weight, and changes none of its arguments.
    The leading ranks of a closed form are those of the same decomposition at a lower rank; iterative ones are not
    nested. The two halves of every rank have equal norms.

    Args:
        weight (`Tensor`): Shape (out, in), as `nn.Linear` stores it, any floating dtype.
        rank (`int`): At least 1. Beyond min(out, in) it is clamped, and the product then equals the weight.
        method (`str`, *optional*, defaults to `"svd"`): What the approximation is best in:

            - `"svd"`: the weight itself.
            - `"activation"`: with the columns weighted by `input_scale` to the power `alpha` (ASVD).
            - `"fisher"`: with the columns weighted by summed `weight_importance` to the power `alpha` (FWSVD).
            - `"importance"`: the same computation, for an importance that holds E[(w dL/dw)^2] (IWSVD).
            - `"fisher_two_sided"`: with rows and columns weighted likewise; at `alpha` 0.5 exact for a
              `weight_importance` of rank one.
            - `"whitening"`: the output on the inputs that `input_gram` sums over (the optimum of SVD-LLM).
            - `"em"`, `"nesterov"`, `"anderson"`: with every entry weighted by its `weight_importance`, iteratively.
              Never worse in that than either SVD or FWSVD.
        input_scale (`Tensor`, *optional*): Shape (in,), mean absolute input.
        input_gram (`Tensor`, *optional*): Shape (in, in), sum or mean of x x^T over tokens; may be singular.
        weight_importance (`Tensor`, *optional*): Shape (out, in), squared gradients or another importance, at least 0.
            Statistics that the method does not need are ignored; units do not matter; any device and dtype.
        alpha (`float`, *optional*, defaults to 0.5): Power of `input_scale` and of summed importance.
        max_iterations (`int`, *optional*, defaults to 30): Limit of the iterative methods.
        dtype (`torch.dtype`, *optional*): `torch.float32` or `torch.float64` to compute in; by default the dtype of the
            weight, float32 at least.

    Returns:
        `Factors`: `up` (out, r) and `down` (r, in) in the dtype and on the device of the weight, without gradient.

    Raises:
        ValueError: If an argument is out of its range, of the wrong shape, holds NaN or infinity, or is missing for
            the method; the message names it.
    """
    check_method(method)
    check_alpha(alpha)
    check_weight(weight)
    rank = check_rank(rank, weight)
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"`max_iterations` must be an integer of at least 1, got {max_iterations!r}.")
    with plain_arithmetic(weight.device):
        statistic = working_statistic(method, weight, input_scale, input_gram, weight_importance, dtype)
        work = working_copy(weight, weight, dtype)
        # entries of size 1, so that squares of very small and very large weights neither vanish nor overflow
        peak = work.abs().amax()
        peak = torch.where(peak > 0, peak, torch.ones_like(peak))
        work = work / peak
        if method in ITERATIVE:
            highest = statistic.amax()
            importance = torch.where(highest > 0, statistic / highest, torch.ones_like(statistic))
            up, down = minimise(work, importance, rank, method, max_iterations)
        else:
            metric = make_metric(method, statistic, alpha, damping=torch.finfo(work.dtype).eps)
            up, down, _ = split(work, metric, rank)
        up, down = balanced(up, down)
        root = peak.sqrt()
        return Factors(*((factor * root).to(weight.device, weight.dtype).contiguous() for factor in (up, down)))
