# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Adapters on the tiny models, trained by the HF Trainer or by hand: what most tests of the tuner start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import Trainer, TrainerCallback

from peft_rank import RankAllocationCallback, SalientLoRAConfig
from tiny_models import TinyModel, training_arguments


# see `test_the_common_schedule`
WARMUP, ALLOCATION, STEPS = 3, 12, 20
DECISIONS = (5, 10, 15)


def config(tiny: TinyModel, **overrides: Any) -> SalientLoRAConfig:
    """Four ranks a module, pruned to two on average by three decisions within twenty steps."""
    settings = {
        "init_r": 4,
        "target_r": 2,
        "lora_alpha": 16.0,
        "task_type": tiny.task_type,
        "target_modules": list(tiny.target_modules),
        "fan_in_fan_out": tiny.conv1d,
        "warmup_steps": WARMUP,
        "allocation_steps": ALLOCATION,
        "initial_window": 2,
        "final_window": 9,
        **overrides,
    }
    return SalientLoRAConfig(**settings)


def adapted(tiny: TinyModel, seed: int = 0, dropout: float = 0.0, **overrides: Any) -> PeftModel:
    """A tiny model with a fresh adapter; the same weights for the same seed."""
    transformers.set_seed(seed)
    return get_peft_model(tiny.make_model(dropout=dropout), config(tiny, **overrides))


def make_trainer(
    model: PeftModel,
    tiny: TinyModel,
    output_dir: Path,
    *,
    callbacks: Sequence[TrainerCallback] | None = None,
    trainer_class: type[Trainer] = Trainer,
    optimizers: tuple = (None, None),
    **arguments: Any,
) -> Trainer:
    """A Trainer with `RankAllocationCallback`, or with `callbacks` instead."""
    callbacks = [RankAllocationCallback(log=False)] if callbacks is None else list(callbacks)
    data = {"train_dataset": tiny.dataset(), "eval_dataset": tiny.dataset(16, seed=1)}
    args = training_arguments(output_dir, **{"max_steps": STEPS, **arguments})
    return trainer_class(model, args, callbacks=callbacks, optimizers=optimizers, **data)


def train(model: PeftModel, tiny: TinyModel, output_dir: Path, *, resume: str | None = None, **kwargs: Any) -> Trainer:
    """Train to the end; returns the Trainer."""
    trainer = make_trainer(model, tiny, output_dir, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def steps_by_hand(
    model: PeftModel, tiny: TinyModel, first: int, last: int, optimizer: torch.optim.Optimizer, shrink: bool = True
) -> list[float]:
    """The loop of the documentation from step `first` to `last`, without `finalize`; returns the losses."""
    tuner, losses = model.base_model, []
    for step in range(first, last + 1):
        loss = model(**tiny.make_batch(8, seed=step)).loss
        loss.backward()
        tuner.add_regularization_gradient()
        optimizer.step()
        tuner.update_and_allocate(step, optimizer if shrink else None)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adam(model: PeftModel, **kwargs: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, **kwargs)


def modules_of(model: torch.nn.Module, adapter_name: str = "default") -> int:
    """Number of adapted modules, counted without the tuner."""
    return sum(f"salientlora_E.{adapter_name}" in dict(m.named_parameters()) for m in model.modules() if _is_layer(m))


def _is_layer(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "SalientLoRALinear"


@torch.no_grad()
def logits(model: torch.nn.Module, tiny: TinyModel, **kwargs: Any) -> torch.Tensor:
    """Outputs for a fixed batch in evaluation mode."""
    return model.eval()(**tiny.make_batch(4, seed=7), **kwargs).logits


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """What an adapter saves of its factors and heads, without the state of an unfinished allocation."""
    entries = get_peft_model_state_dict(model)
    return {key: value.clone() for key, value in entries.items() if not key.endswith("salientlora_state")}


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Equal names and shapes, and values that differ by at most `tolerance`, absolutely."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


class StopAt(TrainerCallback):
    """Breaks the training off after a step, as a crash does (`Interrupted`), or asks the Trainer to end it."""

    def __init__(self, step: int, crash: bool = True) -> None:
        self.step, self.crash = step, crash

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.crash:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.crash:
            raise Interrupted


class Interrupted(Exception):
    """The simulated crash."""
