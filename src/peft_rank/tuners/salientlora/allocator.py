# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Memory and clock of one adapter's allocation: what was recorded, what was decided, what comes next.

It sees the values of ranks, and maybe their gradients, as one vector over the model, module by module, and knows neither layers
nor optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from peft_rank.allocation.budget import keep_top
from peft_rank.allocation.salience import salience_scores
from peft_rank.allocation.schedule import SHORTEST_LAST_WINDOW, AllocationSchedule, Decision

from ..packing import pack_state, read_state
from ..sharding import is_distributed
from .config import SalientLoRAConfig


class RankAllocator:
    """
    The allocation of one adapter.

    Args:
        config (`SalientLoRAConfig`): Its thresholds and scopes; the schedule is set by `plan`.
        sizes (`Sequence[int]`): Ranks of the modules, in injection order.

    Attributes:
        sizes (`list[int]`): Ranks that exist physically, N in all.
        index (`torch.Tensor`): (N,) int64 on the CPU, each rank's position in the model that the allocation started from.
        alive (`torch.Tensor`): (N,) bool on the CPU, False where a rank is pruned but not yet removed.
        last_step (`int`): The last optimizer step that was seen.
        recorded (`int`): Number of steps that were recorded in the allocation phase.
        decided_step (`int`): `step` of the last decision that was taken, -1 for none.
        awaits (`bool`): Whether the regularizer's value is still missing beside the last step of the window.
        rolled_back (`bool`): Whether an older checkpoint was loaded over this run.
        closed (`bool`): Whether the allocation was finalized: what is dead is not even saved.
    """

    def __init__(self, config: SalientLoRAConfig, sizes: Sequence[int]) -> None:
        self.config = config
        self.initial_sizes = list(sizes)
        self.sizes = list(sizes)
        # dtypes and devices are given throughout: torch's defaults are the user's to change
        self.index = torch.arange(sum(sizes), device="cpu")
        self.alive = torch.ones(sum(sizes), dtype=torch.bool, device="cpu")
        self.last_step = 0
        self.recorded = 0
        self.decided_step = -1
        self.awaits = False
        self.rolled_back = False
        self.closed = False
        self.schedule: AllocationSchedule | None = None
        self.decisions: list[Decision] = []
        self._rows = 0
        self._window = torch.empty(0, sum(sizes), dtype=torch.float32, device="cpu")
        self._regularizer = torch.empty(0, dtype=torch.float32, device="cpu")
        # (N,), absolute values, summed over the window; that of the last one until the next begins
        self._gradient: torch.Tensor | None = None

    @property
    def target_total(self) -> int:
        return self.config.target_r * len(self.sizes)

    @property
    def total(self) -> int:
        """Ranks that are alive."""
        return int(self.alive.sum())

    @property
    def finished(self) -> bool:
        """Whether the budget is met: nothing is left to decide."""
        if self.config.reference and self.schedule is not None:
            return not self.pending
        return self._meets_budget

    @property
    def _meets_budget(self) -> bool:
        return self.total <= self.target_total

    @property
    def pending(self) -> list[Decision]:
        """Decisions still to be taken. The last one is owed until the budget is met: where a training goes on under a shorter
        plan than it began with, all of them may lie before what was decided."""
        later = [decision for decision in self.decisions if decision.step > self.decided_step]
        return later if later or self.config.reference or self._meets_budget else self.decisions[-1:]

    @property
    def budget(self) -> int:
        """Budget of the last decision, or the total before the first."""
        taken = [decision.budget for decision in self.decisions if decision.step <= self.decided_step]
        budget = taken[-1] if taken else self.total
        # of a longer plan than the training began with it may be above what is left; the released rule may keep fewer
        return budget if self.config.reference else min(budget, self.total)

    @property
    def has_window(self) -> bool:
        """Whether anything was recorded since the last decision."""
        return self._rows > 0

    @property
    def window_length(self) -> int:
        """Length of the current window in steps, 0 outside of the allocation phase."""
        return self.pending[0].window if self.pending and not self.finished else 0

    def plan(self, total_steps: int | None) -> AllocationSchedule:
        """Set the schedule; raises as `SalientLoRAConfig.schedule` does, and if it holds no decision."""
        initial = sum(self.initial_sizes)
        schedule = self.config.schedule(total_steps, initial, min(self.target_total, initial))
        decisions = schedule.decisions()
        if not decisions and self.target_total < initial:
            raise ValueError(
                f"`allocation_steps={schedule.allocation_steps}` are too few for the released schedule of "
                "`reference=True`, whose first window has 10 steps: no rank would be pruned. Allocate over more steps."
            )
        self.schedule, self.decisions = schedule, decisions
        return schedule

    def restart(self) -> None:
        """Forget an unfinished allocation: a training that starts at step 0 allocates from the ranks that it finds."""
        if self.finished:
            return
        self.initial_sizes = [int(alive.sum()) for alive in self.alive.split(self.sizes)]
        self.index = self.alive.cumsum(0) - self.alive.long()
        self.last_step = self.recorded = self._rows = 0
        self._gradient = None
        self.decided_step = -1
        self.awaits = self.rolled_back = False

    def wants(self, step: int) -> bool:
        """Whether the singular values after `step` belong to the allocation phase."""
        return not self.finished and bool(self.pending) and step > self.schedule.warmup_steps

    def record(
        self,
        values: Sequence[torch.Tensor],
        regularizer: torch.Tensor | None,
        gradient: torch.Tensor | None = None,
    ) -> None:
        """Append a step to the window: the singular values, one (r,) tensor a module, the regularizer's value, a scalar, or
        None if it is still to come, and the gradient of the singular values, (N,), if they are to be weighed by it."""
        device = values[0].device if regularizer is None else regularizer.device
        if self._rows == 0:
            self._gradient = None
        if self._rows == len(self._window) or self._window.device != device:
            self._reserve(device)
        if len({value.device for value in values}) > 1:
            values = [value.to(device) for value in values]
        torch.cat([value.detach().float() for value in values], out=self._window[self._rows])
        if gradient is not None:
            gradient = gradient.abs().to(device)
            self._gradient = gradient if self._gradient is None else self._gradient.add_(gradient)
        self.awaits = regularizer is None
        self._regularizer[self._rows] = 0.0 if regularizer is None else regularizer
        self._rows += 1
        self.recorded += 1

    def complete(self, regularizer: torch.Tensor) -> None:
        """The regularizer's value, a scalar, at the last step of the window."""
        self._regularizer[self._rows - 1] = regularizer
        self.awaits = False

    def _reserve(self, device: torch.device) -> None:
        """Rows for the longest window still to come, on `device`, keeping what is recorded."""
        longest = max([decision.window for decision in self.pending], default=1)
        capacity = max(longest, self._rows + 1)
        window = torch.empty(capacity, len(self.index), dtype=torch.float32, device=device)
        regularizer = torch.empty(capacity, dtype=torch.float32, device=device)
        window[: self._rows] = self._window[: self._rows].to(device)
        regularizer[: self._rows] = self._regularizer[: self._rows].to(device)
        self._window, self._regularizer = window, regularizer
        self._gradient = None if self._gradient is None else self._gradient.to(device)

    def due(self, step: int) -> Decision | None:
        """The decision to take after `step`: the last one whose time has come, if anything was recorded for it. One that is
        owed, see `pending`, waits for a window."""
        late = [decision for decision in self.pending if decision.step <= step]
        if not late:
            return None
        owed = late[-1].step <= self.decided_step
        return late[-1] if self._rows >= (SHORTEST_LAST_WINDOW if owed else 1) else None

    @property
    def gradient(self) -> torch.Tensor | None:
        """(N,) absolute gradients of the values, summed over the window, or until the next begins over the last one; None
        where there is nothing to weigh by: no gradient came, or only zeros, as `zero_grad(set_to_none=False)` leaves."""
        return None if self._gradient is None or not self._gradient.any() else self._gradient

    def decide(self, decision: Decision) -> torch.Tensor:
        """(N,) bool on the CPU: the ranks to keep, of those that exist. Clears the window; the same on every process.

        With gradients a value counts as |E_i| times the mean of |dL/dE_i|, the first-order change of the loss without the
        rank: of one unit for all modules, whatever the norms of A and B (importance of Molchanov et al., CVPR 2019,
        https://huggingface.co/papers/1906.10771, eq. 8, and of AdaLoRA, for the singular value alone). Where all are 0, by E.
        """
        config = self.config
        device = self._window.device
        alive = self.alive.to(device)
        window, gradient = self._window[: self._rows], self.gradient
        if gradient is not None:
            window = window * gradient
        scores = salience_scores(
            window,
            self._regularizer[: self._rows],
            self.sizes,
            alive=alive,
            correlation_threshold=config.correlation_threshold,
            slope_threshold=config.slope_threshold,
            salience_lambda=config.salience_lambda,
            graph_scope=config.graph_scope,
            magnitude_scope=config.magnitude_scope,
            reference=config.reference,
        )
        # after a resume under another plan a budget may be above the ranks that are left; the released rule, which may
        # keep fewer than its budget, counts pruned ranks
        budget = min(decision.budget, len(scores) if config.reference else self.total)
        keep = keep_top(scores, budget, self.sizes, alive=alive, min_r=config.min_r, reference=config.reference)
        if is_distributed():
            # equal inputs may still be summed in another order elsewhere
            keep = keep.to(torch.uint8)
            torch.distributed.broadcast(keep, src=0)
        keep = keep.cpu().bool()
        self.alive &= keep
        self.decided_step = max(self.decided_step, decision.step)
        self._rows = 0
        return keep

    def living(self) -> list[list[int]]:
        """Of each module the ranks that are alive, as positions in the module that the allocation started from."""
        starts = [0, *accumulate(self.initial_sizes)]
        parts = zip(self.index.split(self.sizes), self.alive.split(self.sizes), starts, strict=False)
        return [(index[alive] - start).tolist() for index, alive, start in parts]

    def remove_dead(self) -> list[torch.Tensor]:
        """Forget dead ranks; returns the (r,) bool mask of every module that they were removed by."""
        masks = list(self.alive.split(self.sizes))
        alive = self.alive.to(self._window.device)
        self._window = self._window[:, alive].contiguous()
        self._gradient = None if self._gradient is None else self._gradient[alive]
        self.sizes = [int(mask.sum()) for mask in masks]
        self.index = self.index[self.alive]
        self.alive = torch.ones(len(self.index), dtype=torch.bool, device="cpu")
        return masks

    def pack(self) -> torch.Tensor:
        """The whole state as bytes, (n,) uint8: an integer tensor survives any cast of the model."""
        tensors = {
            "index": self.index,
            "alive": self.alive,
            "sizes": torch.tensor(self.sizes, device="cpu"),
            "initial_sizes": torch.tensor(self.initial_sizes, device="cpu"),
            "window": self._window[: self._rows].cpu().contiguous(),
            "regularizer": self._regularizer[: self._rows].cpu().contiguous(),
        }
        if self._gradient is not None:
            tensors["gradient"] = self._gradient.cpu()
        clock = {name: int(getattr(self, name)) for name in ("last_step", "recorded", "decided_step", "awaits")}
        return pack_state(tensors, clock)

    def unpack(self, blob: torch.Tensor, sizes: Sequence[int]) -> None:
        """Restore what `pack` returned.

        Args:
            blob (`torch.Tensor`): (n,) uint8.
            sizes (`Sequence[int]`): Ranks of the modules that the state has to fit.

        Raises:
            ValueError: If the bytes are damaged or describe other modules; nothing is changed.
        """
        tensors, clock = read_state(blob)
        if tensors["sizes"].tolist() != list(sizes):
            raise ValueError(
                f"The allocation state in the checkpoint describes {len(tensors['sizes'])} modules with "
                f"{int(tensors['sizes'].sum())} ranks, the adapter has {len(sizes)} with {sum(sizes)}. The checkpoint "
                "belongs to another model or to other `target_modules`."
            )
        self.index, self.alive = tensors["index"], tensors["alive"].bool()
        self.sizes, self.initial_sizes = tensors["sizes"].tolist(), tensors["initial_sizes"].tolist()
        self._window, self._regularizer = tensors["window"], tensors["regularizer"]
        self._rows, self._gradient = len(self._window), tensors.get("gradient")
        self.last_step, self.recorded = clock["last_step"], clock["recorded"]
        self.decided_step, self.awaits = clock["decided_step"], bool(clock.get("awaits"))
