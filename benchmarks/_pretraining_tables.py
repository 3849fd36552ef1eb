# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Tables and the picture of the two benchmarks of pre-training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


Cells = tuple[list[str], list[list[Any]]]
Runs = dict[str, list[dict[str, Any]]]
QUALITY = {
    "pretraining_quality": "Pre-training: a small GPT-2 from scratch",
    "pretraining_precision": "Pre-training: half precision against fp32",
}


def sections(results: Path, pictures: Path) -> Iterator[tuple[str, str, dict[str, Any], Cells]]:
    """Title, note, result and table of what has been measured; draws the pictures that the notes show."""
    path = results / "pretraining_step.json"
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        settings = result["settings"]
        note = (
            f"GPT-2 shapes, {settings['batch']} sequences of 1,024 tokens, {settings['precision']} autocast, fused AdamW; products in "
            "the MLPs or in all linears. Growing: InRank with its buffer, between checks."
        )
        yield "Pre-training: a step", note, result, steps(result)
    for name, title in QUALITY.items():
        path = results / f"{name}.jsonl"
        if path.exists():
            environment, settings, runs = read_runs(path)
            draw(runs, pictures / f"{name}.png")
            note = (
                f"{settings['layers']} layers, width {settings['width']}, batches of {settings['batch']} x {settings['context']} tokens, "
                "the same for all runs. What follows an @ differs from the other runs; ranks are those of the targeted linears, "
                f"of their smaller side.\n\n![Loss and rank over the steps]({name}.png)"
            )
            yield title, note, {"environment": environment}, losses(runs)


def read_runs(path: Path) -> tuple[dict[str, Any], dict[str, Any], Runs]:
    """Where and with which arguments was measured, and the rows of each run in order of their steps."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    runs: dict[str, dict[tuple[int, str], dict[str, Any]]] = {}
    for row in rows:
        if "step" in row:
            # what a command that was killed had measured after it was last kept is measured again
            runs.setdefault(row["run"], {})[row["step"], row["event"]] = row
    first = next(row for row in rows if "environment" in row)
    ordered = {name: [found[key] for key in sorted(found)] for name, found in runs.items()}
    return first["environment"], first["arguments"], ordered


def evaluations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "validation_loss" in row]


def losses(runs: Runs) -> Cells:
    """A line a run: its last and its lowest evaluation, and both perplexities over those of full rank in the same
    precision and after as many steps."""
    found = {name: evaluations(rows) for name, rows in runs.items() if evaluations(rows)}
    lines = []
    for name, rows in found.items():
        full = found.get(f"full-{name.partition('@')[0].partition('-')[2]}", [])
        full = [row for row in full if row["step"] <= rows[-1]["step"]]
        comparable = bool(full) and full[-1]["step"] == rows[-1]["step"]
        cells: list[Any] = [name, rows[-1]["step"]]
        for pick in (
            lambda rows: rows[-1]["validation_loss"],
            lambda rows: min(row["validation_loss"] for row in rows),
        ):
            over = f"{100 * math.expm1(pick(rows) - pick(full)):+.1f} %" if comparable else ""
            cells += [f"{pick(rows):.4f}", f"{math.exp(pick(rows)):.2f}", over]
        last = rows[-1]
        cells.append(f"{100 * last['rank_share']:.1f} %" if "rank_share" in last else "")
        lines.append([*cells, f"{last['parameters']:,}", round(last["seconds"])])
    figures = ["loss", "perplexity", "over full rank"]
    columns = ["run", "steps", *figures, *(f"lowest {figure}" for figure in figures), "ranks", "parameters", "seconds"]
    return columns, lines


def steps(result: dict[str, Any]) -> Cells:
    """A line a measurement, and how many times as fast as full rank of the same shape and mode it is."""
    rows = [row for row in result["rows"] if "ms" in row]
    full = {(row["shape"], row["compiled"]): row["ms"] for row in rows if row["method"] == "full"}
    lines = []
    for row in rows:
        dense = full.get((row["shape"], row["compiled"]))
        faster = "" if dense is None or row["method"] == "full" else f"{dense / row['ms']:.2f}"
        mode = "compiled" if row["compiled"] else "eager"
        products = "" if row["method"] == "full" else f"{row['targets']}, rank {row['rank']}"
        times = f"{row['ms']} ({row['ms_iqr']})"
        cells = [row["shape"], mode, row["method"], products, times, faster]
        cells += [row.get("kernels_ms", ""), row.get("host_ms", "")]
        lines.append([*cells, f"{row['tokens_per_second']:,}", row.get("peak_gib", "")])
    columns = [
        "shape",
        "mode",
        "method",
        "products",
        "ms (interquartile range)",
        "times as fast",
        "kernels, ms",
        "host, ms",
        "tokens/s",
        "peak GiB",
    ]
    return columns, lines


def draw(runs: Runs, output: Path) -> None:
    """Validation loss, and mean rank of the modules, over the steps of every run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (name, rows) in enumerate(runs.items()):
        found = evaluations(rows)
        left.plot(
            [row["step"] for row in found], [row["validation_loss"] for row in found], color=f"C{index}", label=name
        )
        ranks = [(row["step"], row["rank/mean"]) for row in rows if "rank/mean" in row]
        if ranks:
            right.step(*zip(*ranks, strict=True), where="post", color=f"C{index}", label=name)
    for axes, title in ((left, "validation loss"), (right, "mean rank")):
        axes.set_title(title)
        axes.set_xlabel("optimizer steps")
    left.legend(fontsize=7)
    figure.savefig(output, dpi=120)
