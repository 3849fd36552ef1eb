# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: where and with what a figure was measured, and how it is stored."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor()} CPU"
    packages = {name: version(name) for name in ("peft-rank", "peft", "transformers", "torch", "accelerate")}
    return {"device": device, "python": platform.python_version(), "date": str(datetime.date.today()), **packages}


def argument_parser(description: str, name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="result file")
    return parser


def store(path: Path, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Write after every row: an interrupted benchmark keeps what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "settings": settings, "rows": rows}, indent=1) + "\n")
