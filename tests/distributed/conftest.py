# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Starts trainings on several processes and reads what they wrote down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file


WORKER = Path(__file__).with_name("worker.py")

# what `accelerate launch` makes of the example's configuration
FSDP2 = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@dataclass(frozen=True)
class Run:
    """What one training of `worker.py` left behind."""

    folder: Path

    @cached_property
    def processes(self) -> list[dict[str, Any]]:
        """What each process saw."""
        files = sorted(self.folder.glob("process-*.pt"))
        return [torch.load(file, weights_only=False) for file in files]

    @property
    def seen(self) -> dict[str, Any]:
        """What the main process saw."""
        return self.processes[0]

    @cached_property
    def adapter(self) -> dict[str, torch.Tensor]:
        """The adapter that `Trainer.save_model` wrote."""
        return load_file(self.folder / "adapter" / "adapter_model.safetensors")

    def distance(self, other: Run) -> float:
        """Largest difference of any weight of the saved adapters; infinite if they have different ranks."""
        shapes, others = ({k: v.shape for k, v in run.adapter.items()} for run in (self, other))
        if shapes != others:
            return float("inf")
        return max(float((v - other.adapter[k]).abs().max()) for k, v in self.adapter.items() if v.numel())

    def check_same(self, other: Run, weights: float = 1e-5, loss: float = 1e-5) -> None:
        """Ranks, the total at every step that the other run made, weights and loss are those of the other run."""
        assert other.seen["totals"] == self.seen["totals"][-len(other.seen["totals"]) :]
        assert other.seen["pattern"] == self.seen["pattern"]
        assert self.distance(other) < weights
        assert other.seen["eval_loss"] == pytest.approx(self.seen["eval_loss"], abs=loss)


Launch = Callable[..., Callable[[str], Run]]


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """
    `launch(name, runs, processes=2, engine=None)` does the runs of `worker.py` one after the other, once for all tests,
    and returns a function from a run's name to the `Run`. Starting up takes much longer than training. `engine` is
    `"deepspeed"`, `"fsdp"` or, for DDP, None.
    """
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each of its processes a folder in a common one
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def start(name: str, runs: list[dict[str, Any]], processes: int = 2, engine: str | None = None):
        folder, log = base / name, base / f"{name}.log"
        with FileLock(base / f"{name}.lock"):
            if not log.exists():
                folder.mkdir()
                log.write_text(_work(folder, runs, processes, engine), encoding="utf-8")
        done = [run["name"] for run in runs if len(list((folder / run["name"]).glob("*.pt"))) == processes]
        assert done == [run["name"] for run in runs], log.read_text(encoding="utf-8")[-10_000:]
        return lambda run: Run(folder / run)

    return start


def _work(folder: Path, runs: list[dict[str, Any]], processes: int, engine: str | None) -> str:
    """Run `worker.py` to its end, well or not; returns what it printed."""
    # `--standalone` finds a free port
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "ACCELERATE_USE_DEEPSPEED": str(engine == "deepspeed").lower(),
        "ACCELERATE_USE_FSDP": str(engine == "fsdp").lower(),
        **(FSDP2 if engine == "fsdp" else {}),
        # a line for every collective operation
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    command = [sys.executable, *(torchrun if processes > 1 else []), str(WORKER), str(folder), json.dumps(runs)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    result = subprocess.run(command, env=environment, check=False, timeout=600, **output)
    return result.stdout


@pytest.fixture(scope="session")
def single(launch: Launch) -> Callable[[str], Run]:
    """The same trainings on one process, with the same examples in every step."""
    return launch(
        "single",
        [
            {"name": "plain"},
            {"name": "unregularized", "config": {"orth_reg_weight": 0.0}},
            {"name": "further", "adapter": "plain/adapter"},
        ],
        processes=1,
    )
