# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Low-rank adapters on the tiny models, and what they should compute: what tests of compression start from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_rank import LowRankConfig
from tiny_models import TinyModel


def config(tiny: TinyModel, **overrides: Any) -> LowRankConfig:
    """Ranks that differ from module to module, some of which stay dense."""
    settings: dict[str, Any] = {"task_type": tiny.task_type, "target_modules": list(tiny.target_modules)}
    if not {"rank", "ratio", "rank_pattern"} & set(overrides):
        settings |= {"ratio": 0.7, "rank_multiple": 4, "allocation": "spectral"}
    return LowRankConfig(**{**settings, **overrides})


def compressed(tiny: TinyModel, seed: int = 0, **overrides: Any) -> PeftModel:
    """A tiny model with a low-rank adapter; the same weights for the same seed."""
    return get_peft_model(tiny.make_model(seed=seed), config(tiny, **overrides))


def targets(model: nn.Module, tiny: TinyModel) -> dict[str, nn.Module]:
    """The targeted modules of a plain model, by name."""
    endings = tuple(f".{target}" for target in tiny.target_modules)
    return {name: module for name, module in model.named_modules() if name.endswith(endings)}


def matrix(module: nn.Module) -> torch.Tensor:
    """The weight as (out, in)."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


@torch.no_grad()
def truncate(module: nn.Module, rank: int) -> None:
    """Put the best approximation of a rank in the place of the weight, by numpy in float64."""
    left, values, right = np.linalg.svd(matrix(module).double().numpy(), full_matrices=False)
    best = torch.from_numpy(left[:, :rank] * values[:rank] @ right[:rank]).to(module.weight.dtype)
    module.weight.copy_(best.T if isinstance(module, Conv1D) else best)
