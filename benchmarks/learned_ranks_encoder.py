# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Learned ranks of compressed classifiers on GLUE, before and after training them again: table 1 of ARS in small.

    python benchmarks/learned_ranks_encoder.py --model sentence-transformers/all-MiniLM-L6-v2   # data from the Hub
    python benchmarks/learned_ranks_encoder.py --model DIR --data DIR                           # DIR/<task>/<split>.jsonl.gz

A small encoder is fine-tuned on each task. All linears of its encoder are then compressed to two ratios by SVD, FWSVD and
IWSVD, at the same part of every weight and at the ranks that ARS learns on 4,000 rows in 8 epochs, as in the paper, and
trained again. Searches start with all ranks, as in the paper, or with `--start spectral` at the ranks of the budget by
spectra. Ranks may have any value, embeddings stay as they are throughout, statistics are of the first rows of the training
set. The ratio counts the encoder's linears.

Every result is stored as soon as it is there; trainings share one GPU. With --resume what is in the file is not compressed
again; the dense classifiers are.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import Deadline, argument_parser, store
from fwsvd_glue import Training, linears, metric, run_together
from glue_quality import BATCH, TASKS, Data
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_rank import AdaptiveRankSVDConfig, CalibrationStatistics, LowRankConfig, calibrate, get_rank_pattern


DECOMPOSITIONS = ("svd", "fisher", "importance")
RANKS = ("uniform", "ars")


