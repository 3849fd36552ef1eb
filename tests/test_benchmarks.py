# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The programs behind the figures about compression: what they measure, on models of a few thousand weights."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.utils import counters
from transformers import StaticCache

from peft_rank import LowRankConfig, calibrate
from peft_rank.decomposition.parallel import WORKERS
from tiny_models import TINY_MODELS, TinyModel


FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("compressed_speed")
    short = {"CONTEXT": 6, "LENGTH": 24, "GROUPS": 2, "CALLS": 1, "WARMUP": 1, "TOKENS": 512}
    cases = {"prefill 2 x 6": (2, 6), "decode 2": (2, 1)}
    for name, value in {**short, "CASES": cases}.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.parametrize("name", ["dense", "0.5/8"])
@torch.no_grad()
def test_what_is_captured_computes_what_the_model_computes(speed: ModuleType, name: str) -> None:
    args = speed.parse(["--shape", "tiny", "--layers", "2"])
    model = speed.build(name, args)
    prefill, decode = speed.CASES
    expected = speed.eager(model, prefill)()
    torch.testing.assert_close(speed.static(model, prefill)(), expected, atol=0.02, rtol=0.02)

    cache = StaticCache(config=model.config, max_cache_len=speed.LENGTH)
    step = speed.eager(model, decode, cache)
    slots = [speed.Slot(model.config, 2, "cpu") for _ in cache.layers]
    for slot, layer in zip(slots, cache.layers, strict=True):
        slot.keys, slot.values = layer.keys.clone(), layer.values.clone()
    expected = step()  # before `static` gives the layers one number
    replayed = speed.static(model, decode, slots=slots)
    torch.testing.assert_close(replayed(), expected, atol=0.02, rtol=0.02)
    assert torch.equal(replayed(), replayed()), "a replayed step must not depend on the one before"


@torch.no_grad()
def test_layers_are_compiled_once_for_all(speed: ModuleType) -> None:
    args = speed.parse(["--shape", "tiny", "--layers", "3"])
    model = speed.build("0.5/8", args)
    for case in speed.CASES:
        counters.clear()
        call, _ = speed.compiled(model, case, "eager")
        torch.testing.assert_close(call().shape, (2, 1, 256))
        assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("name", "multiple"), [("0.8/64", 64), ("0.5/128", 128), ("0.8/1", 1)])
def test_ranks_of_a_layer(speed: ModuleType, name: str, multiple: int) -> None:
    ranks, shapes = speed.layer_ranks(name, "llama-7b"), speed.linear_shapes("llama-7b")
    assert all(rank % multiple == 0 for rank in ranks.values())
    kept = sum(rank * sum(shapes[linear]) for linear, rank in ranks.items())
    ratio = kept / sum(out * features for out, features in shapes.values())
    assert float(name.split("/")[0]) - 0.01 < ratio <= float(name.split("/")[0])


