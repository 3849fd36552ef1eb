# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Every architecture, trained for real by the HF Trainer: exact budget, falling loss, one model in every form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
)
from safetensors.torch import load_file
from transformers import Trainer

from peft_rank import RankAllocationCallback, get_rank_pattern
from runs import adapted, assert_close, logits, modules_of, train
from tiny_models import TINY_MODELS, TinyModel


# steps before the allocation and steps of it, from the paper's scripts
GLUE = {
    "cola": (800, 2000),
    "mnli": (8000, 35000),
    "mrpc": (600, 1000),
    "qnli": (2000, 8500),
    "qqp": (8000, 25000),
    "rte": (600, 1500),
    "sst2": (6000, 20000),
    "stsb": (800, 2500),
}
AUTO_CLASSES = {
    "SEQ_CLS": AutoPeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM,
    "CAUSAL_LM": AutoPeftModelForCausalLM,
}


@dataclass
class Run:
    """What one training left behind."""

    tiny: TinyModel
    trainer: Trainer
    base: Path
    adapter: Path
    logits: torch.Tensor

    @property
    def model(self) -> PeftModel:
        return self.trainer.model


@pytest.fixture(scope="module", params=TINY_MODELS.values(), ids=TINY_MODELS.keys())
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    tiny, folder = request.param, tmp_path_factory.mktemp("run")
    base, adapter = folder / "base", folder / "adapter"
    tiny.make_model().save_pretrained(base)
    heads = ["pooler", "classifier"] if "deberta" in tiny.name else None
    model = adapted(tiny, modules_to_save=heads)
    model.peft_config["default"].base_model_name_or_path = str(base)
    trainer = train(model, tiny, folder, callbacks=[RankAllocationCallback()], max_steps=30)
    trainer.model.save_pretrained(adapter)
    yield Run(tiny, trainer, base, adapter, logits(trainer.model, tiny))


def test_the_budget_is_met_exactly(run: Run) -> None:
    ranks = get_rank_pattern(run.model)
    assert len(ranks) == modules_of(run.model)
    assert sum(ranks.values()) == 2 * len(ranks)
    assert len(set(ranks.values())) > 1, "every module has the same rank: nothing was allocated"


def test_the_parameters_have_the_ranks_that_are_reported(run: Run) -> None:
    parameters = dict(run.model.named_parameters())
    for name, rank in get_rank_pattern(run.model).items():
        prefix = f"base_model.model.{name}.salientlora_"
        assert parameters[f"{prefix}A.default"].shape[0] == rank
        assert parameters[f"{prefix}E.default"].shape == (rank,)
        assert parameters[f"{prefix}B.default"].shape[1] == rank


def test_the_loss_falls(run: Run) -> None:
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) / 4 < 0.9 * sum(losses[:2]) / 2, losses


def test_the_file_holds_compact_factors_and_no_state(run: Run) -> None:
    file = load_file(run.adapter / "adapter_model.safetensors")
    ranks = {name: file[name].numel() for name in file if name.endswith("salientlora_E")}
    assert sum(ranks.values()) == 2 * len(ranks)
    assert not [name for name in file if "state" in name or "mask" in name]
    saved = json.loads((run.adapter / "adapter_config.json").read_text())
    assert saved["allocation_state"] is None
    names = {f"^{name}".replace(".", r"\."): rank for name, rank in get_rank_pattern(run.model).items()}
    assert saved["rank_pattern"] == names


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["plain", "low_cpu_mem_usage"])
def test_peft_reloads_the_same_model(run: Run, low_cpu_mem_usage: bool, recwarn: pytest.WarningsRecorder) -> None:
    base = run.tiny.make_model()
    loaded = PeftModel.from_pretrained(base, str(run.adapter), low_cpu_mem_usage=low_cpu_mem_usage)
    assert_close(logits(loaded, run.tiny), run.logits, 1e-5)
    assert get_rank_pattern(loaded) == get_rank_pattern(run.model)
    assert not [w for w in recwarn if "adapter" in str(w.message)]


