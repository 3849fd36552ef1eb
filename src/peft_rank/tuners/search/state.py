# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Budget, clock and snapshots of one search. It sees logits of modules, and knows neither layers nor optimizers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...allocation.masks import EVEN, keep_probability, straight_through
from ...allocation.parameters import comparable, parameter_budget, repair_ranks, spectral_ranks
from ..packing import pack_state, read_state
from .config import RankSearchConfig


_RANGE = 5.0  # of logits at a spectral start: beyond, masks hardly ever change
_SURE = 2.0  # by how much the last rank of a dense module is above the border then: kept with probability 0.99

Selection = list[Tensor | None]
"""Of every module the ranks that it keeps, (r,) int64 in increasing order, or None where it stays dense."""


class SearchState:
    """
    What a search has to reach and how far it is.

    Args:
        config (`RankSearchConfig`): Its targets, tolerance and patience.
        shapes (`Sequence[tuple[int, int]]`): (out, in) of every module.
        multiples (`Sequence[int]`): What its rank is a multiple of.
        others (`int`): Parameters that the ratio counts and the search does not change.
        others_dense (`int`): What these are in the dense model: more, where ranks were fixed beforehand.
        prefix (`bool`): Whether a module keeps its leading ranks, or any.

    Attributes:
        seed (`int`): Of the noise.
        step (`int`): Completed optimizer steps.
        recorded (`int`): How many of them were not skipped.
        met (`int`): For how many steps in a row the smallest target has been met.
        snapshots (`dict[float, Selection]`): What was kept as each target was reached.

    Raises:
        ValueError: If a target cannot be met; the message names the range.
    """

    def __init__(
        self,
        config: RankSearchConfig,
        shapes: Sequence[tuple[int, int]],
        multiples: Sequence[int],
        others: int,
        others_dense: int,
        prefix: bool,
    ) -> None:
        self.config, self.shapes, self.multiples, self.others, self.prefix = config, shapes, multiples, others, prefix
        self.sizes = [min(shape) for shape in shapes]
        self.costs = [sum(shape) for shape in shapes]
        self.dense = [out_features * in_features for out_features, in_features in shapes]
        self.total = sum(self.dense) + others_dense
        self.budgets = {ratio: self._budget(ratio) for ratio in config.ratios}
        self._copies: dict[torch.device, Tensor] = {}
        self.seed = config.seed
        self.total_steps: int | None = None
        self.restart()

    def restart(self) -> None:
        """Forget the progress of a search that did not finish."""
        self.step = self.recorded = self.met = 0
        self.snapshots: dict[float, Selection] = {}

    def _budget(self, ratio: float) -> int:
        # with fixed ranks, the ratio that comes to the same among what is left
        dense = sum(self.dense) + self.others
        inner = ratio if dense == self.total else ratio * self.total / dense
        try:
            return parameter_budget(self.shapes, inner, others=self.others)
        except ValueError as error:
            raise ValueError(str(error).replace("`ratio", "`target_ratio")) from error

    @property
    def target(self) -> float:
        """The largest target that is not reached yet, or the smallest."""
        left = [ratio for ratio in self.config.ratios if ratio not in self.snapshots]
        return left[0] if left else self.end

    @property
    def end(self) -> float:
        """The smallest target, which the search ends with, now or later: evaluations compare at one budget."""
        return self.config.ratios[-1]

    @property
    def finished(self) -> bool:
        return len(self.snapshots) == len(self.config.ratios)

    @property
    def out_of_patience(self) -> bool:
        return self.finished and self.config.patience is not None and self.met >= self.config.patience

    def ratio(self, counts: Tensor) -> Tensor:
        """Kept / dense parameters for `counts`, (modules,) ranks: scalar.

        A module costs its factors or, if that is less, its weight. The gradient is that of the factors everywhere, or
        nothing would ever leave the dense state.
        """
        costs, dense, _ = self.on(counts.device)
        factors = counts * costs
        capped = torch.minimum(factors, dense)
        return (straight_through(capped, factors).sum() + self.others) / self.total

    def on(self, device: torch.device) -> Tensor:
        """(3, modules) float32: what a rank of each module costs, what its weight does, how many ranks it has; copied to a
        device once."""
        if device not in self._copies:
            with torch.inference_mode(False):  # gradients will flow by it later
                rows = [self.costs, self.dense, self.sizes]
                self._copies[device] = torch.tensor(rows, dtype=torch.float32, device=device)
        return self._copies[device]

    def padded(self, values: Tensor) -> Tensor:
        """(sum of ranks,) values of all modules, one module after the other, as (modules, K), padded with -inf."""
        K = max(self.sizes)
        if min(self.sizes) == K:
            return values.view(-1, K)
        sizes, ranks = self.on(values.device)[2].long(), torch.arange(K, device=values.device)
        inside = ranks < sizes[:, None]
        position = torch.where(inside, (sizes.cumsum(0) - sizes)[:, None] + ranks, 0)
        return torch.where(inside, values.index_select(0, position.flatten()).view_as(inside), float("-inf"))

    def likely(self, logits: Tensor) -> Tensor:
        """(modules,) ranks whose keep probability exceeds one half, for logits (modules, K)."""
        return (keep_probability(logits) > 0.5).sum(dim=1).to(logits.dtype)

    def spectral_start(self, spectra: Sequence[Tensor]) -> list[Tensor]:
        """
        Logits that keep what spectra alone would keep for the target: the logarithm of what a rank adds to the
        output, beside the last one that is kept and the first that is not. A module that stays dense keeps all.

        Args:
            spectra (`Sequence[Tensor]`): Singular values of every module, (k,).
        """
        scaled = [comparable(values.double().cpu(), self.config.sums_amounts) for values in spectra]
        ranks = spectral_ranks(scaled, self.shapes, self.budgets[self.config.ratios[0]], rank_multiple=self.multiples)
        starts = []
        for values, rank in zip(scaled, ranks, strict=True):
            worth = values.square().clamp(min=1e-30).log()
            border = worth[-1] - _SURE if rank is None else (worth[rank - 1] + worth[rank]) / 2
            starts.append((worth - border).clamp(-_RANGE, _RANGE).float() + EVEN)
        return starts

    @torch.no_grad()
    def choose(self, logits: Tensor, target: float) -> Selection:
        """
        What to keep: what is more likely kept than not, moved to the exact budget.

        Args:
            logits (`Tensor`): (modules, K), padded with -inf.
            target (`float`): One of the config's ratios.

        Raises:
            ValueError: If a logit is NaN.
        """
        if bool(logits.isnan().any()):
            raise ValueError("Mask logits are NaN: the search diverged. Lower the learning rate.")
        counts = self.likely(logits).tolist()
        worth = F.softplus(logits.detach().double()).cpu()
        ordered = worth if self.prefix else worth.sort(dim=1, descending=True).values
        scores = [row[:size] for row, size in zip(ordered, self.sizes, strict=True)]
        ranks = repair_ranks(counts, self.shapes, self.budgets[target], rank_multiple=self.multiples, scores=scores)
        if self.prefix:
            return [None if rank is None else torch.arange(rank) for rank in ranks]
        order = worth.argsort(dim=1, descending=True, stable=True)
        return [None if rank is None else row[:rank].sort().values for row, rank in zip(order, ranks, strict=True)]

    def record(self, logits: Tensor) -> float | None:
        """Take note of the logits after optimizer step `step`; returns the target that has been reached by it."""
        self.recorded += 1
        target = self.target
        ratio = float(self.ratio(self.likely(logits)))
        reached = ratio <= target + self.config.tolerance
        self.met = self.met + 1 if reached and target == self.end else 0
        if not reached or target in self.snapshots:
            return None
        self.snapshots[target] = self.choose(logits, target)
        return target

    def pack(self) -> Tensor:
        """Clock and snapshots as bytes, (n,) uint8: an integer tensor survives any cast of the model."""
        clock = {"seed": self.seed, "step": self.step, "recorded": self.recorded, "met": self.met}
        clock["reached"] = list(self.snapshots)
        tensors = {"clock": torch.zeros(0)}
        for i, selection in enumerate(self.snapshots.values()):
            tensors |= {f"{i}.{j}": ranks for j, ranks in enumerate(selection) if ranks is not None}
        return pack_state(tensors, clock)

    def unpack(self, blob: Tensor) -> None:
        """Restore what `pack` returned.

        Raises:
            ValueError: If the bytes are damaged.
        """
        tensors, clock = read_state(blob)
        self.seed, self.step = clock["seed"], clock["step"]
        self.recorded, self.met = clock["recorded"], clock["met"]
        self.snapshots = {
            ratio: [tensors.get(f"{i}.{j}") for j in range(len(self.shapes))]
            for i, ratio in enumerate(clock["reached"])
        }
