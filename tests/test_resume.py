# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Interrupted + resumed equals uninterrupted; the best model; stopping early."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import TrainerCallback

from peft_rank import RankAllocationCallback, get_rank_pattern
from runs import (
    DECISIONS,
    STEPS,
    WARMUP,
    Interrupted,
    StopAt,
    adam,
    adapted,
    assert_close,
    config,
    logits,
    make_trainer,
    modules_of,
    steps_by_hand,
    train,
    weights,
)
from tiny_models import TINY_MODELS, TinyModel


LLAMA = TINY_MODELS["llama"]


def test_the_common_schedule() -> None:
    schedule = config(LLAMA).schedule(STEPS, 56, 28)
    assert [d.step for d in schedule.decisions()] == list(DECISIONS) and schedule.warmup_steps == WARMUP
    budgets = [d.budget for d in schedule.decisions()]
    assert 56 > budgets[0] > budgets[1] > budgets[2] == 28  # every decision prunes


def load_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, those inside of the allocation's state included."""
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith("salientlora_state")]:
        state = tensors.pop(key).numpy().tobytes()
        tensors.update({f"state.{name}": value for name, value in safetensors.torch.load(state).items()})
    return tensors


def assert_same_run(first: Path, second: Path, steps: range) -> None:
    for step in steps:
        a, b = (load_checkpoint(folder / f"checkpoint-{step}") for folder in (first, second))
        assert a.keys() == b.keys(), step
        exact = [key for key in a if key.startswith("state.") and not a[key].is_floating_point()]
        assert_close({key: a[key] for key in exact}, {key: b[key] for key in exact}, 0)
        assert_close(a, b, 1e-6)


