# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Draws `ranks.jsonl`: what every module was left with, and the way there; and what compression did to each module."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .fates import Fates, fates_of
from .grid import RankGrid, rank_grid, total_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


RANKS_FILE = "ranks.jsonl"
PICTURE_FILE = "ranks.png"
CELL = (0.17, 0.42)  # inches: smallest and largest side of a cell
WIDTH = 13.0  # inches that the cells of a deep model share
CURVE = 2.6  # inches: height of a panel below the map
LETTER = 0.085  # inches, of a label of 9 points
COLORS = {"total": "#0072B2", "budget": "#E69F00"}  # of the Okabe-Ito palette, which the colour-blind can tell apart
RANKS, ERRORS = "YlGnBu", "OrRd"  # one hue each, from light to dark, so that grey tells them as well


def plot_ranks(
    path_or_history: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """
    Draws the final rank of every module, total rank and budget over the training, and which ranks were pruned (or, where
    ranks grow, opened) when; of a compressed model the rank of every module, and its error where that was recorded.

    Args:
        path_or_history: `ranks.jsonl`, as `RankAllocationCallback` writes it, the folder that holds it, or its lines as
            dicts; or the directory of a compressed model.
        output (`str`, *optional*): File to write; its ending chooses the format (png, svg, pdf).
        title (`str`, *optional*): Heading of the picture.

    Returns:
        `matplotlib.figure.Figure`: The picture; it is not registered with pyplot and needs no closing.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If no line of the history holds ranks, or one of the file is damaged.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'peft-rank[plot]'.") from error

    compressed = _compressed(path_or_history)
    figure = (
        _draw_history(Figure, _read_history(path_or_history))
        if compressed is None
        else _draw_model(Figure, *compressed)
    )
    if title:
        figure.suptitle(title)
    if output is not None:
        figure.savefig(output, dpi=150)
    return figure


def _read_history(source: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if not isinstance(source, (str, os.PathLike)):
        return list(source)
    path = Path(source) / RANKS_FILE if Path(source).is_dir() else Path(source)
    history = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            history.append(parse_line(line))
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is damaged: {error}. Remove it.") from error
    return history


def read_lines(path: Path) -> list[str]:
    """The lines of a record, whatever they hold: a crash of the machine may leave bytes that are no text."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def parse_line(line: str) -> dict[str, Any]:
    """A line of `ranks.jsonl`.

    Raises:
        ValueError: If it is not one.
    """
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    if not isinstance(content, dict) or type(content.get("step")) is not int:
        raise ValueError("it is no JSON object with a whole number as `step`")
    ranks = content.get("ranks", {})
    if not isinstance(ranks, dict) or not all(type(rank) is int for rank in ranks.values()):
        raise ValueError("its `ranks` are no JSON object of whole numbers")
    return content


def _compressed(source: Any) -> tuple[dict[str, int], dict[str, float]] | None:
    """Ranks and errors by module, if this is the directory of a compressed model."""
    # not at the top: cards, which are written beside such models, need this package
    from ..export.directory import is_compressed
    from .compression import compressed_table

    if not isinstance(source, (str, os.PathLike)) or not Path(source).is_dir() or not is_compressed(source):
        return None
    modules = compressed_table(source).modules
    errors = {name: module.error for name, module in modules.items() if module.error is not None}
    return {name: module.rank for name, module in modules.items()}, errors


# ---- the panels together ----


def _draw_history(figure_class: type[Figure], history: list[Mapping[str, Any]]) -> Figure:
    measured = [line for line in history if line.get("ranks")]
    if not measured:
        raise ValueError(
            "The history holds no ranks. Pass the `ranks.jsonl` of a training with RankAllocationCallback(log=True)."
        )
    grid, fates = rank_grid(measured[-1]["ranks"]), fates_of(history)
    cell = _cell(grid)
    axes = _lay_out(figure_class, grid, cell, panels=1 if fates is None else 2)
    _draw_map(axes[0], grid, cell, f"Final ranks: {grid.total} in {grid.modules} modules", "rank")
    _draw_totals(axes[1], history)
    if fates is not None:
        _draw_fates(axes[2], fates)
    return axes[0].figure


def _draw_model(figure_class: type[Figure], ranks: dict[str, int], errors: dict[str, float]) -> Figure:
    grid = rank_grid(ranks)
    cell = _cell(grid)
    width, height = _map_size(grid, cell)
    maps = 2 if errors else 1
    figure = figure_class(figsize=(max(width, 4), maps * max(height, 2)), layout="constrained")
    axes = figure.subplots(nrows=maps, squeeze=False)[:, 0]
    _draw_map(axes[0], grid, cell, f"Ranks: {grid.total} in {grid.modules} modules; the others are dense", "rank")
    if errors:
        title = "Relative error of each module, in the metric of its decomposition"
        _draw_map(axes[1], rank_grid(errors), cell, title, "error", ERRORS, _short_fraction)
    return figure


def _short_fraction(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def _positions(grid: RankGrid) -> list[int]:
    """Where the layers are, in cells: one after another, with a gap between stacks."""
    stacks = [stack for stack, _ in grid.rows]
    return list(accumulate((1 + (a != b) for a, b in pairwise(stacks)), initial=0))


def _cell(grid: RankGrid) -> float:
    return min(max(WIDTH / len(grid.rows), CELL[0]), CELL[1])


def _map_size(grid: RankGrid, cell: float) -> tuple[float, float]:
    labels = LETTER * max(map(len, grid.columns))
    return cell * (_positions(grid)[-1] + 1) + labels + 1.3, cell * len(grid.columns) + 1.1


def _lay_out(figure_class: type[Figure], grid: RankGrid, cell: float, panels: int) -> list[Axes]:
    """The axes of the map and of the panels: beside each other if the map is narrow, so that the picture is neither a
    tower nor a strip, else one above the other."""
    width, height = _map_size(grid, cell)
    if width < 7:
        figure = figure_class(figsize=(width + 5, max(height, 3.2 * panels)), layout="constrained")
        places = figure.add_gridspec(panels, 2, width_ratios=[width, 5])
        return [figure.add_subplot(places[:, 0]), *(figure.add_subplot(places[i, 1]) for i in range(panels))]
    figure = figure_class(figsize=(width, height + CURVE * panels), layout="constrained")
    return list(figure.subplots(nrows=1 + panels, height_ratios=[height, *[CURVE] * panels]))


# ---- the panels ----


def _draw_map(
    axes: Axes,
    grid: RankGrid,
    cell: float,
    title: str,
    label: str,
    colors: str = RANKS,
    text_of: Callable[[float], str] = str,
) -> None:
    """Layers from left to right, module types from top to bottom."""
    top = max((value or 0 for row in grid.cells for value in row), default=0) or 1
    position = _positions(grid)
    values = [[float("nan")] * (position[-1] + 1) for _ in grid.columns]
    size = min(9.0, cell * 72 * 0.46)
    longest = max(len(text_of(value)) for row in grid.cells for value in row if value is not None)
    for x, row in zip(position, grid.cells, strict=True):
        for y, value in enumerate(row):
            if value is None:
                continue
            values[y][x] = value
            if longest * 0.6 * size < 0.95 * cell * 72:
                color = "white" if value > 0.55 * top else "black"
                axes.text(x, y, text_of(value), ha="center", va="center", fontsize=size, color=color)
    image = axes.imshow(values, cmap=colors, vmin=0, vmax=top, aspect="auto", interpolation="none")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01 if len(position) > 16 else 0.03, aspect=12)
    if isinstance(top, int):
        bar.locator.set_params(nbins=min(top, 6), integer=True, min_n_ticks=1)
    bar.set_label(label)
    bar.outline.set_visible(False)
    _label_map(axes, grid, position, cell)
    axes.set_title(title, fontsize=10, loc="left")


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


def _draw_totals(axes: Axes, history: list[Mapping[str, Any]]) -> None:
    """Total rank and budget over the training; where modules may stay dense, the kept parameters and their target."""
    searches = any("search/ratio" in line for line in history)
    total, budget = ("search/ratio", "search/target") if searches else ("rank/total", "rank/budget")
    label = "kept / dense parameters" if searches else "total rank"
    if not searches:
        history = [{total: total_of(line.get("ranks", {}).values()), **line} for line in history]
    points = [(line["step"], line[total]) for line in history if total in line]
    _draw_budget(axes, [(line["step"], line[budget]) for line in history if budget in line], points)
    axes.step(*zip(*points, strict=True), where="post", color=COLORS["total"], lw=1.6, label=label)
    decisions = [(line["step"], line[total]) for line in history if line.get("event") == "decision" and total in line]
    if decisions:
        axes.plot(*zip(*decisions, strict=True), "o", color=COLORS["total"], ms=5, label="decision")
    axes.set_ylim(bottom=0, top=1.08 * max(value for _, value in points))
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=not searches)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title("Search for ranks" if searches else "Total rank in training", fontsize=10, loc="left")


