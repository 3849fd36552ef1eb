# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Several decompositions at a time: order, errors, and room on the device."""

from __future__ import annotations

import pytest
import torch

from peft_rank.decomposition import Factors, decompose
from peft_rank.decomposition.parallel import WORKERS, in_parallel, workers_within


def test_results_come_in_the_order_of_the_items() -> None:
    assert list(in_parallel(lambda x: x * x, iter(range(5)), 3)) == [0, 1, 4, 9, 16]
    assert list(in_parallel(lambda x: x * x, range(5), 3, torch.device("cpu"))) == [0, 1, 4, 9, 16]


def test_what_fails_is_raised_and_leaves_the_next_call_as_it_was() -> None:
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            list(in_parallel(lambda x: 1 / x, [1, 0, 0, 0, 0, 0], 2))
    assert list(in_parallel(lambda x: 1 / x, [1, 2], 2)) == [1, 0.5]


def test_workers_within_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert workers_within(1, torch.device("cpu")) == 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    expected = {0: WORKERS, 1: WORKERS, 400: 3, 600: 2, 1200: 1, 1201: 1, 10_000: 1}
    assert {needed: workers_within(needed, cuda) for needed in expected} == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_change_no_factor() -> None:
    weights = [torch.randn(200, 300, device="cuda") for _ in range(12)]
    gram = torch.randn(300, 1000).cov()

    def factors(weight: torch.Tensor) -> Factors:
        return decompose(weight, 20, "whitening", input_gram=gram)

    for alone, together in zip(map(factors, weights), in_parallel(factors, weights, 4), strict=True):
        torch.testing.assert_close(together.up @ together.down, alone.up @ alone.down, rtol=1e-4, atol=1e-5)