# dropout, so that the random state has to be right as well
DROPOUT = {"dropout": 0.1, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every step of one run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(adapted(LLAMA, **DROPOUT), LLAMA, folder, save_strategy="steps", save_steps=1)
    return folder


def test_saving_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    model = adapted(LLAMA, **DROPOUT)
    train(model, LLAMA, tmp_path)
    last = load_checkpoint(uninterrupted / f"checkpoint-{STEPS}")
    assert_close(weights(model), last, 0)


def test_checkpoints_in_the_allocation_carry_its_state(uninterrupted: Path) -> None:
    for step in range(1, STEPS + 1):
        tensors = load_checkpoint(uninterrupted / f"checkpoint-{step}")
        rows = tensors["state.window"].shape[0] if "state.window" in tensors else None
        previous = max([d for d in (WARMUP, *DECISIONS) if d <= step], default=step)
        assert rows == (step - previous if step < DECISIONS[-1] else None), step


@pytest.mark.parametrize("step", [2, 3, 4, 5, 6, 9, 10, 14, 15, 18])
def test_resume_equals_uninterrupted(uninterrupted: Path, tmp_path: Path, step: int) -> None:
    model = adapted(LLAMA, seed=step, **DROPOUT)  # other random weights: everything has to come from the checkpoint
    checkpoint = str(uninterrupted / f"checkpoint-{step}")
    train(model, LLAMA, tmp_path, resume=checkpoint, save_strategy="steps", save_steps=1)
    assert_same_run(uninterrupted, tmp_path, range(step + 1, STEPS + 1))


def crash_and_resume(tiny: TinyModel, folder: Path, step: int, same_object: bool, make: Callable, **kwargs: Any):
    model = make()
    with pytest.raises(Interrupted):
        callbacks = [RankAllocationCallback(log=False), StopAt(step)]
        arguments = {"save_strategy": "steps", "save_steps": step, **_fresh(kwargs, model)}
        train(model, tiny, folder, callbacks=callbacks, **arguments)
    model = model if same_object else make()
    train(model, tiny, folder, resume=str(folder / f"checkpoint-{step}"), **_fresh(kwargs, model))
    return model


def _fresh(kwargs: dict[str, Any], model: PeftModel) -> dict[str, Any]:
    """An optimizer given as a function of the trained parameters is made for this model."""
    if "optimizer" not in kwargs:
        return kwargs
    optimizer = kwargs["optimizer"]([p for p in model.parameters() if p.requires_grad])
    return {**{k: v for k, v in kwargs.items() if k != "optimizer"}, "optimizers": (optimizer, None)}


OPTIMIZERS = {
    "foreach": {"optimizer": lambda p: torch.optim.AdamW(p, lr=5e-3, foreach=True)},
    "fused": {"optim": "adamw_torch_fused"},
    "amsgrad": {"optimizer": lambda p: torch.optim.AdamW(p, lr=5e-3, amsgrad=True)},
    "sgd-momentum": {"optimizer": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True)},
    "adafactor": {"optim": "adafactor"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "linear-schedule": {"lr_scheduler_type": "linear"},
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_crash_and_resume_equals_uninterrupted(case: str, tmp_path: Path) -> None:
    model, settings = adapted(LLAMA), OPTIMIZERS[case]
    train(model, LLAMA, tmp_path / "a", **_fresh(settings, model))
    resumed = crash_and_resume(LLAMA, tmp_path / "b", 8, False, lambda: adapted(LLAMA), **settings)
    assert get_rank_pattern(resumed) == get_rank_pattern(model)
    assert_close(weights(resumed), weights(model), 1e-6)


@pytest.mark.parametrize("name", ["deberta-v3", "t5", "gpt2"])
def test_other_architectures_resume(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    heads = {"modules_to_save": ["pooler", "classifier"]} if tiny.task_type == "SEQ_CLS" else {}
    model = adapted(tiny, **heads)
    train(model, tiny, tmp_path / "a")
    resumed = crash_and_resume(tiny, tmp_path / "b", 8, False, lambda: adapted(tiny, **heads))
    assert_close(weights(resumed), weights(model), 1e-6)


def test_resume_with_masks_only_at_a_decision(tmp_path: Path) -> None:
    """A checkpoint with pruned ranks that still exist physically."""
    model = adapted(LLAMA)
    train(model, LLAMA, tmp_path / "a", optim="adafactor")
    for step in (5, 12, 17):
        resumed = crash_and_resume(
            LLAMA, tmp_path / f"b{step}", step, False, lambda: adapted(LLAMA), optim="adafactor"
        )
        tensors = load_checkpoint(tmp_path / f"b{step}" / f"checkpoint-{step}")
        assert tensors["state.alive"].numel() == 56 and not tensors["state.alive"].all()
        assert_close(weights(resumed), weights(model), 1e-6)


@pytest.mark.parametrize("step", [2, 5, 8])
def test_resume_in_the_same_model_object(step: int, tmp_path: Path) -> None:
    model = adapted(LLAMA)
    train(model, LLAMA, tmp_path / "a")
    resumed = crash_and_resume(LLAMA, tmp_path / "b", step, True, lambda: adapted(LLAMA))
    assert_close(weights(resumed), weights(model), 1e-6)


def test_resume_from_an_earlier_checkpoint_in_the_same_model_object(tmp_path: Path) -> None:
    """The model has narrower layers than the checkpoint that it goes back to."""
    model = adapted(LLAMA)
    train(model, LLAMA, tmp_path, save_strategy="steps", save_steps=4)
    expected = weights(model)
    for step in (12, 4, 8):
        train(model, LLAMA, tmp_path, resume=str(tmp_path / f"checkpoint-{step}"))
        assert_close(weights(model), expected, 1e-6)


def test_resume_in_a_fresh_process(uninterrupted: Path, tmp_path: Path) -> None:
    script = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        import conftest, pathlib
        from runs import adapted, train
        from tiny_models import TINY_MODELS
        model, out = adapted(TINY_MODELS["llama"], **{DROPOUT!r}), pathlib.Path({str(tmp_path)!r})
        resume = {str(uninterrupted / "checkpoint-8")!r}
        train(model, TINY_MODELS["llama"], out, resume=resume, save_strategy="steps", save_steps=1)
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], check=True, capture_output=True)
    assert_same_run(uninterrupted, tmp_path, range(9, STEPS + 1))


def test_resume_in_mid_accumulation_window_counts_optimizer_steps(tmp_path: Path) -> None:
    """Sixteen micro-batches make four optimizer steps: decisions do not fall on micro-batches."""
    callback = RankAllocationCallback(output_dir=str(tmp_path))
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 100}
    train(adapted(LLAMA), LLAMA, tmp_path, callbacks=[callback], **settings)
    lines = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "decision"] == list(DECISIONS)


