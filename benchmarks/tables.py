# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Writes docs/benchmarks.md from the files in benchmarks/results.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _common import RESULTS


PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
SECTIONS = {
    "methods": "All seven linears, 32 layers, rank 16 (AdaLoRA and SalientLoRA: 16 to 8)",
    "ranks": "Against the initial rank (4 x 512 tokens)",
    "shrinking": "SalientLoRA before the first and after the last decision (64 ranks to 8)",
    "modes": "Other modes (4 layers)",
}
OPTIONS = ("adapter_dtype", "gradient_checkpointing", "autocast", "compile")


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def origin(result: dict[str, Any]) -> str:
    environment = result["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers", "peft"))
    return f"Measured {environment['date']} on {environment['device']}, {versions}.\n"


def training_step(result: dict[str, Any], section: str) -> str:
    rows = [row for row in result["rows"] if row["section"] == section and "error" not in row]
    lines, floors = [], {}
    for row in rows:
        options = ", ".join(name if row[name] is True else str(row[name]) for name in OPTIONS if name in row)
        key = (row["shape"], options if row["method"] == "floor" or section == "modes" else "")
        floors |= {key: row["ms"]} if row["method"] == "floor" else {}
        ratio = f"{row['ms'] / floors[key]:.2f}" if key in floors else ""
        cells = [row["method"], row["shape"], options or row.get("phase", ""), f"{row['ms']} ({row['ms_iqr']})", ratio]
        extra = [row.get("parameters", ""), row.get("optimizer_mib", "")] if section == "shrinking" else []
        lines.append([*cells, row["peak_gib"], *extra])
    header = ["method", "tokens", "setting", "ms (interquartile range)", "over the floor", "peak GiB"]
    if section == "ranks":
        names = iter(r for r in (16, 64, 128, 480) for _ in range(3))
        lines = [[*line[:2], "" if line[0] == "floor" else f"rank {next(names)}", *line[3:]] for line in lines]
    return table(header + (["parameters", "optimizer MiB"] if section == "shrinking" else []), lines)


def decisions(result: dict[str, Any]) -> str:
    columns = ["n", "window", "kind", "graph_scope", "seconds", "extra_gib"]
    return table(columns, [[row.get(column, "") for column in columns] for row in result["rows"]])


def main() -> None:
    parts = [
        "# Benchmarks\n",
        "Made by `benchmarks/tables.py` from the files in `benchmarks/results`; see its README.\n",
    ]
    parts.append("## Training step\n\nLLaMA-7B shape, bfloat16, fused AdamW, SalientLoRA with everything on.\n")
    for name in ("training_step", "training_step_modes"):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        parts.append(origin(result))
        for section in dict.fromkeys(row["section"] for row in result["rows"]):
            parts += [f"### {SECTIONS[section]}\n", training_step(result, section)]
    parts.append("## One decision\n")
    for path in sorted(RESULTS.glob("decision_*.json")):
        result = json.loads(path.read_text())
        parts += [origin(result), decisions(result)]
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