class Compression:
    """One fine-tuned classifier, its task, and statistics of it, each collected once."""

    def __init__(self, model: nn.Module, data: Data, args: argparse.Namespace, seed: int) -> None:
        self.model, self.data, self.args, self.seed = model, data, args, seed
        self.targets = list(linears(model))
        self.dense = sum(model.get_submodule(name).weight.numel() for name in self.targets)
        self._statistics: dict[str, CalibrationStatistics] = {}

    def settings(self, decomposition: str) -> dict[str, Any]:
        common = {"decomposition": decomposition, "target_modules": self.targets, "rank_multiple": 1}
        if decomposition not in self._statistics:
            rows = range(0, self.args.calibration_rows, BATCH)
            batches = [{key: value[i : i + BATCH] for key, value in self.data.train.items()} for i in rows]
            config = LowRankConfig(rank=1, **common)
            self._statistics[decomposition] = calibrate(self.model, batches, config=config, progress=False)
        return {**common, "statistics": self._statistics[decomposition]}

    def compressed(self, decomposition: str, ranks: str, ratio: float) -> tuple[nn.Module, dict[str, Any]]:
        """The compressed classifier, plain, and what is to be said of it."""
        settings, model, start = self.settings(decomposition), copy.deepcopy(self.model), time.perf_counter()
        if ranks == "ars":
            torch.manual_seed(self.seed)
            config = AdaptiveRankSVDConfig(target_ratio=ratio, start=self.args.start, seed=self.seed, **settings)
            model = get_peft_model(model, config)
            self._search(model)
        else:
            model = get_peft_model(model, LowRankConfig(ratio=ratio, **settings))
        model.base_model.finalize()
        pattern, model = get_rank_pattern(model), model.get_base_model()
        modules = [model.get_submodule(name) for name in self.targets]
        kept = sum(p.numel() for module in modules for p in module.parameters() if p.dim() == 2)
        told = {"kept": round(kept / self.dense, 5), "factorized": len(pattern)}
        return model, told | {"seconds": round(time.perf_counter() - start, 1)}

    def _search(self, model: nn.Module) -> None:
        args, data, tuner = self.args, self.data, model.train().base_model
        rows = min(args.search_rows, len(data.train["labels"]))
        generator = torch.Generator().manual_seed(self.seed)
        order = [torch.randperm(rows, generator=generator) for _ in range(args.search_epochs)]
        steps = torch.cat([epoch[: rows // BATCH * BATCH] for epoch in order]).view(-1, BATCH)[: args.search_steps]
        tuner.resolve_schedule(len(steps))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.search_lr)
        for step, chosen in enumerate(steps, start=1):
            batch = {key: value[chosen.to(data.device)] for key, value in data.train.items()}
            with torch.autocast(data.device, torch.bfloat16, enabled=data.device == "cuda"):
                loss = model(**batch).loss
            loss.backward()
            tuner.add_regularization_gradient()
            optimizer.step()
            tuner.update_and_allocate(step, optimizer)
            optimizer.zero_grad()
        told = {key: round(value, 4) for key, value in tuner.rank_summary().items()}
        print(f"{data.name} seed {self.seed} after {len(steps)} steps: loss {loss.item():.3f}", told, flush=True)


def identity(row: dict[str, Any]) -> str:
    return json.dumps([row[key] for key in ("task", "seed", "decomposition", "ranks", "ratio")])


def study(seed: int, data: dict[str, Data], args: argparse.Namespace, known: set[str]) -> Iterator[dict[str, Any]]:
    """Rows of one seed that are not known: the dense models, then every compressed one, which is yielded once more when it
    is trained."""
    deadline = Deadline(args.seconds)

    def dense(name: str) -> Training:
        torch.manual_seed(seed)
        labels = 1 if TASKS[name].metric == "correlation" else 2
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=labels, dtype=torch.float32, attn_implementation="sdpa"
        ).to(data[name].device)
        row = {"task": name, "seed": seed, "decomposition": "dense", "ranks": "full", "ratio": 1.0}
        return Training(model, data[name], args.lr, args.dense_epochs or TASKS[name].epochs, row)

    waiting = []
    for training in run_together([functools.partial(dense, name) for name in data], args.streams):
        training.model.zero_grad()
        yield training.row | {"before": metric(training.model, training.data)}
        waiting.append(Compression(training.model, training.data, args, seed))

    def again(model: nn.Module, task: Data, row: dict[str, Any]) -> Training:
        return Training(model, task, args.lr, args.epochs, row)

    for compression, ratio in itertools.product(waiting, args.ratios):
        starts = []
        for decomposition, ranks in itertools.product(args.decompositions, RANKS):
            task = compression.data
            row = {"task": task.name, "seed": seed, "decomposition": decomposition, "ranks": ranks, "ratio": ratio}
            if identity(row) in known:
                continue
            if deadline.left() <= 0:
                yield row | {"error": "out of time"}
                continue
            model, told = compression.compressed(decomposition, ranks, ratio)
            row |= told | {"before": metric(model, task)}
            yield row
            starts.append(functools.partial(again, model, task, row))
        for training in run_together(starts, args.streams):
            yield training.row | {"after": metric(training.model, training.data)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "learned_ranks_encoder")
    parser.add_argument("--model", required=True, help="encoder, a directory or a name on the Hub")
    parser.add_argument("--data", type=Path, help="folder of <task>/<split>.jsonl.gz; the Hub's GLUE by default")
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "stsb", "cola"], choices=list(TASKS))
    parser.add_argument("--decompositions", nargs="+", default=list(DECOMPOSITIONS), choices=DECOMPOSITIONS)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.48, 0.33])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=2, help="of training again")
    parser.add_argument("--dense-epochs", type=int, help="of fine-tuning; those of glue_quality.py by default")
    parser.add_argument("--calibration-rows", type=int, default=1024)
    parser.add_argument("--start", choices=["full", "spectral"], default="full", help="of a search, see its config")
    parser.add_argument("--search-lr", type=float, default=1e-3)
    parser.add_argument("--search-rows", type=int, default=4000)
    parser.add_argument("--search-epochs", type=int, default=8)
    parser.add_argument("--search-steps", type=int, default=1000, help="at the most")
    parser.add_argument("--streams", type=int, default=6, help="trainings at a time on one GPU")
    parser.add_argument("--seconds", type=float, default=1500, help="of a seed; what is missing then is stored so")
    parser.add_argument("--resume", action="store_true", help="keep what the result file holds, and go on")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = {name: Data(name, args.data, tokenizer, device) for name in args.tasks}
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "data", "seconds", "resume")}
    settings["model"] = Path(args.model).name
    rows: dict[str, dict[str, Any]] = {}
    if args.resume and args.output.is_file():
        rows = {identity(row): row for row in json.loads(args.output.read_text())["rows"] if "after" in row}
    finished = set(rows)
    for seed in args.seeds:
        for row in study(seed, data, args, finished):
            rows[identity(row)] = row
            print(row, flush=True)
            store(args.output, list(rows.values()), **settings)


if __name__ == "__main__":
    main()
