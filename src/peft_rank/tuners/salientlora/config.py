# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Configuration of SalientLoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft.utils import PeftType

from peft_rank.allocation.schedule import AllocationSchedule

from ..config import AdaptedModulesConfig, check_int, check_number


DEFAULT_RATIOS = {"warmup": 0.1, "allocation": 0.5}
INITIALISATIONS = ("lora", "gaussian", "orthogonal")


@dataclass
class SalientLoRAConfig(AdaptedModulesConfig):
    """
    Configuration of [`SalientLoRAModel`]: LoRA as `W + lora_alpha / init_r * B diag(E) A`, which starts with `init_r`
    ranks in every module and prunes them by their salience until `target_r` ranks a module are left on average
    (SalientLoRA, NeurIPS 2024).

    The schedule has three phases: `warmup` steps without pruning, `allocation` steps in which ranks are pruned over
    windows that grow from `initial_window` to `final_window` steps, and the rest of the training with fixed ranks. The
    first two are given in optimizer steps or as fractions of the training; neither given means the fractions 0.1 and
    0.5. With `target_r == init_r` nothing is ever pruned.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_rank import RankAllocationCallback, SalientLoRAConfig

        >>> config = SalientLoRAConfig(init_r=15, target_r=2, target_modules="all-linear", task_type="SEQ_CLS")
        >>> model = get_peft_model(model, config)
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[RankAllocationCallback()])
        ```

    Raises:
        ValueError: If a field, or a combination of fields, is outside its legal range; the message names the field,
            the value, the range and the remedy.
    """

    init_r: int = field(
        default=15, metadata={"help": "Initial rank of every adapted module (`rank_pattern` overrides it)."}
    )
    target_r: int = field(
        default=2,
        metadata={
            "help": "Average rank of the adapted modules at the end of the allocation: `target_r * modules` ranks are "
            "left in all. Equal to `init_r`: no allocation."
        },
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={
            "help": "The update is scaled by `lora_alpha / init_r`; pruning does not change the scale. Twice `init_r` if "
            "not given."
        },
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapter's input."})
    init_weights: bool | Literal["lora", "gaussian", "orthogonal"] = field(
        default=True,
        metadata={
            "help": "How A, E and B start. `True`: as `'lora'`, or with `reference` as `'gaussian'`. `False`: random, not the "
            "identity. `'lora'`: A as in LoRA, E = 1, B = 0, so that the adapter starts as the identity and learns as fast as "
            "LoRA. `'gaussian'`: A and B normal with deviation 0.02, E = 0, as in the released code. `'orthogonal'`: A and B "
            "with orthonormal ranks, E = 0. Where E starts at 0 the updates start several times smaller: raise `lora_alpha`."
        },
    )
    warmup_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps before the allocation starts (or give `warmup_ratio`)."}
    )
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "The same as a fraction of the training; 0.1 if neither is given."}
    )
    allocation_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps over which ranks are pruned (or give `allocation_ratio`)."},
    )
    allocation_ratio: float | None = field(
        default=None, metadata={"help": "The same as a fraction of the training; 0.5 if neither is given."}
    )
    total_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps of the whole training. Only needed in a hand-written loop that uses fractions; "
            "`RankAllocationCallback` knows it."
        },
    )
    initial_window: int = field(default=10, metadata={"help": "Steps of the first time window (T_i in the paper)."})
    final_window: int = field(default=200, metadata={"help": "Steps that the windows grow to (T_f in the paper)."})
    correlation_threshold: float = field(
        default=0.9,
        metadata={"help": "Two singular values depend on each other if their correlation reaches this (beta)."},
    )
    slope_threshold: float = field(
        default=2.0,
        metadata={"help": "... and if the slope of one on the other reaches this (gamma). Above 1 no cycles exist."},
    )
    salience_lambda: float = field(
        default=0.7,
        metadata={"help": "Weight of the magnitude in the salience; the influence gets the rest (lambda)."},
    )
    graph_scope: Literal["model", "module"] = field(
        default="model",
        metadata={"help": "Look for dependencies among all singular values, or only within each module."},
    )
    magnitude_scope: Literal["model", "module"] = field(
        default="model",
        metadata={"help": "Compare magnitudes over the model, or as shares of their module (as the released code)."},
    )
    orth_reg_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the orthogonality regularizer. Its gradient is added once a step, never the loss. The default is "
            "the authors'; where `init_weights` is LoRA's start, 0.01 is often better."
        },
    )
    min_r: int = field(default=0, metadata={"help": "No module is pruned below this rank."})
    reference: bool = field(
        default=False,
        metadata={"help": "Use the released code's scores and pruning rule, which may miss the budget."},
    )

    def __post_init__(self) -> None:
        self.peft_type = PeftType.SALIENTLORA
        super().__post_init__()
        self._check_ranks()
        self._check_salience()
        self._check_schedule()

    @property
    def scaling(self) -> float:
        """Factor of `B diag(E) A`, constant through pruning."""
        return self.lora_alpha / self.init_r

    @property
    def start(self) -> str | bool:
        """`init_weights` by name; False for a random start."""
        if self.init_weights is True:
            return "gaussian" if self.reference else "lora"
        return self.init_weights

    @property
    def weighs_gradients(self) -> bool:
        """Whether the gradient of E counts when ranks are compared: where E does not start at 0 it says little alone."""
        return self.start not in ("gaussian", "orthogonal") and not self.reference

    @property
    def allocates(self) -> bool:
        """Whether ranks are to be pruned at all."""
        return self.target_r < self.init_r

    def schedule(self, total_steps: int | None, initial_total: int, target_total: int) -> AllocationSchedule:
        """The allocation schedule in steps.

        Args:
            total_steps (`int`, *optional*): Optimizer steps of the training.
            initial_total (`int`), target_total (`int`): Total rank at the start and at the end of the allocation.

        Raises:
            ValueError: If a phase is given as a fraction and `total_steps` is not known, or if the phases do not fit.
        """
        total_steps = self.total_steps if total_steps is None else total_steps
        if total_steps is not None:
            check_int("total_steps", total_steps, 1)
        warmup, allocation = self._phase("warmup", total_steps), self._phase("allocation", total_steps)
        if self._ratio("warmup") is not None and self._ratio("allocation"):
            # both were rounded, which may have added a step too many; the allocation keeps one
            warmup = min(warmup, total_steps - 1)
            allocation = min(allocation, total_steps - warmup)
        return AllocationSchedule(
            warmup_steps=warmup,
            allocation_steps=allocation,
            total_steps=warmup + allocation if total_steps is None else total_steps,
            initial_window=self.initial_window,
            final_window=self.final_window,
            initial_total=initial_total,
            target_total=target_total,
            reference=self.reference,
        )

    def _ratio(self, name: str) -> float | None:
        """Fraction of the training that the phase takes, None if it is given in steps."""
        steps, ratio = getattr(self, f"{name}_steps"), getattr(self, f"{name}_ratio")
        if steps is not None:
            return None
        return DEFAULT_RATIOS[name] if ratio is None else ratio

    def _phase(self, name: str, total_steps: int | None) -> int:
        ratio = self._ratio(name)
        if ratio is None:
            return getattr(self, f"{name}_steps")
        if total_steps is None:
            raise ValueError(
                f"`{name}_ratio={ratio}` is a fraction of the training, whose length is not known. Add "
                f"`RankAllocationCallback()` to the Trainer, call `resolve_schedule(total_steps)` before the first step, "
                f"or give `{name}_steps`."
            )
        # at least one step where a fraction was asked for: a short training is still allocated
        return max(round(ratio * total_steps), 1 if ratio > 0 else 0)

    def _check_ranks(self) -> None:
        check_int("init_r", self.init_r, 1)
        check_int("target_r", self.target_r, 1)
        if self.target_r > self.init_r:
            raise ValueError(
                f"`target_r={self.target_r}` must be at most `init_r={self.init_r}`: ranks are pruned, never added. "
                "Raise `init_r`, or lower `target_r`."
            )
        check_int("min_r", self.min_r, 0)
        if self.min_r > self.target_r:
            raise ValueError(
                f"`min_r={self.min_r}` must be at most `target_r={self.target_r}`, or the budget cannot be met."
            )
        if self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.init_r
        check_number("lora_alpha", self.lora_alpha, lambda value: value > 0, "above 0")
        check_number("lora_dropout", self.lora_dropout, lambda value: 0 <= value < 1, "in [0, 1)")
        if not isinstance(self.init_weights, bool) and self.init_weights not in INITIALISATIONS:
            raise ValueError(
                f"`init_weights={self.init_weights!r}` must be True, False or one of {', '.join(INITIALISATIONS)}."
            )

    def _check_salience(self) -> None:
        check_number("correlation_threshold", self.correlation_threshold, lambda value: 0 < value <= 1, "in (0, 1]")
        check_number("slope_threshold", self.slope_threshold, lambda value: value > 0, "above 0")
        check_number("salience_lambda", self.salience_lambda, lambda value: 0 <= value <= 1, "in [0, 1]")
        check_number("orth_reg_weight", self.orth_reg_weight, lambda value: value >= 0, "of 0 or more")
        for name in ("graph_scope", "magnitude_scope"):
            if getattr(self, name) not in ("model", "module"):
                raise ValueError(f"`{name}={getattr(self, name)!r}` must be 'model' or 'module'.")

    def _check_schedule(self) -> None:
        for name in ("warmup", "allocation"):
            steps, ratio = getattr(self, f"{name}_steps"), getattr(self, f"{name}_ratio")
            if steps is not None and ratio is not None:
                raise ValueError(
                    f"`{name}_steps={steps}` and `{name}_ratio={ratio}` say the same thing twice. Give only one."
                )
            if steps is not None:
                check_int(f"{name}_steps", steps, 0)
            if ratio is not None:
                check_number(f"{name}_ratio", ratio, lambda value: 0 <= value <= 1, "in [0, 1]")
        if self.total_steps is not None:
            check_int("total_steps", self.total_steps, 1)
        check_int("initial_window", self.initial_window, 1)
        check_int("final_window", self.final_window, 1)
        if self.initial_window > self.final_window:
            raise ValueError(
                f"`initial_window={self.initial_window}` must be at most `final_window={self.final_window}`: windows "
                "grow."
            )
        warmup, allocation = self._ratio("warmup") or 0, self._ratio("allocation") or 0
        if warmup + allocation > 1:
            raise ValueError(
                f"`warmup_ratio={warmup}` and `allocation_ratio={allocation}` must not sum to more than 1."
            )
