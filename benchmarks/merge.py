# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Joins the result files of one study whose parts ran beside each other, each on a GPU of its own.

    CUDA_VISIBLE_DEVICES=0 python benchmarks/learned_ranks.py ... --seeds 0 --output part0.json &
    CUDA_VISIBLE_DEVICES=1 python benchmarks/learned_ranks.py ... --seeds 1 --output part1.json & wait
    python benchmarks/merge.py part0.json part1.json --output benchmarks/results/learned_ranks.json

The parts have to agree in all settings but in what they are parts of. Of rows that several parts hold, such as that of the
dense model, the first is kept; what a part had no time for is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any


DIVIDED = ("seeds", "ratios", "tasks", "methods", "decompositions")
KEY = ("method", "task", "seed", "decomposition", "ranks", "ratio")


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of one result file.

    Raises:
        SystemExit: If the parts differ in a setting that must not differ, or in where they were measured.
    """
    first = parts[0]
    merged: dict[str, Any] = {"environment": first["environment"], "settings": copy.deepcopy(first["settings"])}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in parts:
        for group in ("environment", "settings"):
            keys = set(first[group]) | set(part[group])
            different = [key for key in sorted(keys) if first[group].get(key) != part[group].get(key)]
            if wrong := [key for key in different if key not in (*DIVIDED, "date")]:
                raise SystemExit(f"The parts are not of one study: they differ in {', '.join(wrong)}.")
            for key in different:
                if key in DIVIDED:
                    values = merged["settings"].setdefault(key, [])
                    values += [value for value in part["settings"].get(key, []) if value not in values]
        for row in part["rows"]:
            if "error" not in row:
                rows.setdefault(tuple(row.get(name) for name in KEY), row)
    return merged | {"rows": list(rows.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    merged = merge([json.loads(path.read_text(encoding="utf-8")) for path in args.parts])
    args.output.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    print(f"{len(merged['rows'])} rows in {args.output}")


if __name__ == "__main__":
    main()
