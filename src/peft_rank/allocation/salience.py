# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""How much each rank matters, from the singular values recorded over a window of steps.

The salience of SalientLoRA (Ke et al., NeurIPS 2024, openreview vU512K8vrR) mixes two terms. The *magnitude* of rank i
is `sum_t w_t |E_i^t|`, where `w_t` is large at steps at which the factors were close to orthogonal. Its *influence
domain* is `I_i = sum_j slope_ij * I_j` over the ranks whose series it explains (correlation at least `beta`, slope at
least `gamma`; 1 for a leaf). Which of the two `lambda` multiplies is not stated in the sources at hand; here it is the
magnitude. The functions know tensors only: not where a window comes from, nor how many ranks will be kept.

Differences from the released code, which `reference=True` reproduces:

- Both terms are replaced by their percentile among the alive ranks before `salience_lambda` mixes them. Released:
  influence divided by its sum plus magnitude divided by the sum of its module, and no lambda. Influence grows
  exponentially along chains, so that there a few ranks take all of its mass.
- A leaf's influence counts as 1 as in the recursion; released: stored as 0. `influence()` itself keeps the released 0.
- Steps of (nearly) equal orthogonality weigh the same, an emptied or constant module is harmless, and ranks that are
  not alive score -inf. Released: NaN, which uses up the budget.
- Correlation and slope have no constant added to their denominators, so that scores do not depend on the unit of the
  singular values. Series that vary by less than their dtype resolves count as constant and have no edges.
- Arithmetic is float64 and blockwise; the released code holds several N x N arrays.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .graph import ELEMENTS, SeriesBatch, acyclic_path_sums, break_cycles, path_sums, successors_of


SCOPES = ("model", "module")
RELEASED_GUARD = 1e-15
# Orthogonality values closer than this are equal but for rounding in float32; min-max scaling would blow that up.
EQUAL_ORTHOGONALITY = 1e-6


def salience_scores(
    window: Tensor,
    orthogonality: Tensor,
    group_sizes: Sequence[int],
    *,
    alive: Tensor | None = None,
    correlation_threshold: float = 0.9,
    slope_threshold: float = 2.0,
    salience_lambda: float = 0.7,
    graph_scope: str = "model",
    magnitude_scope: str = "model",
    reference: bool = False,
) -> Tensor:
    """Scores every rank of a model.

    The score is `salience_lambda * magnitude + (1 - salience_lambda) * influence`, each as a percentile in [0, 1]
    among the alive ranks, where equal values share their mean percentile. It is hence the same for singular values in
    another unit, and finite for any finite window.

    Args:
        window (`Tensor`): Shape (T, N), any floating dtype: signed singular values at T steps, modules one after
            another.
        orthogonality (`Tensor`): Shape (T,): the regulariser's value at the same steps; smaller means more orthogonal.
        group_sizes (`Sequence[int]`): Ranks of each module; they sum to N.
        alive (`Tensor`, *optional*): Shape (N,), bool. Only these take part; without it, all do.
        correlation_threshold (`float`, *optional*, defaults to 0.9): Smallest correlation of an edge, `beta`.
        slope_threshold (`float`, *optional*, defaults to 2.0): Smallest slope of an edge, `gamma`.
        salience_lambda (`float`, *optional*, defaults to 0.7): Weight of the magnitude.
        graph_scope (`str`, *optional*, defaults to `"model"`): `"module"` looks for edges inside modules only.
        magnitude_scope (`str`, *optional*, defaults to `"model"`): `"module"` measures a magnitude relative to the
            mean of its module, so that modules of large singular values have no advantage.
        reference (`bool`, *optional*, defaults to `False`): The released code's score; of the options above only the
            two thresholds apply then. Where it fails for want of an edge, influence adds nothing; NaN spreads as it
            does there.

    Returns:
        `Tensor`: Shape (N,), float64, -inf where not alive; float32 in reference mode.

    Raises:
        ValueError: If shapes or options are not legal, or outside reference mode if an input is not finite.
    """
    _check_window(window, alive, correlation_threshold, slope_threshold)
    _check_options(window, orthogonality, group_sizes, salience_lambda, graph_scope, magnitude_scope)
    thresholds = (correlation_threshold, slope_threshold)
    if reference:
        return _released_scores(window, orthogonality, _member_index(group_sizes, window.device), *thresholds)
    _require_finite(window=window, orthogonality=orthogonality)
    if bool((orthogonality < 0).any()):
        raise ValueError("`orthogonality` must be at least 0 everywhere: it is a norm, see `peft_rank.orthogonality`.")

    n = window.shape[1]
    alive = torch.ones(n, dtype=torch.bool, device=window.device) if alive is None else alive
    modules = _member_index(group_sizes, window.device)
    everything = torch.arange(n, device=window.device)[None]
    magnitude = _weighted_magnitude(window, _orthogonality_weights(orthogonality))
    if magnitude_scope == "module":
        magnitude = _relative_to_module(magnitude, modules, alive)
    members = everything if graph_scope == "model" else modules
    log_influence, _ = _log2_influence(torch.where(alive, window, 0), members, *thresholds)
    kept = alive.nonzero().squeeze(1)
    mixed = salience_lambda * _percentile(magnitude[kept]) + (1 - salience_lambda) * _percentile(log_influence[kept])
    return torch.full((n,), -torch.inf, dtype=torch.float64, device=window.device).index_copy_(0, kept, mixed)