def _draw_budget(axes: Axes, budget: list[tuple[int, float]], points: list[tuple[int, float]]) -> None:
    """The budget, from the first point on; a bound that is nowhere near the points is left out."""
    if not budget or min(value for _, value in budget) > 1.08 * max(value for _, value in points):
        return
    before = points[:1] if points[0][0] < budget[0][0] else []
    wide = {"color": COLORS["budget"], "lw": 5, "alpha": 0.6}
    axes.step(*zip(*before, *budget, strict=True), where="post", label="budget", **wide)


def _draw_fates(axes: Axes, fates: Fates) -> None:
    """Modules from left to right, layer by layer; their ranks from bottom to top, coloured by when they were pruned or
    opened; those that never changed are black."""
    from matplotlib.colors import ListedColormap

    axes.set_facecolor("0.96")  # where a module has no such rank
    shown = {"aspect": "auto", "interpolation": "nearest", "origin": "lower"}
    axes.imshow(fates.unchanged(), cmap=ListedColormap(["black"]), **shown)
    image = axes.imshow(fates.steps(), cmap=_without_its_end(RANKS), vmin=fates.span[0], vmax=fates.span[1], **shown)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=12)
    bar.locator.set_params(nbins=6, integer=True, min_n_ticks=1)
    bar.set_label("optimizer step")
    bar.outline.set_visible(False)
    every = -(-len(fates.layers) // 20)
    starts = [(start, label) for i, (start, label) in enumerate(fates.layers) if i % every == 0 or " " in label]
    axes.set_xticks([start - 0.5 for start, _ in starts], [label for _, label in starts], fontsize=8, ha="left")
    for start, _ in fates.layers[1:] if len(fates.layers) <= 40 else ():
        axes.axvline(start - 0.5, color="white", lw=0.8)
    axes.set_xlabel("modules, layer by layer", fontsize=9)
    axes.set_ylabel("rank of the module", fontsize=9)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    otherwise = "never" if fates.verb == "pruned" else "at the start"
    axes.set_title(f"When each rank was {fates.verb} (black: {otherwise})", fontsize=10, loc="left")


def _without_its_end(name: str) -> Any:
    """A colour map without its darkest quarter, which black could be taken for."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps[name](range(192)))