def test_resume_without_the_state_of_the_allocation_is_refused(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 8}
    with pytest.warns(UserWarning, match="never ran"):
        train(adapted(LLAMA), LLAMA, tmp_path, callbacks=[], max_steps=8, **settings)
    with pytest.raises(RuntimeError, match="resumes at step 8.*RankAllocationCallback"):
        train(adapted(LLAMA), LLAMA, tmp_path, resume=str(tmp_path / "checkpoint-8"))


def test_resume_after_steps_without_the_callback_is_refused(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4}
    with pytest.raises(Interrupted):
        train(adapted(LLAMA), LLAMA, tmp_path, callbacks=[RankAllocationCallback(log=False), StopAt(4)], **settings)
    train(
        adapted(LLAMA), LLAMA, tmp_path, callbacks=[], max_steps=8, resume=str(tmp_path / "checkpoint-4"), **settings
    )
    with pytest.raises(RuntimeError, match="knows only its first 4 steps"):
        train(adapted(LLAMA), LLAMA, tmp_path, resume=str(tmp_path / "checkpoint-8"))


def test_resume_in_warmup_without_the_state_is_fine(tmp_path: Path) -> None:
    """Nothing was missed yet."""
    with pytest.warns(UserWarning, match="never ran"):
        train(adapted(LLAMA), LLAMA, tmp_path, callbacks=[], max_steps=2, save_strategy="steps", save_steps=2)
    model = adapted(LLAMA)
    train(model, LLAMA, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert sum(get_rank_pattern(model).values()) == 2 * modules_of(model)


def test_a_finished_adapter_trains_on_with_its_ranks(tmp_path: Path) -> None:
    model = adapted(LLAMA)
    train(model, LLAMA, tmp_path)
    ranks = get_rank_pattern(model)
    model.save_pretrained(tmp_path / "finished")
    loaded = PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path / "finished"), is_trainable=True)
    before = weights(loaded)
    train(loaded, LLAMA, tmp_path, max_steps=5)
    assert get_rank_pattern(loaded) == ranks
    assert any(not torch.equal(before[key], value) for key, value in weights(loaded).items())


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_training_twice_with_the_same_trainer(tmp_path: Path, optim: str) -> None:
    """The Trainer keeps its optimizer, which therefore has to hold the parameters that `finalize` made."""
    trainer = make_trainer(adapted(LLAMA), LLAMA, tmp_path, optim=optim)
    trainer.train()
    ranks, before = get_rank_pattern(trainer.model), weights(trainer.model)
    trainer.train()
    assert get_rank_pattern(trainer.model) == ranks
    assert all(not torch.equal(before[key], value) for key, value in weights(trainer.model).items() if value.numel())


# ---- the best model ----


