# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Learned ranks of a language model beside fixed ones: ARS and L2LRC against uniform and spectral budgets.

    python benchmarks/learned_ranks.py --model DIR --data DIR          # DIR/<name>/<split>.jsonl.gz

Compresses the decoder's linears, by whitening unless told otherwise, with one set of statistics and one text for all
methods: what fixed ranks are calibrated on is what the searches draw their batches from. Measures perplexity on the first
tokens of the test text, zero-shot accuracy by length-normalised likelihood, the time of the search, and both again after
healing: some steps of plain training of the factors on the same text. Ranks are multiples of 8. Fixed ranks depend on no
seed, their healing does. Weights are in float32, searches and healing under bfloat16 autocast on a GPU. Searches start at
the spectral budget; their learning rate falls to a twentieth in the second half.

Every result is stored as soon as it is there; with --resume what is in the file is not measured again. With --seconds no
result is begun that would take longer than what is left, judged by those before it.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import Deadline, argument_parser, store, synchronize
from compression_quality import linears, perplexity, read_text, windows
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_rank import (
    AdaptiveRankSVDConfig,
    CalibrationStatistics,
    L2LRCConfig,
    LowRankConfig,
    calibrate,
    get_rank_pattern,
)
from peft_rank.decomposition import ITERATIVE, STATISTIC


METHODS = ("uniform", "spectral", "ars", "l2lrc")
TASKS = {"arc_easy": "test", "piqa": "validation", "hellaswag": "validation", "openbookqa": "test"}
RANK_MULTIPLE = 8
ESTIMATED_AFTER = 20  # steps
SEARCH = {"ars": AdaptiveRankSVDConfig, "l2lrc": L2LRCConfig}


# --- zero-shot accuracy ---


def questions(name: str, row: dict[str, Any]) -> tuple[str, list[str]]:
    """Context and possible continuations of an example, worded as lm-evaluation-harness words them."""
    if name == "arc_easy":
        return f"Question: {row['question']}\nAnswer:", [f" {choice}" for choice in row["choices"]]
    if name == "piqa":
        return f"Question: {row['goal']}\nAnswer:", [f" {row['sol1']}", f" {row['sol2']}"]
    if name == "openbookqa":
        return row["question"], [f" {choice}" for choice in row["choices"]]
    return _without_tags(row["ctx"]), [f" {_without_tags(ending)}" for ending in row["endings"]]


def _without_tags(text: str) -> str:
    for tag in ("[header]", "[step]", "[substeps]"):
        text = text.replace(tag, "")
    return " ".join(text.replace(" [title]", ".").replace("[title]", "").split())


