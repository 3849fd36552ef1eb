# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""A study of quality: methods, ranks, tasks and variants over a grid of learning rates, trained in stacks."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, Deadline, environment, gpu_pool
from _stacked import Losses, Scores, StackedTraining
from _stacked_parts import share
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_rank import SalientLoRAConfig
from peft_rank.allocation.salience import salience_scores


TrainStack = Callable[[list["Spec"]], list[dict[str, Any]]]
MakeTrainer = Callable[[argparse.Namespace], TrainStack]
METHODS = ["lora", "rslora", "adalora", "salientlora"]


@dataclass(frozen=True)
class Spec:
    """One training of a study. `variant` is for SalientLoRA: an ablation, or a key of --variants."""

    method: str
    task: str
    rank: int
    lr: float
    seed: int
    variant: str = ""


def make_config(method: str, rank: int, steps: int, overrides: dict[str, Any], **common: Any) -> PeftConfig:
    """The configuration of a method that ends with `rank` on average, its other fields at their defaults or usual values.

    `overrides` are for SalientLoRA. LoRA has twice its rank for alpha, AdaLoRA starts at one and a half times its target
    and allocates between 10 % and 60 % of the steps, as SalientLoRA does by default.
    """
    kwargs: dict[str, Any]
    if method in ("lora", "rslora"):
        kwargs = {"r": rank, "lora_alpha": 2 * rank, "use_rslora": method == "rslora"}
        return LoraConfig(**common, **kwargs)
    if method == "adalora":
        init = rank * 3 // 2
        kwargs = {"init_r": init, "target_r": rank, "lora_alpha": 2 * init, "deltaT": 10, "total_step": steps}
        kwargs |= {"tinit": steps // 10, "tfinal": steps * 2 // 5}
        return AdaLoraConfig(**common, **kwargs)
    kwargs = {"target_r": rank, "init_r": 15 if rank < 15 else 2 * rank} | overrides
    if "scale" in kwargs:
        kwargs["lora_alpha"] = kwargs.pop("scale") * kwargs["init_r"]
    return SalientLoRAConfig(**common, **kwargs)


# --- ablations: other scores in the place of the salience ---------------------------------------------------------------


def without_orthogonality(window: Tensor, regularizer: Tensor, sizes: list[int], **options: Any) -> Tensor:
    """Every step of the window weighs the same."""
    return salience_scores(window, torch.ones_like(regularizer), sizes, **options)


def without_influence(window: Tensor, regularizer: Tensor, sizes: list[int], **options: Any) -> Tensor:
    return salience_scores(window, regularizer, sizes, **(options | {"salience_lambda": 1.0}))


def magnitude_only(window: Tensor, regularizer: Tensor, sizes: list[int], **options: Any) -> Tensor:
    """The values as they are, no window."""
    return window[-1].abs()


def random_ranks(window: Tensor, regularizer: Tensor, sizes: list[int], **options: Any) -> Tensor:
    generator = torch.Generator(window.device).manual_seed(window.shape[1])
    return torch.rand(window.shape[1], device=window.device, generator=generator)


def uniform_ranks(window: Tensor, regularizer: Tensor, sizes: list[int], **options: Any) -> Tensor:
    """The best by salience inside of each module, the same number everywhere."""
    scores = salience_scores(window, regularizer, sizes, **options)
    places = [part.argsort(descending=True).argsort() for part in scores.split(sizes)]
    return -torch.cat(places).float()


ABLATIONS: dict[str, Scores] = {
    "without orthogonality": without_orthogonality,
    "without influence": without_influence,
    "magnitude only": magnitude_only,
    "random ranks": random_ranks,
    "uniform ranks": uniform_ranks,
}


# --- one stack ----------------------------------------------------------------------------------------------------------


class StackTrainer(ABC):
    """Trains stacks of `Spec`s: what the studies have in common.

    Args:
        args (`Namespace`): Of `study_parser`.
        losses (`Callable`): As in `StackedTraining`.
        common (`dict`): Fields of every method's configuration.
    """

    def __init__(self, args: argparse.Namespace, losses: Losses, **common: Any) -> None:
        self.args, self.losses, self.common = args, losses, common
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @abstractmethod
    def base(self, spec: Spec) -> nn.Module:
        """The model to adapt, on the device; its modules are copied, its tensors shared."""

    @abstractmethod
    def rows(self, task: str) -> tuple[dict[str, Tensor], int, int]:
        """The training set on the device, the size of a batch, and the number of epochs."""

    @abstractmethod
    def evaluate(self, model: PeftModel, task: str) -> dict[str, float]:
        """`metric` and what else belongs into the row."""

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def overrides(self, spec: Spec) -> dict[str, Any]:
        return dict(self.args.variants.get(spec.variant, self.args.overrides))

    def _order(self, spec: Spec) -> Tensor:
        """(steps, batch): which rows each step takes."""
        rows, batch, epochs = self.rows(spec.task)
        count = len(rows["labels"])
        generator = torch.Generator(self.device).manual_seed(spec.seed)
        orders = [torch.randperm(count, device=self.device, generator=generator) for _ in range(epochs)]
        return torch.cat([order[: count // batch * batch] for order in orders]).view(-1, batch)

    def _model(self, spec: Spec, steps: int) -> PeftModel:
        overrides = self.overrides(spec)
        overrides.pop("lr_factors", None)
        base = share(self.base(spec))
        torch.manual_seed(spec.seed)
        return get_peft_model(base, make_config(spec.method, spec.rank, steps, overrides, **self.common))

    def __call__(self, specs: list[Spec]) -> list[dict[str, Any]]:
        start, task = time.perf_counter(), specs[0].task
        orders = torch.stack([self._order(spec) for spec in specs])
        training = StackedTraining(
            share(self.base(specs[0])),
            [self._model(spec, orders.shape[1]) for spec in specs],
            self.rows(task)[0],
            orders,
            [spec.lr for spec in specs],
            self.losses,
            [ABLATIONS.get(spec.variant) for spec in specs],
            [self.overrides(spec).get("lr_factors", {}) for spec in specs],
        )
        rows = training.run()
        with torch.no_grad(), self.autocast():
            metrics = [self.evaluate(model, task) for model in training.models]
        seconds = round((time.perf_counter() - start) / len(specs), 2)
        parts = zip(specs, rows, metrics, strict=True)
        return [{**asdict(spec), **row, **metric, "seconds": seconds} for spec, row, metric in parts]


_train: TrainStack | None = None  # of a process that trains for another


def _begin(make_trainer: MakeTrainer, args: argparse.Namespace) -> None:
    global _train
    torch.set_float32_matmul_precision("high")
    _train = make_trainer(args)


def _train_in_time(stack: list[Spec], deadline: Deadline) -> list[dict[str, Any]] | None:
    return None if deadline.left() <= 0 else _train(stack)


# --- a study ------------------------------------------------------------------------------------------------------------


class Study:
    """All methods, ranks and tasks over the grid of learning rates and all seeds; then the ablations of SalientLoRA at the
    first rank, at the rate of the best mean. One line a training is appended to the output. What an output of the same
    arguments already holds is not run again; that of others is renamed.

    Args:
        args (`Namespace`): Of `study_parser`.
        make_trainer (`Callable`): Makes of `args` what trains a stack of `Spec`s of one method, task and shape, and
            returns a row with `metric` for each.
        sign (`int`, *optional*): -1 where the lower metric is the better one.
    """

    def __init__(self, args: argparse.Namespace, make_trainer: MakeTrainer, sign: int = 1) -> None:
        self.args, self.make_trainer, self.sign = args, make_trainer, sign
        self.started, self.deadline, self.rows = time.perf_counter(), Deadline(args.seconds), []
        # the time limit and how many run at once change nothing in a row
        passing = ("output", "seconds", "together", "processes")
        kept = {key: value for key, value in vars(args).items() if key not in passing}
        self.arguments = json.loads(json.dumps(kept, default=str))

    def run(self, tasks: list[str], ablations: list[str]) -> None:
        args = self.args
        self._read()
        cells = [(m, r, v) for m in args.methods for r in args.ranks for v in self._variants(m)]
        runs = itertools.product(cells, tasks, args.lrs, args.seeds)
        self._run([Spec(m, t, r, lr, seed, v) for (m, r, v), t, lr, seed in runs])
        if "salientlora" in args.methods and not args.variants:
            r = args.ranks[0]
            lr = self._best_lr("salientlora", r)
            runs = itertools.product(tasks, ablations, args.seeds)
            self._run([Spec("salientlora", t, r, lr, seed, name) for t, name, seed in runs])
        print(f"{len(self.rows)} trainings, {time.perf_counter() - self.started:.0f} s")

    def _variants(self, method: str) -> list[str]:
        return list(self.args.variants) if method == "salientlora" and self.args.variants else [""]

    def _run(self, specs: list[Spec]) -> None:
        done = {Spec(*(row[name] for name in Spec.__dataclass_fields__)) for row in self.rows}
        stacks = list(self._stacks([spec for spec in specs if spec not in done]))
        for rows in self._trained(stacks):
            if rows is None:
                raise SystemExit("The time is up. Run the same command again to go on.")
            for row in rows:
                self.rows.append(row)
                self._write(row)

    @cached_property
    def _train(self) -> TrainStack:
        """What trains in this process, made when it is needed."""
        torch.set_float32_matmul_precision("high")
        return self.make_trainer(self.args)

    def _trained(self, stacks: list[list[Spec]]) -> Iterator[list[dict[str, Any]] | None]:
        """The rows of each stack, as they come; None for one that was not begun in time."""
        if self.args.processes == 1:
            yield from (None if self.deadline.left() <= 0 else self._train(stack) for stack in stacks)
            return
        # what one process does on the host, loading and evaluating, another hides behind its own steps
        with gpu_pool(self.args.processes, _begin, self.make_trainer, self.args) as pool:
            futures = [pool.submit(_train_in_time, stack, self.deadline) for stack in stacks]
            yield from (future.result() for future in as_completed(futures))

    def _stacks(self, specs: list[Spec]) -> Iterator[list[Spec]]:
        """Trainings of one shape, as many as may run at once."""
        shapes: dict[tuple, list[Spec]] = {}
        for spec in specs:
            width = self.args.variants.get(spec.variant, self.args.overrides).get("init_r")
            shapes.setdefault((spec.method, spec.rank, spec.task, width), []).append(spec)
        for group in shapes.values():
            for start in range(0, len(group), self.args.together):
                yield group[start : start + self.args.together]

    def _read(self) -> None:
        """What an earlier run of the same arguments left."""
        output = self.args.output
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            head, *rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
            if head["arguments"] == self.arguments:
                self.rows = rows
                return
            output.rename(output.with_suffix(".before"))
        self._write({"environment": environment(), "arguments": self.arguments})

    def _write(self, row: dict[str, Any]) -> None:
        with self.args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")

    def _best_lr(self, method: str, rank: int) -> float:
        runs = [r for r in self.rows if (r["method"], r["rank"], r["variant"]) == (method, rank, "")]
        totals = {lr: self.sign * sum(r["metric"] for r in runs if r["lr"] == lr) for lr in self.args.lrs}
        return max(totals, key=lambda lr: -math.inf if math.isnan(totals[lr]) else totals[lr])


def study_parser(description: str, name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory or a name on the Hub")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.jsonl")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--ranks", nargs="+", type=int)
    parser.add_argument("--lrs", nargs="+", type=float)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--overrides",
        type=json.loads,
        default={},
        help="JSON fields for SalientLoRA's configuration; `scale` stands for lora_alpha / init_r",
    )
    parser.add_argument(
        "--variants",
        type=json.loads,
        default={},
        help="JSON, name to fields: several such configurations; `lr_factors` gives factors of the rate for A, E and B",
    )
    parser.add_argument("--together", type=int, default=9, help="trainings at a time on one GPU")
    parser.add_argument("--processes", type=int, default=1, help="processes that train such stacks, on all GPUs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after this time")
    return parser