def test_compressed_speed_from_end_to_end(speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "compressed_speed.json"
    tiny = ["--shape", "tiny", "--layers", "2", "--models", "dense", "0.5/8", "--ranks", "0.5/8", "--backend", "eager"]
    speed.main([*tiny, "--compiled", "dense", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    timed = [row for row in rows if row["part"] == "speed"]
    assert len(timed) == 2 * 2 * 2 + 2
    assert all(row["ms"] > 0 for row in timed)
    memory = {row["model"]: row["parameters"] for row in rows if row["part"] == "memory"}
    assert memory["0.5/8"] < memory["dense"]
    whole = rows[-1]
    assert (whole["method"], whole["workers"], whole["layers"]) == ("whitening", WORKERS, 2)
    assert rows[-2]["workers"] == 1
    assert rows[-2]["seconds"] >= sum(rows[-2]["seconds_by_linear"].values()) - 0.01
    for name in ("build", "decompose"):
        monkeypatch.setattr(speed, name, None)  # all is there
    monkeypatch.setattr(speed, "in_parallel", lambda *args: [])
    speed.main([*tiny, "--compiled", "dense", "--output", str(output)])
    assert json.loads(output.read_text())["rows"] == rows
    monkeypatch.undo()

    monkeypatch.syspath_prepend(FOLDER)
    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for row in rows:
        row["mib"] = row.get("parameters", 0) / 2**19
    output.write_text(json.dumps({**json.loads(output.read_text()), "rows": rows}))
    page = "\n".join(tables.compression())
    assert "| decode 2 | compile |" in page
    assert f"| 0.5/8 | {memory['0.5/8']} |" in page


@pytest.fixture
def quality() -> ModuleType:
    return importlib.import_module("compression_quality")


def test_perplexity_of_windows(quality: ModuleType, llama: TinyModel) -> None:
    model = llama.make_model().eval()
    ids = llama.make_batch(10)["input_ids"]
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in ids]
    assert quality.perplexity(model, ids) == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)

    def tokenizer(text: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.arange(len(text))[None])

    assert quality.windows(tokenizer, "x" * 50, 30, 8).tolist() == torch.arange(24).view(3, 8).tolist()
    assert quality.windows(tokenizer, "x" * 20, 30, 8).shape == (2, 8)


@pytest.mark.parametrize("allocation", ["uniform", "relative", "absolute"])
def test_cells_are_what_the_tuner_gives(
    quality: ModuleType, llama: TinyModel, allocation: str, tmp_path: Path
) -> None:
    model, ids = llama.make_model().eval(), llama.make_batch(8)["input_ids"]
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    args = quality.parse(["--model", "tiny", "--ratios", "0.7", "--allocations", allocation, "--iterations", "2"])
    results = quality.Results(tmp_path / "rows.json", quality.KEY, model="tiny")
    quality.measure(model, ids, quality.Calibration(model, ids), args, results)
    rows = results.rows
    assert [row["decomposition"] for row in rows[1:]] == args.decompositions
    assert len(set(args.decompositions)) == 9
    assert all(row["kept"] <= 0.7 for row in rows[1:])
    assert all(torch.equal(dense[name], parameter) for name, parameter in model.named_parameters()), "restored"

    config = LowRankConfig(
        ratio=0.7,
        decomposition="whitening",
        allocation="uniform" if allocation == "uniform" else "spectral",
        spectral_loss=None if allocation == "uniform" else allocation,
        rank_multiple=quality.RANK_MULTIPLE,
        target_modules=list(quality.linears(model)),
    )
    batches = [{"input_ids": part, "labels": part} for part in ids.split(quality.BATCH)]
    config.statistics = calibrate(model, batches, config=config, progress=False)
    compressed = get_peft_model(model, config).eval()
    row = next(row for row in rows if row["decomposition"] == "whitening")
    assert quality.perplexity(compressed, ids) == pytest.approx(row["perplexity"], rel=1e-3)


def test_quality_is_cut_short_resumed_and_tabled(
    quality: ModuleType, llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = llama.make_model().eval(), llama.make_batch(4)["input_ids"]
    output = tmp_path / "compression_quality.json"
    settings = {"test_tokens": 20_480, "context": 12, "calibration_tokens": 99}
    arguments = ["--model", "tiny", "--output", str(output), "--decompositions", "whitening", "svd", "--ratios", "0.7"]
    arguments += ["--allocations", "uniform", "relative"]

    def run(*more: str, model: torch.nn.Module = model, **other: Any) -> list[dict[str, Any]]:
        args = quality.parse([*arguments, *more])
        results = quality.Results(output, quality.KEY, model="Tiny", **{**settings, **other})
        quality.measure(model, ids, quality.Calibration(model, ids), args, results)
        return json.loads(output.read_text())["rows"]

    assert len(run("--seconds", "0")) == 1
    first = run("--allocations", "relative")
    monkeypatch.setattr(quality, "weighted_spectrum", None)  # uniform ranks need none, and spectral ones are there
    whole = run()
    assert whole[:3] == first
    assert [(row["decomposition"], row["allocation"]) for row in whole[3:]] == [
        ("whitening", "uniform"),
        ("svd", "uniform"),
    ]
    monkeypatch.setattr(quality, "decompose", None)
    assert run() == whole
    with pytest.raises(SystemExit, match="holds rows of context=12"):
        run(context=13)
    with pytest.raises(SystemExit, match="of another model or text"):
        run(model=llama.make_model(seed=1).eval())

    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = "\n".join(tables.compression())
    assert f"| SVD | {whole[2]['perplexity']:.1f} | {whole[4]['perplexity']:.1f} |" in page
    assert "Tiny, WikiText-2, the first 20,480 tokens" in page


@pytest.fixture
def glue() -> ModuleType:
    pytest.importorskip("sklearn")
    return importlib.import_module("fwsvd_glue")


class Sentences:
    """In place of a GLUE task."""

    name, device = "cola", "cpu"
    task = SimpleNamespace(metric="matthews", epochs=1)

    def __init__(self) -> None:
        self.train = TINY_MODELS["bert"].make_batch(512)
        self.validation = TINY_MODELS["bert"].make_batch(40, seed=1)


def test_training_again(glue: ModuleType, tmp_path: Path) -> None:
    data, model = Sentences(), TINY_MODELS["bert"].make_model()
    training = glue.Training(model, data, 3e-3, 4, {"seed": 0})
    for (trained,) in zip(glue.run_together([lambda: training], 2), strict=False):
        assert trained.done == trained.steps == 64
    assert glue.metric(model, data) > 90

    names = list(glue.linears(model))
    assert len(names) == 12
    args = glue.parse(["--model", "tiny", "--calibration-rows", "64", "--iterations", "2"])
    embeddings = model.base_model.embeddings.word_embeddings.weight.clone()
    results = glue.Results(tmp_path / "rows.json", glue.KEY)
    found = list(glue.cells(model, data, args, glue.missing("cola", 3, args, results)))
    assert [(row["method"], row["fifths"]) for row, _ in found[:6]] == [(method, 1) for method in glue.METHODS]
    assert all(set(factors) == set(names) for _, factors in found)
    row, factors = found[-1]
    assert factors[names[0]].up.shape == (32, 26), "four fifths of 32"
    small = glue.compressed(model, factors)
    assert glue.metric(small, data) > 80
    before = factors[names[0]].up.clone()
    again = glue.Training(small, data, 1e-2, 1, row)
    again.step()
    again.step()
    assert not torch.equal(small.get_submodule(names[0]).up.weight, before)
    assert torch.equal(factors[names[0]].up, before), "the factors are used again"
    assert torch.equal(model.base_model.embeddings.word_embeddings.weight, embeddings)


def test_glue_is_cut_short_and_resumed(glue: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TINY_MODELS["bert"].make_model().save_pretrained(tmp_path / "bert")
    monkeypatch.setattr(glue, "FIFTHS", (2, 4))
    data, output = {"cola": Sentences()}, tmp_path / "rows.json"
    data["cola"].train = {key: value[:64] for key, value in data["cola"].train.items()}
    arguments = ["--model", str(tmp_path / "bert"), "--methods", "svd", "whitening", "--calibration-rows", "32"]
    args = glue.parse([*arguments, "--dense-epochs", "1", "--epochs", "1", "--streams", "2"])

    def run(deadline: Any) -> list[dict[str, Any]]:
        glue.study(0, data, args, glue.Results(output, glue.KEY, model="bert"), deadline)
        return json.loads(output.read_text())["rows"]

    class OneGroup:
        asked = 0

        def left(self) -> int:
            self.asked += 1
            return 3 - self.asked

    first = run(OneGroup())
    assert [row["method"] for row in first] == ["dense", "svd", "whitening", "svd", "whitening"]
    assert ["after" in row for row in first] == [False, True, True, False, False]
    whole = run(glue.Deadline(60))
    assert whole[:3] == first[:3]
    assert all("after" in row for row in whole[1:])
    monkeypatch.setattr(glue, "Training", None)
    assert run(glue.Deadline(60)) == whole


def test_glue_is_drawn_and_tabled(glue: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for seed, task in ((0, "cola"), (1, "cola"), (0, "stsb")):
        rows.append({"task": task, "seed": seed, "method": "dense", "fifths": 5, "before": 50.0 + 10 * seed})
        for fifths in (1, 2):
            rows.append({"task": task, "seed": seed, "method": "em", "fifths": fifths, "before": 10.0 * seed + fifths})
    rows[1]["after"] = 44.0
    assert glue.means(rows, "cola", "em", "before") == [(1, 6.0), (2, 7.0)]
    assert glue.means(rows, "cola", "em", "after") == [(1, 44.0)]
    assert glue.means(rows, "cola", "svd", "before") == []
    glue.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000

    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    common = importlib.import_module("_common")
    common.store(tmp_path / "fwsvd_glue.json", rows, model="tiny", epochs=2)
    page = "\n".join(tables.compression())
    assert "### cola: 55.0 dense" in page
    assert "| EM | 6.0 | 7.0 |  |  | 44.0 |  |  |  |" in page


def test_deadline() -> None:
    common = importlib.import_module("_common")
    assert common.Deadline(-1).left() < 0 < common.Deadline(60).left()
