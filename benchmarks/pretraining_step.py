# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Time, tokens per second and memory of a pre-training step: GPT-2 in full, at a fixed rank, and with InRank.

    python benchmarks/pretraining_step.py                                       # small and medium, eager and compiled
    python benchmarks/pretraining_step.py --shapes tiny --batch 2 --steps 3     # a look at it, on a CPU too

Products of about a third of the ranks (what the paper finds) in the place of the MLP's linears, as in the paper, or of
all linears; InRank is measured while it grows (rank and buffer) and after `finalize`. bfloat16 autocast, fused AdamW.
Needs one GPU of 80 GB with the default batch. What --output holds already is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from typing import Any

import torch
from _common import Deadline, Results, argument_parser, time_steps
from _pretraining import DEVICE, PRECISIONS, TARGETS, Shape, adamw, autocast, gpt2, with_factors


SHAPES = {
    "small": Shape(12, 768, 12, 1024, 50257),
    "medium": Shape(24, 1024, 16, 1024, 50257),
    "tiny": Shape(2, 64, 2, 32, 128),
}
# 33 %, 31 %, 25 %: multiples of 64 near what the paper finds (254, 287)
RANKS = {"small": 256, "medium": 320, "tiny": 16}
BUFFER, WIDTHS = 100, 8
WARMUP = 5
METHODS = ["full", "fixed", "growing", "finalized"]
KEY = ("shape", "targets", "method", "compiled")


class Step:
    """One optimizer step of one method, as its users write it."""

    def __init__(self, method: str, shape: str, targets: str, batch: int, precision: str, compiled: bool) -> None:
        size, rank = SHAPES[shape], RANKS[shape]
        model = gpt2(size)
        self.precision, self.count, self.tuner = precision, 0, None
        if method == "fixed":
            model = with_factors(model, targets, init_r=rank, buffer_r=0)
        elif method != "full":
            # the checks of a real growth are timed by the benchmark of quality; here none is due
            model = with_factors(
                model,
                targets,
                init_r=rank,
                buffer_r=min(BUFFER, rank // 2),
                max_r=size.width,
                rank_multiple=WIDTHS,
                warmup_steps=10**6,
            )
            self.tuner = model.base_model
        self.optimizer = adamw(model, 1e-4)
        if method == "finalized":
            self._finalize(model)
        self.model = model
        self.forward = torch.compile(model) if compiled else model
        self.ids = torch.randint(0, size.vocabulary, (batch, size.context), device=DEVICE)

    def _finalize(self, model: torch.nn.Module) -> None:
        loss = model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=DEVICE)).logits.float().sum()
        loss.backward()
        self.optimizer.zero_grad()
        self.tuner.clock("default").last_step = self.tuner.clock("default").checks = 1
        self.tuner.finalize(self.optimizer)
        self.tuner = None

    def __call__(self) -> None:
        self.count += 1
        with autocast(self.precision):
            loss = self.forward(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        if self.tuner is not None:
            self.tuner.update_and_allocate(self.count, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def run(args: argparse.Namespace, shape: str, targets: str, method: str, compiled: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": shape, "targets": targets, "method": method, "compiled": compiled}
    row["rank"] = None if method == "full" else RANKS[shape]
    try:
        step = Step(method, shape, targets, args.batch, args.precision, compiled)
        row |= time_steps(step, args.steps, WARMUP) | {"parameters": step.parameters()}
        row["tokens_per_second"] = round(1e3 * args.batch * SHAPES[shape].context / row["ms"])
        del step
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    torch._dynamo.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, "pretraining_step")
    parser.add_argument("--shapes", nargs="+", default=["medium", "small"], choices=list(SHAPES))
    parser.add_argument("--targets", nargs="+", default=["mlp", "all"], choices=list(TARGETS))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--compile", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument("--precision", default="bf16", choices=list(PRECISIONS))
    parser.add_argument("--batch", type=int, default=16, help="sequences a step, each as long as the context")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after the measurement that passes this")
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")
    deadline = Deadline(args.seconds)
    settings = {name: vars(args)[name] for name in ("batch", "precision", "steps")}
    results = Results(args.output, KEY, **settings, buffer=BUFFER)
    for compiled, shape, targets in itertools.product(args.compile, args.shapes, args.targets):
        for method in args.methods:
            cell = {"shape": shape, "targets": targets, "method": method, "compiled": compiled == "yes"}
            if results.find(cell) or method == "full" and targets != args.targets[0]:
                continue  # of full rank, other targets are the same model
            if deadline.left() < 0:
                print("out of time", flush=True)
                return
            results.add(run(args, shape, targets, method, compiled == "yes"))


if __name__ == "__main__":
    main()
