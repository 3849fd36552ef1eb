# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Many small trainings on one GPU: each is captured into a CUDA graph and has a stream of its own."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, environment
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn

from peft_rank import SalientLoRAConfig
from peft_rank.allocation.salience import salience_scores
from peft_rank.orthogonality import orthogonality
from peft_rank.tuners.salientlora import allocator as salient_allocator


Scores = Callable[..., Tensor]
METHODS = ["lora", "rslora", "adalora", "salientlora"]


@dataclass(frozen=True)
class Spec:
    """One training of a study."""

    method: str
    task: str
    rank: int
    lr: float
    seed: int
    ablation: str = ""


def make_config(method: str, rank: int, steps: int, overrides: dict[str, Any], **common: Any) -> PeftConfig:
    """The configuration of a method that ends with `rank` on average, its other fields at their defaults or usual values.

    `overrides` are for SalientLoRA. LoRA has twice its rank for alpha, AdaLoRA starts at one and a half times its target and allocates between 10 % and
    60 % of the steps, as SalientLoRA does by default.
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
    kwargs = {"target_r": rank} | ({"init_r": 2 * rank} if rank > 15 else {})
    return SalientLoRAConfig(**common, **(kwargs | overrides))


# --- ablations: other scores in the place of the salience ---------------------------------------------------------------


def without_orthogonality(window: Tensor, regularizer: Tensor, sizes: list[int], **options: Any) -> Tensor:
    """Every step of the window weighs the same."""
    return salience_scores(window, torch.ones_like(regularizer), sizes, **options)


def without_influence(window: Tensor, regularizer: Tensor, sizes: list[int], **options: Any) -> Tensor:
    return salience_scores(window, regularizer, sizes, **(options | {"salience_lambda": 1.0}))


def magnitude_only(window: Tensor, regularizer: Tensor, sizes: list[int], **options: Any) -> Tensor:
    """The singular values as they are, no window."""
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


@contextmanager
def scored_by(scores: Scores | None) -> Iterator[None]:
    if scores is not None:
        salient_allocator.salience_scores = scores
    try:
        yield
    finally:
        salient_allocator.salience_scores = salience_scores


# --- one training -------------------------------------------------------------------------------------------------------


class GraphedTraining:
    """A training that is advanced a step at a time: AdamW, 6 % warm-up, then linear decay, bfloat16 autocast.

    Args:
        model (`PeftModel`): On its device.
        rows (`dict[str, Tensor]`): The training set, all rows of one shape.
        order (`Tensor`): Shape (steps, batch), the rows of each step.
        lr (`float`): Highest learning rate.
        scores (`Callable`, *optional*): Instead of the salience, for ablations.
    """

    def __init__(
        self, model: PeftModel, rows: dict[str, Tensor], order: Tensor, lr: float, scores: Scores | None = None
    ) -> None:
        self.model, self.rows, self.order, self.scores = model.train(), rows, order, scores
        self.done, self.steps, self.device = 0, len(order), order.device
        self.tuner = model.base_model
        config = model.active_peft_config
        self.salient, self.adalora = isinstance(config, SalientLoRAConfig), isinstance(config, AdaLoraConfig)
        if self.salient:
            self.tuner.resolve_schedule(self.steps)
            self.tuner._record = self._record_snapshot
        if self.adalora:
            allocator = self.tuner.rankallocator
            allocator.update_ipt = lambda model: None
            named = self.tuner.model.named_parameters()
            self.averaged = {n: p for n, p in named if "lora_" in n and allocator.adapter_name in n}
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.initial_parameters = sum(p.numel() for p in parameters)
        cuda = self.device.type == "cuda"
        self.peak_lr, self.lr = lr, torch.tensor(lr, device=self.device)
        self.optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0, capturable=cuda, fused=cuda)
        self.batch = {key: value[: order.shape[1]].clone() for key, value in rows.items()}
        self.stream = torch.cuda.Stream() if cuda else None
        self.graph = self._capture(parameters) if cuda else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def _work(self) -> None:
        """All of a step that touches every module, so that it can be replayed; only decisions are left out."""
        with self.autocast():
            loss = self.model(**self.batch).loss
        loss.backward()
        if self.salient:
            self.tuner.add_regularization_gradient()
        self.optimizer.step()
        if self.salient:
            layers = self.tuner.adapter_layers("default").values()
            with torch.no_grad():
                values = torch.cat([layer.masked_E("default") for layer in layers])
            self.snapshot = values, orthogonality(*self.tuner._factors("default"))
        if self.adalora:
            self._update_importance()

    def _record_snapshot(self, adapter_name: str) -> None:
        self.tuner.allocator(adapter_name).record([self.snapshot[0]], self.snapshot[1])

    def _update_importance(self) -> None:
        """AdaLoRA's moving averages, as its `update_ipt` has them: in place and for all factors together, without which
        they take most of the step."""
        allocator, parameters = self.tuner.rankallocator, self.averaged
        averages, deviations = allocator.exp_avg_ipt, allocator.exp_avg_unc
        for name, parameter in parameters.items():
            averages.setdefault(name, torch.zeros_like(parameter))
            deviations.setdefault(name, torch.zeros_like(parameter))
        with torch.no_grad():
            importance = torch._foreach_mul(list(parameters.values()), [p.grad for p in parameters.values()])
            torch._foreach_abs_(importance)
            averages, deviations = ([average[name] for name in parameters] for average in (averages, deviations))
            torch._foreach_lerp_(averages, importance, 1 - allocator.beta1)
            difference = torch._foreach_sub(importance, averages)
            torch._foreach_abs_(difference)
            torch._foreach_lerp_(deviations, difference, 1 - allocator.beta2)

    def _capture(self, parameters: list[nn.Parameter]) -> torch.cuda.CUDAGraph:
        if self.salient:
            for layer in self.tuner.adapter_layers("default").values():
                layer.set_mask("default", torch.ones(layer.salientlora_r["default"]))
        before = [p.detach().clone() for p in parameters]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                self._work()
                self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # an old graph that were collected while this one is captured would spoil it
        gc.disable()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._work()
        finally:
            gc.enable()
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)
            allocator = self.tuner.rankallocator if self.adalora else None
            averages = (allocator.exp_avg_ipt, allocator.exp_avg_unc) if self.adalora else ()
            for state in (*self.optimizer.state.values(), *averages):
                for value in state.values():
                    value.zero_()
        torch.cuda.synchronize()
        return graph

    def step(self) -> None:
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for key, value in self.rows.items():
                torch.index_select(value, 0, self.order[self.done], out=self.batch[key])
            progress = self.done / self.steps
            self.lr.fill_(self.peak_lr * min(progress / 0.06, (1 - progress) / 0.94))
            self.done += 1
            if self.graph is None:
                self._work()
            else:
                self.graph.replay()
            if self.salient or self.adalora:
                with scored_by(self.scores):
                    self.tuner.update_and_allocate(self.done)
            if self.graph is None:
                self.optimizer.zero_grad(set_to_none=True)

    def finish(self) -> dict[str, Any]:
        """Finalizes the adapter, sets the model to evaluation, and returns what the training was."""
        if self.stream:
            self.stream.synchronize()
        total = None
        if self.salient:
            self.tuner.finalize()
            total = self.tuner.rank_summary()["rank/total"]
        self.model.eval()
        return {
            "steps": self.steps,
            "initial_parameters": self.initial_parameters,
            "final_parameters": _kept_parameters(self.model),
            "total_rank": total,
        }


def _kept_parameters(model: PeftModel) -> int:
    """Trainable parameters that are left: AdaLoRA keeps its pruned ranks, which its rank pattern marks."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pattern = model.active_peft_config.rank_pattern
    if isinstance(model.active_peft_config, AdaLoraConfig):
        for key, kept in (pattern or {}).items():
            layer = model.base_model.model.get_submodule(key.removesuffix(".lora_E.default"))
            count -= kept.count(False) * (1 + layer.in_features + layer.out_features)
    return count


