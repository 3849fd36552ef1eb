# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""`RankAllocationCallback`: the hooks, the regularizer's gradient, what is logged, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from trl import SFTConfig, SFTTrainer

from peft_rank import RankAllocationCallback, SalientLoRAConfig, get_rank_pattern
from peft_rank.callbacks import _unscale
from runs import (
    DECISIONS,
    STEPS,
    Interrupted,
    StopAt,
    adapted,
    assert_close,
    config,
    logits,
    make_trainer,
    modules_of,
    train,
    weights,
)
from tiny_models import TINY_MODELS, TinyModel, training_arguments


LLAMA = TINY_MODELS["llama"]
SCALARS = {
    "rank/total",
    "rank/mean",
    "rank/budget",
    "orthogonality",
    "allocation/window",
    "parameters/trainable",
}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Spy(TrainerCallback):
    """Runs a function of the model at a hook of the Trainer and keeps what it returns."""

    def __init__(self, hook: str, function: Any) -> None:
        self.seen: list[Any] = []
        setattr(self, hook, lambda args, state, control, **kwargs: self.seen.append(function(**kwargs)))


def factor_gradients(model: PeftModel, **kwargs: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def regularizer_in_training(tiny: TinyModel, folder: Path, *extra: TrainerCallback, **arguments: Any):
    """What the callback adds to the gradients before the first step, by parameter."""
    before, after = Spy("on_pre_optimizer_step", factor_gradients), Spy("on_pre_optimizer_step", factor_gradients)
    model = adapted(tiny, warmup_steps=0, allocation_steps=1, init_weights="gaussian")
    callbacks = [before, RankAllocationCallback(log=False), *extra, after]
    # the spies' order is the callbacks'
    train(model, tiny, folder, callbacks=callbacks, max_steps=1, **arguments)
    return {name: after.seen[0][name] - gradient for name, gradient in before.seen[0].items()}


def expected_regularizer(tiny: TinyModel, weight: float = 0.1) -> dict[str, torch.Tensor]:
    """Autograd of the formula, at the start of the training."""
    model = adapted(tiny, warmup_steps=0, allocation_steps=1, init_weights="gaussian")
    factors = {n: p for n, p in model.named_parameters() if "salientlora_A" in n or "salientlora_B" in n}
    total = 0.0
    for name, factor in factors.items():
        rows = factor if "salientlora_A" in name else factor.T
        total = total + (rows @ rows.T - torch.eye(len(rows))).norm()
    gradients = torch.autograd.grad(weight * total / len(factors), list(factors.values()))
    return dict(zip(factors, gradients, strict=True))


# ---- the regularizer ----

MICRO_BATCHES = {
    "8x1": {"per_device_train_batch_size": 8},
    "2x4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
}


@pytest.mark.parametrize("arguments", MICRO_BATCHES.values(), ids=MICRO_BATCHES.keys())
@pytest.mark.parametrize("name", ["llama", "deberta-v3"])
def test_the_regularizer_enters_once_whatever_the_micro_batches(name: str, arguments: dict, tmp_path: Path) -> None:
    added = regularizer_in_training(TINY_MODELS[name], tmp_path, **arguments)
    expected = expected_regularizer(TINY_MODELS[name])
    assert all(added[name].abs().max() > 1e-4 for name in expected)
    for key, gradient in added.items():
        assert_close(gradient, expected.get(key, torch.zeros_like(gradient)), 1e-6)


def test_the_regularizer_is_not_switched_off_by_label_smoothing(deberta: TinyModel, tmp_path: Path) -> None:
    added = regularizer_in_training(deberta, tmp_path, label_smoothing_factor=0.3)
    for key, gradient in expected_regularizer(deberta).items():
        assert_close(added[key], gradient, 1e-6)


def test_the_regularizer_does_not_depend_on_the_loss_function(llama: TinyModel, tmp_path: Path) -> None:
    seen = {}
    spies = [Spy("on_pre_optimizer_step", factor_gradients) for _ in range(2)]
    trainer = make_trainer(
        adapted(llama, warmup_steps=0, allocation_steps=1, init_weights="gaussian"),
        llama,
        tmp_path,
        callbacks=[spies[0], RankAllocationCallback(log=False), spies[1]],
        max_steps=1,
    )
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean()
    trainer.train()
    seen = {name: spies[1].seen[0][name] - gradient for name, gradient in spies[0].seen[0].items()}
    for key, gradient in expected_regularizer(llama).items():
        assert_close(seen[key], gradient, 1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_accumulation_equals_one_large_batch(name: str, tmp_path: Path) -> None:
    tiny, results = TINY_MODELS[name], []
    for key in ("8x1", "2x4"):
        model = adapted(tiny)
        train(model, tiny, tmp_path / key, **MICRO_BATCHES[key])
        results.append((get_rank_pattern(model), weights(model)))
    assert results[0][0] == results[1][0]
    assert_close(results[0][1], results[1][1], 1e-5)


def test_no_loss_is_ever_changed(tiny: TinyModel, tmp_path: Path) -> None:
    """In training and evaluation, with a regularizer that would be impossible to overlook."""
    # starts as the identity, and never learns
    model = adapted(tiny, orth_reg_weight=1000.0, warmup_steps=1, allocation_steps=3)
    batch = tiny.make_batch(8)
    plain = tiny.make_model()
    for mode in (True, False):
        assert_close(model.train(mode)(**batch).loss, plain.train(mode)(**batch).loss, 1e-6)
    trainer = make_trainer(model.train(), tiny, tmp_path, learning_rate=0.0, max_steps=5)
    trainer.train()
    own = Trainer(plain, training_arguments(tmp_path), eval_dataset=tiny.dataset(16, seed=1)).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own, abs=1e-6)
    reference = make_trainer(tiny.make_model(), tiny, tmp_path, callbacks=[], learning_rate=0.0, max_steps=5)
    reference.train()
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (trainer, reference)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_weight_zero_adds_nothing(llama: TinyModel) -> None:
    model = adapted(llama, orth_reg_weight=0.0)
    model(**llama.make_batch()).loss.backward()
    before = factor_gradients(model)
    model.base_model.add_regularization_gradient()
    assert_close(factor_gradients(model), before, 0)


# ---- when ----


def test_decisions_fall_after_the_steps_of_the_plan(llama: TinyModel, tmp_path: Path) -> None:
    totals = []
    spy = Spy("on_step_end", lambda model, **kwargs: totals.append(sum(get_rank_pattern(model).values())))
    train(adapted(llama), llama, tmp_path, callbacks=[RankAllocationCallback(log=False), spy])
    decisions = config(llama).schedule(STEPS, 56, 28).decisions()
    expected, budgets = 56, {d.step: d.budget for d in decisions}
    for step, total in enumerate(totals, start=1):
        expected = budgets.get(step, expected)
        assert total == expected, step


def test_fractions_are_resolved_from_the_real_number_of_steps(llama: TinyModel, tmp_path: Path) -> None:
    fractions = {"warmup_steps": None, "allocation_steps": None, "warmup_ratio": 0.25, "allocation_ratio": 0.5}
    model = adapted(llama, **fractions)
    # 64 examples, 2 x 4 a step: 8 steps an epoch
    arguments = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2}
    train(model, llama, tmp_path, callbacks=[RankAllocationCallback()], gradient_accumulation_steps=4, **arguments)
    decisions = [line["step"] for line in read(tmp_path / "ranks.jsonl") if line["event"] == "decision"]
    assert decisions and decisions[0] > 4 and decisions[-1] == 12


