# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Perplexity of a compressed language model: every decomposition, with uniform and spectral budgets, at three ratios.

    python benchmarks/compression_quality.py --model HuggingFaceTB/SmolLM2-135M             # WikiText-2 from the Hub
    python benchmarks/compression_quality.py --model DIR --data DIR                         # DIR/<split>.jsonl.gz

Compresses the decoder's linears, calibrated on the first tokens of the training text, without any training, and measures
on the first tokens of the test text, in windows without overlap. Ratios count the decoder's linears; ranks are multiples
of 8. Single precision throughout. Iterative decompositions stop after --iterations. Modules are decomposed several at a
time, because small ones keep a GPU waiting.

Rows that --output holds are not measured again: what --seconds cut off goes on by the same command.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import Deadline, Results, argument_parser
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_rank import CalibrationStatistics, LowRankConfig, calibrate
from peft_rank.allocation.parameters import comparable, parameter_budget, parameters, spectral_ranks, uniform_ranks
from peft_rank.calibration.statistics import statistic_for
from peft_rank.calibration.texts import CHARACTERS
from peft_rank.decomposition import ITERATIVE, STATISTIC, Factors, decompose, weighted_spectrum
from peft_rank.decomposition.parallel import in_parallel
from peft_rank.tuners.lowrank import LowRankLinear


ALLOCATIONS = ("uniform", "relative", "absolute")  # the latter: `allocation="spectral"` and its `spectral_loss`
KEY = ("decomposition", "allocation", "ratio")
RANK_MULTIPLE = 8
BATCH = 8


