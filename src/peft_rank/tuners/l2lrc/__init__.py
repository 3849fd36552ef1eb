# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Learning to Low-Rank Compress: free logits learn which singular values every weight keeps, by distillation."""

from peft_rank.registration import add_peft_type, register_tuner_type


# the configuration refers to the member
add_peft_type("L2LRC")

from .config import L2LRCConfig  # noqa: E402
from .model import L2LRCModel  # noqa: E402


__all__ = ["L2LRCConfig", "L2LRCModel"]

register_tuner_type("l2lrc", L2LRCConfig, L2LRCModel)
