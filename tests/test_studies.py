# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The programs behind the studies of quality: fair to every method, and their tables right."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import get_peft_model

from runs import assert_close
from tiny_models import TinyModel


STEPS, BATCH = 12, 4
WINDOWS = {"initial_window": 2, "final_window": 4}


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("_trainings")


def start(trainings: ModuleType, tiny: TinyModel, method: str, **options: object):
    torch.manual_seed(0)
    config = trainings.make_config(
        method, 2, STEPS, WINDOWS, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    order = torch.arange(BATCH).expand(STEPS, BATCH)
    return trainings.GraphedTraining(
        get_peft_model(tiny.make_model(), config), tiny.make_batch(BATCH), order, 1e-3, **options
    )


@pytest.mark.parametrize("method", ["lora", "rslora", "adalora", "salientlora"])
def test_every_method_ends_at_its_budget(trainings: ModuleType, method: str, llama: TinyModel) -> None:
    training = start(trainings, llama, method)
    for _ in range(STEPS):
        training.step()
    row = training.finish()
    layers = 2 * 2
    if method == "salientlora":
        assert row["total_rank"] == 2 * layers
    if method in ("lora", "rslora"):
        assert row["initial_parameters"] == row["final_parameters"]
    else:
        assert row["initial_parameters"] > row["final_parameters"]
    if method == "adalora":
        pattern = training.model.active_peft_config.rank_pattern
        assert sum(map(sum, pattern.values())) <= 2 * layers


def test_importance_of_adalora_is_that_of_peft(trainings: ModuleType, llama: TinyModel) -> None:
    training = start(trainings, llama, "adalora")
    allocator, model = training.tuner.rankallocator, training.tuner.model
    expected: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for _ in range(3):
        training._work()
        for name, parameter in training.averaged.items():
            ipt = (parameter * parameter.grad).abs().detach()
            average, deviation = expected.get(name, (torch.zeros_like(ipt), torch.zeros_like(ipt)))
            average = allocator.beta1 * average + (1 - allocator.beta1) * ipt
            deviation = allocator.beta2 * deviation + (1 - allocator.beta2) * (ipt - average).abs()
            expected[name] = average, deviation
    assert set(expected) == {n for n, _ in model.named_parameters() if "lora_" in n}
    for name, (average, deviation) in expected.items():
        assert_close(allocator.exp_avg_ipt[name], average, 1e-6)
        assert_close(allocator.exp_avg_unc[name], deviation, 1e-6)


def test_ablations_change_the_ranks_and_not_the_budget(trainings: ModuleType, llama: TinyModel) -> None:
    found = {}
    for name, scores in trainings.ABLATIONS.items():
        training = start(trainings, llama, "salientlora", scores=scores)
        for _ in range(STEPS):
            training.step()
        assert training.finish()["total_rank"] == 8
        layers = training.tuner.adapter_layers("default").values()
        found[name] = [layer.rank("default") for layer in layers]
    assert found["uniform ranks"] == [2, 2, 2, 2]
    assert len({tuple(ranks) for ranks in found.values()}) > 1
    from peft_rank.allocation.salience import salience_scores
    from peft_rank.tuners.salientlora import allocator

    assert allocator.salience_scores is salience_scores, "the salience must be back after an ablation"


def test_a_study_runs_the_grid_once_and_the_best_rate_with_all_seeds(trainings: ModuleType, tmp_path: Path) -> None:
    class Finished:
        steps = done = 1

        def __init__(self, spec) -> None:
            self.spec = spec

        def step(self) -> None:
            pass

        def finish(self) -> dict[str, object]:
            quality = {1e-3: 50.0, 2e-3: 60.0 + self.spec.seed}[self.spec.lr]
            counts = {"initial_parameters": 10, "final_parameters": 5}
            return {**vars(self.spec), "metric": quality, **counts}

    output = tmp_path / "study.jsonl"
    args = trainings.study_parser("", "x").parse_args(
        [
            "--model",
            "m",
            "--ranks",
            "2",
            "--lrs",
            "1e-3",
            "2e-3",
            "--methods",
            "lora",
            "salientlora",
            "--output",
            str(output),
        ]
    )
    trainings.Study(args, Finished).run(["a", "b"], ["random ranks"])
    rows = [json.loads(line) for line in output.read_text().splitlines()][1:]
    runs = {(row["method"], row["lr"], row["seed"], row["ablation"]) for row in rows}
    grid = {(m, lr, 0, "") for m in ("lora", "salientlora") for lr in (1e-3, 2e-3)}
    best = {(m, 2e-3, seed, "") for m in ("lora", "salientlora") for seed in (1, 2)}
    assert runs == grid | best | {("salientlora", 2e-3, seed, "random ranks") for seed in (0, 1, 2)}
    assert len(rows) == 2 * len(runs)

    tables = importlib.import_module("_quality_tables")
    _, complete, tasks = tables.read_study(output)
    assert tasks == ["a", "b"]
    lora = tables.best(complete, tasks, 1, 1)[1]
    assert lora == [2, "LoRA", "0.002", 3, "61.0 ± 1.0", "61.0 ± 1.0", "61.0 ± 1.0", "10", "5"]
    assert tables.grid(complete, 1)[1] == [2, "LoRA", "50.0", "60.0"]
    with output.open("a") as file:  # a run that is not complete over the tasks stays out
        file.write(json.dumps({**rows[0], "seed": 9}) + "\n")
    assert tables.read_study(output)[1].keys() == complete.keys()