def influence(
    window: Tensor,
    *,
    alive: Tensor | None = None,
    correlation_threshold: float = 0.9,
    slope_threshold: float = 2.0,
    log: bool = False,
) -> Tensor:
    """Computes the influence domain of every series in one graph, not normalised.

    With a slope threshold above 1 the graph has no cycles, and memory stays bounded as N grows. At 1 or below, cycles
    are broken at their weakest edges; that search runs edge by edge on the host and is for small graphs.

    Args:
        window (`Tensor`): Shape (T, N), any floating dtype.
        alive (`Tensor`, *optional*): Shape (N,), bool. Others have no edges.
        correlation_threshold (`float`, *optional*, defaults to 0.9): Smallest correlation of an edge, in [0, 1].
        slope_threshold (`float`, *optional*, defaults to 2.0): Smallest slope of an edge, above 0.
        log (`bool`, *optional*, defaults to `False`): Return the natural logarithm, which is finite where the value
            overflows.

    Returns:
        `Tensor`: Shape (N,), float64: 0 (as logarithm: -inf) for a leaf, although it counts as 1 in the sum of those
            that
        point at it; for others at least `slope_threshold`.

    Raises:
        ValueError: If shapes or thresholds are not legal, or the window is not finite.
    """
    _check_window(window, alive, correlation_threshold, slope_threshold)
    _require_finite(window=window)
    if alive is not None:
        window = torch.where(alive, window, 0)
    members = torch.arange(window.shape[1], device=window.device)[None]
    log_influence, is_leaf = _log2_influence(window, members, correlation_threshold, slope_threshold)
    if log:
        return (log_influence * math.log(2)).masked_fill_(is_leaf, -torch.inf)
    return torch.exp2(log_influence).masked_fill_(is_leaf, 0.0)


def _released_scores(window: Tensor, orthogonality: Tensor, modules: Tensor, beta: float, gamma: float) -> Tensor:
    inverse = orthogonality.double().sum() / orthogonality.double()
    weights = (inverse - inverse.min()) / (inverse.max() - inverse.min())
    magnitude = _weighted_magnitude(window, weights)
    by_module = _gather(magnitude, modules)  # (modules, largest module)
    share = _scatter(by_module / by_module.sum(1, keepdim=True), modules, magnitude.numel())
    everything = torch.arange(window.shape[1], device=window.device)[None]
    log_influence, is_leaf = _log2_influence(window, everything, beta, gamma, RELEASED_GUARD)
    scaled = torch.exp2(log_influence - log_influence.amax()).masked_fill_(is_leaf, 0.0)
    influence_share = scaled / scaled.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return influence_share.float() + share.float()


