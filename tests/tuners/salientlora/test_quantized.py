# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""SalientLoRA on bitsandbytes layers, whose kernels for the CPU are slow and enough."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

from peft_rank import SalientLoRAConfig, export_lora, get_rank_pattern


def linear(kind: str, in_features: int, out_features: int) -> nn.Module:
    if kind == "4bit":
        return bnb.nn.Linear4bit(in_features, out_features, compute_dtype=torch.float32, quant_type="nf4")
    return bnb.nn.Linear8bitLt(in_features, out_features, has_fp16_weights=False)


class Network(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = linear(kind, 64, 128), linear(kind, 128, 64), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.relu(self.first(x))))


def network(kind: str) -> Network:
    return Network(kind).to("cpu")  # which quantizes


def config(**kwargs) -> SalientLoRAConfig:
    return SalientLoRAConfig(target_modules=["first", "second"], modules_to_save=["head"], **kwargs)


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_train_allocate_save_and_export(kind: str, tmp_path: Path) -> None:
    schedule = {"warmup_steps": 2, "allocation_steps": 12, "initial_window": 3, "final_window": 6}
    model = get_peft_model(network(kind), config(init_r=4, target_r=2, **schedule))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, labels, losses = torch.randn(32, 64), torch.randint(0, 3, (32,)), []
    for step in range(1, 21):
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        model.base_model.add_regularization_gradient()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    model.base_model.finalize(optimizer)
    assert losses[-1] < 0.5 * losses[0]
    assert sum(get_rank_pattern(model).values()) == 4

    expected = outputs(model, x)
    model.save_pretrained(tmp_path / "adapter")
    export_lora(model, tmp_path / "lora")
    for folder in ("adapter", "lora"):
        loaded = PeftModel.from_pretrained(network(kind), tmp_path / folder)
        torch.testing.assert_close(outputs(loaded, x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "rounding"), [("4bit", 0.12), ("8bit", 0.02)])
def test_merge_quantizes_the_sum(kind: str, rounding: float) -> None:
    model = get_peft_model(network(kind), config(init_r=4, target_r=4, init_weights=False))
    layer = model.base_model.model.first

    def weight() -> torch.Tensor:
        base = layer.get_base_layer()
        state = base.weight.quant_state if kind == "4bit" else base.state
        return dequantize_bnb_weight(base.weight, state=state).float()

    outputs(model, torch.randn(2, 64))  # an 8-bit layer sets up its state in the first forward
    expected = weight() + layer.get_delta_weight("default")
    assert layer.get_delta_weight("default").norm() > 0.3 * expected.norm()
    with pytest.warns(UserWarning, match="rounds the sum to its format again.*loaded without quantization"):
        layer.merge(safe_merge=True)
    assert (weight() - expected).norm() < rounding * expected.norm()