def read_text(split: str, data: Path | None) -> str:
    """All lines with an empty line between them, as perplexities on WikiText are usually taken."""
    if data is None:
        from datasets import load_dataset

        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    else:
        with gzip.open(data / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    return "\n\n".join(row["text"] for row in rows)


def windows(tokenizer: Any, text: str, tokens: int, context: int) -> Tensor:
    """(windows, context) token ids of the beginning of a text."""
    ids = tokenizer(text[: tokens * CHARACTERS], add_special_tokens=False, return_tensors="pt").input_ids[0]
    count = min(tokens, len(ids)) // context
    return ids[: count * context].view(count, context)


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Of every token but the first of each window, given those before it in the window."""
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    for batch in ids.split(BATCH):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").double()
    return math.exp(float(total) / ids[:, 1:].numel())


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The decoder's, by name; the head is not one of them."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }


@contextmanager
def compressed(model: nn.Module, factors: dict[str, Factors]) -> Iterator[None]:
    """The model with factors in the place of some of its linears."""
    dense = {name: model.get_submodule(name) for name in factors}
    for name, linear in dense.items():
        model.set_submodule(name, LowRankLinear.from_factors(factors[name], linear.bias))
    try:
        yield
    finally:
        for name, linear in dense.items():
            model.set_submodule(name, linear)


class Calibration:
    """Statistics by what they are of, each collected once and kept on the device."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.found: dict[str, CalibrationStatistics] = {}

    def arguments_for(self, method: str) -> dict[str, dict[str, Tensor]]:
        """Keyword arguments of `decompose` by module."""
        kind = statistic_for(method)
        names = list(linears(self.model))
        if kind is None:
            return {name: {} for name in names}
        if kind not in self.found:
            batches = [{"input_ids": ids, "labels": ids, "use_cache": False} for ids in self.ids.split(BATCH)]
            config = LowRankConfig(rank=1, decomposition=method, target_modules=names)
            statistics = self.found[kind] = calibrate(self.model, batches, config=config, progress=False)
            shared = {id(value): value.to(self.ids.device) for value in statistics.tensors[kind].values()}
            statistics.tensors[kind] = {name: shared[id(value)] for name, value in statistics.tensors[kind].items()}
        return {name: self.found[kind].for_module(name, method) for name in names}


def cells(args: argparse.Namespace, results: Results) -> list[dict[str, Any]]:
    """What is to be measured, and the file does not hold yet."""
    grid = itertools.product(args.decompositions, args.allocations, args.ratios)
    rows = [dict(zip(KEY, cell, strict=True)) for cell in grid]
    return [row for row in rows if results.find(row) is None]


def measure(
    model: nn.Module, ids: Tensor, calibration: Calibration, args: argparse.Namespace, results: Results
) -> None:
    """A row for the dense model, and one for every decomposition, budget and ratio that the file does not hold."""
    dense = {"decomposition": "dense", "perplexity": round(perplexity(model, ids), 3)}
    held = results.find(dense) or dense
    if not math.isclose(held["perplexity"], dense["perplexity"], rel_tol=1e-3):
        raise SystemExit(f"{args.output} is of another model or text: perplexity {held['perplexity']}, here {dense}.")
    results.add(held)
    todo, deadline, start = cells(args, results), Deadline(args.seconds), time.perf_counter()
    for method, rows in itertools.groupby(todo, key=lambda row: row["decomposition"]):
        if deadline.left() <= 0:
            break
        compress = compressor(model, method, calibration, args)
        for row in rows:
            if deadline.left() <= 0:
                break
            begin = time.perf_counter()
            factors, kept = compress(row["allocation"], row["ratio"])
            with compressed(model, factors):
                row["perplexity"] = round(perplexity(model, ids), 3)
            row |= {"kept": kept, "factorized": len(factors), "seconds": round(time.perf_counter() - begin, 2)}
            results.add(row)
            done, spent = todo.index(row) + 1, time.perf_counter() - start
            print(
                f"{done} of {len(todo)} rows in {spent:.0f} s, at this pace {spent / done * (len(todo) - done):.0f} s more"
            )
    if left := len(cells(args, results)):
        print(f"Out of time: {left} rows are left. The same command goes on.")


def compressor(
    model: nn.Module, method: str, calibration: Calibration, args: argparse.Namespace
) -> Callable[[str, float], tuple[dict[str, Factors], float]]:
    """A function of budget and ratio: the factors of the modules that do not stay dense, and the part that is kept."""
    weights = {name: linear.weight.detach() for name, linear in linears(model).items()}
    shapes = [tuple(weight.shape) for weight in weights.values()]
    given = calibration.arguments_for(method)

    @cache
    def spectra() -> list[Tensor]:
        return list(
            in_parallel(lambda name: weighted_spectrum(weights[name], method, **given[name]), weights, args.workers)
        )

    def compress(allocation: str, ratio: float) -> tuple[dict[str, Factors], float]:
        budget = parameter_budget(shapes, ratio)
        if allocation == "uniform":
            found = uniform_ranks(shapes, budget, rank_multiple=RANK_MULTIPLE)
        else:
            compared = [comparable(values, allocation == "absolute") for values in spectra()]
            found = spectral_ranks(compared, shapes, budget, rank_multiple=RANK_MULTIPLE)
        ranks = {name: rank for name, rank in zip(weights, found, strict=True) if rank is not None}
        factors = in_parallel(
            lambda name: decompose(weights[name], ranks[name], method, max_iterations=args.iterations, **given[name]),
            ranks,
            args.workers,
        )
        kept = sum(parameters(shape, rank) for shape, rank in zip(shapes, found, strict=True))
        return dict(zip(ranks, factors, strict=True)), round(kept / sum(map(math.prod, shapes)), 5)

    return compress


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "compression_quality")
    methods = [method for method in STATISTIC if method not in ITERATIVE] + list(ITERATIVE)  # slow ones last
    parser.add_argument("--model", required=True, help="causal language model, a directory or a name on the Hub")
    parser.add_argument("--data", type=Path, help="folder of <split>.jsonl.gz; the Hub's WikiText-2 by default")
    parser.add_argument("--decompositions", nargs="+", default=methods, choices=methods)
    parser.add_argument("--allocations", nargs="+", default=ALLOCATIONS, choices=ALLOCATIONS)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.95, 0.9, 0.8])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--test-tokens", type=int, default=20_480)
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--iterations", type=int, default=6, help="of em, nesterov and anderson")
    parser.add_argument("--workers", type=int, default=8, help="modules that are decomposed at the same time on a GPU")
    parser.add_argument("--seconds", type=float, default=500, help="limit; no row is begun after that")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    settings = {name: vars(args)[name] for name in ("context", "test_tokens", "calibration_tokens", "iterations")}
    results = Results(args.output, KEY, model=Path(args.model).name, **settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    test = windows(tokenizer, read_text("test", args.data), args.test_tokens, args.context).to(device)
    train = windows(tokenizer, read_text("train", args.data), args.calibration_tokens, args.context).to(device)
    measure(model, test, Calibration(model, train), args, results)


if __name__ == "__main__":
    main()