def test_neither_steps_nor_fractions_means_a_tenth_and_a_half(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama, warmup_steps=None, allocation_steps=None)
    train(model, llama, tmp_path, callbacks=[RankAllocationCallback()])
    assert "over steps 3-12" in read(tmp_path / "ranks.jsonl")[0]["plan"]


def test_a_schedule_that_does_not_fit_is_refused_before_the_first_step(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama, warmup_steps=10, allocation_steps=11)
    before = weights_quietly(model)
    with pytest.raises(ValueError, match="`total_steps`.*at least 21.*got 20"):
        train(model, llama, tmp_path)
    assert_close(weights_quietly(model), before, 0)


def weights_quietly(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "salientlora_" in name}


@pytest.mark.parametrize("total", [2, 3, 5, 7, 11])
def test_short_trainings_are_allocated(llama: TinyModel, tmp_path: Path, total: int) -> None:
    model = adapted(llama, warmup_steps=None, allocation_steps=None)
    train(model, llama, tmp_path, max_steps=total)
    assert sum(get_rank_pattern(model).values()) == 2 * modules_of(model)


def test_an_empty_data_set_is_refused_by_the_trainer(llama: TinyModel, tmp_path: Path) -> None:
    trainer = make_trainer(adapted(llama), llama, tmp_path, max_steps=-1, num_train_epochs=1)
    trainer.train_dataset = llama.dataset(0)
    with pytest.raises((ValueError, RuntimeError)):
        trainer.train()