# --- a study ------------------------------------------------------------------------------------------------------------


def run_together(starts: Iterable[Callable[[], GraphedTraining]], streams: int) -> Iterator[GraphedTraining]:
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


class Study:
    """All methods, ranks and tasks over the grid of learning rates with the first seed, then at the best rate of each
    method and rank (by the mean over the tasks) with the other seeds. One line a training is appended to the output.

    Args:
        args (`Namespace`): Of `study_parser`.
        start (`Callable`): Builds the training of a `Spec`; its `finish` returns a row with `metric`.
        sign (`int`, *optional*): -1 where the lower metric is the better one.
    """

    def __init__(self, args: argparse.Namespace, start: Callable[[Spec], GraphedTraining], sign: int = 1) -> None:
        self.args, self.start, self.sign = args, start, sign
        self.rows: list[dict[str, Any]] = []

    def run(self, tasks: list[str], ablations: list[str]) -> None:
        args, started = self.args, time.perf_counter()
        torch.set_float32_matmul_precision("high")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        self._write({"environment": environment(), "arguments": vars(args)})
        cells = list(itertools.product(args.methods, args.ranks))
        first, others = args.seeds[0], args.seeds[1:]
        self._run([Spec(m, t, r, lr, first) for t in tasks for m, r in cells for lr in args.lrs])
        best = {cell: self._best_lr(*cell) for cell in cells}
        self._run([Spec(m, t, r, best[m, r], seed) for seed in others for t in tasks for m, r in cells])
        if "salientlora" in args.methods:
            r = args.ranks[0]
            runs = itertools.product(args.seeds, tasks, ablations)
            self._run([Spec("salientlora", t, r, best["salientlora", r], seed, name) for seed, t, name in runs])
        print(f"{args.name or 'default'}: {len(self.rows)} trainings in {time.perf_counter() - started:.0f} s")

    def _run(self, specs: list[Spec]) -> None:
        for training in run_together([partial(self.start, spec) for spec in specs], self.args.streams):
            self.rows.append({**training.finish(), "name": self.args.name})
            self._write(self.rows[-1])

    def _write(self, row: dict[str, Any]) -> None:
        with self.args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")

    def _best_lr(self, method: str, rank: int) -> float:
        runs = [r for r in self.rows if (r["method"], r["rank"]) == (method, rank)]
        return max(self.args.lrs, key=lambda lr: self.sign * sum(r["metric"] for r in runs if r["lr"] == lr))


def study_parser(description: str, name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory or a name on the Hub")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.jsonl")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--ranks", nargs="+", type=int)
    parser.add_argument("--lrs", nargs="+", type=float)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--overrides", type=json.loads, default={}, help="JSON fields for SalientLoRA's configuration")
    parser.add_argument("--name", default="", help="label of a variant, stored with its rows")
    parser.add_argument("--streams", type=int, default=6, help="trainings at a time on one GPU")
    return parser
