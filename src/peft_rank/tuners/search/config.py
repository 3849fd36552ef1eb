# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The fields of every method that learns masks over singular values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft_rank.decomposition import ITERATIVE

from ..config import check_int, check_number
from ..lowrank.config import CompressionConfig


@dataclass
class RankSearchConfig(CompressionConfig):
    """
    A search for the ranks of a compressed model. A method's `__post_init__` sets `peft_type` first.

    Raises:
        ValueError: If a field is outside its legal range.
    """

    target_ratio: float | list[float] = field(
        default=0.8,
        metadata={
            "help": "Kept parameters / dense parameters, in (0, 1], counted as `ratio_scope` says; never exceeded. A list "
            "is searched from its largest to its smallest, with a snapshot as each is reached."
        },
    )
    start: Literal["full", "spectral"] = field(
        default="full",
        metadata={
            "help": "'full': with all ranks. 'spectral': with those that spectra alone choose for the target, as "
            "`allocation='spectral'` of `LowRankConfig` does, for the search to improve on; it then needs fewer steps."
        },
    )
    tau: float = field(
        default=0.4, metadata={"help": "Temperature of the masks: the smaller, the harder their gradient."}
    )
    compression_weight: float = field(
        default=16.0, metadata={"help": "Weight of the loss that pulls the parameters to the target (lambda in ARS)."}
    )
    patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop the training when the smallest target has been met for this many optimizer steps in a row. By "
            "default it goes on to its end."
        },
    )
    tolerance: float = field(
        default=0.003,
        metadata={
            "help": "A target counts as reached at this much above it; what is kept in the end meets it exactly."
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Of the mask noise, which depends on it and the optimizer step alone."}
    )
    factor_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder where decomposed weights are kept for further searches, one file for each weight, statistic "
            "and decomposition."
        },
    )
    save_factors: bool = field(
        default=True,
        metadata={
            "help": "Write the full factors into checkpoints of an unfinished search, which makes them larger than the "
            "compressed weights but complete. False: such checkpoints load only where the weights are decomposed alike, "
            "as when a Trainer resumes."
        },
    )
    snapshot_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder where the finished adapter of every ratio in `target_ratio` is written as it is reached."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # not a field: PEFT's classes for classification add the head to it, which a search leaves as it is
        self.asked_modules_to_save = None if self.modules_to_save is None else list(self.modules_to_save)
        if self.decomposition in ITERATIVE:
            raise ValueError(
                f"`decomposition={self.decomposition!r}` has no singular values to choose from. Search with 'svd', "
                "'activation', 'fisher', 'fisher_two_sided', 'importance' or 'whitening'."
            )
        ratios = self.target_ratio if isinstance(self.target_ratio, (list, tuple)) else [self.target_ratio]
        for ratio in ratios:
            check_number("target_ratio", ratio, lambda value: 0 < value <= 1, "in (0, 1]: kept / dense parameters")
        if not ratios or len(set(ratios)) < len(ratios):
            raise ValueError(f"`target_ratio={self.target_ratio!r}` must be a number or a list of different numbers.")
        if self.start not in ("full", "spectral"):
            raise ValueError(f"`start={self.start!r}` must be 'full' or 'spectral'.")
        if self.start == "spectral" and len(ratios) > 1:
            raise ValueError(
                f"`start='spectral'` begins at a target, so that the first of `target_ratio={self.target_ratio!r}` would be "
                "reached before anything is learned. Give one ratio, or `start='full'`."
            )
        check_number("tau", self.tau, lambda value: value > 0, "above 0")
        check_number("compression_weight", self.compression_weight, lambda value: value >= 0, "of 0 or more")
        check_number("tolerance", self.tolerance, lambda value: 0 <= value < 1, "in [0, 1)")
        check_int("seed", self.seed, 0)
        if self.patience is not None:
            check_int("patience", self.patience, 1)
        if self.offload_dense:
            raise ValueError(
                "`offload_dense=True` is for fixed ranks. A search needs the weights where the model is: modules go back to "
                "them."
            )

    @property
    def ratios(self) -> list[float]:
        """The targets, largest first."""
        given = self.target_ratio if isinstance(self.target_ratio, (list, tuple)) else [self.target_ratio]
        return sorted(given, reverse=True)
