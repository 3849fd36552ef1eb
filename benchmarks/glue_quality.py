# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Quality at equal budget: SalientLoRA, LoRA, rsLoRA and PEFT's AdaLoRA on six GLUE tasks with a small encoder.

    python benchmarks/glue_quality.py --model sentence-transformers/all-MiniLM-L6-v2          # data from the Hub
    python benchmarks/glue_quality.py --model DIR --data DIR                                  # DIR/<task>/<split>.jsonl.gz

Every method gets the same grid of learning rates, seeds, steps and batches; the metric is that of the last epoch on the
validation split. Many small trainings share one GPU: each is captured into a CUDA graph and has a stream of its own;
without CUDA they run one by one. Products are in bfloat16 under autocast. Allocation runs for real, with masks while
training (a graph needs fixed shapes) and `finalize` at the end.

One line a training is appended to --output; `benchmarks/tables.py` makes the tables.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, environment
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_rank import SalientLoRAConfig
from peft_rank.orthogonality import orthogonality


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
    "sst2": Task(16_000, 2, 40, "accuracy"),
    "qnli": Task(10_000, 2, 80, "accuracy"),
}
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
BATCH = 32


@dataclass(frozen=True)
class Spec:
    """One training."""

    method: str
    task: str
    rank: int
    lr: float
    seed: int
    overrides: dict[str, Any] = field(default_factory=dict, hash=False)


def make_config(spec: Spec, steps: int) -> PeftConfig:
    common = {"target_modules": TARGETS, "modules_to_save": ["classifier", "pooler"], "task_type": "SEQ_CLS"}
    r = spec.rank
    if spec.method == "lora":
        kwargs = {"r": r, "lora_alpha": 2 * r}
        return LoraConfig(**common, **(kwargs | spec.overrides))
    if spec.method == "rslora":
        kwargs = {"r": r, "lora_alpha": 2 * r, "use_rslora": True}
        return LoraConfig(**common, **(kwargs | spec.overrides))
    if spec.method == "adalora":
        init = r * 3 // 2
        kwargs = {"init_r": init, "target_r": r, "lora_alpha": 2 * init, "deltaT": 10, "total_step": steps}
        kwargs |= {"tinit": steps // 10, "tfinal": steps * 2 // 5}
        return AdaLoraConfig(**common, **(kwargs | spec.overrides))
    return SalientLoRAConfig(**common, **({"target_r": r} | spec.overrides))


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
    return round(100 * float(value), 3)


class Training:
    """One training that is advanced a step at a time."""

    def __init__(self, spec: Spec, data: Data, model_path: str) -> None:
        self.spec, self.data, self.done = spec, data, 0
        torch.manual_seed(spec.seed)
        labels = 1 if data.task.metric == "correlation" else 2
        model = AutoModelForSequenceClassification.from_pretrained(
            model_path, num_labels=labels, dtype=torch.float32, attn_implementation="sdpa"
        ).to(data.device)
        config = make_config(spec, data.steps)
        self.model = get_peft_model(model, config).train()
        self.tuner = self.model.base_model
        self.salient, self.adalora = isinstance(config, SalientLoRAConfig), isinstance(config, AdaLoraConfig)
        if self.salient:
            self.tuner.resolve_schedule(data.steps)
            self.tuner._record = self._record_snapshot
        if self.adalora:
            self.tuner.rankallocator.update_ipt = lambda model: None
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.initial_parameters = sum(p.numel() for p in parameters)
        cuda = data.device == "cuda"
        self.lr = torch.tensor(spec.lr, device=data.device)
        self.optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0, capturable=cuda, fused=cuda)
        generator = torch.Generator(device=data.device).manual_seed(spec.seed)
        rows = len(data.train["labels"])
        epochs = [torch.randperm(rows, device=data.device, generator=generator) for _ in range(data.task.epochs)]
        self.order = torch.cat([epoch[: rows // BATCH * BATCH] for epoch in epochs]).view(-1, BATCH)
        self.batch = {key: value[:BATCH].clone() for key, value in data.train.items()}
        self.stream = torch.cuda.Stream() if cuda else None
        self.graph = self._capture(parameters) if cuda else None
        self.start = time.perf_counter()

    def _work(self) -> None:
        """All of a step that touches every module, so that it can be replayed; only decisions are left out."""
        with torch.autocast(self.data.device, torch.bfloat16):
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
        """AdaLoRA's moving averages, which PEFT keeps in new tensors every step, in the same ones."""
        allocator = self.tuner.rankallocator
        averages = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)
        kept = [dict(average) for average in averages]
        type(allocator).update_ipt(allocator, self.model)
        for average, old in zip(averages, kept, strict=True):
            if old:
                torch._foreach_copy_(list(old.values()), [average[key] for key in old])
                average.update(old)

    def _capture(self, parameters: list[torch.nn.Parameter]) -> torch.cuda.CUDAGraph:
        if self.salient:
            for layer in self.tuner.adapter_layers("default").values():
                layer.set_mask("default", torch.ones(layer.salientlora_r["default"]))
        before = [p.detach().clone() for p in parameters]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                self._work()
                self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._work()
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)
            allocator = self.tuner.rankallocator if self.adalora else None
            averages = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc) if self.adalora else ()
            for state in (*self.optimizer.state.values(), *averages):
                for value in state.values():
                    value.zero_()
        torch.cuda.synchronize()
        return graph

    def step(self) -> None:
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            rows = self.order[self.done]
            for key, value in self.data.train.items():
                torch.index_select(value, 0, rows, out=self.batch[key])
            progress = self.done / self.data.steps
            self.lr.fill_(self.spec.lr * min(progress / 0.06, (1 - progress) / 0.94))
            self.done += 1
            if self.graph is None:
                self._work()
            else:
                self.graph.replay()
            if self.salient or self.adalora:
                self.tuner.update_and_allocate(self.done)
            if self.graph is None:
                self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        if self.stream:
            self.stream.synchronize()
        if self.salient:
            self.tuner.finalize()
        self.model.eval()
        validation, logits = self.data.validation, []
        for start in range(0, len(validation["labels"]), 256):
            batch = {key: value[start : start + 256] for key, value in validation.items() if key != "labels"}
            with torch.autocast(self.data.device, torch.bfloat16):
                logits.append(self.model(**batch).logits.float().cpu())
        labels = validation["labels"].cpu().numpy()
        total = self.tuner.rank_summary()["rank/total"] if self.salient else None
        return {
            **asdict(self.spec),
            "metric": score(self.data.task.metric, torch.cat(logits).numpy(), labels),
            "steps": self.data.steps,
            "initial_parameters": self.initial_parameters,
            "final_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "total_rank": total,
            "seconds": round(time.perf_counter() - self.start, 1),
        }


