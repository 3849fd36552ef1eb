# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Adaptive ranks for PEFT: importing this package registers its tuner types."""

from .calibration import CalibrationStatistics, calibrate
from .callbacks import RankAllocationCallback
from .export import export_lora
from .export.card import register_model_card
from .export.compressed import densify, load_compressed, save_compressed
from .export.quantizer import register_low_rank
from .ranks import get_rank_pattern
from .reporting import plot_ranks, rank_table
from .tuners.ars import AdaptiveRankSVDConfig, AdaptiveRankSVDModel
from .tuners.inrank import InRankConfig, InRankModel
from .tuners.l2lrc import L2LRCConfig, L2LRCModel
from .tuners.lowrank import LowRankConfig, LowRankLinear, LowRankModel
from .tuners.salientlora import SalientLoRAConfig, SalientLoRAModel


__all__ = [
    "AdaptiveRankSVDConfig",
    "AdaptiveRankSVDModel",
    "CalibrationStatistics",
    "InRankConfig",
    "InRankModel",
    "L2LRCConfig",
    "L2LRCModel",
    "LowRankConfig",
    "LowRankLinear",
    "LowRankModel",
    "RankAllocationCallback",
    "SalientLoRAConfig",
    "SalientLoRAModel",
    "calibrate",
    "densify",
    "export_lora",
    "get_rank_pattern",
    "load_compressed",
    "plot_ranks",
    "rank_table",
    "save_compressed",
]

register_model_card()
register_low_rank()
