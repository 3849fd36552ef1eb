# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""From scores and a budget to the ranks that stay.

Knows neither what a score means nor when it was taken. Exact: as many ranks stay as the budget says, ties included,
and the same ones on every process and device.
"""

from collections.abc import Sequence

import torch
from torch import BoolTensor, Tensor


def keep_top(
    scores: Tensor,
    budget: int,
    group_sizes: Sequence[int],
    *,
    alive: Tensor | None = None,
    min_r: int = 0,
    reference: bool = False,
) -> BoolTensor:
    """Keeps the ranks of highest score.

    Among equal scores the lower index stays. Every module keeps at least `min_r` ranks, or all of its alive ones if
    these are fewer; they count towards the budget.

    Args:
        scores (`Tensor`): Shape (N,), any floating dtype, modules one after another. Infinite scores are legal.
        budget (`int`): Number of ranks to keep.
        group_sizes (`Sequence[int]`): Ranks of each module; they sum to N.
        alive (`Tensor`, *optional*): Shape (N,), bool. Only these can stay; without it, all can.
        min_r (`int`, *optional*, defaults to 0): Ranks that every module keeps.
        reference (`bool`, *optional*, defaults to `False`): The rule of the released SalientLoRA code: a rank stays if
            its score exceeds the (N - budget)-th smallest, where NaN counts as largest. Ties at that threshold and NaN
            fall, hence fewer than `budget` may stay; `alive` and `min_r` play no part. A budget of N, which the
            released code cannot compute, keeps everything.

    Returns:
        `BoolTensor`: Shape (N,), True for ranks that stay.

    Raises:
        ValueError: If the budget cannot be met, shapes do not fit, or scores hold NaN outside reference mode.
    """
    total = scores.shape[0] if scores.dim() == 1 else -1
    if total != sum(group_sizes) or any(size < 0 for size in group_sizes):
        raise ValueError(
            f"`group_sizes` must be non-negative and sum to the number of scores, got {sum(group_sizes)} for `scores` "
            f"of shape {tuple(scores.shape)}."
        )
    if alive is not None and (alive.shape != scores.shape or alive.dtype != torch.bool):
        raise ValueError(f"`alive` must be bool of shape ({total},), got {alive.dtype} of {tuple(alive.shape)}.")
    if min_r < 0:
        raise ValueError(f"`min_r` must be at least 0, got {min_r}.")
    if reference:
        return _keep_above_threshold(scores, budget)
    if bool(scores.isnan().any()):
        raise ValueError("`scores` must not hold NaN: check the singular values and the loss for NaN or infinity.")
    alive = torch.ones_like(scores, dtype=torch.bool) if alive is None else alive

    by_score = torch.where(alive, scores, -torch.inf).argsort(descending=True, stable=True)
    # A stable second sort puts the alive ranks first, which -inf alone would not where scores are -inf themselves.
    by_score = by_score[alive[by_score].argsort(descending=True, stable=True)]
    floor = _best_of_each_group(by_score, alive, group_sizes, min_r)
    n_floor, n_alive = torch.stack([floor.sum(), alive.sum()]).tolist()
    if not n_floor <= budget <= n_alive:
        raise ValueError(
            f"`budget` must be between {n_floor} (what min_r={min_r} keeps) and {n_alive} (the ranks alive), "
            f"got {budget}." + (" Lower min_r or raise the budget." if 0 <= budget < n_floor else "")
        )
    by_priority = by_score[floor[by_score].argsort(descending=True, stable=True)]
    keep = torch.zeros_like(alive)
    keep[by_priority[:budget]] = True
    return keep


def _best_of_each_group(by_score: Tensor, alive: Tensor, group_sizes: Sequence[int], count: int) -> Tensor:
    """Marks the first `count` alive ranks of each group in the order `by_score`."""
    sizes = torch.tensor(group_sizes, device=alive.device, dtype=torch.long)  # (groups,)
    group = torch.arange(len(group_sizes), device=alive.device).repeat_interleave(sizes, output_size=alive.numel())
    by_group = by_score[group[by_score].argsort(stable=True)]  # best first inside each group, groups in order
    place = torch.arange(alive.numel(), device=alive.device) - (sizes.cumsum(0) - sizes)[group]
    best = torch.empty_like(alive)
    best[by_group] = place < count
    return best & alive


def _keep_above_threshold(scores: Tensor, budget: int) -> BoolTensor:
    total = scores.numel()
    if not 0 <= budget <= total:
        raise ValueError(f"`budget` must be between 0 and {total} (the number of scores), got {budget}.")
    if budget == total:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > scores.kthvalue(total - budget).values
