# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Compiled trainings, the whole model or block by block, are eager ones and are not compiled anew in every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.utils import counters

from peft_rank import AdaptiveRankSVDConfig, L2LRCConfig, SalientLoRAConfig
from tiny_models import TinyModel


STEPS = 9
SEARCH = {"target_ratio": 0.7, "rank_multiple": 1, "start": "spectral"}
WINDOWS = {"warmup_steps": 2, "allocation_steps": 4, "initial_window": 2, "final_window": 2}
METHODS: dict[str, tuple[type, dict[str, Any], float]] = {
    "salientlora": (SalientLoRAConfig, {"init_r": 4, "target_r": 2, **WINDOWS}, 1e-2),
    "ars": (AdaptiveRankSVDConfig, SEARCH, 1e-2),
    "l2lrc": (L2LRCConfig, {**SEARCH, "distillation_weight": 0.0, "anneal_steps": 1}, 0.5),
    "l2lrc-distilled": (L2LRCConfig, {**SEARCH, "anneal_steps": 1}, 0.5),
}


def train(tiny: TinyModel, method: str, compiled: str | None) -> tuple[list[float], list[int]]:
    """Losses, and how many graphs had been compiled, after every step."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    kind, fields, lr = METHODS[method]
    config = kind(target_modules=list(tiny.target_modules), task_type=tiny.task_type, **fields)
    model = get_peft_model(tiny.make_model(use_cache=False), config).train()
    tuner = model.base_model
    tuner.resolve_schedule(STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    forward = torch.compile(model, backend="aot_eager") if compiled == "model" else model
    if compiled == "blocks":
        for block in model.get_base_model().model.layers:
            block.compile(backend="aot_eager")
    batch, losses, graphs = tiny.make_batch(4), [], []
    for step in range(1, STEPS + 1):
        loss = forward(**batch).loss
        loss.backward()
        tuner.add_regularization_gradient()
        optimizer.step()
        # masks until the end: other widths are other graphs
        tuner.update_and_allocate(step, optimizer, shrink="last")
        optimizer.zero_grad()
        losses.append(float(loss))
        graphs.append(counters["stats"].get("unique_graphs", 0))
    return losses, graphs


@pytest.mark.filterwarnings("ignore:The search of adapter", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("method", "compiled"),
    [
        ("salientlora", "model"),
        ("salientlora", "blocks"),
        ("ars", "model"),
        ("ars", "blocks"),
        ("l2lrc", "model"),
        ("l2lrc-distilled", "blocks"),
    ],
)
def test_a_compiled_training_is_the_eager_one(llama: TinyModel, method: str, compiled: str) -> None:
    expected, none = train(llama, method, None)
    losses, graphs = train(llama, method, compiled)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=0)
    assert max(none) == 0 < graphs[0]
    last = STEPS if method != "salientlora" else 5  # which shrinks after its last decision
    assert len(set(graphs[2:last])) == 1, f"compiled anew: {graphs}"
    assert len(set(expected)) > STEPS // 2
