# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The programs behind the studies of quality: fair to every method, and their tables right."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional

from peft_rank import SalientLoRAConfig
from runs import assert_close
from tiny_models import TINY_MODELS, TinyModel


STEPS, BATCH = 20, 4
WINDOWS = {"initial_window": 2, "final_window": 4}
RATES = (1e-2, 3e-3)


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def trainings() -> ModuleType:
    return importlib.import_module("_trainings")


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(K, batch, classes) and (K, batch) to (K,)."""
    return torch.stack([functional.cross_entropy(*each) for each in zip(logits, labels, strict=True)])


def make_models(trainings: ModuleType, tiny: TinyModel, method: str) -> list[PeftModel]:
    """Two adapters of one model, heads included, which start differently."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        options = {"target_modules": ["query", "value"], "modules_to_save": ["pooler", "classifier"]}
        overrides = WINDOWS | {"orth_reg_weight": (0.3, 0.1)[seed]}
        config = trainings.make_config(method, 2, STEPS, overrides, task_type="SEQ_CLS", **options)
        models.append(get_peft_model(tiny.make_model(), config))
    return models


def stack(trainings: ModuleType, method: str, **options: Any) -> Any:
    tiny = TINY_MODELS["bert"]
    orders = torch.stack([torch.arange(STEPS * BATCH) % 12, torch.arange(STEPS * BATCH) % 11]).view(2, STEPS, BATCH)
    models = make_models(trainings, tiny, method)
    return trainings.StackedTraining(tiny.make_model(), models, tiny.make_batch(12), orders, RATES, losses, **options)


