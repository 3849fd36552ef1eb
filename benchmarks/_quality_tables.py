# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Tables of the studies of quality: files of one training a line, as `_trainings.Study` writes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any


NAMES = {"lora": "LoRA", "rslora": "rsLoRA", "adalora": "AdaLoRA", "salientlora": "SalientLoRA"}
Runs = dict[tuple, dict[str, dict[str, Any]]]  # (rank, method, variant, lr, seed) -> task -> row


def read_study(path: Path) -> tuple[dict[str, Any], Runs, list[str]]:
    """The first line, which says where and with what arguments, the runs that are complete over all tasks, and the tasks."""
    head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "method" in row]
    runs: Runs = {}
    for row in rows:
        key = (row["rank"], row["method"], row["variant"], row["lr"], row["seed"])
        runs.setdefault(key, {})[row["task"]] = row
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return head, {key: run for key, run in runs.items() if len(run) == len(tasks)}, tasks


def total(run: dict[str, dict[str, Any]]) -> float:
    """Mean over the tasks; a training that diverged counts as 0."""
    return mean(0.0 if math.isnan(row["metric"]) else row["metric"] for row in run.values())


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def cells(runs: Runs) -> list[tuple[int, str]]:
    """Ranks and methods, in the order of a table."""
    return sorted({key[:2] for key in runs}, key=lambda cell: (cell[0], list(NAMES).index(cell[1])))


def seeds(runs: Runs, *cell: Any) -> list[dict[str, dict[str, Any]]]:
    """The runs of a rank, method, variant and learning rate."""
    return [run for key, run in runs.items() if key[:4] == cell]


def grid(runs: Runs, digits: int) -> list[list[str]]:
    """The mean over tasks and seeds for every learning rate."""
    lrs = sorted({key[3] for key in runs})
    lines = []
    for rank, method in cells(runs):
        found = [seeds(runs, rank, method, "", lr) for lr in lrs]
        means = [f"{mean(map(total, each)):.{digits}f}" if each else "" for each in found]
        lines.append([rank, NAMES[method], *means])
    return [["final rank", "method", *(f"{lr:g}" for lr in lrs)], *lines]


def best(runs: Runs, tasks: list[str], sign: int, digits: int) -> list[list[str]]:
    """Every method at its best learning rate, then the ablations at the same: mean and deviation over the seeds."""
    lines = []
    for rank, method in cells(runs):
        lrs = {key[3] for key in runs if key[:3] == (rank, method, "")}
        lr = max(lrs, key=lambda rate: sign * mean(map(total, seeds(runs, rank, method, "", rate))))
        for variant in dict.fromkeys(key[2] for key in runs if key[:2] == (rank, method)):
            found = seeds(runs, rank, method, variant, lr)
            if not found:
                continue
            values = [spread([run[task]["metric"] for run in found], digits) for task in tasks if len(tasks) > 1]
            row = found[0][tasks[0]]
            parameters = [f"{row['initial_parameters']:,}", f"{row['final_parameters']:,}"]
            name = NAMES[method] + (f", {variant}" if variant else "")
            lines.append(
                [rank, name, f"{lr:g}", len(found), *values, spread(list(map(total, found)), digits), *parameters]
            )
    head = tasks if len(tasks) > 1 else []
    return [["final rank", "method", "rate", "seeds", *head, "mean", "parameters", "at the end"], *lines]


def epochs(result: dict[str, Any]) -> list[list[str]]:
    """The evaluations of an example's `results.json`, and what the adapter was at the end."""
    (run,) = result["runs"]
    parameters = run["trainable_parameters"]
    lines = [
        [row["step"], f"{row['loss']:.4f}", f"{row['mean_token_accuracy']:.4f}", "", ""] for row in run["history"]
    ]
    lines = list({line[0]: line for line in lines}.values())  # the last one is evaluated twice
    lines[-1][3:] = [run["total_rank"], f"{parameters['end']:,} of {parameters['start']:,}"]
    return [["step", "validation loss", "token accuracy", "total rank", "parameters"], *lines]
