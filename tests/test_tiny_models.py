# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The tiny architectures themselves: repeatable, differentiable, able to learn their task."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from tiny_models import TinyModel, training_arguments


def _targets(tiny: TinyModel, model: nn.Module) -> dict[str, nn.Module]:
    wanted = tuple("." + name for name in tiny.target_modules)
    return {name: module for name, module in model.named_modules() if name.endswith(wanted)}


def test_forward_backward_reaches_every_target(tiny: TinyModel) -> None:
    model = tiny.make_model()
    model(**tiny.make_batch()).loss.backward()
    targets = _targets(tiny, model)
    kind = Conv1D if tiny.conv1d else nn.Linear
    assert all(isinstance(module, kind) for module in targets.values())
    for suffix in tiny.target_modules:
        assert any(name.endswith("." + suffix) for name in targets), f"no module is called {suffix}"
    for name, module in targets.items():
        gradient = module.weight.grad
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().max() > 0, name


def test_same_seed_same_model_and_batch(tiny: TinyModel) -> None:
    before = torch.get_rng_state()
    first, second, other = tiny.make_model(), tiny.make_model(), tiny.make_model(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [next(iter(_targets(tiny, model).values())).weight for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    batch = tiny.make_batch(4, seed=3)
    with torch.no_grad():
        assert torch.equal(first(**batch).logits, second(**batch).logits)  # no dropout unless asked for
    assert all(torch.equal(value, tiny.make_batch(4, seed=3)[key]) for key, value in batch.items())


def test_dropout_can_be_switched_on(tiny: TinyModel) -> None:
    model, batch = tiny.make_model(dropout=0.5), tiny.make_batch()
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_loss_falls(tiny: TinyModel, tmp_path: Path) -> None:
    trainer = Trainer(tiny.make_model(), training_arguments(tmp_path, max_steps=30), train_dataset=tiny.dataset())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0], losses
