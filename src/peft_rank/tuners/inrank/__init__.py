# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""InRank (2023): products of low rank whose ranks grow with the spectrum of what was learned."""

from peft_rank.registration import add_peft_type, register_mixed_tuner, register_tuner_type


# the configuration refers to the member
add_peft_type("INRANK")

from .config import InRankConfig  # noqa: E402
from .layer import InRankFactors, InRankLinear  # noqa: E402
from .model import InRankModel  # noqa: E402


__all__ = ["InRankConfig", "InRankFactors", "InRankLinear", "InRankModel"]

register_mixed_tuner(
    register_tuner_type("inrank", InRankConfig, InRankModel),
    InRankConfig,
    InRankModel,
    InRankLinear,
)
