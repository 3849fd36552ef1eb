# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: where and with what a figure was measured, how it is stored, and how a device is kept busy."""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import platform
import queue
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
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


@functools.cache
def _streams(count: int) -> list[torch.cuda.Stream]:
    """The same at every call: the libraries keep a workspace for each stream that they have seen."""
    return [torch.cuda.Stream() for _ in range(count)]


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> list[Any]:
    """Results in the order of the items. Small decompositions wait for the host most of the time: on CUDA every thread
    has a stream of its own, so that they fill the device together. One worker is a plain loop."""
    items = list(items)
    if workers == 1 or not torch.cuda.is_available():
        return [function(item) for item in items]
    torch.linalg.inv(torch.eye(2, device="cuda"))  # the library must not be loaded by two threads at once
    torch.cuda.synchronize()
    streams: queue.SimpleQueue[torch.cuda.Stream] = queue.SimpleQueue()
    for stream in _streams(workers):
        streams.put(stream)

    def work(item: Any) -> Any:
        stream = streams.get()
        with torch.cuda.stream(stream):
            result = function(item)
            stream.synchronize()
        streams.put(stream)
        return result

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, items))