def test_auto_peft_model_reloads_the_same_model(run: Run) -> None:
    loaded = AUTO_CLASSES[run.tiny.task_type].from_pretrained(str(run.adapter))
    assert isinstance(loaded.get_base_model(), run.tiny.model_class)
    assert_close(logits(loaded, run.tiny), run.logits, 1e-5)


def test_transformers_loads_the_same_model(run: Run) -> None:
    loaded = run.tiny.model_class.from_pretrained(run.base)
    loaded.load_adapter(str(run.adapter))
    assert_close(logits(loaded, run.tiny), run.logits, 1e-5)


@pytest.mark.parametrize("safe_merge", [False, True], ids=["merge", "safe_merge"])
def test_merged_is_the_same_model(run: Run, safe_merge: bool) -> None:
    loaded = PeftModel.from_pretrained(run.tiny.make_model(), str(run.adapter))
    merged = loaded.merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is run.tiny.model_class
    assert not [name for name, _ in merged.named_parameters() if "salientlora" in name]
    assert_close(logits(merged, run.tiny), run.logits, 1e-5)


def test_unmerging_restores_the_base_model(run: Run) -> None:
    loaded = PeftModel.from_pretrained(run.tiny.make_model(), str(run.adapter))
    loaded.merge_adapter()
    assert_close(logits(loaded, run.tiny), run.logits, 1e-5)
    loaded.unmerge_adapter()
    assert_close(logits(loaded, run.tiny), run.logits, 1e-5)
    with loaded.disable_adapter():
        assert_close(logits(loaded, run.tiny), logits(run.tiny.make_model(), run.tiny), 1e-5)


def test_the_base_model_is_untouched_by_training(run: Run) -> None:
    with run.model.disable_adapter():
        assert_close(logits(run.model, run.tiny), logits(run.tiny.make_model(), run.tiny), 0)


@pytest.mark.parametrize("task", GLUE)
def test_a_glue_schedule_scaled_down_meets_the_budget(deberta: TinyModel, task: str, tmp_path: Path) -> None:
    shrink = 500 if GLUE[task][1] > 10000 else 200
    warmup, allocation = (steps // shrink for steps in GLUE[task])
    model = adapted(
        deberta, init_r=15, warmup_steps=warmup, allocation_steps=allocation, initial_window=3, final_window=10
    )
    train(model, deberta, tmp_path, max_steps=warmup + allocation + 2, per_device_train_batch_size=2)
    assert sum(get_rank_pattern(model).values()) == 2 * modules_of(model)


@pytest.mark.parametrize("task", GLUE)
def test_every_architecture_meets_the_budget_of_every_glue_schedule(tiny: TinyModel, task: str) -> None:
    """Without forward passes, and the paper's steps divided by 20."""
    warmup, allocation = (steps // 20 for steps in GLUE[task])
    model = adapted(tiny, init_r=6, warmup_steps=warmup, allocation_steps=allocation, final_window=40)
    tuner = model.base_model
    tuner.resolve_schedule(warmup + allocation)
    decisions = 0
    # only steps that record or decide: the windows may have gaps, as after skipped steps
    for step in range(warmup + 1, warmup + allocation + 1, max(1, allocation // 25)):
        decisions += _random_step(model, step)
    decisions += _random_step(model, warmup + allocation)
    assert decisions > 1
    assert tuner.allocation_finished
    tuner.finalize()
    assert sum(get_rank_pattern(model).values()) == 2 * modules_of(model)


@torch.no_grad()
def _random_step(model: PeftModel, step: int) -> bool:
    for name, parameter in model.named_parameters():
        if "salientlora_E" in name:
            parameter.add_(torch.randn_like(parameter))
    return model.base_model.update_and_allocate(step)
