# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The table of ranks and their picture: every rank stands in the right cell, whatever the architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from transformers import Trainer

import runs_inrank
import searches
from peft_rank import RankAllocationCallback, SalientLoRAConfig, get_rank_pattern, plot_ranks, rank_table
from peft_rank.reporting import rank_grid
from peft_rank.reporting.fates import fates_of
from tiny_models import LAYERS, TINY_MODELS, TinyModel, training_arguments


LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")


def _llama(layers: int) -> dict[str, int]:
    return {f"model.layers.{i}.{kind}": (i + 3 * j) % 5 for i in range(layers) for j, kind in enumerate(LLAMA)}


def _encoder_decoder(layers: int) -> dict[str, int]:
    names = [
        (stack, i, kind) for stack in ("encoder", "decoder") for i in range(layers) for kind in ("self_attn", "fc1")
    ]
    names += [("decoder", i, "encoder_attn") for i in range(layers)]
    return {f"model.{stack}.layers.{i}.{kind}": 1 for stack, i, kind in names}


def _history(ranks: dict[str, int]) -> list[dict[str, Any]]:
    start, total = 8 * len(ranks), sum(ranks.values())
    return [
        {"step": 0, "event": "start", "plan": "", "ranks": dict.fromkeys(ranks, 8)},
        {"step": 5, "event": "log", "rank/total": start, "rank/budget": start},
        {"step": 10, "event": "decision", "rank/total": total, "rank/budget": total, "ranks": ranks},
        {"step": 20, "event": "end", "rank/total": total, "rank/budget": total, "ranks": ranks},
    ]


def test_grid_of_an_encoder() -> None:
    ranks = {f"bert.encoder.layer.{i}.{kind}.dense": i for i in (10, 2) for kind in ("attention.output", "output")}
    grid = rank_grid(ranks | {"classifier": 7})
    assert grid.rows == [("", "2"), ("", "10"), ("other", "")]
    assert grid.columns == ["attention.output.dense", "output.dense", "classifier"]
    assert grid.cells == [[2, 2, None], [10, 10, None], [None, None, 7]]


def test_grid_keeps_encoder_and_decoder_apart() -> None:
    grid = rank_grid(
        {
            "encoder.block.0.layer.0.SelfAttention.q": 1,
            "encoder.block.0.layer.1.DenseReluDense.wi": 2,
            "decoder.block.0.layer.0.SelfAttention.q": 3,
            "decoder.block.0.layer.1.EncDecAttention.q": 0,
            "decoder.block.0.layer.2.DenseReluDense.wi": 5,
        }
    )
    assert grid.rows == [("encoder", "0"), ("decoder", "0")]
    assert grid.columns == ["SelfAttention.q", "wi", "EncDecAttention.q"]
    assert grid.cells == [[1, 2, None], [3, 5, 0]]


def test_grid_keeps_experts_apart() -> None:
    grid = rank_grid({f"model.layers.0.mlp.experts.{i}.up_proj": i for i in range(3)})
    assert grid.columns == [f"{i}.up_proj" for i in range(3)]
    assert grid.cells == [[0, 1, 2]]


@pytest.mark.parametrize(
    "names", [["0", "2"], ["layers.0", "layers.1"], ["lin0", "lin1"], ["tower.a.0.x", "tower.0.x"], []]
)
def test_grid_of_unusual_names_loses_nothing(names: list[str]) -> None:
    grid = rank_grid({name: i + 1 for i, name in enumerate(names)})
    assert grid.modules == len(names)
    assert grid.total == sum(range(len(names) + 1))
    assert len(set(grid.rows)) == len(grid.rows) and len(set(grid.columns)) == len(grid.columns)
    assert grid.summary in str(grid)


def test_table_of_every_architecture(tiny: TinyModel) -> None:
    config = SalientLoRAConfig(init_r=4, target_modules=list(tiny.target_modules), task_type=tiny.task_type)
    model = get_peft_model(tiny.make_model(), config)
    table = rank_table(model)
    assert table.total == sum(get_rank_pattern(model).values())
    assert table.modules == len(get_rank_pattern(model))
    stacks = {"bart": ["encoder", "decoder"], "t5": ["encoder", "decoder"]}.get(tiny.name, [""])
    assert table.rows == [(stack, str(i)) for stack in stacks for i in range(LAYERS)]
    assert all(column.rsplit(".", 1)[-1].isidentifier() for column in table.columns)


