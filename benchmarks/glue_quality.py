# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Quality at equal budget: SalientLoRA, LoRA, rsLoRA and PEFT's AdaLoRA on six GLUE tasks with a small encoder.

    python benchmarks/glue_quality.py --model sentence-transformers/all-MiniLM-L6-v2          # data from the Hub
    python benchmarks/glue_quality.py --model DIR --data DIR                                  # DIR/<task>/<split>.jsonl.gz

Every method gets the same grid of learning rates, seeds, steps and batches; the metric is that of the last epoch on the
validation split. The grid is run with the first seed; the rate with the best mean over the tasks is run with the others.
At the first of --ranks, SalientLoRA is then run with other scores in the place of the salience. Allocation runs for
real, with masks while training (a CUDA graph needs fixed shapes) and `finalize` at the end.

One line a training is appended to --output; `benchmarks/tables.py` makes the tables.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _trainings import ABLATIONS, GraphedTraining, Spec, Study, make_config, study_parser
from peft import get_peft_model
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
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
BATCH = 32


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

    @property
    def steps(self) -> int:
        return len(self.train["labels"]) // BATCH * self.task.epochs


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


class Training(GraphedTraining):
    """One training on one task."""

    def __init__(self, spec: Spec, data: Data, args: argparse.Namespace) -> None:
        self.spec, self.data, self.start = spec, data, time.perf_counter()
        torch.manual_seed(spec.seed)
        labels = 1 if data.task.metric == "correlation" else 2
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=labels, dtype=torch.float32, attn_implementation="sdpa"
        ).to(data.device)
        heads = ["classifier", "pooler"]
        config = make_config(
            spec.method,
            spec.rank,
            data.steps,
            args.overrides,
            target_modules=TARGETS,
            modules_to_save=heads,
            task_type="SEQ_CLS",
        )
        generator = torch.Generator(device=data.device).manual_seed(spec.seed)
        rows = len(data.train["labels"])
        epochs = [torch.randperm(rows, device=data.device, generator=generator) for _ in range(data.task.epochs)]
        order = torch.cat([epoch[: rows // BATCH * BATCH] for epoch in epochs]).view(-1, BATCH)
        super().__init__(get_peft_model(model, config), data.train, order, spec.lr, ABLATIONS.get(spec.ablation))

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        row = {**asdict(self.spec), **super().finish()}
        validation, logits = self.data.validation, []
        for start in range(0, len(validation["labels"]), 256):
            batch = {key: value[start : start + 256] for key, value in validation.items() if key != "labels"}
            with self.autocast():
                logits.append(self.model(**batch).logits.float().cpu())
        labels = validation["labels"].cpu().numpy()
        row["metric"] = score(self.data.task.metric, torch.cat(logits).numpy(), labels)
        row["seconds"] = round(time.perf_counter() - self.start, 1)
        return row


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__, "glue_quality")
    parser.add_argument("--data", type=Path, help="folder of <task>/<split>.jsonl.gz; the Hub's GLUE by default")
    parser.add_argument("--ablations", nargs="*", default=list(ABLATIONS), choices=list(ABLATIONS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.set_defaults(ranks=[2, 8], lrs=[1e-3, 2e-3, 4e-3])
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = cache(lambda task: Data(task, args.data, tokenizer, device))
    Study(args, lambda spec: Training(spec, data(spec.task), args)).run(args.tasks, args.ablations)


if __name__ == "__main__":
    main()