class LaterIsWorse:
    """A metric that grows with every evaluation, so that the first one is the best."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.count += 1
        return {"order": self.count}


def train_for_best(model: PeftModel, folder: Path, *callbacks: TrainerCallback, steps: int = 5, **arguments: Any):
    trainer = make_trainer(
        model,
        LLAMA,
        folder,
        callbacks=[RankAllocationCallback(log=False), *callbacks],
        load_best_model_at_end=True,
        metric_for_best_model="order",
        greater_is_better=False,
        eval_strategy="steps",
        eval_steps=steps,
        save_strategy="steps",
        save_steps=steps,
        **arguments,
    )
    trainer.compute_metrics = LaterIsWorse()
    trainer.train()
    return trainer


def test_the_best_model_is_chosen_after_the_allocation(tmp_path: Path) -> None:
    model = adapted(LLAMA)
    trainer = train_for_best(model, tmp_path)
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-15"  # 5 and 10 have better metrics
    assert sum(get_rank_pattern(model).values()) == 2 * modules_of(model)
    best = PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path / "checkpoint-15"))
    assert_close(logits(model, LLAMA), logits(best, LLAMA), 1e-6)


def test_without_an_evaluation_after_the_allocation_the_last_model_stays(tmp_path: Path) -> None:
    model = adapted(LLAMA)
    trainer = train_for_best(model, tmp_path, steps=14, max_steps=17)
    assert trainer.state.best_model_checkpoint is None or not trainer.state.best_model_checkpoint.endswith("-14")
    assert sum(get_rank_pattern(model).values()) == 2 * modules_of(model)


@pytest.mark.parametrize(("steps", "stop", "best"), [(8, 11, 8), (4, 9, 4), (2, 5, 2)])
def test_a_best_model_from_before_the_end_keeps_its_ranks(tmp_path: Path, steps: int, stop: int, best: int) -> None:
    model = adapted(LLAMA)
    with pytest.warns(UserWarning, match="budget of 28 was not reached"):
        trainer = train_for_best(model, tmp_path, StopAt(stop, crash=False), steps=steps)
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    ranks = get_rank_pattern(model)
    checkpoint = json.loads((tmp_path / f"checkpoint-{best}" / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(ranks.values()) == (
        56 if best < 5 else sum(checkpoint.get(f"^{n}".replace(".", r"\."), 4) for n in ranks)
    )
    expected = logits(PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path / f"checkpoint-{best}")), LLAMA)
    assert_close(logits(model, LLAMA), expected, 1e-6)
    model.save_pretrained(tmp_path / "saved")
    saved = PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path / "saved"))
    assert_close(logits(saved, LLAMA), expected, 1e-6)
    assert not [key for key in load_checkpoint(tmp_path / "saved") if "state" in key]


def test_training_goes_on_from_a_best_model_of_other_widths(tmp_path: Path) -> None:
    model = adapted(LLAMA)
    stop = StopAt(11, crash=False)
    with pytest.warns(UserWarning, match="budget of 28 was not reached"):
        trainer = train_for_best(model, tmp_path, stop, steps=8)
    assert sum(get_rank_pattern(model).values()) == 40
    trainer.remove_callback(stop)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert sum(get_rank_pattern(model).values()) == 28
    state = trainer.optimizer.optimizer.state
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(state[p]["exp_avg"].shape == p.shape for p in trained.values() if p.numel())
    same = [name for name, p in trained.items() if p.shape == before[name].shape and torch.equal(p, before[name])]
    assert not [name for name in same if trained[name].numel()]


def test_a_best_model_with_masked_ranks_is_compacted(tmp_path: Path) -> None:
    model = adapted(LLAMA)
    with pytest.warns(UserWarning, match="was not reached"):
        train_for_best(model, tmp_path, StopAt(11, crash=False), steps=8, optim="adafactor")
    ranks = get_rank_pattern(model)
    assert 28 < sum(ranks.values()) < 56
    assert sum(p.numel() for n, p in model.named_parameters() if "salientlora_E" in n) == sum(ranks.values())


# ---- another length of the training ----


FRACTIONS = {"warmup_steps": None, "allocation_steps": None}


@pytest.mark.parametrize("shrink", [True, False], ids=["shrunk", "masked"])
@pytest.mark.parametrize("old", [12, 40, 100])
@pytest.mark.parametrize("new", [14, 24, 80])
def test_a_training_of_another_length_meets_the_budget(old: int, new: int, shrink: bool, tmp_path: Path) -> None:
    """Whatever the old plan has decided by then: ranks never come back, and the last decision is owed until it is taken."""
    for stop in sorted({2, old // 3, old - 5}):
        model = adapted(LLAMA, **FRACTIONS)
        model.base_model.resolve_schedule(old)
        steps_by_hand(model, LLAMA, 1, stop, adam(model), shrink)
        before = sum(get_rank_pattern(model).values())
        model.save_pretrained(tmp_path / str(stop))
        model = PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path / str(stop)), is_trainable=True)
        model.base_model.resolve_schedule(new)
        optimizer = adam(model)
        for step in range(stop + 1, new + 1):
            steps_by_hand(model, LLAMA, step, step, optimizer, shrink)
            before, last = sum(get_rank_pattern(model).values()), before
            assert 28 <= before <= last
        # no room is left where the new training ends where the old one stopped, or before
        with (
            pytest.warns(UserWarning, match=f"cut short at step {max(stop, new)}, before its last window")
            if before > 28
            else nullcontext()
        ):
            model.base_model.finalize(optimizer)
        assert before == 28 or new < stop + 3
        assert sum(get_rank_pattern(model).values()) == 28, (old, stop, new)


@pytest.mark.parametrize(("old", "stop", "new"), [(40, 11, 100), (100, 30, 40), (40, 19, 20)])
def test_the_trainer_goes_on_with_another_length(old: int, stop: int, new: int, tmp_path: Path) -> None:
    model = adapted(LLAMA, **FRACTIONS)
    callbacks = [RankAllocationCallback(log=False), StopAt(stop)]
    with pytest.raises(Interrupted):
        train(model, LLAMA, tmp_path, callbacks=callbacks, max_steps=old, save_strategy="steps", save_steps=stop)
    checkpoint, fresh = str(tmp_path / f"checkpoint-{stop}"), adapted(LLAMA, **FRACTIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The allocation of adapter")
        train(fresh, LLAMA, tmp_path, max_steps=new, resume=checkpoint)
    assert sum(get_rank_pattern(fresh).values()) == 28


# ---- stopping early ----


@pytest.mark.parametrize("step", [4, 5, 9, 14])
def test_an_early_stop_takes_the_last_decision(tmp_path: Path, step: int) -> None:
    model = adapted(LLAMA)
    callbacks = [RankAllocationCallback(log=False), StopAt(step, crash=False)]
    with pytest.warns(UserWarning, match=f"cut short at step {step}, before its end at step 15.*28 ranks"):
        train(model, LLAMA, tmp_path, callbacks=callbacks)
    assert sum(get_rank_pattern(model).values()) == 2 * modules_of(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path))
    assert_close(logits(loaded, LLAMA), logits(model, LLAMA), 1e-6)


def test_an_early_stop_in_warmup_raises(tmp_path: Path) -> None:
    callbacks = [RankAllocationCallback(log=False), StopAt(2, crash=False)]
    with pytest.raises(RuntimeError, match="never ran"):
        train(adapted(LLAMA), LLAMA, tmp_path, callbacks=callbacks)


def test_an_early_stop_after_a_resume_in_the_same_object_meets_the_budget(tmp_path: Path) -> None:
    """Going back to an earlier checkpoint to go on from there is not the same as loading the best model at the end."""
    model = adapted(LLAMA)
    with pytest.raises(Interrupted):
        callbacks = [RankAllocationCallback(log=False), StopAt(12)]
        train(model, LLAMA, tmp_path, callbacks=callbacks, save_strategy="steps", save_steps=4)
    callbacks = [RankAllocationCallback(log=False), StopAt(9, crash=False)]
    with pytest.warns(UserWarning, match="cut short at step 9"):
        train(model, LLAMA, tmp_path, callbacks=callbacks, resume=str(tmp_path / "checkpoint-8"))
    assert sum(get_rank_pattern(model).values()) == 2 * modules_of(model)
