# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What users do by accident: reuse a configuration, start again, forget to activate. Nothing of it may pass silently."""

from __future__ import annotations

import json
import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_rank import RankAllocationCallback, SalientLoRAConfig, get_rank_pattern
from runs import STEPS, WARMUP, adam, adapted, config, make_trainer, steps_by_hand
from tiny_models import TINY_MODELS


LLAMA = TINY_MODELS["llama"]
MODULES = 14


def train_by_hand(model: PeftModel, last: int, finalize: bool = True) -> str:
    """Optimizer steps 1 to `last` of the common schedule."""
    tuner = model.base_model
    plan = tuner.resolve_schedule(STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(1, last + 1):
        model(**LLAMA.make_batch(4, seed=step)).loss.backward()
        tuner.add_regularization_gradient()
        optimizer.step()
        tuner.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    if finalize:
        tuner.finalize(optimizer)
    return plan


def total(model: torch.nn.Module) -> int:
    return sum(get_rank_pattern(model).values())


@pytest.mark.parametrize("last", [12, STEPS], ids=["mid-allocation", "finished"])
def test_a_configuration_makes_equal_models_again_and_again(last: int, tmp_path: Path) -> None:
    shared = config(LLAMA)
    first = get_peft_model(LLAMA.make_model(), shared)
    train_by_hand(first, last, finalize=last == STEPS)
    first.save_pretrained(tmp_path)
    assert total(first) < 4 * MODULES and shared.rank_pattern
    second = get_peft_model(LLAMA.make_model(), shared)
    assert total(second) == 4 * MODULES and shared.allocation_state is None
    assert "56 -> 28" in train_by_hand(second, STEPS)
    assert total(second) == 2 * MODULES


def test_the_users_own_rank_pattern_comes_back(tmp_path: Path) -> None:
    shared = config(LLAMA, rank_pattern={"q_proj": 3})
    train_by_hand(get_peft_model(LLAMA.make_model(), shared), STEPS)
    assert "q_proj" not in shared.rank_pattern
    again = get_rank_pattern(get_peft_model(LLAMA.make_model(), shared))
    assert {r for name, r in again.items() if name.endswith("q_proj")} == {3}


def test_training_afresh_after_an_interruption(tmp_path: Path) -> None:
    model = adapted(LLAMA)
    train_by_hand(model, 12, finalize=False)
    before = total(model)
    trainer = make_trainer(model, LLAMA, tmp_path, callbacks=[RankAllocationCallback()])
    trainer.train()
    assert before < 4 * MODULES and total(model) == 2 * MODULES
    lines = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert f"{before} -> 28" in lines[0]["plan"] and lines[0]["rank/total"] == before
    assert next(line["step"] for line in lines if line["event"] == "decision") == 5


def test_transformers_reads_checkpoints_of_an_unfinished_allocation(tmp_path: Path) -> None:
    model = adapted(LLAMA)
    train_by_hand(model, 12, finalize=False)
    model.save_pretrained(tmp_path / "middle")
    plain = LLAMA.make_model()
    info = plain.load_adapter(str(tmp_path / "middle"))
    assert not info.unexpected_keys and not info.missing_keys
    plain.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(LLAMA.make_model(), tmp_path / "again", is_trainable=True)
    assert again.base_model.allocator("default").last_step == 12


def test_merging_in_the_warm_up_warns_and_saving_does_not(tmp_path: Path) -> None:
    model = adapted(LLAMA)
    model.base_model.resolve_schedule(STEPS)
    model.base_model.update_and_allocate(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "checkpoint")
    with pytest.warns(UserWarning, match="never ran"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.raises(RuntimeError, match="never ran"):
        model.base_model.finalize()
    with pytest.warns(UserWarning, match="never ran"):
        model.save_pretrained(tmp_path / "given-up")


@pytest.mark.parametrize("trainable", [True, False, None], ids=["loaded to train", "loaded for inference", "live"])
@pytest.mark.parametrize("last", [WARMUP - 1, 7])
def test_merging_in_the_midst_of_the_allocation_warns_once(last: int, trainable: bool | None, tmp_path: Path) -> None:
    model = get_peft_model(LLAMA.make_model(), config(LLAMA))
    train_by_hand(model, last, finalize=False)
    if trainable is not None:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path), is_trainable=trainable)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.merge_and_unload()
    told = [str(warning.message) for warning in told if issubclass(warning.category, UserWarning)]
    never = last < WARMUP and trainable is not False
    assert (
        len(told) == 1 and ("never ran" if never else "has not finished: adapter 'default' is merged with") in told[0]
    )


def test_merging_after_the_end_does_not_warn(tmp_path: Path) -> None:
    model = get_peft_model(LLAMA.make_model(), config(LLAMA))
    train_by_hand(model, 20)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for each in (model, loaded):
            each.merge_and_unload()


