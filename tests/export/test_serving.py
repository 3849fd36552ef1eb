# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""A padded export against what vLLM documents of the LoRA adapters that it takes; vLLM itself needs a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from peft_rank import export_lora
from runs import adapted
from tiny_models import TINY_MODELS, TinyModel


MAX_RANKS = {1, 8, 16, 32, 64, 128, 256, 320, 512}  # values of --max-lora-rank
LANGUAGE_MODELS = [tiny for tiny in TINY_MODELS.values() if tiny.task_type == "CAUSAL_LM"]


@pytest.mark.parametrize("rank", [4, 9])
@pytest.mark.parametrize("tiny", LANGUAGE_MODELS, ids=lambda tiny: tiny.name)
def test_vllm_takes_a_padded_export(tiny: TinyModel, rank: int, tmp_path: Path) -> None:
    empty, narrow, *_ = tiny.target_modules
    pattern = {empty: 0, narrow: 2}
    model = adapted(tiny, init_r=rank, target_r=rank, rank_pattern=pattern, init_weights=False)
    export_lora(model, tmp_path, pad=True)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    allowed = int(re.search(r"--max-lora-rank (\d+)", ModelCard.load(tmp_path / "README.md").text)[1])
    assert config["peft_type"] == "LORA"
    assert config["r"] == rank
    assert allowed in MAX_RANKS
    assert allowed >= rank
    assert config["lora_alpha"] == config["r"], "the factor alpha / r of all modules has to be 1"
    assert isinstance(config["lora_alpha"], int)
    assert isinstance(config["target_modules"], list)
    assert config["bias"] == "none"
    for field in ("modules_to_save", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layer_replication"):
        assert not config.get(field), field

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    modules = dict(model.get_base_model().named_modules())
    kinds = {"lora_A": set(), "lora_B": set()}
    for key, tensor in tensors.items():
        name, kind = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", key).groups()
        kinds[kind].add(name)
        layer = modules[name]
        assert tuple(tensor.shape) == ((rank, layer.in_features) if kind == "lora_A" else (layer.out_features, rank))
        assert tensor.dtype == torch.float32
    assert kinds["lora_A"] == kinds["lora_B"] == set(config["target_modules"])
    assert not [name for name in kinds["lora_A"] if name.endswith("." + empty)], "ranks have to be at least 1"
    assert [name for name in kinds["lora_A"] if name.endswith("." + narrow)]
