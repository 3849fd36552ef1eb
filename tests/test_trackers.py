# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""trackio, offline: the scalars of a search reach its database. (TensorBoard is in `test_callbacks.py`.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


PROGRAM = """
import sys
from pathlib import Path
from peft_rank import RankAllocationCallback, calibrate
from peft import get_peft_model
from runs import adapted, make_trainer
from searches import config
from tiny_models import TINY_MODELS

llama = TINY_MODELS["llama"]
if sys.argv[1] == "salientlora":
    model = adapted(llama)
else:
    base = llama.make_model()
    search = config("l2lrc", llama, decomposition="whitening")
    search.statistics = calibrate(base, [llama.make_batch(8)], config=search, progress=False)
    model = get_peft_model(base, search)
settings = {"report_to": ["trackio"], "project": "ranks", "run_name": "one", "trackio_space_id": None}
trainer = make_trainer(model, llama, Path("out"), callbacks=[], logging_steps=4, **settings)
trainer.add_callback(RankAllocationCallback(log=trainer.log))
trainer.train()
"""

# another program: trackio writes what was logged last (our line of the end) when the first one exits
READER = """
import json
from trackio.sqlite_storage import SQLiteStorage

print(json.dumps([dict(entry) for entry in SQLiteStorage.get_logs("ranks", "one")], default=str))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "scalar"), [("salientlora", "orthogonality"), ("l2lrc", "search/ratio")])
def test_scalars_reach_trackio(method: str, scalar: str, tmp_path: Path) -> None:
    # in a process of its own, since trackio fixes its folder when it is imported
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    for program in (PROGRAM, READER):
        command = [sys.executable, "-c", program, method]
        result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
    logs = json.loads(result.stdout.splitlines()[-1])
    totals = [entry["train/rank/total"] for entry in logs if "train/rank/total" in entry]
    lines = [json.loads(line) for line in (tmp_path / "out" / "ranks.jsonl").read_text().splitlines()]
    assert totals == [line["rank/total"] for line in lines if line["event"] != "start"]
    assert len([entry for entry in logs if f"train/{scalar}" in entry]) >= 5
