# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The configuration: legal values, the schedule in steps, files."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, PeftType

from peft_rank import SalientLoRAConfig


WRONG = {
    "init_r": [0, -1, 1.5, "8", None, True],
    "target_r": [0, -2, 16, 2.0],
    "lora_alpha": [0, -1.0, float("nan")],
    "lora_dropout": [-0.1, 1.0, 2],
    "init_weights": ["pissa", "", 3],
    "warmup_steps": [-1, 0.5],
    "warmup_ratio": [-0.1, 1.5],
    "allocation_steps": [-1, 2.5],
    "allocation_ratio": [-0.1, 1.1],
    "total_steps": [0, -5],
    "initial_window": [0, -1, 201],
    "final_window": [0, 9],
    "correlation_threshold": [0, 1.1, -1],
    "slope_threshold": [0, -2.0],
    "salience_lambda": [-0.1, 1.1],
    "graph_scope": ["layer", None],
    "magnitude_scope": ["layer"],
    "orth_reg_weight": [-0.1],
    "min_r": [-1, 3, 0.5],
    "bias": ["lora_only", "some"],
    "rank_pattern": [{"q": -1}, {"q": 1.5}],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRONG.items() for v in values])
def test_an_illegal_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}"):
        SalientLoRAConfig(**{field: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_steps=3.*warmup_ratio=0.1.*only one"),
        ({"allocation_steps": 3, "allocation_ratio": 0.1}, "allocation_steps=3.*only one"),
        ({"warmup_ratio": 0.6, "allocation_ratio": 0.5}, "sum"),
        ({"warmup_ratio": 0.6}, "allocation_ratio=0.5.*sum"),
        ({"target_modules": "q.*", "layers_to_transform": [1]}, "layers_to_transform"),
        ({"target_modules": "q.*", "layers_pattern": "h"}, "layers_pattern"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_to_transform"),
        ({"init_r": 4, "target_r": 5}, "`target_r=5`.*`init_r=4`"),
    ],
)
def test_an_illegal_combination_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SalientLoRAConfig(**settings)


def test_every_field_has_a_help_text() -> None:
    own = {field.name: field for field in fields(SalientLoRAConfig)}
    inherited = {field.name for field in fields(PeftConfig)}
    assert all(field.metadata.get("help") for name, field in own.items() if name not in inherited)


def plan(total: int | None = 100, **settings: Any) -> tuple[int, int, int]:
    schedule = SalientLoRAConfig(**settings).schedule(total, 30, 4)
    return schedule.warmup_steps, schedule.allocation_steps, schedule.total_steps


def test_steps_and_fractions() -> None:
    assert plan() == (10, 50, 100)
    assert plan(warmup_steps=7, allocation_steps=20) == (7, 20, 100)
    assert plan(warmup_ratio=0.2, allocation_steps=20) == (20, 20, 100)
    assert plan(warmup_steps=0, allocation_ratio=1.0) == (0, 100, 100)
    assert plan(None, warmup_steps=7, allocation_steps=20) == (7, 20, 27)
    assert plan(None, total_steps=50) == (5, 25, 50)
    assert plan(80, total_steps=50) == (8, 40, 80)  # what is known of the training counts


@pytest.mark.parametrize(("warmup", "allocation"), [(0.5, 0.5), (0.1, 0.9), (0.3, 0.7), (0.0, 1.0), (0.25, 0.75)])
def test_fractions_that_sum_to_one_fit_any_training(warmup: float, allocation: float) -> None:
    for total in range(2, 60):
        steps = plan(total, warmup_ratio=warmup, allocation_ratio=allocation)
        assert total - 1 <= steps[0] + steps[1] <= total, total


def test_two_decimals_that_sum_to_one_are_legal() -> None:
    for percent in range(101):
        SalientLoRAConfig(warmup_ratio=percent / 100, allocation_ratio=(100 - percent) / 100)


def test_the_shortest_training() -> None:
    assert plan(2)[:2] == (1, 1)
    assert plan(1)[:2] == (0, 1)
    with pytest.raises(ValueError, match="`total_steps=0`"):
        plan(0)


def test_fractions_of_an_unknown_number_of_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_ratio=0.1.*resolve_schedule\(total_steps\)"):
        plan(None)
    with pytest.raises(ValueError, match="allocation_ratio=0.5"):
        plan(None, warmup_steps=3)


def test_phases_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="`total_steps`.*120.*got 100"):
        plan(warmup_steps=20, allocation_steps=100)
    with pytest.raises(ValueError, match="`allocation_steps`"):
        plan(allocation_steps=0)


def test_the_scale_and_whether_ranks_are_pruned() -> None:
    assert SalientLoRAConfig(init_r=8, lora_alpha=4).scaling == 0.5
    assert SalientLoRAConfig(init_r=8).scaling == SalientLoRAConfig(init_r=3).scaling == 2
    assert SalientLoRAConfig(init_r=8, target_r=4).allocates
    assert not SalientLoRAConfig(init_r=8, target_r=8).allocates


def test_what_the_default_start_is() -> None:
    assert SalientLoRAConfig().start == "lora" and SalientLoRAConfig().weighs_gradients
    released = SalientLoRAConfig(reference=True)
    assert released.start == "gaussian" and not released.weighs_gradients
    assert SalientLoRAConfig(init_weights=False).start is False
    assert not SalientLoRAConfig(init_weights="orthogonal").weighs_gradients


EXAMPLE = {
    "init_r": 6,
    "target_r": 3,
    "min_r": 1,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["lm_head"],
    "modules_to_save": ["classifier"],
    "warmup_ratio": 0.2,
    "rank_pattern": {"^a\\.b": 0, "c": 9},
    "bias": "all",
    "task_type": "CAUSAL_LM",
    "init_weights": "orthogonal",
    "reference": True,
}


def test_a_file_gives_the_same_configuration(tmp_path: Path) -> None:
    config = SalientLoRAConfig(**EXAMPLE)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SALIENTLORA"
    for loaded in (
        PeftConfig.from_pretrained(tmp_path),
        SalientLoRAConfig.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert type(loaded) is SalientLoRAConfig and loaded.peft_type is PeftType.SALIENTLORA
        assert _plain(loaded) == {**_plain(config), "inference_mode": loaded.inference_mode}


def _plain(config: SalientLoRAConfig) -> dict[str, Any]:
    return {k: sorted(v) if isinstance(v, (set, list)) else v for k, v in config.to_dict().items()}


def test_the_file_says_which_version_wrote_it(tmp_path: Path) -> None:
    from importlib.metadata import version

    SalientLoRAConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_rank_version"] == version("peft-rank")


def test_keys_of_a_later_version_are_left_out_with_a_warning(tmp_path: Path) -> None:
    SalientLoRAConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_tomorrow": 1}))
    with pytest.warns(UserWarning, match="of_tomorrow"):
        assert type(PeftConfig.from_pretrained(tmp_path)) is SalientLoRAConfig


def test_configurations_do_not_share_their_rank_pattern() -> None:
    first, second = SalientLoRAConfig(), SalientLoRAConfig(rank_pattern=None)
    first.rank_pattern["a"] = 1
    assert SalientLoRAConfig().rank_pattern == {} == second.rank_pattern
