# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The programs that measure several GPUs and quantized bases, on a model of a few thousand weights."""

from __future__ import annotations

import importlib
import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peft_rank.allocation.schedule import AllocationSchedule


SMALL = ["--shape", "tiny", "--vocabulary", "32", "--batch", "2", "--length", "16", "--init_r", "4", "--target_r", "2"]
MODULES = 7


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    module = importlib.import_module("multi_gpu")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    monkeypatch.setitem(module.SHAPES, "tiny", sizes)
    return module


def test_trainings_of_an_engine(engines: ModuleType, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    engines.work(engines.parse([*SMALL, "--worker", "single", "--result", str(result)]))
    row = json.loads(result.read_text())
    engines.compare(row, json.loads(result.read_text()))
    assert {name: row[name]["total_rank"] for name in row if isinstance(row[name], dict)} == {
        "agreement": 2 * MODULES,
        "allocation": 2 * MODULES,
        "fixed": 4 * MODULES,
        "fixed again": 4 * MODULES,
    }
    assert row["agreement"]["ranks_elsewhere"] == 0
    parts = {name: {key for key in row[name] if key.endswith("_ms")} for name in row if isinstance(row[name], dict)}
    timed = {"regularizer_ms", "recording_ms", "decision_ms"}
    assert parts == {"agreement": timed, "allocation": timed, "fixed": set(), "fixed again": set()}
    assert {name: row[name]["steps"] for name in engines.TRAININGS} == {
        "agreement": engines.STEPS,
        "fixed": engines.FREE.stop,
        "allocation": engines.WATCHED.stop,
        "fixed again": engines.FREE.stop,
    }
    fixed = [row[name]["milliseconds"] for name in ("fixed", "fixed again")]
    assert row["slower_than_fixed"] == pytest.approx(
        row["allocation"]["milliseconds"] / (sum(fixed) / 2) - 1, abs=1e-4
    )
    assert row["fixed_differ"] == pytest.approx(max(fixed) / min(fixed) - 1, abs=1e-4)
    assert all(row["allocation"][part] > 0 for part in timed)
    assert row["allocation"]["recording_ms"] <= row["allocation"]["decision_ms"]
    for name in engines.TRAININGS:
        tokens = 2 * (4 if name == "agreement" else 16)
        seconds = row[name]["milliseconds"] / 1e3
        assert row[name]["tokens_per_second"] == pytest.approx(tokens / seconds, rel=0.02)


def test_what_allocating_costs_can_be_had_alone(engines: ModuleType, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    settings = [*SMALL, "--accumulation", "2", "--cost-only"]
    engines.work(engines.parse([*settings, "--worker", "single", "--result", str(result)]))
    row = json.loads(result.read_text())
    assert {name: found["steps"] for name, found in row.items()} == dict.fromkeys(
        ("fixed", "allocation", "fixed again"), engines.FREE.stop
    )
    assert not [key for key in row["allocation"] if key.endswith("_ms")]
    tokens = row["fixed"]["tokens_per_second"] * row["fixed"]["milliseconds"] / 1e3
    assert tokens == pytest.approx(2 * 2 * 16, rel=0.02)


def test_what_is_watched_is_a_window_that_is_recorded(engines: ModuleType) -> None:
    schedule = AllocationSchedule(
        **engines.SHORT_SCHEDULE, total_steps=engines.STEPS, initial_total=1792, target_total=896
    )
    met = next(decision for decision in schedule.decisions() if decision.budget == 896)
    assert range(met.step - met.window, met.step) == engines.WATCHED  # steps that are completed before each
    assert engines.FREE.stop <= engines.WATCHED.start


def test_ranks_elsewhere_are_counted_once(engines: ModuleType) -> None:
    row = {"agreement": {"ranks": [3, 0, 3]}}
    engines.compare(row, {"agreement": {"ranks": [2, 2, 2]}})
    assert row["agreement"]["ranks_elsewhere"] == 2
    assert row["agreement"]["total_rank"] == 6


def test_an_engine_that_fails_keeps_what_it_found(
    engines: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import pathlib, sys\n"
        "pathlib.Path(sys.argv[-1]).write_text('{\"agreement\": {}}')\n"
        "raise MemoryError('of ' + ' '.join(sys.argv[1:-1]))\n"
    )
    monkeypatch.setattr(engines, "__file__", str(worker))
    row = engines.run_engine(engines.parse(SMALL), "single")
    assert (row["engine"], row["agreement"]) == ("single", {})
    assert "MemoryError: of --shape=tiny --vocabulary=32 --batch=2" in row["error"]


def test_tables_show_what_was_measured(engines: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.engines() == []
    settings = {name: getattr(engines.parse(SMALL), name) for name in (*engines.SETTINGS, "processes")}
    results = engines.Results(tmp_path / "multi_gpu.json", ("engine",), **settings)
    parts = {"milliseconds": 40.5, "regularizer_ms": 1.5, "recording_ms": 0.25, "decision_ms": 9.0}
    allocation = {"tokens_per_second": 900, "peak_gib": 1.5, **parts}
    measured = {"agreement": {"ranks_elsewhere": 0}, "allocation": allocation, "fixed": {"tokens_per_second": 950}}
    results.add({"engine": "zero2", "slower_than_fixed": 0.0123, "fixed_differ": 0.004, **measured})
    results.add({"engine": "fsdp2", "error": "MemoryError"})
    page = "\n".join(tables.engines())
    assert "LLaMA-tiny shape, random weights, 2 x 16 tokens a step on 2 GPUs" in page
    assert "| ZeRO-2 | 0 | 900 | 1.5 | 950 |  | 1.2 | 0.4 | 40.5 | 1.5 | 0.25 | 9.0 |" in page
    assert "| FSDP2 | failed |  |  |  |  |  |  |  |  |  |  |" in page


def test_an_engine_that_hangs_is_told_to_end(engines: ModuleType) -> None:
    """torchrun then ends its workers, which would keep the GPUs busy if it were killed."""
    program = "import signal; signal.signal(signal.SIGTERM, lambda *_: exit('told to end')); signal.pause()"
    error = engines._run([sys.executable, "-c", program], dict(os.environ), 1)
    assert error == "not done after 1 s: told to end\n"


def test_a_run_that_was_cut_off_goes_on(engines: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the file holds, engines that failed excepted."""
    output, ran = tmp_path / "rows.json", []

    def run(args: Namespace, engine: str) -> dict[str, Any]:
        ran.append(engine)
        if engine == "zero2" and ran.count("zero2") == 1:
            return {"engine": engine, "error": "MemoryError"}
        return {"engine": engine, "agreement": {"ranks": [2, 2] if engine == "single" else [3, 1]}}

    monkeypatch.setattr(engines, "run_engine", run)
    for chosen in (["single", "zero2"], ["single", "ddp", "zero2"]):
        monkeypatch.setattr("sys.argv", ["multi_gpu.py", *SMALL, "--output", str(output), "--engines", *chosen])
        engines.main()
    assert ran == ["single", "zero2", "ddp", "zero2"]
    rows = {row["engine"]: row["agreement"]["ranks_elsewhere"] for row in json.loads(output.read_text())["rows"]}
    assert rows == {"single": 0, "ddp": 1, "zero2": 1}


def test_quantized_bases_from_end_to_end(
    engines: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    quantized = importlib.import_module("quantized")
    monkeypatch.setattr("sys.argv", ["quantized.py", *SMALL, "--lr", "0.02", "--output", str(tmp_path / "rows.json")])
    quantized.main()
    rows = {row["base"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert [row["layer"] for row in rows.values()] == ["Linear", "Linear4bit", "Linear8bitLt"]
    for row in rows.values():
        assert (row["modules"], row["total_rank"]) == (MODULES, 2 * MODULES)
        assert row["change"] > 0.05
        assert row["error_loaded"] == 0
        assert row["error_exported"] < 0.2
    assert rows["plain"]["error_merged"] < rows["8bit"]["error_merged"] < rows["4bit"]["error_merged"]
    (_, _, table) = importlib.import_module("_engine_tables").ENGINES["quantized"]
    assert [line[0] for line in table(json.loads((tmp_path / "rows.json").read_text()))[1]] == list(rows)
    quantized.main()  # a second time it has nothing to do
    assert capsys.readouterr().out.count("'error_merged'") == 3
