# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What decomposes or replaces weights refuses quantized ones, by name, and says what to do."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from peft_rank import AdaptiveRankSVDConfig, InRankConfig, L2LRCConfig, LowRankConfig


TARGETS = {"target_modules": ["first", "second"]}
LAYERS = {
    "4bit": lambda: bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4"),
    "8bit": lambda: bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (LowRankConfig(ratio=0.5, **TARGETS), "Load the model without quantization, compress it"),
        (AdaptiveRankSVDConfig(target_ratio=0.5, **TARGETS), "Leave it out of `target_modules`"),
        (L2LRCConfig(target_ratio=0.5, **TARGETS), "Leave it out of `target_modules`"),
        (InRankConfig(from_scratch=True, **TARGETS), "Load the model without quantization"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PeftConfig) else "",
)
def test_quantized_weights_are_refused(kind: str, config: PeftConfig, remedy: str) -> None:
    model = nn.ModuleDict({"second": nn.Linear(96, 8), "first": LAYERS[kind]()}).to("cpu")  # which quantizes
    layer = type(model["first"]).__name__
    with pytest.raises(TypeError, match=f"first .*{layer}.*{remedy}"):
        get_peft_model(model, config)
