# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Learning to Low-Rank Compress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft.utils import PeftType

from ..config import check_int, check_number
from ..search.config import RankSearchConfig


@dataclass
class L2LRCConfig(RankSearchConfig):
    """
    Configuration of [`L2LRCModel`]: free mask logits learn which singular values each weight keeps, by distillation from
    the dense model, until it has `target_ratio` of its parameters (Learning to Low-Rank Compress). Only the logits are
    trained; the released code uses AdamW at a learning rate of 1e-2. Fine-tune after `finalize()`.

    A classifier's head stays as it is, also with a `task_type`, unless it is named in `modules_to_save`.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_rank import L2LRCConfig, RankAllocationCallback, calibrate

        >>> config = L2LRCConfig(target_ratio=[0.9, 0.8], decomposition="whitening", exclude_modules=["lm_head"])
        >>> config.statistics = calibrate(model, batches, config=config)
        >>> model = get_peft_model(model, config)
        >>> Trainer(model, args, train_dataset=data, callbacks=[RankAllocationCallback()]).train()
        >>> model = model.get_base_model()  # with two linears in the place of one, ready for fine-tuning
        ```

    Raises:
        ValueError: If a field is outside its legal range; the message names the field, the value, the range and the
            remedy.
    """

    init_logits: tuple[float, float] = field(
        default=(6.0, 3.0),
        metadata={
            "help": "Logits of the first and the last rank of every module at a full start, evenly spaced between."
        },
    )
    distillation_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the distance of final hidden states from those of the dense model, which is run beside in "
            "each training step. 0: without."
        },
    )
    pretraining_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the model's own loss, through which it is scaled in the backward pass only; the loss that "
            "is reported stays as it is. 0: distillation alone. Without distillation it must be 1."
        },
    )
    total_variation_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the total variation of keep probabilities, which makes kept ranks contiguous."},
    )
    keep: Literal["any", "prefix"] = field(
        default="any",
        metadata={"help": "Keep any ranks of a module, or as many of the leading ones."},
    )
    anneal_ratio: float = field(
        default=0.5,
        metadata={"help": "Fraction of the training over which the target falls from 1 to `target_ratio`."},
    )
    anneal_steps: int | None = field(
        default=None,
        metadata={"help": "The same in optimizer steps, for loops that do not call `resolve_schedule`."},
    )

    def __post_init__(self) -> None:
        self.peft_type = PeftType.L2LRC
        super().__post_init__()
        # JSON has no tuples
        self.init_logits = tuple(self.init_logits) if isinstance(self.init_logits, (list, tuple)) else self.init_logits
        if not isinstance(self.init_logits, tuple) or len(self.init_logits) != 2:
            raise ValueError(
                f"`init_logits={self.init_logits!r}` must be two numbers: of the first and the last rank."
            )
        for value in self.init_logits:
            check_number("init_logits", value, lambda value: True, "that is finite")
        for name in ("distillation_weight", "pretraining_weight", "total_variation_weight"):
            check_number(name, getattr(self, name), lambda value: value >= 0, "of 0 or more")
        if self.distillation_weight == 0 and self.pretraining_weight != 1:
            raise ValueError(
                f"`pretraining_weight={self.pretraining_weight}` weighs the model's loss against distillation, which "
                "`distillation_weight=0` leaves out. Set it to 1; to weigh it against compression, change "
                "`compression_weight`."
            )
        if self.keep not in ("any", "prefix"):
            raise ValueError(f"`keep={self.keep!r}` must be 'any' or 'prefix'.")
        check_number("anneal_ratio", self.anneal_ratio, lambda value: 0 <= value <= 1, "in [0, 1]")
        if self.anneal_steps is not None:
            check_int("anneal_steps", self.anneal_steps, 0)
