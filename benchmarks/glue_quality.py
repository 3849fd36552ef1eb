# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Quality at equal budget: SalientLoRA, LoRA, rsLoRA and PEFT's AdaLoRA on six GLUE tasks with a small encoder.

    python benchmarks/glue_quality.py --model sentence-transformers/all-MiniLM-L6-v2          # data from the Hub
    python benchmarks/glue_quality.py --model DIR --data DIR                                  # DIR/<task>/<split>.jsonl.gz

Every method gets the same grid of learning rates, seeds, steps and batches; the metric is that of the last epoch on the
validation split. At the first of --ranks, SalientLoRA is then run with other scores in the place of the salience, at the
rate of the best mean over the tasks. Allocation runs for real, with masks while training (a CUDA graph needs fixed shapes)
and `finalize` at the end. Trainings of one shape share the frozen model's passes (`_stacked.py`).

One line a training is appended to --output; the same command goes on where it was stopped. `benchmarks/tables.py` makes
the tables.
"""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _trainings import ABLATIONS, Spec, StackTrainer, Study, study_parser
from peft import PeftModel
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@dataclass(frozen=True)
class Task:
    rows: int
    epochs: int
    length: int
    metric: str


TASKS = {
    "cola": Task(8_551, 4, 28, "matthews"),
    "mrpc": Task(3_668, 6, 80, "f1_accuracy"),
    "rte": Task(2_490, 6, 112, "accuracy"),
    "stsb": Task(5_749, 5, 48, "correlation"),
    "sst2": Task(16_000, 1, 40, "accuracy"),
    "qnli": Task(10_000, 1, 80, "accuracy"),
}
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
BATCH, EVALUATED = 32, 1024


class Data:
    """One task on the device: fixed-length token ids, so that every batch has one shape."""

    def __init__(self, name: str, data: Path | None, tokenizer: Any, device: str) -> None:
        self.name, self.task, self.device = name, TASKS[name], device
        self.train = self._tensors(_read(name, "train", data)[: self.task.rows], tokenizer)
        self.validation = self._tensors(_read(name, "validation", data), tokenizer)

    def _tensors(self, rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, torch.Tensor]:
        rows = [row for row in rows if row["label"] != -1]
        columns = [key for key, value in rows[0].items() if isinstance(value, str)]
        texts = [[row[column] for row in rows] for column in columns]
        encoded = tokenizer(
            *texts, padding="max_length", truncation=True, max_length=self.task.length, return_tensors="pt"
        )
        dtype = torch.float32 if self.task.metric == "correlation" else torch.long
        labels = torch.tensor([row["label"] for row in rows], dtype=dtype)
        return {key: value.to(self.device) for key, value in {**encoded, "labels": labels}.items()}


def _read(name: str, split: str, data: Path | None) -> list[dict[str, Any]]:
    if data is None:
        from datasets import load_dataset

        return list(load_dataset("nyu-mll/glue", name, split=split))
    with gzip.open(data / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def score(metric: str, logits: np.ndarray, labels: np.ndarray) -> float:
    """The task's official metric, in points."""
    predictions = logits.squeeze() if metric == "correlation" else logits.argmax(-1)
    value = {
        "matthews": lambda: matthews_corrcoef(labels, predictions),
        "accuracy": lambda: accuracy_score(labels, predictions),
        "f1_accuracy": lambda: (f1_score(labels, predictions) + accuracy_score(labels, predictions)) / 2,
        "correlation": lambda: (pearsonr(predictions, labels)[0] + spearmanr(predictions, labels)[0]) / 2,
    }[metric]()
    return round(100 * float(np.nan_to_num(value)), 3)  # a training that diverged has no correlation


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(K, batch, classes) and (K, batch) to (K,): cross-entropy, or the squared error where labels are real."""
    if labels.is_floating_point():
        return (logits.float().squeeze(-1) - labels).square().mean(1)
    return (
        functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        .view_as(labels)
        .mean(1)
    )


class Trainer(StackTrainer):
    def __init__(self, args: argparse.Namespace) -> None:
        heads = ["classifier", "pooler"]
        super().__init__(args, losses, target_modules=TARGETS, modules_to_save=heads, task_type="SEQ_CLS")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.data = cache(lambda task: Data(task, args.data, tokenizer, self.device))
        self._base = cache(self._load)

    def _load(self, classes: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)  # of the new head
        return AutoModelForSequenceClassification.from_pretrained(
            self.args.model, num_labels=classes, dtype=torch.float32, attn_implementation="sdpa"
        ).to(self.device)

    def base(self, spec: Spec) -> nn.Module:
        return self._base(1 if TASKS[spec.task].metric == "correlation" else 2, spec.seed)

    def rows(self, task: str) -> tuple[dict[str, Tensor], int, int]:
        return self.data(task).train, BATCH, TASKS[task].epochs

    def evaluate(self, model: PeftModel, task: str) -> dict[str, float]:
        validation, logits = self.data(task).validation, []
        labels = validation["labels"].cpu().numpy()
        for start in range(0, len(labels), EVALUATED):
            batch = {key: value[start : start + EVALUATED] for key, value in validation.items() if key != "labels"}
            logits.append(model(**batch).logits.float().cpu())
        return {"metric": score(TASKS[task].metric, torch.cat(logits).numpy(), labels)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__, "glue_quality")
    parser.add_argument("--data", type=Path, help="folder of <task>/<split>.jsonl.gz; the Hub's GLUE by default")
    parser.add_argument("--ablations", nargs="*", default=list(ABLATIONS), choices=list(ABLATIONS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.set_defaults(ranks=[2, 8], lrs=[1e-3, 2e-3, 4e-3])
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    Study(args, Trainer).run(args.tasks, args.ablations)


if __name__ == "__main__":
    main()
