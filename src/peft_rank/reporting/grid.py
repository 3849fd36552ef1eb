# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Ranks as a table of layers and module types.

Module names are split into a layer and a module type by their shape alone: nothing here knows of architectures.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from peft_rank.ranks import get_rank_pattern


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
        body = [*self.cells, [total_of(column) for column in zip(*self.cells, strict=True)]]
        labels = [*(" ".join(row).strip() for row in self.rows), "total"]
        return [
            [label, *("" if rank is None else str(rank) for rank in row), str(total_of(row))]
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


def total_of(ranks: Iterable[int | None]) -> int:
    """The sum, where `None` stands for no module."""
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


def layers_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Stack and index of the layer that each module is in, as in `RankGrid.rows`."""
    places = {name: _split(name)[:2] for name in names}
    labels = _stack_labels(list(dict.fromkeys(stack for stack, index in places.values() if index is not None)))
    return {
        name: ("other", "") if index is None else (labels[stack], str(index))
        for name, (stack, index) in places.items()
    }


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
