# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Compressed classifiers on GLUE, metric against rank, before and after training them again.

    python benchmarks/fwsvd_glue.py --model sentence-transformers/all-MiniLM-L6-v2          # data from the Hub
    python benchmarks/fwsvd_glue.py --model DIR --data DIR                                  # DIR/<task>/<split>.jsonl.gz
    python benchmarks/fwsvd_glue.py --draw                                                  # the picture again

A small encoder is fine-tuned on each task; all linears of its encoder are then replaced by factors of a fifth, two, three
and four fifths of the full rank, and trained again. Embeddings stay as they are throughout. Statistics are of the first
rows of the training set. Trainings share one GPU: each is captured into a CUDA graph and has a stream of its own.

Rows that --output holds are not measured again: what --seconds cut off goes on by the same command, with dense models that
are fine-tuned anew, the same but for rounding.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _common import Deadline, Results, argument_parser, captured
from glue_quality import BATCH, TASKS, Data, score
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_rank import LowRankConfig, calibrate
from peft_rank.decomposition import Factors, decompose
from peft_rank.decomposition.parallel import in_parallel
from peft_rank.tuners.lowrank import LowRankLinear


PICTURE = Path(__file__).parent.parent / "docs" / "fwsvd_glue.png"
METHODS = {  # what is drawn: label, color (Okabe and Ito's, for the colour-blind), marker
    "svd": ("SVD", "#000000", "o"),
    "fisher": ("FWSVD", "#E69F00", "s"),
    "em": ("EM", "#56B4E9", "^"),
    "nesterov": ("Nesterov", "#009E73", "v"),
    "anderson": ("Anderson", "#CC79A7", "D"),
    "whitening": ("whitening", "#D55E00", "P"),
}
FIFTHS = (1, 2, 3, 4)
KEY = ("task", "seed", "method", "fifths")
METRICS = {"cola": ("CoLA", "Matthews correlation"), "stsb": ("STS-B", "mean of Pearson's and Spearman's correlation")}


# --- trainings ---


