# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Searches for ranks on the tiny models: what the tests of the tuners that learn them start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model

from peft_rank import AdaptiveRankSVDConfig, L2LRCConfig
from tiny_models import TinyModel


# name: class, settings, a learning rate at which a few steps change what is kept
METHODS: dict[str, tuple[type[PeftConfig], dict[str, Any], float]] = {
    "ars": (AdaptiveRankSVDConfig, {}, 3e-2),
    # a network for each module takes its time: few modules
    "ars-per-layer": (
        AdaptiveRankSVDConfig,
        {"hypernetwork": "per_layer", "target_modules": ["q_proj", "up_proj"]},
        3e-2,
    ),
    "l2lrc": (L2LRCConfig, {"anneal_steps": 2}, 0.8),
    "l2lrc-prefix": (L2LRCConfig, {"anneal_steps": 2, "keep": "prefix"}, 0.8),
}
every_method = pytest.mark.parametrize("method", METHODS)
both_methods = pytest.mark.parametrize("method", ["ars", "l2lrc"])


def config(method: str, tiny: TinyModel, **overrides: Any) -> PeftConfig:
    """Seven tenths of the parameters of the targeted modules, at any rank."""
    config_class, settings, _ = METHODS[method]
    settings = {"target_ratio": 0.7, "target_modules": list(tiny.target_modules), "rank_multiple": 1, **settings}
    return config_class(**{**settings, **overrides})


def searched(method: str, tiny: TinyModel, seed: int = 0, **overrides: Any) -> PeftModel:
    """A tiny model at the start of a search; the same for the same seed."""
    transformers.set_seed(seed)
    return get_peft_model(tiny.make_model(), config(method, tiny, seed=seed, **overrides))


def optimizer(model: PeftModel, method: str) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=METHODS[method][2], weight_decay=0.0)


def search(
    model: PeftModel, tiny: TinyModel, optimizer: torch.optim.Optimizer, steps: int, first: int = 1
) -> list[float]:
    """The loop of the documentation, without `finalize`; returns the losses."""
    tuner, losses = model.base_model, []
    for step in range(first, first + steps):
        loss = model.train()(**tiny.make_batch(4, seed=step)).loss
        loss.backward()
        tuner.add_regularization_gradient()
        optimizer.step()
        tuner.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def after(method: str, tiny: TinyModel, steps: int = 8, **overrides: Any) -> PeftModel:
    """A tiny model within a search."""
    model = searched(method, tiny, **overrides)
    search(model, tiny, optimizer(model, method), steps)
    return model


def masks(model: PeftModel) -> dict[str, torch.Tensor]:
    """Values of what is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