def test_table_as_text_and_markdown() -> None:
    grid = rank_grid({"h.0.attn.q": 12, "h.0.mlp": 3, "h.1.attn.q": 0, "h.1.mlp": 1})
    assert str(grid).splitlines() == [
        "layer   q  mlp  total",
        "---------------------",
        "0      12    3     15",
        "1       0    1      1",
        "---------------------",
        "total  12    4     16",
        "total rank 16, 4 a module, 4 modules, 1 of them without any rank",
    ]
    assert grid.markdown().splitlines() == [
        "| layer | q | mlp | total |",
        "| --- | ---: | ---: | ---: |",
        "| 0 | 12 | 3 | 15 |",
        "| 1 | 0 | 1 | 1 |",
        "| total | 12 | 4 | 16 |",
    ]


def test_table_of_a_model_without_adapter(llama: TinyModel) -> None:
    with pytest.raises(TypeError, match="no adapter of peft_rank"):
        rank_table(llama.make_model())


@pytest.mark.parametrize("layers", [1, 2, 6, 12, 32, 80])
def test_picture_has_a_sane_shape_and_every_number(layers: int, tmp_path: Path) -> None:
    ranks = _llama(layers)
    figure = plot_ranks(_history(ranks), tmp_path / "ranks.png", title="Ranks")
    width, height = figure.get_size_inches()
    assert 1 < width / height < 5 and width < 17
    assert (tmp_path / "ranks.png").stat().st_size > 0
    numbers = [text.get_text() for text in figure.axes[0].texts if text.get_text().isdecimal()]
    assert sorted(numbers) == sorted(map(str, ranks.values()))


def test_numbers_that_do_not_fit_are_left_out() -> None:
    figure = plot_ranks(_history({name: 1000 * rank for name, rank in _llama(80).items()}))
    assert not [text for text in figure.axes[0].texts if text.get_text().isdecimal()]


def test_picture_of_an_encoder_decoder_names_the_stacks() -> None:
    figure = plot_ranks(_history(_encoder_decoder(6)))
    assert {"encoder layer", "decoder layer"} <= {text.get_text() for text in figure.axes[0].texts}


def test_picture_of_a_real_training(tmp_path: Path, deberta: TinyModel) -> None:
    config = SalientLoRAConfig(
        init_r=4, target_r=1, initial_window=3, final_window=6, target_modules=list(deberta.target_modules)
    )
    model = get_peft_model(deberta.make_model(), config)
    arguments = training_arguments(tmp_path, max_steps=12)
    Trainer(model, arguments, train_dataset=deberta.dataset(16), callbacks=[RankAllocationCallback()]).train()
    history = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rank_grid(history[-1]["ranks"]) == rank_table(model)
    for source in (tmp_path, str(tmp_path / "ranks.jsonl"), history):
        lines = {line.get_label(): line.get_ydata() for line in plot_ranks(source).axes[1].lines}
        first, *_, last = lines["total rank"]
        assert (first, last) == (4 * rank_table(model).modules, rank_table(model).modules)
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    fates = fates_of(history)
    decisions = {line["step"] for line in history if line["event"] == "decision"}
    assert {step for fate in fates.modules.values() for step in fate if step is not None} == decisions
    left = {name: [i for i, step in enumerate(fate) if step is None] for name, fate in fates.modules.items()}
    assert left == model.base_model.living_ranks()
    assert {name: len(numbers) for name, numbers in left.items()} == get_rank_pattern(model)


NAN = float("nan")
PRUNED = [
    {
        "step": 0,
        "event": "start",
        "ranks": {"decoder.layers.0.q": 3, "encoder.layers.0.q": 2, "encoder.layers.1.q": 1},
    },
    {"step": 4, "event": "log", "rank/total": 6},
    {
        "step": 5,
        "event": "decision",
        "ranks": {"decoder.layers.0.q": 1, "encoder.layers.0.q": 2, "encoder.layers.1.q": 1},
        "pruned": {"decoder.layers.0.q": [0, 2]},
    },
    {
        "step": 9,
        "event": "decision",
        "ranks": {"decoder.layers.0.q": 1, "encoder.layers.0.q": 1, "encoder.layers.1.q": 0},
        "pruned": {"encoder.layers.0.q": [0], "encoder.layers.1.q": [0]},
    },
]


