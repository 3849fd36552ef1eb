# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Configuration of InRank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft.utils import PeftType

from peft_rank.allocation.growth import CRITERIA

from ..config import AdaptedModulesConfig, check_int, check_number


# ranks that are trained beyond the found one, so that it shows when more are needed
BUFFERS = {"adapter": 8, "from_scratch": 100}
DEFAULT_GROWTH_RATIO = 0.5


@dataclass
class InRankConfig(AdaptedModulesConfig):
    """
    Configuration of [`InRankModel`]: a product B A whose rank grows while it is trained, until it explains a given share
    of the product's spectrum (InRank, 2023).

    With `from_scratch=False` the product is added to the weight, `W0 + lora_alpha / init_r * B A`, and its spectrum is that of
    the cumulative update. With `from_scratch=True` the weight *is* B A, for pre-training (InRank-Efficient): the
    targeted modules keep no weight of their own, and everything else in the model trains as usual.

    Every module starts with `init_r` ranks and trains `buffer_r` more. Every `check_interval` optimizer steps after
    `warmup_steps` its rank becomes the smallest one that explains more than `explained_ratio` of the spectrum of the
    whole product, buffer included, and the product is widened to the new rank and the buffer. When the growth ends
    (`growth_steps`, `growth_ratio`, or `finalize`), the product is cut to the rank that was found, and the training goes on
    with fixed ranks. With `buffer_r=0` ranks never grow: a low-rank model of fixed rank.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_rank import InRankConfig, RankAllocationCallback

        >>> model = GPT2LMHeadModel(GPT2Config())
        >>> config = InRankConfig(from_scratch=True, target_modules=["c_fc", "mlp.c_proj"], fan_in_fan_out=True)
        >>> model = get_peft_model(model, config)
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[RankAllocationCallback()])
        ```

    Raises:
        ValueError: If a field, or a combination of fields, is outside its legal range; the message names the field,
            the value, the range and the remedy.
    """

    init_r: int = field(default=2, metadata={"help": "Rank of every module at the start, without the buffer."})
    buffer_r: int | None = field(
        default=None,
        metadata={
            "help": "Ranks that are trained beyond the rank of a module; a check adds at most as many. 100 with "
            "`from_scratch`, as in the paper, and 8 otherwise. 0: ranks stay at `init_r`."
        },
    )
    max_r: int | None = field(
        default=None,
        metadata={
            "help": "No module becomes wider than this, buffer included. By default half of the smaller side of its weight."
        },
    )
    explained_ratio: float = field(
        default=0.9, metadata={"help": "Share of the spectrum that the rank of a module has to explain."}
    )
    criterion: Literal["energy", "variance"] = field(
        default="energy",
        metadata={
            "help": "What of the singular values is explained: their sum of squares, or their variance with all zeros of "
            "the weight counted (as the released code), which depends on the width of the module."
        },
    )
    warmup_steps: int = field(default=100, metadata={"help": "Optimizer steps before the first check."})
    check_interval: int = field(
        default=25, metadata={"help": "A check is made after every step that is a multiple of this."}
    )
    growth_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer step after which products are cut to their ranks, which are then fixed (or give "
            "`growth_ratio`)."
        },
    )
    growth_ratio: float | None = field(
        default=None,
        metadata={
            "help": "The same as a fraction of the training. With neither, half of the training where its length is known, "
            "as `RankAllocationCallback` does, or else until `finalize`."
        },
    )
    rank_multiple: int = field(
        default=1,
        metadata={
            "help": "Widths are rounded up to a multiple of this while they grow, and so are the ranks that are kept: "
            "multiples of 8 or 64 are faster on accelerators, and parameters change less often."
        },
    )
    reference: bool = field(
        default=False,
        metadata={
            "help": "Grow by the released code's rule, which stops one rank before the buffer and one before `max_r`."
        },
    )
    from_scratch: bool = field(
        default=False,
        metadata={"help": "The weight is B A, without W0, and everything else in the model is trained, too."},
    )
    train_base: bool = field(
        default=False, metadata={"help": "Also train, and save, the weights W0 of the adapted modules."}
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "The update is scaled by `lora_alpha / init_r`, whatever the rank; `init_r` if not given."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapter's input."})
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Start with B = 0, so that the adapter is the identity; False: random. With `from_scratch` the product "
            "always starts with the variance of the weight that it replaces."
        },
    )
    init_scale: float = field(
        default=1.0,
        metadata={
            "help": "With `from_scratch`, how many times as large as the weight that it replaces the product starts. Products "
            "that start small learn slowly at first: 2 where the model's own deviation is well below 1 / sqrt(width)."
        },
    )

    def __post_init__(self) -> None:
        self.peft_type = PeftType.INRANK
        super().__post_init__()
        if self.buffer_r is None:
            self.buffer_r = BUFFERS["from_scratch" if self.from_scratch else "adapter"]
        check_int("init_r", self.init_r, 1)
        check_int("buffer_r", self.buffer_r, 0)
        check_int("rank_multiple", self.rank_multiple, 1)
        if self.max_r is not None:
            check_int("max_r", self.max_r, 1)
            if self.max_r < self.init_r:
                raise ValueError(
                    f"`max_r={self.max_r}` must be at least `init_r={self.init_r}`: ranks grow. Raise `max_r`, or lower "
                    "`init_r`."
                )
        if self.lora_alpha is None:
            self.lora_alpha = float(self.init_r)
        check_number("lora_alpha", self.lora_alpha, lambda value: value > 0, "above 0")
        check_number("init_scale", self.init_scale, lambda value: value > 0, "above 0")
        check_number("lora_dropout", self.lora_dropout, lambda value: 0 <= value < 1, "in [0, 1)")
        self._check_growth()
        if self.from_scratch:
            self._check_from_scratch()
        elif self.init_scale != 1:
            raise ValueError(
                f"`init_scale={self.init_scale}` is for `from_scratch=True`, where the product takes the place of a weight. An "
                "update is scaled by `lora_alpha`."
            )

    @property
    def scaling(self) -> float:
        """Factor of B A, constant through growth."""
        return self.lora_alpha / self.init_r

    @property
    def allocates(self) -> bool:
        """Whether ranks are to grow at all."""
        return self.buffer_r > 0

    def growth_end(self, total_steps: int | None) -> int | None:
        """
        The optimizer step that ends the growth, None if only `finalize` does.

        Args:
            total_steps (`int`, *optional*): Optimizer steps of the training.

        Raises:
            ValueError: If no check fits in before, or the training is too short or of unknown length.
        """
        if total_steps is not None and total_steps < 1:
            raise ValueError(
                f"`total_steps={total_steps}` must be at least 1: it counts the training's optimizer steps."
            )
        ratio = self.growth_ratio
        if self.growth_steps is not None:
            end = self.growth_steps
        elif total_steps is not None:
            end = max(1, round((DEFAULT_GROWTH_RATIO if ratio is None else ratio) * total_steps))
        elif ratio is not None:
            raise ValueError(
                f"`growth_ratio={ratio}` is a fraction of the training, whose length is not known. Add "
                "`RankAllocationCallback()` to the Trainer, call `resolve_schedule(total_steps)` before the first step, or "
                "give `growth_steps`."
            )
        else:
            return None
        if total_steps is not None and end > total_steps:
            raise ValueError(
                f"`growth_steps={end}` must be at most the {total_steps} steps of the training. Lower it, or give "
                "`growth_ratio`."
            )
        self._check_end(end)
        return end

    def _check_end(self, end: int) -> None:
        if end // self.check_interval * self.check_interval <= self.warmup_steps:
            raise ValueError(
                f"No check fits in between `warmup_steps={self.warmup_steps}` and the end of the growth after {end} steps, "
                f"with `check_interval={self.check_interval}`: no rank would ever grow. Lower them, raise `growth_steps` or "
                "`growth_ratio`, or train longer; for fixed ranks set `buffer_r=0`."
            )

    def _check_growth(self) -> None:
        check_number("explained_ratio", self.explained_ratio, lambda value: 0 < value <= 1, "in (0, 1]")
        if self.criterion not in CRITERIA:
            raise ValueError(f"`criterion={self.criterion!r}` must be 'energy' or 'variance'.")
        check_int("warmup_steps", self.warmup_steps, 0)
        check_int("check_interval", self.check_interval, 1)
        if self.growth_steps is not None and self.growth_ratio is not None:
            raise ValueError(
                f"`growth_steps={self.growth_steps}` and `growth_ratio={self.growth_ratio}` say the same thing twice. Give "
                "only one."
            )
        if self.growth_steps is not None:
            check_int("growth_steps", self.growth_steps, 1)
            if self.allocates:
                self._check_end(self.growth_steps)
        if self.growth_ratio is not None:
            check_number("growth_ratio", self.growth_ratio, lambda value: 0 < value <= 1, "in (0, 1]")

    def _check_from_scratch(self) -> None:
        for name, rank in self.rank_pattern.items():
            check_int(f"rank_pattern[{name!r}]", rank, 1)
        for name, value, only in (
            ("lora_alpha", self.lora_alpha, float(self.init_r)),
            ("lora_dropout", self.lora_dropout, 0.0),
            ("train_base", self.train_base, False),
            ("bias", self.bias, "none"),
        ):
            if value != only:
                raise ValueError(
                    f"`{name}={value!r}` is for a product that is added to a weight. With `from_scratch=True` the weight "
                    "is the product, and all other parameters are trained: leave it out."
                )
