# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Configuration of adaptive-rank SVD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft.utils import PeftType

from ..config import check_number
from ..search.config import RankSearchConfig


@dataclass
class AdaptiveRankSVDConfig(RankSearchConfig):
    """
    Configuration of [`AdaptiveRankSVDModel`]: a hypernetwork learns how many singular values each weight keeps, until the
    model has `target_ratio` of its parameters (ARS, NAACL 2024). Only the hypernetwork is trained, by Adam at a learning
    rate of 1e-3 in the paper; fine-tune after `finalize()`.

    A classifier's head stays as it is, also with a `task_type`, unless it is named in `modules_to_save`.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_rank import AdaptiveRankSVDConfig, RankAllocationCallback, calibrate

        >>> config = AdaptiveRankSVDConfig(target_ratio=0.8, decomposition="whitening", exclude_modules=["lm_head"])
        >>> config.statistics = calibrate(model, batches, config=config)
        >>> model = get_peft_model(model, config)
        >>> Trainer(model, args, train_dataset=data, callbacks=[RankAllocationCallback()]).train()
        >>> model = model.get_base_model()  # with two linears in the place of one, ready for fine-tuning
        ```

    Raises:
        ValueError: If a field is outside its legal range; the message names the field, the value, the range and the
            remedy.
    """

    hypernetwork: Literal["shared", "per_layer"] = field(
        default="shared",
        metadata={
            "help": "'shared': one GRU over the modules and a linear head for each, the paper's. 'per_layer': a GRU for "
            "each module over its singular values, the released code's."
        },
    )
    mask_bias: float = field(
        default=3.0,
        metadata={"help": "Added to the logits, so that the search starts with all ranks (b in the paper)."},
    )
    alignment_weight: float = field(
        default=10.0,
        metadata={
            "help": "Weight of the loss that pulls masks to prefixes (gamma in the paper), taken on singular values that are "
            "scaled to a sum of squares of 1 in each module."
        },
    )

    def __post_init__(self) -> None:
        self.peft_type = PeftType.ADAPTIVE_RANK_SVD
        super().__post_init__()
        if self.hypernetwork not in ("shared", "per_layer"):
            raise ValueError(f"`hypernetwork={self.hypernetwork!r}` must be 'shared' or 'per_layer'.")
        if self.hypernetwork == "per_layer" and self.start == "spectral":
            raise ValueError(
                "`start='spectral'` needs a bias for each rank, which `hypernetwork='per_layer'` does not have. Use 'shared'."
            )
        check_number("mask_bias", self.mask_bias, lambda value: True, "that is finite")
        check_number("alignment_weight", self.alignment_weight, lambda value: value >= 0, "of 0 or more")