def test_which_rank_was_pruned_when() -> None:
    fates = fates_of(PRUNED)
    expected = {"decoder.layers.0.q": [5, None, 5], "encoder.layers.0.q": [9, None], "encoder.layers.1.q": [9]}
    assert (fates.verb, fates.modules, fates.span) == ("pruned", expected, (5, 9))
    assert fates.layers == [(0, "decoder 0"), (1, "encoder 0"), (2, "1")]
    assert str(fates.steps()) == str([[5.0, 9.0, 9.0], [NAN, NAN, NAN], [5.0, NAN, NAN]])
    assert str(fates.unchanged()) == str([[NAN, NAN, NAN], [1.0, 1.0, NAN], [NAN, NAN, NAN]])


def test_ranks_without_identity_go_from_the_last_on() -> None:
    counts = [{key: value for key, value in line.items() if key != "pruned"} for line in PRUNED]
    assert fates_of(counts).modules == {
        "decoder.layers.0.q": [None, 5, 5],
        "encoder.layers.0.q": [None, 9],
        "encoder.layers.1.q": [9],
    }


def test_ranks_that_open() -> None:
    history = [{"step": step, "ranks": {"h.0": a, "h.1": b}} for step, a, b in [(0, 1, 1), (3, 3, 1), (6, 4, 1)]]
    fates = fates_of(history)
    assert (fates.verb, fates.modules) == ("opened", {"h.0": [None, 3, 3, 6], "h.1": [None]})
    titles = [axes.get_title(loc="left") for axes in plot_ranks(history).axes]
    assert "When each rank was opened (black: at the start)" in titles


@pytest.mark.parametrize("method", ["inrank", "ars", "l2lrc"])
def test_pictures_of_the_other_methods(method: str, tmp_path: Path) -> None:
    bart = TINY_MODELS["bart"]
    model = runs_inrank.adapted(bart) if method == "inrank" else searches.searched(method, bart)
    rate = 5e-3 if method == "inrank" else searches.METHODS[method][2]
    arguments = training_arguments(tmp_path, max_steps=20, learning_rate=rate, logging_steps=2)
    Trainer(model, arguments, train_dataset=bart.dataset(16), callbacks=[RankAllocationCallback()]).train()
    assert (tmp_path / "ranks.png").stat().st_size > 0
    figure = plot_ranks(tmp_path)
    numbers = [int(text.get_text()) for text in figure.axes[0].texts if text.get_text().isdecimal()]
    assert sorted(numbers) == sorted(get_rank_pattern(model).values())
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[1].lines}
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    if method == "inrank":
        assert list(curves["total rank"])[-1] == sum(get_rank_pattern(model).values())
        assert "budget" not in curves  # it is only an upper bound
        assert "When each rank was opened (black: at the start)" in titles
    else:
        assert set(curves["budget"]) == {0.7}
        assert curves["kept / dense parameters"][0] == 1
        assert not [title for title in titles if title.startswith("When")]


def test_fixed_ranks_have_no_fates() -> None:
    assert fates_of([{"step": 0, "ranks": {"h.0": 2}}, {"step": 9, "ranks": {"h.0": 2}}]) is None
    assert fates_of([{"step": 0, "event": "log"}]) is None
    assert len(plot_ranks([{"step": 0, "ranks": {"h.0": 2}}]).axes) == 3  # the map, its bar, the curve


def test_history_without_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no ranks"):
        plot_ranks([{"step": 1, "event": "log", "rank/total": 3, "rank/budget": 3}])
    with pytest.raises(FileNotFoundError):
        plot_ranks(tmp_path)


@pytest.mark.parametrize(
    "line",
    ["", '{"step": 3, "ran', "\0\0\0", "[1, 2]", '{"event": "log"}', '{"step": 3, "ranks": [1]}', '{"step": "a"}'],
)
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "ranks.jsonl"
    path.write_text("\n".join([json.dumps(_history(_llama(2))[0]), line, "{}"]))
    with pytest.raises(ValueError, match=rf"Line 2 of {path} is damaged"):
        plot_ranks(tmp_path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=rf"Line 1 of {path} is damaged"):
        plot_ranks(path)


def test_ranks_pruned_before_the_first_line_that_is_left() -> None:
    history = [{"step": step, "ranks": {"0.q": 4 - step}, "pruned": {"0.q": [4 - step]}} for step in (1, 2, 3)]
    assert fates_of(history).modules == {"0.q": [None, 3, 2, None]}


def test_matplotlib_is_only_needed_for_pictures() -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from peft_rank import plot_ranks\n"
        "try:\n    plot_ranks([])\n"
        "except ImportError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "peft-rank[plot]" in result.stdout
