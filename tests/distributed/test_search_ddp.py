# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Two processes under DDP search what one process searches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from peft import PeftModel

import peft_rank  # noqa: F401 - registers the adapters' types
from tiny_models import TinyModel


pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("search_worker.py")
METHODS = ("ars", "l2lrc")


def _work(folder: Path, processes: int) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    paths = [str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore::FutureWarning"}
    command = [sys.executable, *(torchrun if processes > 1 else []), str(WORKER), str(folder)]
    result = subprocess.run(command, env=environment, check=False, timeout=600, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-10_000:]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of processes, the folder of the worker."""
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each of its processes a folder in a common one
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folders = {processes: base / f"search-{processes}" for processes in (1, 2)}
    with FileLock(base / "search.lock"):
        for processes, folder in folders.items():
            if not folder.exists():
                folder.mkdir()
                _work(folder, processes)
    return folders


def _seen(runs: dict[int, Path], method: str, processes: int, process: int = 0) -> dict[str, Any]:
    return torch.load(runs[processes] / f"{method}-{process}.pt", weights_only=False)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_search_what_one_searches(runs: dict[int, Path], method: str) -> None:
    one, two = _seen(runs, method, 1), _seen(runs, method, 2)
    assert two["engine"] == "DistributedDataParallel"
    assert two["pattern"] == one["pattern"]
    assert torch.equal(two["noise"], one["noise"])
    for name, value in one["masks"].items():
        torch.testing.assert_close(two["masks"][name], value, rtol=0, atol=2e-3, msg=name)
    torch.testing.assert_close(two["logits"], one["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_processes_agree_bit_for_bit(runs: dict[int, Path], method: str) -> None:
    main, other = (_seen(runs, method, 2, process) for process in (0, 1))
    assert main["pattern"] == other["pattern"]
    assert main["masks"].keys() == other["masks"].keys()
    for name, value in main["masks"].items():
        assert torch.equal(other["masks"][name], value)


@pytest.mark.parametrize("method", METHODS)
def test_the_saved_adapter_is_finished(runs: dict[int, Path], llama: TinyModel, method: str) -> None:
    model = PeftModel.from_pretrained(llama.make_model(), runs[2] / method).eval()
    with torch.no_grad():
        logits = model(**llama.make_batch(4, seed=7)).logits
    torch.testing.assert_close(logits, _seen(runs, method, 2)["logits"], rtol=0, atol=1e-5)