def train_alone(
    model: PeftModel, rows: dict[str, Tensor], order: Tensor, peak: float, factors: dict[str, float]
) -> None:
    """The loop as a user of PEFT writes it."""
    tuner, config = model.base_model, model.active_peft_config
    if isinstance(config, SalientLoRAConfig):
        tuner.resolve_schedule(STEPS)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = {name: next((k for k in "AEB" if f"lora_{k}." in name), "other") for name in named}
    groups = [{"params": [p], "factor": factors.get(kinds[name], 1.0)} for name, p in named.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    model.train()
    for step, indices in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = peak * group["factor"] * min(step / STEPS / 0.06, (1 - step / STEPS) / 0.94)
        model(**{key: value[indices] for key, value in rows.items()}).loss.backward()
        if isinstance(config, SalientLoRAConfig):
            tuner.add_regularization_gradient()
        optimizer.step()
        if isinstance(config, (SalientLoRAConfig, AdaLoraConfig)):
            tuner.update_and_allocate(step + 1)
        optimizer.zero_grad()


@pytest.mark.parametrize("factors", [{}, {"A": 0.5, "B": 4.0, "E": 2.0}], ids=["one rate", "rates"])
@pytest.mark.parametrize("method", ["lora", "rslora", "adalora", "salientlora"])
def test_a_stack_is_its_trainings_one_by_one(trainings: ModuleType, method: str, factors: dict[str, float]) -> None:
    training = stack(trainings, method, lr_factors=[{}, factors])
    alone = make_models(trainings, TINY_MODELS["bert"], method)
    before = copy.deepcopy(alone[1].state_dict())
    for model, order, lr, each in zip(alone, training.orders, RATES, [{}, factors], strict=True):
        train_alone(model, training.rows, order, lr, each)
    rows = training.run()
    for model, stacked, row in zip(alone, training.models, rows, strict=True):
        assert row["initial_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
        if method == "salientlora":
            model.base_model.finalize()
            assert row["total_rank"] == 2 * 4
        state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        others = stacked.state_dict()
        assert state.keys() <= others.keys()
        for name, value in state.items():
            assert_close(others[name], value, 2e-4)
        assert stacked.active_peft_config.rank_pattern == model.active_peft_config.rank_pattern
        assert (
            row["final_parameters"] < row["initial_parameters"] or "adalora" not in method and method != "salientlora"
        )
    moved = [name for name, value in before.items() if not torch.equal(alone[1].state_dict().get(name), value)]
    assert len(moved) >= 2 * 4


def test_a_stack_refuses_trainings_of_other_shapes(trainings: ModuleType) -> None:
    tiny = TINY_MODELS["bert"]
    models = make_models(trainings, tiny, "lora")[:1] + make_models(trainings, tiny, "adalora")[:1]
    orders = torch.zeros(2, STEPS, BATCH, dtype=torch.long)
    with pytest.raises(ValueError, match="Only trainings of one shape can be stacked"):
        trainings.StackedTraining(tiny.make_model(), models, tiny.make_batch(12), orders, RATES, losses)


def test_ablations_change_the_ranks_and_not_the_budget(trainings: ModuleType) -> None:
    found = {}
    for name, scores in trainings.ABLATIONS.items():
        training = stack(trainings, "salientlora", scores=[scores, None])
        assert [row["total_rank"] for row in training.run()] == [8, 8]
        layers = training.tuners[0].adapter_layers("default").values()
        found[name] = [layer.rank("default") for layer in layers]
    assert found["uniform ranks"] == [2, 2, 2, 2]
    assert len({tuple(ranks) for ranks in found.values()}) > 1
    from peft_rank.allocation.salience import salience_scores
    from peft_rank.tuners.salientlora import allocator

    assert allocator.salience_scores is salience_scores, "the salience must be back after an ablation"


def test_losses_of_the_studies_are_those_of_the_models() -> None:
    glue, instruct = (importlib.import_module(name) for name in ("glue_quality", "instruct_quality"))
    logits, labels = torch.randn(3, 5, 2), torch.randint(2, (3, 5))
    assert_close(glue.losses(logits, labels), losses(logits, labels), 1e-6)
    logits, labels = torch.randn(3, 5, 1), torch.randn(3, 5)
    assert_close(glue.losses(logits, labels), ((logits[..., 0] - labels) ** 2).mean(1), 1e-6)
    model, rows = TINY_MODELS["llama"].make_model(), TINY_MODELS["llama"].make_batch(6)
    rows["labels"][0, :7] = -100
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    parts = [{key: value[part] for key, value in rows.items()} for part in (slice(0, 3), slice(3, 6))]
    expected = torch.stack([model(**part).loss for part in parts])
    assert_close(instruct.losses(logits.unflatten(0, (2, 3)), rows["labels"].unflatten(0, (2, 3))), expected, 1e-5)


def test_a_study_runs_the_grid_once_and_the_best_rate_with_all_seeds(trainings: ModuleType, tmp_path: Path) -> None:
    stacks = []

    def train(specs: list) -> list[dict[str, object]]:
        assert len({(spec.method, spec.task, spec.rank) for spec in specs}) == 1
        stacks.append(len(specs))
        counts = {"initial_parameters": 10, "final_parameters": 5}
        quality = [{1e-3: 50.0, 2e-3: 60.0 + spec.seed}[spec.lr] for spec in specs]
        return [{**vars(spec), "metric": metric, **counts} for spec, metric in zip(specs, quality, strict=True)]

    output = tmp_path / "study.jsonl"
    options = ["--model", "m", "--ranks", "2", "--lrs", "1e-3", "2e-3", "--methods", "lora", "salientlora"]
    args = trainings.study_parser("", "x").parse_args([*options, "--output", str(output), "--together", "4"])
    trainings.Study(args, lambda args: train).run(["a", "b"], ["random ranks"])
    rows = [json.loads(line) for line in output.read_text().splitlines()][1:]
    runs = {(row["method"], row["lr"], row["seed"], row["variant"]) for row in rows}
    grid = {(m, lr, seed, "") for m in ("lora", "salientlora") for lr in (1e-3, 2e-3) for seed in (0, 1, 2)}
    assert runs == grid | {("salientlora", 2e-3, seed, "random ranks") for seed in (0, 1, 2)}
    assert len(rows) == 2 * len(runs)
    assert stacks == [4, 2] * 4 + [3] * 2

    # the same again adds nothing, a cut one goes on, another study does not mix with it
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:10]))
    trainings.Study(args, lambda args: train).run(["a", "b"], ["random ranks"])
    assert sorted(output.read_text().splitlines(keepends=True)) == sorted(lines)
    args.seconds = 0.0
    trainings.Study(args, lambda args: train).run(["a", "b"], ["random ranks"])
    args.overrides = {"init_r": 4}
    with pytest.raises(SystemExit, match="The time is up"):
        trainings.Study(args, lambda args: train).run(["a", "b"], ["random ranks"])
    assert len(output.read_text().splitlines()) == 1
    output.with_suffix(".before").replace(output)

    tables = importlib.import_module("_quality_tables")
    _, complete, tasks = tables.read_study(output)
    assert tasks == ["a", "b"]
    lora = tables.best(complete, tasks, 1, 1)[1]
    assert lora == [2, "LoRA", "0.002", 3, "61.0 ± 1.0", "61.0 ± 1.0", "61.0 ± 1.0", "10", "5"]
    assert tables.grid(complete, 1)[1] == [2, "LoRA", "50.0", "61.0"]
    with output.open("a") as file:  # a run that is not complete over the tasks stays out
        file.write(json.dumps({**rows[0], "seed": 9}) + "\n")
    assert tables.read_study(output)[1].keys() == complete.keys()


class FakeTrainer:
    """At the top of a module, so that other processes can have it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def __call__(self, specs: list) -> list[dict[str, object]]:
        counts = {"initial_parameters": 10, "final_parameters": 5, "process": os.getpid()}
        return [{**vars(spec), "metric": spec.lr, **counts} for spec in specs]


def test_processes_share_a_study(trainings: ModuleType, tmp_path: Path) -> None:
    options = ["--model", "m", "--ranks", "2", "--lrs", "1e-3", "--methods", "lora", "--processes", "2"]
    args = trainings.study_parser("", "x").parse_args([*options, "--output", str(tmp_path / "study.jsonl")])
    study = trainings.Study(args, FakeTrainer)
    study.run([str(task) for task in range(8)], [])
    assert len({(row["task"], row["seed"]) for row in study.rows}) == 8 * 3 == len(study.rows)
    assert os.getpid() not in {row["process"] for row in study.rows}
