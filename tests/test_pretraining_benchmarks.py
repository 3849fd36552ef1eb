# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The comparison of pre-trainings: every run sees the same, and goes on where its command was cut off."""

from __future__ import annotations

import importlib
import json
import math
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


FLAGS = (
    "--steps 12 --eval-steps 5 --eval-rows 4 --batch 2 --context 16 --layers 1 --width 32 --heads 2 --warmup 3 --fixed-rank 8 "
    "--vocabulary 300 --buffer 6 --max-rank 12 --growth-warmup 2 --check-interval 2 --growth-ratio 0.7 --rank-multiple 1 "
    "--lr 1e-2"
)


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("pretraining_quality")


@pytest.fixture
def args(quality: ModuleType, tmp_path: Path) -> Namespace:
    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(40):
        lines = (f"The {k}th line of {n} says {k * n}.\n" for k in range(20))
        (texts / f"{n}.txt").write_text("".join(lines))
    (texts / "left_out.json").write_text("no text")
    (texts / "site-packages").mkdir()
    (texts / "site-packages" / "left_out.py").write_text("no text")
    (tmp_path / "work").mkdir()
    flags = [
        *FLAGS.split(),
        "--text",
        str(texts),
        "--output",
        str(tmp_path / "out.jsonl"),
        "--work",
        str(tmp_path / "work"),
    ]
    return quality.parse(flags)


