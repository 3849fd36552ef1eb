# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Several decompositions at a time on one accelerator. Knows neither what is decomposed nor how.

An eigendecomposition of some thousand rows is a long row of short steps, between which the host decides what is next; one
alone leaves most of a large device idle.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch


Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = 4
"""Decompositions at a time, where the device has room for them."""


def workers_within(needed: int, device: torch.device) -> int:
    """
    How many decompositions a device has room for at a time.

    Args:
        needed (`int`): Bytes that one takes at the most.
        device (`torch.device`): Anything but a CUDA device has room for one.
    """
    if device.type != "cuda":
        return 1
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(WORKERS, (free + cached) // max(needed, 1)))


@cache
def _streams(count: int, device: torch.device) -> list[torch.cuda.Stream]:
    """The same at every call: the libraries keep a workspace for each stream that they have seen."""
    return [torch.cuda.Stream(device) for _ in range(count)]


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, device: torch.device | None = None
) -> Iterator[Result]:
    """
    The results of a function, in the order of the items.

    Args:
        function (`Callable`): Takes one item. On CUDA every call has a stream of its own, which has come to its end when the
            result is returned.
        items (`Iterable`): What to call it with.
        workers (`int`): Calls at a time; 1 is a plain loop, and so is whatever runs elsewhere than on CUDA.
        device (`torch.device`, *optional*): Where it computes, by default on the current CUDA device if there is one.
    """
    if workers == 1 or not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        yield from map(function, items)
        return
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    torch.linalg.inv(torch.eye(2, device=device))  # the library must not be loaded by two threads at once
    torch.cuda.synchronize(device)
    streams: queue.SimpleQueue[torch.cuda.Stream] = queue.SimpleQueue()
    for stream in _streams(workers, device):
        streams.put(stream)

    def work(item: Item) -> Result:
        stream = streams.get()
        try:
            with torch.cuda.stream(stream):
                result = function(item)
                stream.synchronize()
            return result
        finally:
            streams.put(stream)

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(work, items)