class Training:
    """A training that is advanced a step at a time: AdamW, 6 % warm-up, then linear decay, bfloat16 autocast.

    Args:
        model (`torch.nn.Module`): A classifier on its device.
        data (`Data`): Its task.
        lr (`float`): Highest learning rate.
        epochs (`int`): Over the training set.
        row (`dict`): What the result is to be stored with.
    """

    def __init__(self, model: nn.Module, data: Data, lr: float, epochs: int, row: dict[str, Any]) -> None:
        self.model, self.data, self.lr, self.row, self.done = model.train(), data, lr, row, 0
        model.base_model.embeddings.requires_grad_(False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        cuda = data.device == "cuda"
        self.rate = torch.tensor(lr, device=data.device)
        self.optimizer = torch.optim.AdamW(parameters, lr=self.rate, weight_decay=0.01, capturable=cuda, fused=cuda)
        generator = torch.Generator(device=data.device).manual_seed(row["seed"])
        rows = len(data.train["labels"])
        order = [torch.randperm(rows, device=data.device, generator=generator) for _ in range(epochs)]
        self.order = torch.cat([epoch[: rows // BATCH * BATCH] for epoch in order]).view(-1, BATCH)
        self.steps = len(self.order)
        self.batch = {key: value[:BATCH].clone() for key, value in data.train.items()}
        self.stream = torch.cuda.Stream() if cuda else None
        self.work = self._captured(parameters) if cuda else self._work

    def _work(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # in a graph gradients are written, not added up
        with torch.autocast(self.data.device, torch.bfloat16):
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()

    def _captured(self, parameters: list[nn.Parameter]) -> Any:
        before = [p.detach().clone() for p in parameters]
        replay = captured(self._work, self.stream)
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        torch.cuda.synchronize()
        return replay

    def step(self) -> None:
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for key, value in self.data.train.items():
                torch.index_select(value, 0, self.order[self.done], out=self.batch[key])
            progress = self.done / self.steps
            self.rate.fill_(self.lr * min(progress / 0.06, (1 - progress) / 0.94))
            self.work()
            self.done += 1
            if self.done == self.steps and self.stream:
                self.stream.synchronize()


def run_together(starts: Iterable[Callable[[], Training]], streams: int) -> Iterator[Training]:
    """Advances up to `streams` trainings in turn (one by one without CUDA) and yields each as it is done."""
    waiting, running = deque(starts), []
    while waiting or running:
        while waiting and len(running) < (streams if torch.cuda.is_available() else 1):
            running.append(waiting.popleft()())
        for training in running:
            training.step()
        for training in [t for t in running if t.done == t.steps]:
            running.remove(training)
            yield training


@torch.no_grad()
def metric(model: nn.Module, data: Data) -> float:
    """Of the validation set, in points."""
    model.eval()
    validation, logits = data.validation, []
    for start in range(0, len(validation["labels"]), 256):
        batch = {key: value[start : start + 256] for key, value in validation.items() if key != "labels"}
        logits.append(model(**batch).logits.float().cpu())
    return score(data.task.metric, torch.cat(logits).numpy(), validation["labels"].cpu().numpy())


# --- compression ---


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The encoder's, by name."""
    encoder = model.base_model.encoder
    inside = {name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    prefix = f"{model.base_model_prefix}.encoder."
    return {prefix + name: model.get_submodule(prefix + name) for name in sorted(inside)}


def statistics(model: nn.Module, data: Data, rows: int, methods: list[str]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """By method, then by module: keyword arguments of `decompose`."""
    names = list(linears(model))
    batches = [{key: value[i : i + BATCH] for key, value in data.train.items()} for i in range(0, rows, BATCH)]
    given: dict[str, dict[str, dict[str, Tensor]]] = {"svd": {name: {} for name in names}}
    for method in ("fisher", "whitening"):
        config = LowRankConfig(rank=1, decomposition=method, target_modules=names)
        found = calibrate(model, batches, config=config, progress=False)
        given[method] = {
            name: {key: value.to(data.device) for key, value in found.for_module(name, method).items()}
            for name in names
        }
    return {method: given[method if method in given else "fisher"] for method in methods}


def compressed(model: nn.Module, factors: dict[str, Factors]) -> nn.Module:
    """A copy with factors in the place of its linears."""
    model = copy.deepcopy(model)
    for name, pair in factors.items():
        bias = model.get_submodule(name).bias
        model.set_submodule(name, LowRankLinear.from_factors(Factors(*(f.clone() for f in pair)), bias))
    return model


def missing(task: str, seed: int, args: argparse.Namespace, results: Results) -> list[dict[str, Any]]:
    """Beginnings of the rows of every rank and method that the file does not hold whole."""
    grid = itertools.product(FIFTHS, args.methods)
    rows = [{"task": task, "seed": seed, "method": method, "fifths": fifths} for fifths, method in grid]
    return [row for row in rows if "after" not in (results.find(row) or {})]


def cells(
    model: nn.Module, data: Data, args: argparse.Namespace, rows: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Factors]]]:
    """Rows with the factors of their rank and method."""
    weights = {name: linear.weight.detach() for name, linear in linears(model).items()}
    given = statistics(model, data, args.calibration_rows, args.methods)
    for row in rows:
        start, fifths, method = time.perf_counter(), row["fifths"], row["method"]
        ranks = {name: max(1, round(min(weight.shape) * fifths / 5)) for name, weight in weights.items()}
        factors = list(
            in_parallel(
                lambda name, method=method, ranks=ranks: decompose(
                    weights[name], ranks[name], method, max_iterations=args.iterations, **given[method][name]
                ),
                weights,
                args.workers,
            )
        )
        kept = sum(rank * sum(weights[name].shape) for name, rank in ranks.items())
        facts = {"kept": round(kept / sum(w.numel() for w in weights.values()), 4)}
        facts |= {"seconds": round(time.perf_counter() - start, 2)}
        yield row | facts, dict(zip(weights, factors, strict=True))


# --- the study ---


def study(seed: int, data: dict[str, Data], args: argparse.Namespace, results: Results, deadline: Deadline) -> None:
    """One seed: the dense models, then every compressed one, which is stored once more when it is trained."""
    todo = {name: rows for name in data if (rows := missing(name, seed, args, results))}
    if not todo or deadline.left() <= 0:
        return

    def dense(name: str) -> Training:
        torch.manual_seed(seed)
        labels = 1 if TASKS[name].metric == "correlation" else 2
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=labels, dtype=torch.float32, attn_implementation="sdpa"
        ).to(data[name].device)
        row = {"task": name, "seed": seed, "method": "dense", "fifths": 5, "kept": 1.0}
        return Training(model, data[name], args.lr, args.dense_epochs or TASKS[name].epochs, row)

    models = {}
    for training in run_together([functools.partial(dense, name) for name in todo], args.streams):
        training.model.zero_grad()
        models[training.data.name] = training.model
        if results.find(training.row) is None:
            results.add(training.row | {"before": metric(training.model, training.data)})
    waiting = []
    for name, model in models.items():
        for row, factors in cells(model, data[name], args, todo[name]):
            row["before"] = metric(compressed(model, factors), data[name])
            results.add(row)
            waiting.append((row, factors))

    def again(row: dict[str, Any], factors: dict[str, Factors]) -> Training:
        name = row["task"]
        return Training(compressed(models[name], factors), data[name], args.lr, args.epochs, row)

    begin = time.perf_counter()
    for start in range(0, len(waiting), args.streams):
        if deadline.left() <= 0:
            return
        starts = [functools.partial(again, *cell) for cell in waiting[start : start + args.streams]]
        for training in run_together(starts, args.streams):
            results.add(training.row | {"after": metric(training.model, training.data)})
        done, spent = min(start + args.streams, len(waiting)), time.perf_counter() - begin
        left = spent / done * (len(waiting) - done)
        print(f"{done} of {len(waiting)} trainings in {spent:.0f} s, at this pace {left:.0f} s more", flush=True)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A row of axes for each task, a column for before and after; lines are means over the seeds."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(10.5, 3.4 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), 2, sharey="row", squeeze=False)
    for (line, task), (column, stage) in itertools.product(enumerate(tasks), enumerate(("before", "after"))):
        axes = grid[line][column]
        dense = [row["before"] for row in rows if row["task"] == task and row["method"] == "dense"]
        axes.axhline(sum(dense) / len(dense), color="0.45", lw=1.2, ls="--", label="dense")
        for number, (method, (label, color, marker)) in enumerate(METHODS.items()):
            # beside each other, so that equal points can be told apart
            points = [(fifths + 0.04 * (number - 2.5), value) for fifths, value in means(rows, task, method, stage)]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, ms=5, lw=1.2, label=label)
        axes.set_xticks(FIFTHS, [f"{fifths}/5" for fifths in FIFTHS])
        axes.set_title(f"{METRICS[task][0]}, {stage} training again", fontsize=10, loc="left")
        axes.set_xlabel("rank / full rank", fontsize=9)
        axes.set_ylabel("" if column else METRICS[task][1], fontsize=9)
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def means(rows: list[dict[str, Any]], task: str, method: str, stage: str) -> list[tuple[int, float]]:
    """(fifths, mean over the seeds) of what has been measured."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["task"], row["method"]) == (task, method) and stage in row:
            found.setdefault(row["fifths"], []).append(row[stage])
    return [(fifths, sum(values) / len(values)) for fifths, values in sorted(found.items())]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "fwsvd_glue")
    parser.add_argument("--model", help="encoder, a directory or a name on the Hub")
    parser.add_argument("--data", type=Path, help="folder of <task>/<split>.jsonl.gz; the Hub's GLUE by default")
    parser.add_argument("--tasks", nargs="+", default=list(METRICS), choices=list(METRICS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=2, help="of training again")
    parser.add_argument("--dense-epochs", type=int, help="of fine-tuning; 4 for CoLA, 5 for STS-B by default")
    parser.add_argument("--calibration-rows", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=10, help="of EM, Nesterov and Anderson")
    parser.add_argument("--workers", type=int, default=8, help="modules that are decomposed at the same time on a GPU")
    parser.add_argument("--streams", type=int, default=6, help="trainings at a time on one GPU")
    parser.add_argument("--seconds", type=float, default=500, help="limit; no training is begun after that")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--draw", action="store_true", help="draw what --output holds, and measure nothing")
    args = parser.parse_args(argv)
    if not args.draw and args.model is None:
        parser.error("--model is needed")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.draw:
        draw(json.loads(args.output.read_text())["rows"], args.picture)
        return
    settings = {name: vars(args)[name] for name in ("lr", "epochs", "dense_epochs", "calibration_rows", "iterations")}
    results = Results(args.output, KEY, model=Path(args.model).name, **settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = {name: Data(name, args.data, tokenizer, device) for name in args.tasks}
    deadline = Deadline(args.seconds)
    for seed in args.seeds:
        study(seed, data, args, results, deadline)
    if left := sum(len(missing(name, seed, args, results)) for name in data for seed in args.seeds):
        print(f"Out of time: {left} rows are left. The same command goes on.")
    if find_spec("matplotlib") is not None:
        draw(results.rows, args.picture)


if __name__ == "__main__":
    main()
