# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The configuration: what it refuses, what it derives, what it writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_model

from peft_rank import CalibrationStatistics, LowRankConfig, get_rank_pattern
from tiny_models import TinyModel


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "One of `rank`, `ratio` and `rank_pattern` is needed"),
        ({"rank_pattern": {}}, "One of `rank`, `ratio` and `rank_pattern` is needed"),
        ({"rank": 4, "ratio": 0.5}, "`ratio=0.5` and `rank=4` both say which ranks. Give only one"),
        ({"ratio": 0.5, "rank_pattern": {"q": 3}}, r"`ratio=0.5` and `rank_pattern=\{'q': 3\}` both say"),
        ({"rank": 0}, "`rank=0` must be an integer of 1 or more"),
        ({"rank": 2.5}, "`rank=2.5` must be an integer"),
        ({"rank": True}, "`rank=True` must be an integer"),
        ({"ratio": 0}, r"`ratio=0` must be a number in \(0, 1\]"),
        ({"ratio": 1.2}, r"`ratio=1.2` must be a number in \(0, 1\]"),
        ({"ratio": 80}, r"`ratio=80` must be a number in \(0, 1\]"),
        ({"rank": 4, "decomposition": "pca"}, "`decomposition='pca'` must be one of svd, activation, fisher"),
        ({"rank": 4, "alpha": -1}, "`alpha=-1` must be a number of 0 or more"),
        ({"rank": 4, "allocation": "learned"}, "`allocation='learned'` must be 'uniform' or 'spectral'"),
        (
            {"ratio": 0.5, "spectral_loss": "squared"},
            "`spectral_loss='squared'` must be 'relative', 'absolute' or None",
        ),
        (
            {"rank": 4, "allocation": "spectral"},
            "`allocation='spectral'` is how `ratio` is spent, and there is none: give",
        ),
        (
            {"rank": 4, "ratio_scope": "model"},
            "`ratio_scope='model'` is how `ratio` is spent, and there is none: give",
        ),
        (
            {"ratio": 0.5, "spectral_loss": "absolute"},
            "`spectral_loss='absolute'` has no part in `allocation='uniform'`",
        ),
        ({"rank": 4, "ratio_scope": "layer"}, "`ratio_scope='layer'` must be 'targets' or 'model'"),
        ({"rank": 4, "rank_multiple": 0}, "`rank_multiple=0` must be an integer of 1 or more"),
        ({"rank_pattern": {"q_proj": 0}}, r"`rank_pattern\['q_proj'\]=0` must be an integer of 1 or more"),
        ({"rank": 4, "bias": "lora_only"}, "`bias='lora_only'` must be 'none', 'all' or 'lowrank_only'"),
        ({"rank": 4, "statistics": "stats.safetensors"}, "`statistics` must be what `calibrate` returns"),
        ({"rank": 4, "target_modules": "q", "layers_to_transform": [1]}, "`layers_to_transform` cannot be used"),
    ],
    ids=str,
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankConfig(**fields)


def test_the_type_is_registered() -> None:
    assert LowRankConfig(rank=4).peft_type is PeftType.LOWRANK


@pytest.mark.parametrize(
    ("rank_pattern", "targets"),
    [
        ({"q_proj": 8, "up_proj": 12}, {"q_proj", "up_proj"}),
        ({"layers.0.self_attn.q_proj": 8}, {"layers.0.self_attn.q_proj"}),
        ({r"layers\.\d+\.self_attn\.[qk]_proj": 8}, r"(?:.*\.)?(?:layers\.\d+\.self_attn\.[qk]_proj)"),
        ({r"^model\.layers\.0\.mlp\.up_proj": 8, "q_proj": 4}, None),
    ],
)
def test_targets_follow_from_the_rank_pattern(rank_pattern: dict, targets: Any, llama: TinyModel) -> None:
    config = LowRankConfig(rank_pattern=rank_pattern, task_type="CAUSAL_LM")
    assert targets is None or config.target_modules == targets
    model = get_peft_model(llama.make_model(), config)
    expected = {
        "q_proj": [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)],
        "up_proj": [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)],
        "layers.0.self_attn.q_proj": ["model.layers.0.self_attn.q_proj"],
        r"layers\.\d+\.self_attn\.[qk]_proj": [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qk"],
        r"^model\.layers\.0\.mlp\.up_proj": ["model.layers.0.mlp.up_proj"],
    }
    ranks = {name: rank for key, rank in rank_pattern.items() for name in expected[key]}
    assert get_rank_pattern(model) == {name: ranks[name] for name in get_rank_pattern(model)}
    assert set(get_rank_pattern(model)) == set(ranks)


def test_the_notebook_in_one_line(llama: TinyModel) -> None:
    """Ranks by module name, about a fifth of the parameters gone."""
    base = llama.make_model(hidden_size=64, intermediate_size=160)
    before = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, LowRankConfig(rank_pattern={"q_proj": 8, "o_proj": 8, "gate_proj": 16}))
    model.base_model.finalize()
    after = sum(p.numel() for p in model.parameters())
    assert before - after == 2 * (2 * (64 * 64 - 8 * 128) + 64 * 160 - 16 * 224)
    assert len(get_rank_pattern(model)) == 6


def test_a_rank_with_exceptions(llama: TinyModel) -> None:
    config = LowRankConfig(rank=4, rank_pattern={"up_proj": 8, r".*\.1\..*q_proj": 2}, target_modules="all-linear")
    ranks = get_rank_pattern(get_peft_model(llama.make_model(), config))
    assert {rank for name, rank in ranks.items() if "up_proj" in name} == {8}
    assert ranks["model.layers.1.self_attn.q_proj"] == 2
    assert ranks["model.layers.0.self_attn.q_proj"] == 4


class Untouchable(CalibrationStatistics):
    """Statistics that are too large to copy."""

    def __deepcopy__(self, memo: dict) -> None:
        raise AssertionError("copied")


def test_statistics_are_neither_saved_nor_copied(tmp_path: Path) -> None:
    statistics = Untouchable(tensors={"input_scale": {"q": torch.ones(4)}}, shapes={"q": (4, 4)})
    config = LowRankConfig(rank=4, decomposition="activation", statistics=statistics)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "statistics" not in written
    assert config.statistics is statistics
    assert "statistics" not in repr(config)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is LowRankConfig
    assert loaded.to_dict() == config.to_dict()
    assert loaded == copy.copy(config), "equal but for the statistics"


def test_a_configuration_serves_the_next_model_as_it_did_the_first(llama: TinyModel, tmp_path: Path) -> None:
    """Saving writes the ranks of that model, and that its factors are in the file."""
    config = LowRankConfig(ratio=0.6, rank_multiple=2, target_modules=list(llama.target_modules))
    first = get_peft_model(llama.make_model(), config)
    ranks = get_rank_pattern(first)
    first.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["factors_saved"] is True
    assert written["rank_pattern"] == {"^" + name.replace(".", r"\."): rank for name, rank in ranks.items()}
    wide = get_peft_model(llama.make_model(intermediate_size=96), config)
    assert get_rank_pattern(wide) != ranks
    batch = llama.make_batch(2)
    assert torch.isfinite(wide(**batch).logits).all()