def _log2_influence(
    window: Tensor, members: Tensor, beta: float, gamma: float, guard: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns log2 of the influence, 0 for a leaf, and which ranks are leaves; both (N,).

    `members` (graphs, n) names the ranks of each graph; N stands for padding."""
    n_ranks = window.shape[1]
    log_influence = torch.zeros(n_ranks + 1, dtype=torch.float64, device=window.device)
    is_leaf = torch.ones(n_ranks + 1, dtype=torch.bool, device=window.device)
    if n_ranks == 0:
        return log_influence[:0], is_leaf[:0]
    padded = torch.nn.functional.pad(window, (0, 1)).T  # (N + 1, T)
    resolution = max(torch.finfo(window.dtype).eps, 1e-14)
    per_chunk = max(1, ELEMENTS // members.shape[1] ** 2)
    for chunk in members.split(per_chunk):
        unit, log_deviation, varies = _standardize(padded[chunk], resolution)
        order = log_deviation.masked_fill(~varies, -torch.inf).argsort(dim=1, descending=True, stable=True)
        if gamma > 1:
            order = order[:, : max(1, int(varies.sum(1).amax()))]
            chunk = chunk.gather(1, order)
            unit = unit.gather(1, order[..., None].expand(-1, -1, unit.shape[2]))
            batch = SeriesBatch(unit, log_deviation.gather(1, order), beta, gamma, guard)
            log_influence[chunk], is_leaf[chunk] = path_sums(batch)
        else:
            batch = SeriesBatch(unit, log_deviation, beta, gamma, guard)
            for ids, successors in zip(chunk, successors_of(batch), strict=True):
                values = acyclic_path_sums(successors, break_cycles(successors))
                log_influence[ids] = log_influence.new_tensor(values)
                is_leaf[ids] = torch.tensor([not edges for edges in successors], device=window.device)
    return log_influence[:-1], is_leaf[:-1]


def _standardize(series: Tensor, resolution: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns unit deviations (G, n, T), log2 of their norms (G, n), and which series vary (G, n)."""
    series = series.double()
    scale = series.abs().amax(-1, keepdim=True)
    scaled = series / torch.where(scale > 0, scale, 1.0)  # squares stay in range for any magnitude
    deviation = scaled - scaled.mean(-1, keepdim=True)
    norm = deviation.norm(dim=-1, keepdim=True)
    varies = norm > resolution * math.sqrt(series.shape[-1])  # False for NaN as well
    unit = torch.where(varies, deviation / norm, 0.0)
    varies = varies.squeeze(-1)
    log_deviation = (norm.log2() + scale.log2()).squeeze(-1)
    smallest = log_deviation.masked_fill(~varies, torch.inf).amin(1, keepdim=True)
    smallest = torch.where(smallest.isinf(), 0.0, smallest)  # nothing varies in this graph
    return unit, torch.where(varies, log_deviation, smallest), varies


def _orthogonality_weights(orthogonality: Tensor) -> Tensor:
    """Returns (T,) weights from 0 at the least to 1 at the most orthogonal step; all 1 if the steps do not differ."""
    values = orthogonality.double()
    largest = values.max()
    inverse = largest / values.clamp(min=largest * EQUAL_ORTHOGONALITY)  # at least 1; NaN if all are 0
    spread = inverse.max() - inverse.min()
    return torch.where(spread > EQUAL_ORTHOGONALITY, (inverse - inverse.min()) / spread, torch.ones_like(values))


def _weighted_magnitude(window: Tensor, weights: Tensor) -> Tensor:
    return (window.double().abs() * weights[:, None]).sum(0)  # (N,)


def _relative_to_module(magnitude: Tensor, modules: Tensor, alive: Tensor) -> Tensor:
    """Divides by the mean over the alive ranks of the module.

    By the mean and not the sum, as a lone survivor would otherwise have the share 1 and could never fall."""
    by_module = _gather(torch.where(alive, magnitude, 0.0), modules)
    mean = by_module.sum(1, keepdim=True) / _gather(alive.double(), modules).sum(1, keepdim=True).clamp(min=1)
    return _scatter(by_module / torch.where(mean > 0, mean, 1.0), modules, magnitude.numel())


def _percentile(values: Tensor) -> Tensor:
    """Returns each value's place among all of them, from 0 to 1; equal values share the mean of their places."""
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to - 1).double() / (2 * max(values.numel() - 1, 1))


def _member_index(group_sizes: Sequence[int], device: torch.device) -> Tensor:
    """Returns (modules, largest module) indices of ranks, N for padding."""
    sizes = torch.tensor(group_sizes, device=device, dtype=torch.long)
    place = torch.arange(max(group_sizes, default=0), device=device)
    index = (sizes.cumsum(0) - sizes)[:, None] + place
    return torch.where(place < sizes[:, None], index, sum(group_sizes))


def _gather(values: Tensor, members: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, 1))[members]


def _scatter(by_module: Tensor, members: Tensor, n: int) -> Tensor:
    return by_module.new_zeros(n + 1).index_put_((members,), by_module)[:-1]


def _check_window(window: Tensor, alive: Tensor | None, beta: float, gamma: float) -> None:
    if window.dim() != 2 or window.shape[0] < 1 or not window.is_floating_point():
        raise ValueError(
            f"`window` must be floating point of shape (steps, ranks) with one step or more, got {window.dtype} of "
            f"shape {tuple(window.shape)}."
        )
    if alive is not None and (alive.shape != window.shape[1:] or alive.dtype != torch.bool):
        raise ValueError(
            f"`alive` must be bool of shape ({window.shape[1]},), got {alive.dtype} {tuple(alive.shape)}."
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"`correlation_threshold` must be between 0 and 1, got {beta}.")
    if not 0 < gamma < math.inf:
        raise ValueError(f"`slope_threshold` must be above 0 and finite, got {gamma}.")


def _check_options(
    window: Tensor,
    orthogonality: Tensor,
    group_sizes: Sequence[int],
    salience_lambda: float,
    graph_scope: str,
    magnitude_scope: str,
) -> None:
    steps, n = window.shape
    if orthogonality.shape != (steps,):
        raise ValueError(
            f"`orthogonality` must hold one value for each of the {steps} steps of the window, got shape "
            f"{tuple(orthogonality.shape)}."
        )
    if sum(group_sizes) != n or any(size < 0 for size in group_sizes):
        raise ValueError(
            f"`group_sizes` must be non-negative and sum to the {n} ranks of the window, got a sum of "
            f"{sum(group_sizes)}."
        )
    if not 0 <= salience_lambda <= 1:
        raise ValueError(f"`salience_lambda` must be between 0 and 1, got {salience_lambda}.")
    for name, scope in (("graph_scope", graph_scope), ("magnitude_scope", magnitude_scope)):
        if scope not in SCOPES:
            raise ValueError(f"`{name}` must be one of {SCOPES}, got {scope!r}.")


def _require_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"`{name}` must be finite, but holds NaN or infinity: training has diverged. Lower the learning rate, "
                "clip gradients, or go back to a checkpoint from before."
            )
