# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of one pruning decision: scores of N singular values over a window, and the ranks to keep.

    python benchmarks/decision.py             # on the GPU if there is one, else on the CPU

Windows: random walks (a sparse graph of dependencies) and monotone growth (a dense one). N = 1,080 is DeBERTa-base with
15 ranks a module, 14,336 LLaMA-7B with 64, 107,520 with 480.
"""

from __future__ import annotations

import statistics
import time

import torch
from _common import argument_parser, store

from peft_rank.allocation.budget import keep_top
from peft_rank.allocation.salience import salience_scores


CASES = [(1_080, 15, 100), (4_320, 60, 50), (14_336, 64, 200), (107_520, 480, 200)]


def window(kind: str, n: int, steps: int, device: str) -> torch.Tensor:
    """(steps, n) singular values that look like a training's."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(n, generator=generator).exp()
    noise = torch.randn(steps, n, generator=generator)
    if kind == "random walk":
        return (noise.cumsum(0) * scale * 1e-3).to(device)
    ramp = torch.linspace(0, 1, steps)[:, None]
    return ((ramp + 0.02 * noise) * scale * 1e-2).to(device)


def decide(values: torch.Tensor, regularizer: torch.Tensor, sizes: list[int], scope: str) -> torch.Tensor:
    scores = salience_scores(values, regularizer, sizes, graph_scope=scope)
    return keep_top(scores, values.shape[1] // 2, sizes)


def main() -> None:
    args = argument_parser(__doc__, "decision").parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.output = args.output.with_stem(f"{args.output.stem}_{device}")
    rows = []
    for n, r, steps in CASES if device == "cuda" else CASES[:3]:
        for kind in ("random walk", "growth"):
            values = window(kind, n, steps, device)
            regularizer = torch.linspace(2, 1, steps, device=device)
            for scope in ("model", "module"):
                times = []
                for _ in range(4):
                    if device == "cuda":
                        torch.cuda.synchronize()
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                    start = time.perf_counter()
                    decide(values, regularizer, [r] * (n // r), scope).cpu()
                    times.append(time.perf_counter() - start)
                row = {"n": n, "window": steps, "kind": kind, "graph_scope": scope}
                row["seconds"] = round(statistics.median(times[1:]), 4)
                if device == "cuda":
                    row["extra_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
                rows.append(row)
                print(row, flush=True)
                store(args.output, rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
