# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The programs behind the figures about learned ranks, from end to end on models of a few thousand weights."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny_models import TINY_MODELS, TinyModel


FOLDER = Path(__file__).parents[1] / "benchmarks"
WORDS = [f"w{i}" for i in range(60)]
QUESTIONS = {
    "arc_easy": {"question": "w1 w2", "choices": ["w3", "w4 w5", "w6"], "label": 0},
    "piqa": {"goal": "w1", "sol1": "w2 w3", "sol2": "w4", "label": 1},
    "openbookqa": {"question": "w1 w2", "choices": ["w3", "w4"], "label": 1},
    "hellaswag": {"ctx": "[header] w1 [title] w2 [step] w3", "endings": ["w4", "[substeps] w5 w6"], "label": 0},
}


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(FOLDER)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A decoder with its tokenizer in `model`, data in `data`."""
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["[UNK]", "[PAD]", *WORDS])}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "model")
    TINY_MODELS["llama"].make_model().save_pretrained(tmp_path / "model")
    lines = [{"text": " ".join(WORDS[(i + j) % 60] for j in range(13))} for i in range(40)]
    for split in ("train", "test"):
        _write(tmp_path / "data" / "wikitext2_raw" / f"{split}.jsonl.gz", lines)
    learned = importlib.import_module("learned_ranks")
    for name, row in QUESTIONS.items():
        _write(tmp_path / "data" / name / f"{learned.TASKS[name]}.jsonl.gz", [row] * 3)
    return tmp_path


def _arguments(files: Path, *more: str) -> list[str]:
    sizes = ["--context", "16", "--test-tokens", "128", "--train-tokens", "256", "--batch", "4", "--steps", "6"]
    rates = ["--ars-lr", "3e-2", "--l2lrc-lr", "0.8", "--heal-steps", "2", "--log-every", "3", "--seeds", "0"]
    where = [
        "--model",
        str(files / "model"),
        "--data",
        str(files / "data"),
        "--output",
        str(files / "learned_ranks.json"),
        "--factor-cache",
        str(files / "factors"),
    ]
    return [*where, *sizes, *rates, "--ratios", "0.7", *more]


@pytest.mark.filterwarnings("ignore:The search of adapter")
def test_learned_ranks(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: ModuleType = importlib.import_module("learned_ranks")
    learned.main(_arguments(files, "--methods", "uniform", "ars"))
    learned.main(_arguments(files, "--resume"))
    rows = json.loads((files / "learned_ranks.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "uniform", "ars", "spectral", "l2lrc"]
    for row in rows[1:]:
        assert row["kept"] <= 0.7
        assert row["healed"]["perplexity"] != row["perplexity"]
        assert set(row["accuracy"]) == set(QUESTIONS)
    assert rows[2]["steps"] == 6

    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables, "RESULTS", files)
    page = "\n".join(tables.learned())
    assert f"| ARS | {rows[2]['kept']:.4f} | {rows[2]['perplexity']:.2f} |" in page


@torch.no_grad()
def test_accuracy_is_by_likelihood_per_byte(llama: TinyModel) -> None:
    """Of the continuation alone, whatever stands beside it in a batch."""
    learned = importlib.import_module("learned_ranks")
    model = llama.make_model().eval()
    examples, right = [], 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        context = torch.randint(4, 60, (3 + seed % 3,), generator=generator).tolist()
        choices = [torch.randint(4, 60, (n,), generator=generator).tolist() for n in (1, 4, 2)]
        sizes, values = [3, 11, 6], []
        for choice, size in zip(choices, sizes, strict=True):
            logits = model(torch.tensor([context + choice])).logits[0].log_softmax(-1)
            values.append(sum(float(logits[len(context) + i - 1, t]) for i, t in enumerate(choice)) / size)
        label = seed % 3
        right += values.index(max(values)) == label
        examples.append({"ids": [context + c for c in choices], "start": len(context), "sizes": sizes, "label": label})
    assert learned.accuracies(model, {"task": examples}, batch=5) == {"task": round(100 * right / 12, 2)}


def test_questions_are_worded() -> None:
    learned = importlib.import_module("learned_ranks")
    worded = {name: learned.questions(name, row) for name, row in QUESTIONS.items()}
    assert worded["arc_easy"] == ("Question: w1 w2\nAnswer:", [" w3", " w4 w5", " w6"])
    assert worded["piqa"] == ("Question: w1\nAnswer:", [" w2 w3", " w4"])
    assert worded["hellaswag"] == ("w1. w2 w3", [" w4", " w5 w6"])


def test_a_step_of_a_search(tmp_path: Path) -> None:
    step = importlib.import_module("search_step")
    sizes = ["--layers", "1", "--hidden", "128", "--intermediate", "128", "--tokens", "8"]
    step.main(
        [
            *sizes,
            "--searches",
            "ars",
            "l2lrc, distilled",
            "--repeats",
            "1",
            "--backend",
            "eager",
            "--output",
            str(tmp_path / "search_step.json"),
        ]
    )
    rows = json.loads((tmp_path / "search_step.json").read_text())["rows"]
    assert len(rows) == 2 + 2 * 3
    assert all(row["ms"] > 0 for row in rows)


def test_parts_of_a_study_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = importlib.import_module("merge")
    environment = {"device": "GPU", "date": "2026-11-22", "torch": "2.11.0"}

    def part(seed: int, **changed: Any) -> dict[str, Any]:
        rows = [{"method": "dense", "perplexity": 20.0 + seed}]
        rows += [{"method": "ars", "ratio": ratio, "seed": seed, "perplexity": 30.0} for ratio in (0.9, 0.8)]
        rows.append({"method": "l2lrc", "ratio": 0.9, "seed": seed, "error": "out of time"})
        return {"environment": environment, "settings": {"seeds": [seed], "steps": 400} | changed, "rows": rows}

    for seed in (0, 1):
        (tmp_path / f"{seed}.json").write_text(json.dumps(part(seed)))
    output = tmp_path / "both.json"
    paths = [str(tmp_path / f"{seed}.json") for seed in (0, 1)]
    monkeypatch.setattr("sys.argv", ["merge.py", *paths, "--output", str(output)])
    merge.main()
    both = json.loads(output.read_text())
    assert both["settings"] == {"seeds": [0, 1], "steps": 400}
    assert both["rows"] == part(0)["rows"][:3] + part(1)["rows"][1:3]

    with pytest.raises(SystemExit, match="differ in steps"):
        merge.merge([part(0), part(1, steps=300)])
    with pytest.raises(SystemExit, match="differ in torch"):
        merge.merge([part(0), part(1) | {"environment": environment | {"torch": "2.13.0"}}])
