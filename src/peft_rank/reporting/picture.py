# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Draws `ranks.jsonl`: what every module was left with, and the way there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_rank.callbacks import RANKS_FILE

from .grid import RankGrid, rank_grid, total_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


CELL = (0.17, 0.42)  # inches: smallest and largest side of a cell
WIDTH = 13.0  # inches that the cells of a deep model share
LETTER = 0.085  # inches, of a label of 9 points
COLORS = {"total": "#0072B2", "budget": "#E69F00"}  # of the Okabe-Ito palette, which the colour-blind can tell apart


def plot_ranks(
    path_or_history: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """
    Draws the final rank of every module, and total rank and budget over the training.

    Args:
        path_or_history: `ranks.jsonl`, as `RankAllocationCallback` writes it, the folder that holds it, or its lines as
            dicts.
        output (`str`, *optional*): File to write; its ending chooses the format (png, svg, pdf).
        title (`str`, *optional*): Heading of the picture.

    Returns:
        `matplotlib.figure.Figure`: The picture; it is not registered with pyplot and needs no closing.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If no line of the history holds ranks.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'peft-rank[plot]'.") from error

    history = _read_history(path_or_history)
    measured = [line for line in history if line.get("ranks")]
    if not measured:
        raise ValueError(
            "The history holds no ranks. Pass the `ranks.jsonl` of a training with RankAllocationCallback(log=True)."
        )
    grid = rank_grid(measured[-1]["ranks"])
    cell = min(max(WIDTH / len(grid.rows), CELL[0]), CELL[1])
    left, right = _lay_out(Figure, grid, cell)
    _draw_map(left, grid, cell)
    _draw_totals(right, history)
    figure = left.figure
    if title:
        figure.suptitle(title)
    if output is not None:
        figure.savefig(output, dpi=150)
    return figure


def _read_history(source: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if not isinstance(source, (str, os.PathLike)):
        return list(source)
    path = Path(source)
    lines = (path / RANKS_FILE if path.is_dir() else path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _positions(grid: RankGrid) -> list[int]:
    """Where the layers are, in cells: one after another, with a gap between stacks."""
    stacks = [stack for stack, _ in grid.rows]
    return list(accumulate((1 + (a != b) for a, b in pairwise(stacks)), initial=0))


def _lay_out(figure_class: type[Figure], grid: RankGrid, cell: float) -> tuple[Axes, Axes]:
    """The axes of the map and of the curve: beside each other if the map is narrow, so that the picture is neither a
    tower nor a strip, else one above the other."""
    labels = LETTER * max(map(len, grid.columns))
    width, height = cell * (_positions(grid)[-1] + 1) + labels + 1.3, cell * len(grid.columns) + 1.1
    if width < 7:
        figure = figure_class(figsize=(width + 5, max(height, 3.2)), layout="constrained")
        return figure.subplots(ncols=2, width_ratios=[width, 5])
    figure = figure_class(figsize=(width, height + 2.6), layout="constrained")
    return figure.subplots(nrows=2, height_ratios=[height, 2.6])


def _draw_map(axes: Axes, grid: RankGrid, cell: float) -> None:
    """Layers from left to right, module types from top to bottom."""
    top = max((rank or 0 for row in grid.cells for rank in row), default=0) or 1
    position = _positions(grid)
    values = [[float("nan")] * (position[-1] + 1) for _ in grid.columns]
    size = min(9.0, cell * 72 * 0.46)
    for x, row in zip(position, grid.cells, strict=True):
        for y, rank in enumerate(row):
            if rank is None:
                continue
            values[y][x] = rank
            if len(str(top)) * 0.6 * size < 0.95 * cell * 72:
                color = "white" if rank > 0.55 * top else "black"
                axes.text(x, y, str(rank), ha="center", va="center", fontsize=size, color=color)
    image = axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=top, aspect="auto", interpolation="none")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01 if len(position) > 16 else 0.03, aspect=12)
    bar.locator.set_params(nbins=min(top, 6), integer=True, min_n_ticks=1)
    bar.set_label("rank")
    bar.outline.set_visible(False)
    _label_map(axes, grid, position, cell)


def _label_map(axes: Axes, grid: RankGrid, position: list[int], cell: float) -> None:
    axes.set_facecolor("0.96")  # where a layer has no such module
    axes.set_yticks(range(len(grid.columns)), grid.columns, fontsize=9)
    every = 1 if cell >= 0.25 else 5
    shown = [i for i, (_, index) in enumerate(grid.rows) if not index or int(index) % every == 0]
    axes.set_xticks([position[i] for i in shown], [grid.rows[i][1] for i in shown], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    stacks = [stack for stack, _ in grid.rows]
    below = {"xycoords": ("data", "axes fraction"), "xytext": (0, -18), "textcoords": "offset points"}
    for stack in dict.fromkeys(stacks):
        mine = [x for x, other in zip(position, stacks, strict=True) if other == stack]
        label = stack if stack == "other" else f"{stack} layer".strip()
        axes.annotate(label, ((mine[0] + mine[-1]) / 2, 0), ha="center", va="top", fontsize=9, **below)
    axes.set_title(f"Final ranks: {grid.total} in {grid.modules} modules", fontsize=10, loc="left")


def _draw_totals(axes: Axes, history: list[Mapping[str, Any]]) -> None:
    points = [(line["step"], line.get("rank/total", total_of(line.get("ranks", {}).values()))) for line in history]
    budget = [(line["step"], line["rank/budget"]) for line in history if "rank/budget" in line]
    decisions = [(line["step"], line["rank/total"]) for line in history if line.get("event") == "decision"]
    if budget:
        before = points[:1] if points[0][0] < budget[0][0] else []
        wide = {"color": COLORS["budget"], "lw": 5, "alpha": 0.6}
        axes.step(*zip(*before, *budget, strict=True), where="post", label="budget", **wide)
    axes.step(*zip(*points, strict=True), where="post", color=COLORS["total"], lw=1.6, label="total rank")
    if decisions:
        axes.plot(*zip(*decisions, strict=True), "o", color=COLORS["total"], ms=5, label="decision")
    axes.set_ylim(bottom=0, top=1.08 * max(total for _, total in points))
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title("Total rank in training", fontsize=10, loc="left")
