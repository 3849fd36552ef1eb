# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""SalientLoRA (NeurIPS 2024): low-rank adaptation whose ranks are pruned by salience while the model trains."""

from peft_rank.registration import add_peft_type, register_mixed_tuner, register_tuner_type


# the configuration refers to the member
add_peft_type("SALIENTLORA")

from .config import SalientLoRAConfig  # noqa: E402
from .layer import SalientLoRALayer, SalientLoRALinear  # noqa: E402
from .model import SalientLoRAModel  # noqa: E402


__all__ = ["SalientLoRAConfig", "SalientLoRALayer", "SalientLoRALinear", "SalientLoRAModel"]

register_mixed_tuner(
    register_tuner_type("salientlora", SalientLoRAConfig, SalientLoRAModel),
    SalientLoRAConfig,
    SalientLoRAModel,
    SalientLoRALayer,
)
