# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""When ranks are pruned, and how many are left afterwards.

The adaptive time window of SalientLoRA (Ke et al., NeurIPS 2024). After `t_i` warm-up steps come `n_a` allocation
steps, which are cut into windows; each window ends with a decision. At progress `c` through the allocation phase

    T(c) = round(T_f + (T_i - T_f) * (1 - c)^3)        length of the next window
    b(c) = int(N - T / T_f * (N - N_target))           total rank that is left

so windows grow from `T_i` towards `T_f` while the budget falls from `N` to `N_target`, fastest at the beginning. This
file knows steps and totals only; neither a model nor scores.

Differences from the released code, all of them undone by `reference=True`:

- Progress is `(s - t_i) / n_a`. The released denominator is `t_i + n_a`, so that its progress never reaches 1 and the
  budget is missed.
- The last decision falls on the last allocation step and leaves exactly `N_target`; the released code drops the
  unfinished last window.
- The first window has `T_i` steps; released: always 10.
- Steps count completed optimizer steps, from 1; released: from 0.
"""

from dataclasses import dataclass


RELEASED_FIRST_WINDOW = 10
# With two steps every correlation is 1 or -1: a shorter window holds no evidence of its own.
SHORTEST_LAST_WINDOW = 3


@dataclass(frozen=True)
class Decision:
    """One pruning decision.

    Args:
        step (`int`): Taken after this optimizer step (from 1; from 0 in reference mode).
        window (`int`): Number of steps, up to and including `step`, that the decision looks at.
        budget (`int`): Total rank of the model after the decision.
    """

    step: int
    window: int
    budget: int


@dataclass(frozen=True)
class AllocationSchedule:
    """The decisions of one training run, known before it starts.

    Args:
        warmup_steps (`int`): Steps before anything is recorded (`t_i`).
        allocation_steps (`int`): Steps during which ranks are recorded and pruned (`n_a`). 0 is legal only where there
            is nothing to prune.
        total_steps (`int`): Length of the training; ranks are fixed after `warmup_steps + allocation_steps`.
        initial_window (`int`): Length of the first window (`T_i`).
        final_window (`int`): Length that windows grow towards (`T_f`).
        initial_total (`int`): Total rank of the model at the start (`N`).
        target_total (`int`): Total rank after the last decision (`N_target`).
        reference (`bool`, *optional*, defaults to `False`): The decisions of the released code, see the module's
            docstring.

    Raises:
        ValueError: If a field is outside its legal range; the message says which, and what to change.
    """

    warmup_steps: int
    allocation_steps: int
    total_steps: int
    initial_window: int
    final_window: int
    initial_total: int
    target_total: int
    reference: bool = False

    def __post_init__(self) -> None:
        fixed = self.target_total == self.initial_total
        self._require_range("initial_total", 1, None, "Adapt at least one module with a rank of 1 or more.")
        self._require_range(
            "target_total", 1, self.initial_total, "Ranks are only ever pruned: raise init_r or lower target_r."
        )
        self._require_range("warmup_steps", 0, None, "Use 0 to start recording with the first step.")
        self._require_range(
            "allocation_steps",
            0 if fixed else 1,
            None,
            "Pruning to the target needs one step or more in which to decide.",
        )
        self._require_range(
            "initial_window", 1, None, "A window holds one step or more (3 for a meaningful correlation)."
        )
        self._require_range(
            "final_window", self.initial_window, None, "Windows grow: it cannot be below initial_window."
        )
        self._require_range(
            "total_steps",
            self.warmup_steps + self.allocation_steps,
            None,
            "Train longer, or lower warmup_steps + allocation_steps.",
        )

    def _require_range(self, field: str, low: int, high: int | None, remedy: str) -> None:
        value = getattr(self, field)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or value < low or (high is not None and value > high):
            legal = f"of at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"`{field}` must be an integer {legal}, got {value!r}. {remedy}")

    def decisions(self) -> list[Decision]:
        """Returns all decisions in the order of their steps.

        Their windows are disjoint. Outside reference mode they cover the allocation phase, the last one ends on its
        last step with a budget of exactly `target_total`, and there is none if `target_total == initial_total`.
        """
        return self._released_decisions() if self.reference else self._covering_decisions()

    def _window_and_budget(self, progress: float) -> tuple[int, int]:
        window = round(self.final_window + (self.initial_window - self.final_window) * (1 - progress) ** 3)
        budget = int(self.initial_total - window / self.final_window * (self.initial_total - self.target_total))
        return window, budget

    def _covering_decisions(self) -> list[Decision]:
        if self.target_total == self.initial_total:
            return []
        end = self.warmup_steps + self.allocation_steps
        decisions: list[Decision] = []
        start, window = self.warmup_steps, self.initial_window
        # The decision at `start + window` is taken only if it leaves enough steps for one more window.
        while start + window <= end - SHORTEST_LAST_WINDOW:
            next_window, budget = self._window_and_budget((start + window - self.warmup_steps) / self.allocation_steps)
            decisions.append(Decision(start + window, window, budget))
            start, window = start + window, next_window
        return [*decisions, Decision(end, end - start, self.target_total)]

    def _released_decisions(self) -> list[Decision]:
        end = self.warmup_steps + self.allocation_steps
        decisions: list[Decision] = []
        start, window = self.warmup_steps, RELEASED_FIRST_WINDOW
        while start + window <= end:
            next_window, budget = self._window_and_budget((start + window - self.warmup_steps) / end)
            decisions.append(Decision(start + window, window, budget))
            start, window = start + window, next_window
        return decisions

    def __str__(self) -> str:
        decisions = self.decisions()
        if not decisions:
            return f"ranks fixed at {self.initial_total}: no allocation"
        windows = [decision.window for decision in decisions]
        lengths = f"{min(windows)}" if min(windows) == max(windows) else f"{min(windows)} to {max(windows)}"
        return (
            f"ranks {self.initial_total} -> {decisions[-1].budget} in {len(decisions)} "
            f"decision{'s' if len(decisions) > 1 else ''} over steps {self.warmup_steps + 1}-{decisions[-1].step} "
            f"(windows {lengths} steps), then fixed until step {self.total_steps}"
        )