def load_tasks(data: Path, names: list[str], limit: int, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """By task: tokens of every continuation behind its context, where it starts, its length in bytes."""
    tasks = {}
    for name in names:
        with gzip.open(data / name / f"{TASKS[name]}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in itertools.islice(file, limit)]
        tasks[name] = []
        for row in rows:
            context, choices = questions(name, row)
            start = len(tokenizer(context, add_special_tokens=False).input_ids)
            ids = [tokenizer(context + choice, add_special_tokens=False).input_ids for choice in choices]
            sizes = [len(choice.encode()) for choice in choices]
            tasks[name].append({"ids": ids, "start": start, "sizes": sizes, "label": row["label"]})
    return tasks


@torch.no_grad()
def accuracies(model: nn.Module, tasks: dict[str, list[dict[str, Any]]], batch: int = 64) -> dict[str, float]:
    """Percent of examples whose answer has the largest likelihood per byte."""
    model.eval()
    device = next(model.parameters()).device
    found = {}
    for name, examples in tasks.items():
        flat = [(i, j, ids) for i, example in enumerate(examples) for j, ids in enumerate(example["ids"])]
        flat.sort(key=lambda item: len(item[2]))
        scores = [[0.0] * len(example["ids"]) for example in examples]
        for start in range(0, len(flat), batch):
            part = flat[start : start + batch]
            length = max(len(ids) for _, _, ids in part)
            ids = torch.tensor([ids + [0] * (length - len(ids)) for _, _, ids in part], device=device)
            mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for _, _, ids in part], device=device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            likely = -nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            place = torch.arange(1, length, device=device)
            starts = torch.tensor([examples[i]["start"] for i, _, _ in part], device=device)[:, None]
            sums = (likely * (mask[:, 1:] * (place >= starts))).sum(1).tolist()
            for (i, j, _), value in zip(part, sums, strict=True):
                scores[i][j] = value / examples[i]["sizes"][j]
        right = sum(max(range(len(s)), key=s.__getitem__) == e["label"] for s, e in zip(scores, examples, strict=True))
        found[name] = round(100 * right / len(examples), 2)
    return found


# --- compression ---


class Study:
    """A model, its text on the device, and the statistics that all methods share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(self.device).eval()
        text = None if args.data is None else args.data / "wikitext2_raw"
        read = lambda split, tokens: windows(tokenizer, read_text(split, text), tokens, args.context).to(self.device)  # noqa: E731
        self.test, self.train = read("test", args.test_tokens), read("train", args.train_tokens)
        names = args.tasks if args.data is not None else []
        self.tasks = load_tasks(args.data, names, args.examples, tokenizer) if names else {}
        self.targets = list(linears(self.model))
        self.dense = sum(self.model.get_submodule(name).weight.numel() for name in self.targets)
        self._statistics: CalibrationStatistics | None = None

    def settings(self) -> dict[str, Any]:
        """What every compression has in common."""
        common = {"target_modules": self.targets, "rank_multiple": RANK_MULTIPLE}
        common["decomposition"] = self.args.decomposition
        if self._statistics is None:
            parts = self.train.split(self.args.batch)
            batches = [{"input_ids": ids, "labels": ids, "use_cache": False} for ids in parts]
            config = LowRankConfig(rank=1, **common)
            self._statistics = calibrate(self.model, batches, config=config, progress=False)
        return {**common, "statistics": self._statistics}

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            ids = self.train[torch.randint(len(self.train), (self.args.batch,), generator=generator).to(self.device)]
            yield {"input_ids": ids, "labels": ids, "use_cache": False}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def compress(self, method: str, ratio: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """The compressed model, plain, and what is to be said of it."""
        model, start = copy.deepcopy(self.model), time.perf_counter()
        if method in SEARCH:
            model, told = self._search(model, method, ratio, seed)
        else:
            config = LowRankConfig(ratio=ratio, allocation=method, **self.settings())
            model, told = get_peft_model(model, config), {}
        model.base_model.finalize()
        synchronize()
        pattern, model = get_rank_pattern(model), model.get_base_model().eval()
        modules = [model.get_submodule(name) for name in self.targets]
        kept = sum(p.numel() for module in modules for p in module.parameters() if p.dim() == 2)
        told |= {"kept": round(kept / self.dense, 5), "factorized": len(pattern)}
        return model, told | {"seconds": round(time.perf_counter() - start, 1)}

    def _search(self, model: nn.Module, method: str, ratio: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        args = self.args
        torch.manual_seed(seed)
        own = {"target_ratio": ratio, "seed": seed, "factor_cache": str(args.factor_cache)}
        config = SEARCH[method](**own, **self.settings(), **getattr(args, f"{method}_config"))
        model = get_peft_model(model, config).train()
        tuner = model.base_model
        tuner.resolve_schedule(args.steps)
        rate = getattr(args, f"{method}_lr")
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        deadline, step = Deadline(args.search_seconds), 0
        for step, batch in enumerate(self.batches(seed, args.steps), start=1):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, 2 * (1 - step / args.steps) + 0.05)
            with self.autocast():
                loss = model(**batch).loss
            loss.backward()
            tuner.add_regularization_gradient()
            optimizer.step()
            tuner.update_and_allocate(step, optimizer)
            optimizer.zero_grad()
            if step == ESTIMATED_AFTER:
                synchronize()
                each = (args.search_seconds - deadline.left()) / step
                print(
                    f"{method} {ratio} seed {seed}: {each:.3f} s a step, {each * args.steps:.0f} s expected",
                    flush=True,
                )
            if step % args.log_every == 0:
                told = {key: round(value, 4) for key, value in tuner.rank_summary().items()}
                print(f"{method} {ratio} seed {seed} step {step}: loss {loss.item():.3f}", told, flush=True)
            if deadline.left() <= 0:
                break
        told = {"steps": step, "lr": rate, "searched_ratio": round(tuner.rank_summary()["search/ratio"], 4)}
        return model, told

    def heal(self, model: nn.Module, seed: int) -> None:
        """Train the factors on the text of the search, and nothing else."""
        args = self.args
        model.requires_grad_(False).train()
        parameters = [
            p
            for name in self.targets
            for p in model.get_submodule(name).parameters()
            if p.dim() == 2 and not isinstance(model.get_submodule(name), nn.Linear)
        ]
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=args.heal_lr, weight_decay=0.0)
        for step, batch in enumerate(self.batches(1000 + seed, args.heal_steps)):
            progress = step / args.heal_steps
            for group in optimizer.param_groups:
                group["lr"] = args.heal_lr * min(1.0, progress / 0.05 + 0.01) * (1 - progress)
            with self.autocast():
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()

    def quality(self, model: nn.Module) -> dict[str, Any]:
        return {"perplexity": round(perplexity(model, self.test), 3), "accuracy": accuracies(model, self.tasks)}


def measure(study: Study, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for the dense model, and one for each method, ratio and seed."""
    args, deadline, longest = study.args, Deadline(study.args.seconds), {}
    known = {(row["method"], row.get("ratio"), row.get("seed")) for row in done if "error" not in row}
    if ("dense", None, None) not in known:
        yield {"method": "dense", **study.quality(study.model)}
    # the first seed of everything first
    for seed, ratio, method in itertools.product(args.seeds, args.ratios, args.methods):
        row: dict[str, Any] = {"method": method, "ratio": ratio, "seed": seed}
        if (method, ratio, seed) in known:
            continue
        if deadline.left() <= longest.get(method in SEARCH, 0.0):
            yield row | {"error": "out of time"}
            continue
        begun = deadline.left()
        model, told = study.compress(method, ratio, seed)
        row |= told | study.quality(model)
        if args.heal_steps:
            start = time.perf_counter()
            study.heal(model, seed)
            row["healed"] = study.quality(model) | {"seconds": round(time.perf_counter() - start, 1)}
        longest[method in SEARCH] = max(longest.get(method in SEARCH, 0.0), begun - deadline.left())
        yield row


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "learned_ranks")
    parser.add_argument("--model", required=True, help="causal language model, a directory or a name on the Hub")
    parser.add_argument("--data", type=Path, help="folder of <name>/<split>.jsonl.gz; without it no accuracies")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    closed = [method for method in STATISTIC if method not in ITERATIVE]
    parser.add_argument("--decomposition", default="whitening", choices=closed)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--test-tokens", type=int, default=20_480)
    parser.add_argument("--train-tokens", type=int, default=1_048_576, help="of calibration, search and healing")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--steps", type=int, default=400, help="of a search")
    parser.add_argument("--ars-lr", type=float, default=1e-3)
    parser.add_argument("--l2lrc-lr", type=float, default=5e-2)
    spectral = {"start": "spectral"}
    parser.add_argument("--ars-config", type=json.loads, default=spectral, help="further fields, as JSON")
    parser.add_argument("--l2lrc-config", type=json.loads, default=spectral, help="further fields, as JSON")
    cache = Path(tempfile.gettempdir(), "learned_ranks")
    parser.add_argument(
        "--factor-cache", type=Path, default=cache, help="folder for decomposed weights, 1 GB for this model"
    )
    parser.add_argument("--heal-steps", type=int, default=300, help="0: no healing")
    parser.add_argument("--heal-lr", type=float, default=1e-4)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--examples", type=int, default=500, help="of each task at the most")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--search-seconds", type=float, default=600, help="limit of one search")
    parser.add_argument("--seconds", type=float, default=3600, help="limit of all; what is missing then is stored so")
    parser.add_argument("--resume", action="store_true", help="keep what the result file holds, and go on")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_float32_matmul_precision("highest")
    left_out = ("output", "data", "resume", "seconds", "log_every", "factor_cache")
    settings = {key: value for key, value in vars(args).items() if key not in left_out}
    settings["model"] = Path(args.model).name
    rows: list[dict[str, Any]] = []
    if args.resume and args.output.is_file():
        rows = [row for row in json.loads(args.output.read_text())["rows"] if "error" not in row]
    for row in measure(Study(args), rows):
        rows.append(row)
        print(row, flush=True)
        store(args.output, rows, **settings)
    for (method, ratio), group in sorted(_grouped(rows).items()):
        print(f"{method:10s} {ratio}: perplexity {sum(group) / len(group):.2f} over {len(group)} runs")


def _grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, float], list[float]]:
    groups: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if math.isfinite(row.get("perplexity", math.nan)):
            groups.setdefault((row["method"], row.get("ratio", 1.0)), []).append(row["perplexity"])
    return groups


if __name__ == "__main__":
    main()