def lines(path: Path) -> list[dict[str, Any]]:
    """What a run wrote, but for its durations."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["full-fp32", "inrank0.9-bf16", "fixed-fp32"])
def test_cut_off_and_continued_equals_uninterrupted(quality: ModuleType, args: Namespace, name: str) -> None:
    data, never = quality.prepare(args), time.time() + 1e6
    assert quality.Training(name, data, args).run(never)["step"] == 12
    whole = lines(args.output)
    assert [row["step"] for row in whole if "validation_loss" in row] == [5, 10, 12]
    assert any(row["event"] == "decision" for row in whole) == name.startswith("inrank")
    args.output.unlink()
    (args.work / f"{name}.pt").unlink()
    for stop in (3, 7):
        training = quality.Training(name, data, args)
        while training.step < stop:
            training.advance()
            if training.step % args.eval_steps == 0:
                training.evaluate("evaluation")
        assert "out of time" in training.run(end=0)["event"]
        torch.manual_seed(stop)  # another process starts with another state
    quality.Training(name, data, args).run(never)
    assert lines(args.output) == whole
    assert quality.Training(name, data, args).run(never)["event"] == "was complete before"
    assert lines(args.output) == whole


def test_a_kept_run_of_other_arguments_is_refused(quality: ModuleType, args: Namespace) -> None:
    data = quality.prepare(args)
    quality.Training("full-fp32", data, args).run(end=0)
    row = quality.train("full-fp32", data, Namespace(**{**vars(args), "lr": 1.0, "parallel": 1}), end=0)
    assert "made with other arguments: lr" in row["error"]
    assert lines(args.output) == [row], "the file says why the run is missing"


def test_names_override_arguments(quality: ModuleType, args: Namespace) -> None:
    changed = quality.arguments_of("inrank0.9-bf16@lr=2e-3@buffer=9@targets=all", args)
    assert {key: vars(changed)[key] for key in vars(args) if vars(changed)[key] != vars(args)[key]} == {
        "lr": 2e-3,
        "buffer": 9,
        "targets": "all",
    }
    for name in ("full-bf16@rate=1", "full-bf16@work=x", "full-bf16@vocabulary=1"):
        with pytest.raises(SystemExit, match=r"is no argument that a run can override"):
            quality.arguments_of(name, args)


def test_texts_are_held_out(quality: ModuleType, args: Namespace, tmp_path: Path) -> None:
    train, held_out = quality.split_texts(args)
    assert len(train) == 38 and len(held_out) == 2
    assert not set(train) & set(held_out)
    assert not any("no text" in text for text in train + held_out)
    single = tmp_path / "single.txt"
    single.write_text("abcdefghij" * 4)
    train, held_out = quality.split_texts(Namespace(text=[single], validation=None))
    assert train[0] + held_out[0] == single.read_text() and len(held_out[0]) == 2


def test_all_runs_see_the_same_batches(quality: ModuleType, args: Namespace) -> None:
    data = quality.prepare(args)
    first, second = (quality.Training(name, data, args) for name in ("full-fp32", "inrank0.9-fp32"))
    for _ in range(3):
        assert torch.equal(first.batch(), second.batch())
        first.advance()
        second.advance()


def test_tables_and_picture(quality: ModuleType, args: Namespace, tmp_path: Path) -> None:
    tables = importlib.import_module("_pretraining_tables")
    args.output = tmp_path / "pretraining_quality.jsonl"
    quality.append(
        args.output, {"environment": {"device": "x"}, "arguments": vars(args) | {"text": "", "output": "", "work": ""}}
    )
    data = quality.prepare(args)
    for name in ("full-fp32", "inrank0.9-fp32@lr=3e-3"):
        quality.train(
            name, data, Namespace(**{**vars(quality.arguments_of(name, args)), "parallel": 1}), time.time() + 1e6
        )
    step = {"shape": "small", "targets": "mlp", "compiled": False, "ms_iqr": 1, "tokens_per_second": 5, "peak_gib": 2}
    rows = [step | {"method": "full", "rank": None, "ms": 30.0}, step | {"method": "fixed", "rank": 8, "ms": 20.0}]
    measured = {"environment": {}, "settings": {"batch": 16, "precision": "bf16"}, "rows": rows}
    (tmp_path / "pretraining_step.json").write_text(json.dumps(measured))

    (_, _, _, steps), (_, note, _, losses) = tables.sections(tmp_path, tmp_path)
    assert [line[5] for line in steps[1]] == ["", "1.50"]
    assert "pretraining_quality.png" in note and (tmp_path / "pretraining_quality.png").stat().st_size > 1000
    full, inrank = (dict(zip(losses[0], line, strict=True)) for line in losses[1])
    assert full["run"] == "full-fp32" and full["over full rank"] == "+0.0 %" and full["ranks"] == ""
    ends = {row["run"]: row for row in lines(args.output) if row.get("event") == "end"}
    assert inrank["steps"] == 12 and inrank["ranks"] == f"{100 * ends[inrank['run']]['rank_share']:.1f} %"
    ratio = math.exp(ends[inrank["run"]]["validation_loss"]) / math.exp(ends["full-fp32"]["validation_loss"])
    assert inrank["over full rank"] == f"{100 * (ratio - 1):+.1f} %"
    best = [
        min(row["validation_loss"] for row in lines(args.output) if row.get("run") == run and "validation_loss" in row)
        for run in ends
    ]
    assert {line["lowest loss"] for line in (full, inrank)} == {f"{loss:.4f}" for loss in best}


def test_steps_are_measured_once(quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed, output = importlib.import_module("pretraining_step"), tmp_path / "steps.json"
    flags = ["--shapes", "tiny", "--targets", "mlp", "--batch", "2", "--steps", "2", "--compile", "no"]
    flags += ["--output", str(output)]
    speed.main([*flags, "--methods", "full", "finalized"])
    rows = json.loads(output.read_text())["rows"]
    assert [row["method"] for row in rows] == ["full", "finalized"]
    assert all(row["ms"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert rows[1]["parameters"] < rows[0]["parameters"]
    measured, run = [], speed.run
    monkeypatch.setattr(speed, "run", lambda *args: measured.append(args[3]) or run(*args))
    speed.main([*flags, "--methods", "full", "growing", "finalized"])
    assert measured == ["growing"]
    assert json.loads(output.read_text())["rows"][:2] == rows
    speed.main([*flags, "--methods", "fixed", "--seconds", "-1"])
    assert measured == ["growing"]
