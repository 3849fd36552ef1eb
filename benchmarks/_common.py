# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: where and with what a figure was measured, how it is stored, and what it is measured with."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import SimpleQueue, get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


RESULTS = Path(__file__).parent / "results"
STEP_OPTIONS = ("adapter_dtype", "gradient_checkpointing", "autocast", "compile")  # of a training step
SHORT_SCHEDULE = {"warmup_steps": 4, "allocation_steps": 30, "initial_window": 4, "final_window": 12}


def environment() -> dict[str, str]:
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.processor() or platform.machine()} CPU"
    )
    packages = {name: version(name) for name in ("peft-rank", "peft", "transformers", "torch", "accelerate")}
    return {"device": device, "python": platform.python_version(), "date": str(datetime.date.today()), **packages}


def argument_parser(description: str, name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="result file")
    return parser


def store(path: Path, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Write after every row: a benchmark that is interrupted, at this moment even, keeps what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(json.dumps({"environment": environment(), "settings": settings, "rows": rows}, indent=1) + "\n")
    draft.replace(path)


class Results:
    """The rows of a result file, which is written after every row. What it holds already need not be measured again.

    Args:
        path (`Path`): The file.
        key (`tuple[str, ...]`): What tells rows apart.
        settings (*optional*): Of all rows alike. A `model` keeps the name that the file has for it.

    Raises:
        SystemExit: If the file holds rows of other settings.
    """

    def __init__(self, path: Path, key: tuple[str, ...], **settings: Any) -> None:
        held = json.loads(path.read_text()) if path.is_file() else {"rows": [], "settings": {}}
        settings = json.loads(json.dumps(settings))
        self.path, self.key = path, key
        self.settings = {name: held["settings"].get(name, value) for name, value in settings.items()}
        other = [f"{name}={self.settings[name]}" for name in settings if self.settings[name] != settings[name]]
        if other := [text for text in other if not text.startswith("model=")]:
            raise SystemExit(
                f"{path} holds rows of {', '.join(other)}: move it away, or name another file by --output."
            )
        self._rows = {self._key_of(row): row for row in held["rows"] if "error" not in row}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self._rows.values())

    def _key_of(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in self.key)

    def find(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The row of the same key, if there is one."""
        return self._rows.get(self._key_of(row))

    def add(self, row: dict[str, Any]) -> None:
        self._rows[self._key_of(row)] = row
        print(row, flush=True)
        store(self.path, self.rows, **self.settings)


class Deadline:
    """What is left of a part's time; a part that runs out of it stores what it has."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def left(self) -> float:
        return self.end - time.perf_counter()


def gpu_pool(processes: int, begin: Callable[..., None] | None = None, *args: Any) -> ProcessPoolExecutor:
    """Processes that share all GPUs evenly, each on one of them. `begin(*args)` is called first in each."""
    context = get_context("spawn")
    places = context.SimpleQueue()
    for index in range(processes):
        places.put(index % max(torch.cuda.device_count(), 1))
    return ProcessPoolExecutor(processes, context, _begin_on_gpu, (places, begin, args))


def _begin_on_gpu(places: SimpleQueue, begin: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
    place = places.get()
    if torch.cuda.is_available():
        torch.cuda.set_device(place)
    if begin is not None:
        begin(*args)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_steps(
    step: Callable[[], None], steps: int, warmup: int, beside: Callable[[], None] | None = None
) -> dict[str, float]:
    """Median and interquartile range of single steps, each waited for. On a GPU also what its kernels take alone, what
    the host takes to launch them (a step takes the longer of the two, and a little more), and the peak of memory.

    With a step to compare with, `beside`, each is preceded by one of those, whose median is `beside_ms`: what a host that
    others use, too, takes changes by the minute."""
    cuda = torch.cuda.is_available()
    for _ in range(warmup):
        if beside is not None:
            beside()
        step()
    synchronize()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times, host, others = [], [], []
    for _ in range(steps):
        if beside is not None:
            start = time.perf_counter()
            beside()
            synchronize()
            others.append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - start))
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    spread = statistics.quantiles(times, n=4) if steps > 1 else 3 * times
    found = {"ms": round(statistics.median(times), 2), "ms_iqr": round(spread[2] - spread[0], 2)}
    if others:
        found["beside_ms"] = round(statistics.median(others), 2)
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            step()
            synchronize()
        kernels = sum(event.self_device_time_total for event in profiled.key_averages())
        found |= {"kernels_ms": round(kernels / 1000, 2), "host_ms": round(statistics.median(host), 2)}
        found["peak_gib"] = round(peak / 2**30, 2)
    return found


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile each block of a decoder by itself: they share what is compiled."""
    torch._dynamo.reset()
    for block in model.model.layers:
        block.compile(backend=backend)


def uncompile_blocks(model: nn.Module) -> None:
    for block in model.model.layers:
        block._compiled_call_impl = None


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
