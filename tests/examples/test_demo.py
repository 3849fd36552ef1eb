# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The demo from end to end in its smoke mode, and the task that it builds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--smoke", "--output_dir", str(output)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "ranks 180 -> 24 in 2 decisions" in result.stdout
    assert "total rank 24, 2 a module, 12 modules" in result.stdout
    accuracies = [float(x) for x in re.findall(r"LoRA +(\d\.\d+) \+-", result.stdout)]
    assert len(accuracies) == 2
    figures = re.search(r"difference of the logits: (\S+) \(without any adapter: (\S+)\)", result.stdout)
    difference, effect = map(float, figures.groups())
    assert difference < 1e-5
    assert effect > 0, "an adapter without effect would agree with anything"
    assert json.loads((output / "salientlora" / "adapter_config.json").read_text())["peft_type"] == "SALIENTLORA"
    assert json.loads((output / "exported" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (output / "ranks.png").stat().st_size > 0
    assert {path.name for path in output.iterdir()} == {"encoder", "exported", "lora", "ranks.png", "salientlora"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from stdlib_docs import MASK, PACKAGES, make_task

    task = make_task()
    assert task == make_task(), "the same data every time"
    assert task.labels == list(PACKAGES)
    assert Counter(label for _, label in task.train) == dict.fromkeys(range(10), 140)
    assert Counter(label for _, label in task.validation) == dict.fromkeys(range(10), 60)
    sentences = [text for text, _ in task.train + task.validation]
    assert len(set(sentences)) == len(sentences)
    assert any(MASK in text for text in sentences)
    assert not any(name in text.lower() for text in sentences for name in PACKAGES)
