# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Low-rank compression: two factors of fixed rank in the place of a weight."""

from peft_rank.registration import add_peft_type, register_tuner_type


# the configuration refers to the member
add_peft_type("LOWRANK")

from .config import LowRankConfig  # noqa: E402
from .layer import FactorizedLinear  # noqa: E402
from .linear import LowRankLinear  # noqa: E402
from .model import LowRankModel  # noqa: E402


__all__ = ["FactorizedLinear", "LowRankConfig", "LowRankLinear", "LowRankModel"]

register_tuner_type("lowrank", LowRankConfig, LowRankModel)
