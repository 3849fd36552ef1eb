# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Shows ranks to people: a table of a model's ranks, and a picture of `ranks.jsonl`.

Module names are split into a layer and a module type by their shape alone, so that nothing here knows of architectures.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .callbacks import RANKS_FILE
from .ranks import get_rank_pattern


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# ---- names into layers and module types ----


@dataclass(frozen=True)
class RankGrid:
    """
    Ranks by layer and module type. Prints as a table; notebooks show `markdown()`.

    Args:
        rows (`list[tuple[str, str]]`): Stack and index of every layer. The stack is "" if there is only one; modules
            outside of any numbered layer are in a last row `("other", "")`.
        columns (`list[str]`): Module types, as short as they stay unique.
        cells (`list[list[int | None]]`): A list a row; `None` where a layer has no such module.
    """

    rows: list[tuple[str, str]]
    columns: list[str]
    cells: list[list[int | None]]

    @property
    def total(self) -> int:
        return sum(rank or 0 for row in self.cells for rank in row)

    @property
    def modules(self) -> int:
        return sum(rank is not None for row in self.cells for rank in row)

    @property
    def summary(self) -> str:
        """One line: total and mean rank, number of modules."""
        empty = sum(rank == 0 for row in self.cells for rank in row)
        left_out = f", {empty} of them without any rank" if empty else ""
        return f"total rank {self.total}, {self.total / max(self.modules, 1):.4g} a module, {self.modules} modules{left_out}"

    def _lines(self) -> list[list[str]]:
        """The body as text: a row a layer and one of totals; label first, total last."""
        body = [*self.cells, [_total(column) for column in zip(*self.cells, strict=True)]]
        labels = [*(" ".join(row).strip() for row in self.rows), "total"]
        return [
            [label, *("" if rank is None else str(rank) for rank in row), str(_total(row))]
            for label, row in zip(labels, body, strict=True)
        ]

    def __str__(self) -> str:
        header = [column.split(".") for column in ["layer", *self.columns, "total"]]
        height = max(map(len, header))
        stacked = [[""] * (height - len(parts)) + parts for parts in header]
        lines = [*([parts[i] for parts in stacked] for i in range(height)), *self._lines()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([*text[:height], rule, *text[height:-1], rule, text[-1], self.summary])

    __repr__ = __str__

    def markdown(self) -> str:
        """The table as Markdown, without the summary."""
        header = ["layer", *self.columns, "total"]
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *self._lines()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    _repr_markdown_ = markdown


def _total(ranks: Iterable[int | None]) -> int:
    return sum(rank or 0 for rank in ranks)


def rank_grid(ranks: Mapping[str, int]) -> RankGrid:
    """Arranges ranks, given by module name, in a grid of layers and module types.

    The first number in a name is the layer's index, what stands before it the stack (encoder and decoder are two), what
    follows the module type. Containers that are numbered again (`layer.0` in T5's blocks) are left out of the type where
    no two modules of a layer become the same.
    """
    places = {name: _split(name) for name in ranks}
    plain = {name: _without_numbers(kind) for name, (_, _, kind) in places.items()}
    if len({(*places[name][:2], kind) for name, kind in plain.items()}) == len(places):
        places = {name: (stack, index, plain[name]) for name, (stack, index, _) in places.items()}
    stacks = list(dict.fromkeys(stack for stack, index, _ in places.values() if index is not None))
    layers = {place[:2]: {} for place in places.values()}  # (stack, index) -> module type -> rank
    for name, (stack, index, kind) in places.items():
        layers[stack, index][kind] = ranks[name]
    order = sorted(layers, key=lambda row: (row[1] is None, stacks.index(row[0]) if row[0] in stacks else 0, row[1]))
    kinds = list(dict.fromkeys(kind for _, _, kind in places.values()))
    labels = _stack_labels(stacks)
    return RankGrid(
        rows=[("other", "") if index is None else (labels[stack], str(index)) for stack, index in order],
        columns=_shortest_endings(kinds),
        cells=[[layers[row].get(kind) for kind in kinds] for row in order],
    )


def _split(name: str) -> tuple[str, int | None, str]:
    """Stack, index and module type of a module; no index outside of numbered layers."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return "", None, name
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :] or parts[max(at - 1, 0) : at] or ["module"])


def _without_numbers(kind: str) -> str:
    parts = kind.split(".")
    numbered = [part.isdecimal() for part in [*parts, ""]]
    return ".".join(p for i, p in enumerate(parts) if not numbered[i] and not numbered[i + 1]) or kind


def _stack_labels(stacks: list[str]) -> dict[str, str]:
    """What tells the stacks apart: their names without what all of them begin and end with."""
    if len(stacks) <= 1:
        return dict.fromkeys(stacks, "")
    split = [stack.split(".") for stack in stacks]
    start = len(os.path.commonprefix(split))
    end = len(os.path.commonprefix([parts[start:][::-1] for parts in split]))
    return {
        stack: ".".join(parts[start : len(parts) - end]) or stack for stack, parts in zip(stacks, split, strict=True)
    }


def _shortest_endings(names: list[str]) -> list[str]:
    """The shortest dotted ending of each name that no other name ends with, of one length for the parts of one parent."""
    split = [name.split(".") for name in names]
    count = Counter(tuple(parts[-n:]) for parts in split for n in range(1, len(parts) + 1))
    length: dict[tuple[str, ...], int] = {}
    for parts in split:
        own = next((n for n in range(1, len(parts)) if count[tuple(parts[-n:])] == 1), len(parts))
        length[tuple(parts[:-1])] = max(length.get(tuple(parts[:-1]), 1), own)
    return [".".join(parts[-length[tuple(parts[:-1])] :]) for parts in split]


def rank_table(model: nn.Module, *, adapter_name: str | None = None) -> RankGrid:
    """
    The ranks of an adapted model as a table: a row a layer, a column a module type, with totals.

    Args:
        model (`torch.nn.Module`): A model with an adapter of this package.
        adapter_name (`str`, *optional*): The adapter, by default the first active one.

    Returns:
        `RankGrid`: Prints as a table; `.markdown()` gives it as Markdown, `.cells` as numbers.

    Raises:
        TypeError: If the model has no such adapter.

    Example:

        ```py
        >>> print(rank_table(model))
        ```
    """
    return rank_grid(get_rank_pattern(model, adapter_name=adapter_name))


# ---- the picture ----


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
    labels = LETTER * max(map(len, grid.columns))
    map_size = (cell * (len(grid.rows) + _gaps(grid)) + labels + 1.3, cell * len(grid.columns) + 1.1)
    if map_size[0] < 7:  # beside each other, so that the picture is neither a tower nor a strip
        shape = {"ncols": 2, "width_ratios": [map_size[0], 5]}
        size = (map_size[0] + 5, max(map_size[1], 3.2))
    else:
        shape = {"nrows": 2, "height_ratios": [map_size[1], 2.6]}
        size = (map_size[0], map_size[1] + 2.6)
    figure = Figure(figsize=size, layout="constrained")
    upper, lower = figure.subplots(**shape)
    _draw_map(upper, grid, cell)
    _draw_totals(lower, history)
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


def _gaps(grid: RankGrid) -> int:
    stacks = [stack for stack, _ in grid.rows]
    return sum(a != b for a, b in pairwise(stacks))


def _draw_map(axes: Axes, grid: RankGrid, cell: float) -> None:
    """Layers from left to right, with a gap between stacks; module types from top to bottom."""
    top = max((rank or 0 for row in grid.cells for rank in row), default=0) or 1
    position, stacks = [], [stack for stack, _ in grid.rows]
    for i, stack in enumerate(stacks):
        position.append((position[-1] + 1 + (stack != stacks[i - 1])) if i else 0)
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

    axes.set_facecolor("0.96")  # where a layer has no such module
    axes.set_yticks(range(len(grid.columns)), grid.columns, fontsize=9)
    every = 1 if cell >= 0.25 else 5
    shown = [i for i, (_, index) in enumerate(grid.rows) if not index or int(index) % every == 0]
    axes.set_xticks([position[i] for i in shown], [grid.rows[i][1] for i in shown], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    below = {"xycoords": ("data", "axes fraction"), "xytext": (0, -18), "textcoords": "offset points"}
    for stack in dict.fromkeys(stacks):
        mine = [x for x, other in zip(position, stacks, strict=True) if other == stack]
        label = stack if stack == "other" else f"{stack} layer".strip()
        axes.annotate(label, ((mine[0] + mine[-1]) / 2, 0), ha="center", va="top", fontsize=9, **below)
    axes.set_title(f"Final ranks: {grid.total} in {grid.modules} modules", fontsize=10, loc="left")


def _draw_totals(axes: Axes, history: list[Mapping[str, Any]]) -> None:
    points = [(line["step"], line.get("rank/total", _total(line.get("ranks", {}).values()))) for line in history]
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