def run_all(specs: list[Spec], args: argparse.Namespace, output: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data: dict[str, Data] = {}
    waiting, running = list(specs), []
    while waiting or running:
        while waiting and len(running) < (args.streams if device == "cuda" else 1):
            spec = waiting.pop(0)
            if spec.task not in data:
                data[spec.task] = Data(spec.task, args.data, tokenizer, device)
            running.append(Training(spec, data[spec.task], args.model))
        for training in running:
            training.step()
        for training in [t for t in running if t.done == t.data.steps]:
            running.remove(training)
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**training.finish(), "name": args.name}) + "\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="encoder, a directory or a name on the Hub")
    parser.add_argument("--data", type=Path, help="folder of <task>/<split>.jsonl.gz; the Hub's GLUE by default")
    parser.add_argument("--output", type=Path, default=RESULTS / "glue_quality.jsonl")
    methods = ["lora", "rslora", "adalora", "salientlora"]
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--overrides", type=json.loads, default={}, help="JSON fields for the methods' configuration")
    parser.add_argument("--name", default="", help="label of a variant, stored with its rows")
    parser.add_argument("--streams", type=int, default=6, help="trainings at a time on one GPU")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # seeds last: an interrupted study is complete for the first ones
    grid = itertools.product(args.seeds, args.tasks, args.ranks, args.methods, args.lrs)
    specs = [Spec(method, task, r, lr, seed, args.overrides) for seed, task, r, method, lr in grid]
    with args.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"environment": environment(), "arguments": vars(args)}, default=str) + "\n")
    started = time.perf_counter()
    run_all(specs, args, args.output)
    print(f"{args.name or 'default'}: {len(specs)} trainings in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
