# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Configuration of low-rank compression."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from peft.utils import PeftType

from peft_rank.calibration import CalibrationStatistics
from peft_rank.decomposition import STATISTIC

from ..config import AdaptedModulesConfig, check_int, check_number


@dataclass
class CompressionConfig(AdaptedModulesConfig):
    """
    The fields of every method that replaces weights by factors. A method's `__post_init__` sets `peft_type` first.

    Raises:
        ValueError: If a field is outside its legal range.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to compress, a regular expression, or 'all-linear': every linear but the head. By "
            "default only those that LoRA adapts in the architecture."
        },
    )
    decomposition: str = field(
        default="svd",
        metadata={
            "help": "How a weight is split: 'svd', 'activation' (ASVD), 'fisher' (FWSVD), 'fisher_two_sided', "
            "'importance' (IWSVD), 'whitening' (SVD-LLM), or 'em', 'nesterov', 'anderson' (every entry weighted, "
            "iteratively). All but the first weigh by statistics."
        },
    )
    alpha: float = field(
        default=0.5,
        metadata={
            "help": "Power of the mean absolute input or of the summed importance that a weight is weighted by."
        },
    )
    ratio_scope: Literal["targets", "model"] = field(
        default="targets",
        metadata={"help": "Count the ratio over the targeted modules, or over the whole model."},
    )
    rank_multiple: int | None = field(
        default=None,
        metadata={
            "help": "Ranks are multiples of this; 1 allows every rank. By default 64 for modules of 1024 features or more "
            "on both sides on a CUDA device of compute capability 8 or more, else 8; where that is 8, ranks that were "
            "given stay as they are. Ranks below one multiple are left to modules too small for one, to budgets that need "
            "them, and to those who ask for them."
        },
    )
    statistics: CalibrationStatistics | None = field(
        default=None,
        repr=False,
        compare=False,
        metadata={
            "help": "What `calibrate` collected, for decompositions that weigh by it. Not saved, and not needed to load."
        },
    )
    train_factors: bool = field(
        default=True,
        metadata={
            "help": "Whether the factors are trained; in float32, unless `autocast_adapter_dtype=False`. Frozen factors "
            "keep the dtype of the weight."
        },
    )
    offload_dense: bool = field(
        default=False,
        metadata={
            "help": "Keep the weights that factors stand in for in the memory of the CPU. They are then slow to come back "
            "to: by `disable_adapter`, `merge_adapter`, `unload` or a second active adapter."
        },
    )
    factors_saved: bool = field(
        default=False,
        metadata={
            "help": "Written to saved adapters: `rank_pattern` lists every factorized module, and the factors are in the "
            "file, so that loading decomposes nothing. Not to be set by hand."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decomposition not in STATISTIC:
            raise ValueError(f"`decomposition={self.decomposition!r}` must be one of {', '.join(STATISTIC)}.")
        check_number("alpha", self.alpha, lambda value: value >= 0, "of 0 or more; 0.5 is the usual")
        if self.ratio_scope not in ("targets", "model"):
            raise ValueError(f"`ratio_scope={self.ratio_scope!r}` must be 'targets' or 'model'.")
        if self.rank_multiple is not None:
            check_int("rank_multiple", self.rank_multiple, 1)
        for name, rank in self.rank_pattern.items():
            check_int(f"rank_pattern[{name!r}]", rank, 1)
        if self.statistics is not None and not isinstance(self.statistics, CalibrationStatistics):
            raise ValueError(
                f"`statistics` must be what `calibrate` returns or `CalibrationStatistics.load(path)`, got "
                f"{type(self.statistics).__name__}."
            )

    @property
    def sums_amounts(self) -> bool:
        """Whether modules are compared by the amounts that their ranks drop, or by the parts of their wholes.

        Squared gradients measure what the model loses, in one unit for all of its modules. The other metrics measure
        weights or outputs, whose sizes say nothing about what they are worth to it.
        """
        return STATISTIC[self.decomposition] == "weight_importance"

    def to_dict(self) -> dict[str, Any]:
        """The fields without `statistics`, which are run-time only."""
        described = asdict(self.without_statistics())
        del described["statistics"]
        return described

    def without_statistics(self) -> CompressionConfig:
        """A copy that keeps no calibration in memory."""
        bare = copy.copy(self)
        bare.statistics = None
        return bare

    def write_ranks(self, rank_pattern: dict[str, int], allocation_state: dict[str, Any] | None = None) -> None:
        super().write_ranks(rank_pattern, allocation_state)
        self.factors_saved = True

    def forget_ranks(self) -> None:
        if "_given_rank_pattern" in vars(self):
            self.factors_saved = False
        super().forget_ranks()


@dataclass
class LowRankConfig(CompressionConfig):
    """
    Configuration of [`LowRankModel`]: weights are replaced by two factors of fixed rank.

    Ranks are given by `rank` (the same everywhere, `rank_pattern` overrides it), by `rank_pattern` alone (modules that it
    does not name stay dense; without `target_modules` they are those that it names), or follow from `ratio`, kept /
    dense parameters.

    A rank given by `rank` or `rank_pattern` becomes the nearest multiple of `rank_multiple`, the higher one of two, if that
    is given or is 64 by default; a rank below one multiple stays as it is. A module whose factors would not be smaller than
    its weight stays dense, with its original weight, and counts as dense.

    `allocation="spectral"` compares modules by the part of their whole that ranks drop. By the amount, which theory sums up,
    the few modules of the largest outputs take the budget, and with whitening the perplexity can be worse than with uniform
    ranks: what a module feeds is normalised or added to others of its size, so that the part is what is felt.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_rank import LowRankConfig, calibrate

        >>> model = get_peft_model(model, LowRankConfig(rank_pattern={"q_proj": 384, "o_proj": 384, "gate_proj": 512}))

        >>> config = LowRankConfig(ratio=0.8, decomposition="whitening", target_modules="all-linear")
        >>> config.statistics = calibrate(model, batches, config=config)
        >>> model = get_peft_model(model, config)
        >>> model.base_model.finalize()  # two linears in the place of one, dense weights freed
        >>> model = model.get_base_model()
        ```

    Raises:
        ValueError: If a field, or a combination of fields, is outside its legal range; the message names the field,
            the value, the range and the remedy.
    """

    rank: int | None = field(
        default=None, metadata={"help": "Rank of every targeted module (`rank_pattern` overrides it)."}
    )
    ratio: float | None = field(
        default=None,
        metadata={
            "help": "Kept parameters / dense parameters, in (0, 1], counted as `ratio_scope` says; never exceeded. Biases "
            "count and are kept."
        },
    )
    allocation: Literal["uniform", "spectral"] = field(
        default="uniform",
        metadata={
            "help": "How `ratio` becomes ranks. 'uniform': every module keeps the same part. 'spectral': the ranks that "
            "drop the least, summed over the modules, in the metric of the decomposition."
        },
    )
    spectral_loss: Literal["relative", "absolute"] | None = field(
        default=None,
        metadata={
            "help": "What `allocation='spectral'` sums up. 'absolute': the amount that each module drops, the default where "
            "gradients are the weights (Fisher and importance, iterative or not). 'relative': the part of its whole, the "
            "default elsewhere, as amounts there favour modules of large outputs."
        },
    )

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LOWRANK
        super().__post_init__()
        if self.allocation not in ("uniform", "spectral"):
            raise ValueError(f"`allocation={self.allocation!r}` must be 'uniform' or 'spectral'.")
        if self.spectral_loss not in (None, "relative", "absolute"):
            raise ValueError(f"`spectral_loss={self.spectral_loss!r}` must be 'relative', 'absolute' or None.")
        if self.rank is not None:
            check_int("rank", self.rank, 1)
        if self.ratio is not None:
            check_number("ratio", self.ratio, lambda value: 0 < value <= 1, "in (0, 1]: kept / dense parameters")
        if self.factors_saved:
            return
        if self.ratio is not None and (self.rank is not None or self.rank_pattern):
            other = f"rank_pattern={self.rank_pattern}" if self.rank is None else f"rank={self.rank}"
            raise ValueError(f"`ratio={self.ratio}` and `{other}` both say which ranks. Give only one.")
        if self.rank is None and self.ratio is None and not self.rank_pattern:
            raise ValueError(
                "One of `rank`, `ratio` and `rank_pattern` is needed: e.g. `ratio=0.8` to keep 80% of the parameters, or "
                '`rank_pattern={"q_proj": 384, "gate_proj": 512}`.'
            )
        for name, usual in (("allocation", "uniform"), ("ratio_scope", "targets")):
            if self.ratio is None and getattr(self, name) != usual:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is how `ratio` is spent, and there is none: give `ratio` instead of "
                    f"`rank` and `rank_pattern`, or leave `{name}` at {usual!r}."
                )
        if self.allocation == "uniform" and self.spectral_loss is not None:
            raise ValueError(
                f"`spectral_loss={self.spectral_loss!r}` has no part in `allocation='uniform'`: set `allocation='spectral'`."
            )
        if self.target_modules is None and self.rank is None and self.ratio is None:
            self.target_modules = _modules_of(self.rank_pattern)

    @property
    def sums_amounts(self) -> bool:
        return super().sums_amounts if self.spectral_loss is None else self.spectral_loss == "absolute"


def _modules_of(rank_pattern: dict[str, int]) -> set[str] | str:
    """`target_modules` that select what the keys of a `rank_pattern` match."""
    if all(re.fullmatch(r"[\w.]+", key) for key in rank_pattern):
        return set(rank_pattern)
    return "|".join(rf"(?:.*\.)?(?:{key})" for key in rank_pattern)
