# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What the tables of `multi_gpu.py` and `quantized.py` hold: columns and lines."""

from __future__ import annotations

from typing import Any


NAMES = {"single": "one process", "ddp": "DDP", "fsdp2": "FSDP2", **{f"zero{i}": f"ZeRO-{i}" for i in (1, 2, 3)}}
PARTS = ["milliseconds", "regularizer_ms", "recording_ms", "decision_ms"]
Cells = tuple[list[str], list[list[Any]]]


def several_gpus(result: dict[str, Any]) -> Cells:
    """A line an engine; engines that failed say so."""
    lines = []
    for row in result["rows"]:
        found = {name: row.get(name, {}) for name in ("agreement", "allocation", "fixed")}
        line = [NAMES[row["engine"]], found["agreement"].get("ranks_elsewhere", "failed" if "error" in row else "")]
        for name in ("allocation", "fixed"):
            line += [found[name].get("tokens_per_second", ""), found[name].get("peak_gib") or ""]
        parts = (found["allocation"].get(part, "") for part in PARTS)
        percent = [f"{100 * row[key]:.1f}" if key in row else "" for key in ("slower_than_fixed", "fixed_differ")]
        lines.append([*line, *percent, *parts])
    columns = ["engine", "ranks elsewhere", "tokens/s", "peak GiB a GPU", "tokens/s, fixed ranks", "peak GiB, fixed"]
    columns += ["a step longer by, %", "fixed ranks twice, %"]
    return [*columns, "a step, ms", "regularizer", "recording", "a decision"], lines


def quantized_bases(result: dict[str, Any]) -> Cells:
    columns = ["base", "layer", "milliseconds", "peak_gib", "change", "error_loaded", "error_exported", "error_merged"]
    return columns, [[row[column] for column in columns] for row in result["rows"]]


SEVERAL_GPUS = (
    "HF Trainer, LLaMA-{shape} shape, random weights, {batch} x {length} tokens a step on {processes} GPUs together (one "
    "process: one GPU). Ranks elsewhere than with one process in fp32, on four blocks; all else in bfloat16. Steps are "
    "compared with those of fixed ranks, which were trained before and after, and differed themselves. Milliseconds of a "
    "step while it allocates, and in other steps of the regularizer, of recording and of the longest decision, waiting for the "
    "device before and after: upper bounds."
)
# result file -> heading, note that its settings are put into, table
ENGINES = {
    "multi_gpu": (
        "Several GPUs, 16 rows a GPU",
        SEVERAL_GPUS,
        several_gpus,
    ),
    "multi_gpu_accumulation": (
        "Several GPUs, 64 rows a GPU in four batches",
        "As above, but {accumulation} times as much in a step.",
        several_gpus,
    ),
    "quantized": (
        "Quantized bases",
        (
            "HF Trainer, {batch} x {length} tokens a step. What the adapter changes in the logits, relative to them, and relative "
            "to that change the errors of the adapter after loading, as plain LoRA, and merged."
        ),
        quantized_bases,
    ),
}
