# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Searches under the HF Trainer with RankAllocationCallback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import Trainer

from peft_rank import LowRankLinear, RankAllocationCallback, get_rank_pattern
from runs import Interrupted, StopAt, make_trainer
from runs import logits as outputs
from searches import METHODS, both_methods, every_method, masks, searched
from tiny_models import TinyModel


def _trainer(
    method: str, tiny: TinyModel, folder: Path, seed: int = 0, callbacks=(), log=False, **settings
) -> Trainer:
    arguments = {key: settings.pop(key) for key in list(settings) if key in ("max_steps", "save_steps", "save_strategy",
                 "gradient_accumulation_steps", "per_device_train_batch_size", "bf16")}  # fmt: skip
    model = searched(method, tiny, seed=seed, **settings)
    return make_trainer(
        model,
        tiny,
        folder,
        callbacks=[RankAllocationCallback(log=log), *callbacks],
        **{"learning_rate": METHODS[method][2], "max_steps": 8, **arguments},
    )


@both_methods
def test_a_search_from_start_to_finish(method: str, llama: TinyModel, tmp_path: Path, capsys) -> None:
    trainer = _trainer(method, llama, tmp_path, log=True, max_steps=24, tolerance=0.02)
    dense = outputs(llama.make_model(), llama)
    trainer.train()
    assert "search over 384 ranks of 14 modules" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines][:1] + [lines[-1]["event"]] == ["start", "end"]
    assert "decision" in [line["event"] for line in lines]
    logged = [line["search/ratio"] for line in lines if "search/ratio" in line]
    assert logged[0] == 1.0
    assert min(logged) <= 0.72
    # what users see is the model's own loss: about ln 64 for random weights, not twenty and more of compression
    assert all(entry["loss"] < 6 for entry in trainer.state.log_history if "loss" in entry)

    model = trainer.model
    assert any(isinstance(module, LowRankLinear) for module in model.get_base_model().modules())
    evaluated = outputs(model, llama)
    assert not torch.equal(evaluated, dense)
    assert lines[-1]["ranks"] == get_rank_pattern(model)
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(llama.make_model(), tmp_path / "adapter")
    assert torch.equal(outputs(again, llama), evaluated)

    # healing, with the very same kind of loop
    healing = make_trainer(model, llama, tmp_path / "healing", callbacks=[], max_steps=3)
    healing.train()
    assert not torch.equal(outputs(model, llama), evaluated)
    assert get_rank_pattern(model) == lines[-1]["ranks"]


@every_method
def test_resuming_equals_not_stopping(method: str, llama: TinyModel, tmp_path: Path) -> None:
    whole = _trainer(method, llama, tmp_path / "whole")
    whole.model.base_model.finalize = lambda *args, **kwargs: None  # to compare the masks that it ends with
    whole.train()
    folder = tmp_path / "parts"
    first = _trainer(method, llama, folder, save_strategy="steps", save_steps=5, callbacks=[StopAt(5)])
    with pytest.raises(Interrupted):
        first.train()
    second = _trainer(method, llama, folder, save_strategy="steps", save_steps=5, seed=1)
    second.model.base_model.finalize = lambda *args, **kwargs: None
    second.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    expected = masks(whole.model)
    for name, value in masks(second.model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


@both_methods
def test_resuming_without_the_search_is_refused(method: str, llama: TinyModel, tmp_path: Path) -> None:
    first = _trainer(method, llama, tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    first.remove_callback(RankAllocationCallback)
    with pytest.warns(UserWarning, match="never ran"):
        first.train()
    second = _trainer(method, llama, tmp_path)
    with pytest.raises(RuntimeError, match="resumes at step 2.*knows only its first 0 steps"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@both_methods
def test_patience_ends_the_training(method: str, llama: TinyModel, tmp_path: Path) -> None:
    trainer = _trainer(method, llama, tmp_path, target_ratio=0.9, tolerance=0.1, patience=2, max_steps=60)
    trainer.train()
    assert trainer.state.global_step < 60
    assert get_rank_pattern(trainer.model)


@both_methods
def test_accumulation_equals_one_batch(method: str, llama: TinyModel, tmp_path: Path) -> None:
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = _trainer(
            method, llama, tmp_path / str(size), max_steps=4,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.args.max_grad_norm = 0.0
        trainer.model.base_model.finalize = lambda *args, **kwargs: None
        trainer.train()
        runs.append(masks(trainer.model))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=0, atol=2e-3, msg=name)


@both_methods
def test_bfloat16_autocast(method: str, llama: TinyModel, tmp_path: Path) -> None:
    trainer = _trainer(method, llama, tmp_path, bf16=True)
    trainer.train()
    assert get_rank_pattern(trainer.model)


@both_methods
def test_two_targets_are_two_decisions(method: str, llama: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    trainer = _trainer(
        method,
        llama,
        tmp_path,
        log=True,
        target_ratio=[0.9, 0.7],
        tolerance=0.05,
        max_steps=30,
        snapshot_dir=str(folder),
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("decision") == 2
    large, small = (PeftModel.from_pretrained(llama.make_model(), folder / f"ratio-{r}") for r in (0.9, 0.7))
    assert set(get_rank_pattern(large).items()) != set(get_rank_pattern(small).items())
