# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""GPT-2 from scratch, in full, at a fixed rank, or with InRank: what the two benchmarks of pre-training share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_rank import InRankConfig


# the paper replaces the two linears of the MLP; "all" also those of the attention
TARGETS = {"mlp": r".*\.mlp\.(c_fc|c_proj)", "all": r".*\.(c_attn|c_fc|c_proj)"}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Shape:
    """Size of a GPT-2."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int


def gpt2(shape: Shape, dropout: float = 0.0, seed: int = 0) -> GPT2LMHeadModel:
    """A new GPT-2. Its activation is GPT-2's own, by one kernel in place of several."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).to(DEVICE).train()


def with_factors(model: GPT2LMHeadModel, targets: str, **fields: Any) -> PeftModel:
    """The same model with products in the place of its linears; `buffer_r=0` for a fixed rank."""
    return get_peft_model(
        model, InRankConfig(from_scratch=True, target_modules=TARGETS[targets], fan_in_fan_out=True, **fields)
    )


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """Decay for matrices only, fused where that exists."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=DEVICE == "cuda")


def autocast(precision: str) -> AbstractContextManager:
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(DEVICE, dtype)