# ---- skipped steps and loss scaling ----


class FakeOptimizer(AcceleratedOptimizer):
    """An optimizer whose steps are skipped when told so, as a scaler does at an overflow."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.scaler, self.skip = optimizer, None, False

    @property
    def step_was_skipped(self) -> bool:
        return self.skip


class SkipSteps(TrainerCallback):
    """Leaves out optimizer steps in a training: before the callback under test looks, the step counts as skipped."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        optimizer._is_overflow = state.global_step + 1 in self.steps


@pytest.fixture
def skippable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: self._is_overflow))


def test_a_skipped_step_delays_the_decision(llama: TinyModel, tmp_path: Path, skippable: None) -> None:
    callbacks = [SkipSteps(5, 6, 10), RankAllocationCallback()]
    model = adapted(llama)
    train(model, llama, tmp_path, callbacks=callbacks)
    lines = read(tmp_path / "ranks.jsonl")
    assert [line["step"] for line in lines if line["event"] == "decision"] == [7, 11, 15]
    assert sum(get_rank_pattern(model).values()) == 28


def test_a_skipped_step_is_not_recorded(llama: TinyModel, tmp_path: Path, skippable: None) -> None:
    callbacks = [SkipSteps(6, 8), RankAllocationCallback(log=False), StopAt(9)]
    model = adapted(llama)
    with pytest.raises(Interrupted):
        train(model, llama, tmp_path, callbacks=callbacks, save_strategy="steps", save_steps=9)
    assert model.base_model.allocator("default").recorded == 6 - 2  # of the steps 4 to 9


def test_a_skipped_last_decision_is_taken_at_the_end(llama: TinyModel, tmp_path: Path, skippable: None) -> None:
    model = adapted(llama)
    with pytest.warns(UserWarning, match="cut short at step"):
        train(model, llama, tmp_path, callbacks=[SkipSteps(15), RankAllocationCallback(log=False)], max_steps=15)
    assert sum(get_rank_pattern(model).values()) == 28


