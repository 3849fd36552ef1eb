# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: where and with what a figure was measured, how it is stored, and what it is measured with."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import time
from collections.abc import Callable
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


class Deadline:
    """What is left of a part's time; a part that runs out of it stores what it has."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def left(self) -> float:
        return self.end - time.perf_counter()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def captured(call: Callable[[], Any], stream: torch.cuda.Stream | None = None) -> Callable[[], None]:
    """A CUDA graph of a call that has fixed shapes and addresses, to be replayed; two runs before that warm it up."""
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # an old graph that were collected while this one is captured would spoil it
    try:
        with torch.cuda.graph(graph, stream=stream):
            call()
    finally:
        gc.enable()
    return graph.replay
