# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Adaptive-rank SVD (ARS, NAACL 2024): a hypernetwork learns which singular values every weight keeps."""

from peft_rank.registration import add_peft_type, register_tuner_type


# the configuration refers to the member
add_peft_type("ADAPTIVE_RANK_SVD")

from .config import AdaptiveRankSVDConfig  # noqa: E402
from .hypernetwork import Hypernetwork, PerLayerHypernetwork  # noqa: E402
from .model import AdaptiveRankSVDModel  # noqa: E402


__all__ = ["AdaptiveRankSVDConfig", "AdaptiveRankSVDModel", "Hypernetwork", "PerLayerHypernetwork"]

register_tuner_type("adaptive_rank_svd", AdaptiveRankSVDConfig, AdaptiveRankSVDModel)