@pytest.mark.parametrize("skipped", [(8,), (7, 8), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_a_checkpoint_of_a_skipped_step_can_be_resumed(
    llama: TinyModel, tmp_path: Path, skippable: None, skipped: tuple[int, ...]
) -> None:
    callbacks = [SkipSteps(*skipped), RankAllocationCallback(log=False), StopAt(8)]
    with pytest.raises(Interrupted):
        train(adapted(llama), llama, tmp_path, callbacks=callbacks, save_strategy="steps", save_steps=8)
    model = adapted(llama)
    callbacks = [SkipSteps(), RankAllocationCallback(log=False)]
    train(model, llama, tmp_path, callbacks=callbacks, resume=str(tmp_path / "checkpoint-8"))
    assert sum(get_rank_pattern(model).values()) == 28


@pytest.mark.parametrize("clipped", [False, True], ids=["unclipped", "clipped"])
def test_gradients_are_unscaled_once_before_the_regularizer(clipped: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    wrapped = FakeOptimizer(optimizer)
    wrapped.scaler = scaler
    scaler.scale((parameter * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
    if clipped:
        scaler.unscale_(optimizer)
    _unscale(wrapped)
    assert_close(parameter.grad, torch.tensor([1.0, 2.0, 3.0]), 0)
    parameter.grad.add_(0.5)
    scaler.step(optimizer)
    scaler.update()
    assert_close(parameter.detach(), 1 - torch.tensor([1.5, 2.5, 3.5]), 0)


def test_an_overflow_is_still_seen_after_unscaling() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    wrapped = FakeOptimizer(optimizer)
    wrapped.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((parameter * math.inf).sum()).backward()
    _unscale(wrapped)
    parameter.grad.add_(0.5)
    scaler.step(optimizer)
    scaler.update()
    assert parameter.item() == 1 and scaler.get_scale() < 1024


def test_other_errors_of_the_scaler_are_not_hidden() -> None:
    def fail(optimizer: Any) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        wrapped = FakeOptimizer(None)
        wrapped.scaler = SimpleNamespace(unscale_=fail)
        _unscale(wrapped)


# ---- what is refused ----


def test_a_model_without_a_tuner_is_refused(llama: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="get_peft_model"):
        train(llama.make_model(), llama, tmp_path)


def test_another_peft_method_is_refused(llama: TinyModel, tmp_path: Path) -> None:
    model = get_peft_model(llama.make_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="no tuner that allocates"):
        train(model, llama, tmp_path)


def test_an_adapter_of_transformers_is_refused(llama: TinyModel, tmp_path: Path) -> None:
    model = llama.make_model()
    model.add_adapter(config(llama))
    with pytest.raises(RuntimeError, match="add_adapter.*get_peft_model"):
        train(model, llama, tmp_path)


# ---- twice ----


def test_added_twice_it_acts_once(llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    once = adapted(llama)
    train(once, llama, tmp_path / "once", callbacks=[RankAllocationCallback()])
    plan = next(line for line in capsys.readouterr().out.splitlines() if "decisions over steps" in line)
    same = RankAllocationCallback()
    for name, callbacks in {"two": [RankAllocationCallback(), RankAllocationCallback()], "same": [same, same]}.items():
        model = adapted(llama)
        train(model, llama, tmp_path / name, callbacks=callbacks)
        assert_close(weights(model), weights(once), 0)
        assert read(tmp_path / name / "ranks.jsonl") == read(tmp_path / "once" / "ranks.jsonl"), name
        assert capsys.readouterr().out.splitlines().count(plan) == 1, name


def test_one_callback_drives_one_training_after_another(llama: TinyModel, tmp_path: Path) -> None:
    callback = RankAllocationCallback()
    for seed in range(2):
        model = adapted(llama, seed=seed)
        train(model, llama, tmp_path, callbacks=[callback])
        assert sum(get_rank_pattern(model).values()) == 28


def test_it_can_be_given_as_a_class(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama)
    train(model, llama, tmp_path, callbacks=[RankAllocationCallback])
    assert sum(get_rank_pattern(model).values()) == 28


# ---- logging ----


def test_ranks_jsonl(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama)
    train(model, llama, tmp_path, callbacks=[RankAllocationCallback()], logging_steps=4)
    lines = read(tmp_path / "ranks.jsonl")
    events = [(line["event"], line["step"]) for line in lines]
    assert events == [
        ("start", 0),
        ("log", 4),
        ("decision", 5),
        ("log", 8),
        ("decision", 10),
        ("log", 12),
        ("decision", 15),
        ("log", 16),
        ("log", 20),
        ("end", 20),
    ]
    assert "56 -> 28 in 3 decisions" in lines[0]["plan"]
    for line in lines[1:]:
        assert line.keys() >= SCALARS
        assert ("ranks" in line) == (line["event"] != "log")
        assert line["rank/mean"] == line["rank/total"] / 14
        if "ranks" in line:
            assert sum(line["ranks"].values()) == line["rank/total"]
    budgets = [d.budget for d in config(llama).schedule(STEPS, 56, 28).decisions()]
    assert [line["rank/budget"] for line in lines if line["event"] == "decision"] == budgets
    assert [line["allocation/window"] for line in lines[1:]] == [2, 5, 5, 5, 5, 0, 0, 0, 0]
    assert lines[-1]["ranks"] == get_rank_pattern(model)
    trainable = [line["parameters/trainable"] for line in lines[1:]]
    assert trainable == sorted(trainable, reverse=True) and trainable[-1] < trainable[0]
    assert trainable[-1] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_ranks_jsonl_goes_on_after_a_resume(llama: TinyModel, tmp_path: Path) -> None:
    train(adapted(llama), llama, tmp_path / "a", callbacks=[RankAllocationCallback()])
    settings = {"save_strategy": "steps", "save_steps": 7}
    with pytest.raises(Interrupted):
        # what is logged between the checkpoint and the crash happens a second time
        train(adapted(llama), llama, tmp_path / "b", callbacks=[RankAllocationCallback(), StopAt(14)], **settings)
    checkpoint = str(tmp_path / "b" / "checkpoint-7")
    train(adapted(llama), llama, tmp_path / "b", callbacks=[RankAllocationCallback()], resume=checkpoint)
    whole, resumed = (read(tmp_path / name / "ranks.jsonl") for name in "ab")
    assert [(line["event"], line["step"]) for line in resumed if line["step"] != 7 or line["event"] != "start"] == [
        (line["event"], line["step"]) for line in whole
    ]
    assert resumed[-1]["ranks"] == whole[-1]["ranks"]
    assert [line["rank/total"] for line in resumed if line["event"] == "decision"] == [
        line["rank/total"] for line in whole if line["event"] == "decision"
    ]


@pytest.mark.parametrize("damage", [b'{"step": 3, "ev', b"\n", b"\0\0\0\n", b"\xff\n", b'{"event": "log"}\n', b"[]\n"])
def test_a_damaged_record_does_not_keep_a_training_from_resuming(
    damage: bytes, llama: TinyModel, tmp_path: Path
) -> None:
    callbacks = [RankAllocationCallback(), StopAt(8)]
    with pytest.raises(Interrupted):
        train(adapted(llama), llama, tmp_path, callbacks=callbacks, save_strategy="steps", save_steps=8)
    path = tmp_path / "ranks.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + damage)
    with pytest.warns(UserWarning, match=rf"1 of the .* lines in {path} are damaged"):
        train(
            adapted(llama),
            llama,
            tmp_path,
            callbacks=[RankAllocationCallback()],
            resume=str(tmp_path / "checkpoint-8"),
        )
    assert path.read_bytes().startswith(whole) and read(path)[-1]["event"] == "end"


def test_a_fresh_start_replaces_the_file(llama: TinyModel, tmp_path: Path) -> None:
    for _ in range(2):
        train(adapted(llama), llama, tmp_path, callbacks=[RankAllocationCallback()])
    assert [line["event"] for line in read(tmp_path / "ranks.jsonl")].count("start") == 1


def test_the_folder_of_the_file_can_be_chosen(llama: TinyModel, tmp_path: Path) -> None:
    callback = RankAllocationCallback(output_dir=str(tmp_path / "elsewhere" / "deep"))
    train(adapted(llama), llama, tmp_path / "out", callbacks=[callback])
    assert read(tmp_path / "elsewhere" / "deep" / "ranks.jsonl")
    assert not (tmp_path / "out" / "ranks.jsonl").exists()


def test_silent(llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trainer = train(adapted(llama), llama, tmp_path, callbacks=[RankAllocationCallback(log=False)], logging_steps=100)
    out = capsys.readouterr().out
    assert "decision" not in out and "ranks" not in out
    assert not list(tmp_path.glob("*.jsonl"))
    assert not any("rank/total" in entry for entry in trainer.state.log_history)


def test_the_plan_is_printed_once(llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(adapted(llama), llama, tmp_path, callbacks=[RankAllocationCallback()])
    out = capsys.readouterr().out
    assert out.count("56 -> 28 in 3 decisions over steps 4-15") == 1


def test_logging_through_the_trainer_reaches_history_and_tensorboard(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = make_trainer(
        adapted(llama),
        llama,
        tmp_path,
        callbacks=[],
        report_to=["tensorboard"],
        logging_steps=4,
        eval_strategy="steps",
    )
    trainer.add_callback(RankAllocationCallback(log=trainer.log))
    trainer.train()
    history = trainer.state.log_history
    ours = {entry["step"]: entry for entry in history if "rank/total" in entry}
    assert sorted(ours) == [4, 5, 8, 10, 12, 15, 16, 20]
    assert all(entry.keys() >= SCALARS for entry in ours.values())
    # the Trainer's own lines are neither swallowed nor repeated
    assert [entry["step"] for entry in history if "loss" in entry] == [4, 8, 12, 16, 20]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [4, 8, 12, 16, 20]
    (written,) = (tmp_path / "tb").rglob("events.out.tfevents.*")  # a log after the end would open a second file
    events = EventAccumulator(str(written))
    events.Reload()
    tags = events.Tags()["scalars"]
    for scalar in SCALARS:
        tag = next(tag for tag in tags if tag.endswith(scalar))
        assert len(events.Scalars(tag)) >= 8
    totals = [event.value for event in events.Scalars(next(tag for tag in tags if tag.endswith("rank/total")))]
    assert totals[0] == 56 and totals[-1] == 28


class Tracker(TrainerCallback):
    """Opens a run with the training, and closes it at its end, as trackers do."""

    def __init__(self) -> None:
        self.runs: list[list[dict[str, Any]]] = []
        self.is_open = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if not self.is_open:
            self.runs.append([])
            self.is_open = True
        self.runs[-1].append(dict(logs))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.is_open = False


BEST = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.filterwarnings("ignore:The allocation of adapter 'default' was cut short")
@pytest.mark.parametrize(
    ("stop", "arguments"),
    [(STEPS, {}), (7, {}), (STEPS, {**BEST, "load_best_model_at_end": True})],
    ids=["whole", "cut short", "best model"],
)
def test_trackers_see_the_end_before_they_close(
    llama: TinyModel, tmp_path: Path, stop: int, arguments: dict[str, Any]
) -> None:
    """One run that ends with the ranks of the adapter, which are told once."""
    model, tracker = adapted(llama), Tracker()
    trainer = make_trainer(
        model, llama, tmp_path, callbacks=[tracker, StopAt(stop, crash=False)], logging_steps=100, **arguments
    )
    trainer.add_callback(RankAllocationCallback(log=trainer.log))
    trainer.train()
    (run,) = tracker.runs
    totals = [entry["rank/total"] for entry in run if "rank/total" in entry]
    assert totals[-1] == sum(get_rank_pattern(model).values()) == 28
    assert len(totals) == len([step for step in DECISIONS if step <= stop]) + 1
    assert read(tmp_path / "ranks.jsonl")[-1]["rank/total"] == 28


def test_any_callable_can_log(llama: TinyModel, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    train(adapted(llama), llama, tmp_path, callbacks=[RankAllocationCallback(log=seen.append)], logging_steps=100)
    assert [entry["rank/total"] for entry in seen][-1] == 28 and len(seen) == len(DECISIONS) + 1
    assert all(entry.keys() == SCALARS for entry in seen)
    assert read(tmp_path / "ranks.jsonl")


# ---- other trainers ----


def test_seq2seq_trainer(tmp_path: Path) -> None:
    bart = TINY_MODELS["bart"]
    args = training_arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, max_steps=STEPS)
    model = adapted(bart)
    trainer = Seq2SeqTrainer(
        model,
        args,
        train_dataset=bart.dataset(),
        eval_dataset=bart.dataset(8, seed=1),
        callbacks=[RankAllocationCallback()],
    )
    trainer.train()
    assert sum(get_rank_pattern(model).values()) == 2 * modules_of(model)
    prediction = trainer.predict(bart.dataset(8, seed=1))
    assert prediction.predictions.shape[0] == 8 and math.isfinite(prediction.metrics["test_loss"])


# TRL's own configuration still sets an argument by its former name
FORMER_NAME = "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
SFT = {"max_steps": STEPS, "max_length": 16, "bf16": False}


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.filterwarnings(FORMER_NAME)
def test_sft_trainer(llama: TinyModel, tmp_path: Path) -> None:
    texts = [" ".join(f"w{(start + offset) % 16}" for offset in range(8)) for start in range(32)]
    args = training_arguments(tmp_path, SFTConfig, logging_steps=4, **SFT)
    model = adapted(llama)
    trainer = SFTTrainer(
        model, args=args, train_dataset=Dataset.from_dict({"text": texts}), processing_class=word_tokenizer()
    )
    trainer.add_callback(RankAllocationCallback(log=trainer.log))
    trainer.train()
    assert sum(get_rank_pattern(trainer.model).values()) == 2 * modules_of(trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(llama.make_model(), str(tmp_path / "saved"))
    assert_close(logits(loaded, llama), logits(trainer.model, llama), 1e-5)


@pytest.mark.filterwarnings(FORMER_NAME)
def test_sft_trainer_makes_the_adapter_itself(llama: TinyModel, tmp_path: Path) -> None:
    texts = [" ".join(f"w{(start + offset) % 16}" for offset in range(8)) for start in range(32)]
    args = training_arguments(tmp_path, SFTConfig, **SFT)
    trainer = SFTTrainer(
        llama.make_model(),
        args=args,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=word_tokenizer(),
        peft_config=config(llama),
        callbacks=[RankAllocationCallback()],
    )
    trainer.train()
    assert sum(get_rank_pattern(trainer.model).values()) == 2 * modules_of(trainer.model)


@pytest.mark.parametrize("by", ["trainer", "blocks"])
def test_compiled_training_shrinks_once(llama: TinyModel, tmp_path: Path, by: str) -> None:
    def make() -> PeftModel:
        settings = config(llama, target_modules=["q_proj", "down_proj"], warmup_steps=1, allocation_steps=8)
        return get_peft_model(llama.make_model(num_hidden_layers=1), settings)

    eager, shapes = make(), []
    start = {name: p.detach().clone() for name, p in eager.named_parameters()}
    train(eager, llama, tmp_path, max_steps=10)
    model = make()
    model.load_state_dict(start)
    spy = Spy("on_step_end", lambda model, **_: shapes.append(sum(p.numel() for p in model.parameters())))
    arguments = {"torch_compile": True, "torch_compile_backend": "eager"} if by == "trainer" else {}
    if by == "blocks":
        for block in model.get_base_model().model.layers:
            block.compile(backend="eager")
    arguments["max_steps"] = 10
    train(model, llama, tmp_path, callbacks=[RankAllocationCallback(log=False), spy], **arguments)
    assert len(set(shapes)) == 2 and shapes[-1] < shapes[0]
    assert sum(get_rank_pattern(model).values()) == 2 * modules_of(model)
    assert_close(weights(model), weights(eager), 1e-5)


def test_early_stopping_callback_does_not_stop_at_a_reset(llama: TinyModel, tmp_path: Path) -> None:
    """The best metric is forgotten at the end of the allocation: an evaluation after it is the first."""
    model = adapted(llama)
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    callbacks = [RankAllocationCallback(log=False), EarlyStoppingCallback(early_stopping_patience=2)]
    trainer = train(model, llama, tmp_path, callbacks=callbacks, **arguments)
    assert trainer.state.best_global_step > DECISIONS[-1]
    assert sum(get_rank_pattern(model).values()) == 28


def test_nothing_to_allocate_is_no_reason_to_complain(
    llama: TinyModel, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = adapted(llama, init_r=4, target_r=4, warmup_steps=None, allocation_steps=None)
    train(model, llama, tmp_path, callbacks=[RankAllocationCallback()])
    assert "no allocation" in read(tmp_path / "ranks.jsonl")[0]["plan"]
    model.save_pretrained(tmp_path)
    assert not [w for w in recwarn if "alloc" in str(w.message)]
    assert set(get_rank_pattern(model).values()) == {4}


def test_the_hooks_need_no_trainer_object(llama: TinyModel, tmp_path: Path) -> None:
    """State, control and arguments are all that a callback gets, whoever calls it."""
    model = adapted(llama, warmup_steps=0, allocation_steps=1)
    callback, state, control = RankAllocationCallback(log=False), TrainerState(max_steps=1), TrainerControl()
    args = training_arguments(tmp_path)
    optimizer = FakeOptimizer(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    make_trainer(model, llama, tmp_path)  # sets accelerate up
    hooks = {"args": args, "state": state, "control": control, "model": model, "optimizer": optimizer}
    callback.on_train_begin(**hooks)
    model(**llama.make_batch()).logits.square().mean().backward()
    callback.on_pre_optimizer_step(**hooks)
    optimizer.optimizer.step()
    callback.on_optimizer_step(**hooks)
    callback.on_train_end(**hooks)
    assert isinstance(model.peft_config["default"], SalientLoRAConfig)
    assert sum(get_rank_pattern(model).values()) == 28