@pytest.mark.parametrize("last", [4, 7, 20])
def test_a_plain_state_dict_goes_into_a_fresh_model(last: int) -> None:
    """At the widths that it has; that the state of the allocation is not in it is told of where that matters."""
    model, fresh = (get_peft_model(LLAMA.make_model(), config(LLAMA)) for _ in "ab")
    train_by_hand(model, last, finalize=last == 20)
    fresh.load_state_dict(model.state_dict())
    assert get_rank_pattern(fresh) == get_rank_pattern(model)
    batch = LLAMA.make_batch(4, seed=7)
    assert torch.equal(fresh.eval()(**batch).logits, model.eval()(**batch).logits)
    optimizer = adam(fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fresh.base_model.resolve_schedule(20)
    with (
        pytest.warns(UserWarning, match="begins at step .* save by `save_pretrained`") if last < 20 else nullcontext()
    ):
        steps_by_hand(fresh, LLAMA, last + 1, 21, optimizer)
    fresh.base_model.finalize(optimizer)
    assert total(fresh) == 2 * MODULES


def test_a_plain_state_dict_of_an_earlier_moment_is_loaded_back() -> None:
    model = get_peft_model(LLAMA.make_model(), config(LLAMA))
    train_by_hand(model, 7, finalize=False)
    before, ranks = {key: value.clone() for key, value in model.state_dict().items()}, get_rank_pattern(model)
    steps_by_hand(model, LLAMA, 8, 12, adam(model))
    assert get_rank_pattern(model) != ranks
    model.load_state_dict(before)
    assert get_rank_pattern(model) == ranks and all(map(torch.equal, before.values(), model.state_dict().values()))
    steps_by_hand(model, LLAMA, 1, 20, adam(model))
    assert total(model) == 2 * MODULES


def test_a_module_without_ranks_gets_no_gradient() -> None:
    """`clip_grad_norm_` by the largest entry, and Muon, cannot make anything of an empty one."""
    model = get_peft_model(LLAMA.make_model(), config(LLAMA, rank_pattern={"q_proj": 0}))
    model(**LLAMA.make_batch(4)).loss.backward()
    model.base_model.add_regularization_gradient()
    assert all((p.grad is None) == (p.numel() == 0) for p in model.parameters() if p.requires_grad)
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=float("inf")) > 0


def test_the_released_schedule_needs_ten_steps() -> None:
    with pytest.raises(ValueError, match="first window has 10 steps"):
        adapted(LLAMA, reference=True, allocation_steps=8).base_model.resolve_schedule(STEPS)


def test_layers_without_their_tuner_are_told_of_when_saved(tmp_path: Path) -> None:
    model = LLAMA.make_model()
    model.add_adapter(config(LLAMA))
    with pytest.warns(UserWarning, match="cannot run.*without the tuner"):
        model.save_pretrained(tmp_path)


def test_an_adapter_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    adapted(LLAMA, target_r=4).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(LLAMA.make_model(), tmp_path)
    with pytest.raises(RuntimeError, match="is_trainable=True"):
        frozen.base_model.resolve_schedule(STEPS)


def test_finalizing_another_adapter_tells_of_the_one_left_behind() -> None:
    model = adapted(LLAMA)
    train_by_hand(model, 12, finalize=False)
    model.add_adapter("other", config(LLAMA))
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="'default' is in the middle"):
        train_by_hand(model, STEPS)


def test_steps_count_from_one() -> None:
    tuner = adapted(LLAMA, warmup_steps=0).base_model
    with pytest.raises(ValueError, match="`global_step=-1`"):
        tuner.update_and_allocate(-1)
    assert not tuner.update_and_allocate(0)
    assert tuner.allocator("default").recorded == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", "8"),
        ("lora_alpha", math.inf),
        ("slope_threshold", math.inf),
        ("orth_reg_weight", math.nan),
        ("warmup_ratio", "0.1"),
        ("lora_dropout", None),
        ("salience_lambda", "a"),
        ("rank_pattern", ["a"]),
    ],
)
def test_values_of_a_wrong_type_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}="):
        SalientLoRAConfig(**{field: value})


def test_a_budget_that_is_met_from_the_start(tmp_path: Path) -> None:
    model = adapted(LLAMA, rank_pattern={".*": 1})
    assert "no allocation" in model.base_model.resolve_schedule(STEPS)
    summary = model.base_model.rank_summary()
    assert summary["rank/budget"] == summary["rank/total"] == MODULES


def test_ranks_are_logged_by_epoch(tmp_path: Path) -> None:
    trainer = make_trainer(
        adapted(LLAMA), LLAMA, tmp_path, callbacks=[RankAllocationCallback()], logging_strategy="epoch"
    )
    trainer.train()
    events = [json.loads(line)["event"] for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert "log" in events


def test_many_living_ranks_are_counted_exactly_in_half_precision() -> None:
    model = adapted(LLAMA, init_r=512, target_r=1, target_modules=["q_proj"]).to(torch.bfloat16)
    layer = next(iter(model.base_model.adapter_layers("default").values()))
    layer.set_mask("default", torch.arange(512) < 301)
    assert layer.rank("default") == 301
