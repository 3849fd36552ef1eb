# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The tiny models with `LowRankLinear` modules in them, put there by hand: what tests of compressed directories start from."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_rank.decomposition import decompose
from peft_rank.tuners.lowrank import LowRankLinear
from tiny_models import TinyModel


AUTO_CLASSES = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
}


def compress_module(model: nn.Module, name: str, rank: int) -> None:
    """Replace one linear."""
    module = model.get_submodule(name)
    weight = module.weight.detach()
    factors = decompose(weight.T if isinstance(module, Conv1D) else weight, rank)
    model.set_submodule(name, LowRankLinear.from_factors(factors, module.bias))


def compressed(tiny: TinyModel, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A tiny model whose targets have ranks from 3 to 9; the first of them stays dense."""
    model = tiny.make_model(**config)
    for parameter in model.parameters():
        # buffers stay in float32, as they do when transformers loads a model in a smaller dtype
        parameter.data = parameter.data.to(dtype)
    endings = tuple(f".{target}" for target in tiny.target_modules)
    for index, name in enumerate([n for n, _ in model.named_modules() if n.endswith(endings)][1:]):
        compress_module(model, name, 3 + index % 7)
    return model.eval()


def edit_weights(path: Any, **changes: Any) -> None:
    """Rewrite a file of weights: a key is left out where the change is `None`."""
    state = {key: tensor for key, tensor in {**load_file(path), **changes}.items() if tensor is not None}
    save_file(state, path, metadata={"format": "pt"})
