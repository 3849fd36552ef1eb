# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Adaptive ranks for PEFT: importing this package registers its tuner types."""

from .calibration import CalibrationStatistics, calibrate
from .callbacks import RankAllocationCallback
from .export import export_lora
from .export.card import register_model_card
from .ranks import get_rank_pattern
from .reporting import plot_ranks, rank_table
from .tuners.salientlora import SalientLoRAConfig, SalientLoRAModel


__all__ = [
    "CalibrationStatistics",
    "RankAllocationCallback",
    "SalientLoRAConfig",
    "SalientLoRAModel",
    "calibrate",
    "export_lora",
    "get_rank_pattern",
    "plot_ranks",
    "rank_table",
]

register_model_card()
