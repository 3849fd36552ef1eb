# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""InRank on the tiny models: what the tests of the tuner start from."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model

from peft_rank import InRankConfig
from tiny_models import TinyModel


def config(tiny: TinyModel, **overrides: Any) -> InRankConfig:
    """One rank and a buffer of two a module; checks after steps 2, 4, ... 10, ranks fixed after step 10 of 20."""
    settings = {
        "init_r": 1,
        "buffer_r": 2,
        "max_r": 12,
        "explained_ratio": 0.8,
        "warmup_steps": 1,
        "check_interval": 2,
        "task_type": tiny.task_type,
        "target_modules": list(tiny.target_modules),
        "fan_in_fan_out": tiny.conv1d,
        **overrides,
    }
    return InRankConfig(**settings)


def adapted(tiny: TinyModel, seed: int = 0, **overrides: Any) -> PeftModel:
    transformers.set_seed(seed)
    return get_peft_model(tiny.make_model(), config(tiny, **overrides))


def adam(model: PeftModel, lr: float = 5e-3, **kwargs: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)


def steps_by_hand(
    model: PeftModel, tiny: TinyModel, first: int, last: int, optimizer: torch.optim.Optimizer
) -> list[float]:
    """The loop of the documentation from step `first` to `last`, without `finalize`; returns the losses."""
    losses = []
    for step in range(first, last + 1):
        loss = model(**tiny.make_batch(8, seed=step)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def widths(model: PeftModel) -> dict[str, tuple[int, int]]:
    """Rank and width of every module."""
    layers = model.base_model.adapter_layers("default")
    return {name: (layer.rank("default"), layer.inrank_A["default"].shape[0]) for name, layer in layers.items()}


def factors(model: PeftModel) -> dict[str, torch.Tensor]:
    layers = model.base_model.adapter_layers("default")
    return {
        f"{name}.{part}": getattr(layer, part)["default"].detach().clone()
        for name, layer in layers.items()
        for part in layer.adapter_layer_names
    }


@torch.no_grad()
def logits(model: torch.nn.Module, tiny: TinyModel, **kwargs: Any) -> torch.Tensor:
    training = model.training
    result = model.eval()(**tiny.make_batch(4, seed=7), **kwargs).logits
    model.train(training)
    return result
