# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""When each rank of a model was pruned or opened, from the lines of `ranks.jsonl`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .grid import layers_of


@dataclass(frozen=True)
class Fates:
    """
    The fate of every rank.

    Args:
        verb (`str`): What happened to ranks: `"pruned"` or `"opened"`.
        modules (`dict[str, list[int | None]]`): For every module, layer by layer, the step at which that happened to each of
            its ranks; None where it never did.
    """

    verb: str
    modules: dict[str, list[int | None]]

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last of the steps."""
        steps = [step for fate in self.modules.values() for step in fate if step is not None]
        return min(steps), max(steps)

    @property
    def layers(self) -> list[tuple[int, str]]:
        """For every layer where it begins among the modules, and its label: that of the first one names the stack."""
        places = list(layers_of(self.modules).values())
        starts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1]]
        new_stack = {i for i in starts if i == 0 or places[i][0] != places[i - 1][0]}
        return [(i, " ".join(places[i]).strip() if i in new_stack else places[i][1]) for i in starts]

    def steps(self) -> list[list[float]]:
        """A row a rank, a column a module: the step, NaN where there is none."""
        return self._image(lambda step: float("nan") if step is None else float(step))

    def unchanged(self) -> list[list[float]]:
        """In the same form 1 where nothing ever happened to a rank, NaN elsewhere."""
        return self._image(lambda step: 1.0 if step is None else float("nan"))

    def _image(self, value: Any) -> list[list[float]]:
        height = max(map(len, self.modules.values()))
        columns = [[*map(value, steps), *[float("nan")] * (height - len(steps))] for steps in self.modules.values()]
        return [list(row) for row in zip(*columns, strict=True)]


def fates_of(history: Iterable[Mapping[str, Any]]) -> Fates | None:
    """
    Reads the fates of ranks from a history.

    Where a line tells which ranks were pruned, they are named by it; else the last ranks of a module are taken to go first,
    and ranks that come to be the last ones.

    Args:
        history: Lines of `ranks.jsonl` as dicts.

    Returns:
        `Fates`, or None if no rank of the history changed for good: in a search they come and go.
    """
    history = list(history)
    lines = [line for line in history if line.get("ranks")]
    if not lines or any("search/ratio" in line for line in history):
        return None
    first, last = lines[0]["ranks"], lines[-1]["ranks"]
    grows = sum(last.values()) > sum(first.values())
    # the line that told of all ranks may be missing
    widths = {
        name: max(max([line["ranks"].get(name, 0), *(n + 1 for n in _pruned(line, name))]) for line in lines)
        for name in last
    }
    modules: dict[str, list[int | None]] = {name: [None] * width for name, width in widths.items()}
    named = any("pruned" in line for line in lines)
    before = first
    for line in lines[1:]:
        for name, fate in modules.items():
            a, b = before.get(name, 0), line["ranks"].get(name, 0)
            changed = _pruned(line, name) if named else range(a, b) if grows else range(b, a)
            for number in changed:
                fate[number] = line["step"]
        before = line["ranks"]
    if not any(step is not None for fate in modules.values() for step in fate):
        return None
    places = layers_of(modules)
    order = {place: i for i, place in enumerate(dict.fromkeys(places.values()))}
    names = sorted(modules, key=lambda name: order[places[name]])
    return Fates("opened" if grows else "pruned", {name: modules[name] for name in names})


def _pruned(line: Mapping[str, Any], name: str) -> Sequence[int]:
    return line.get("pruned", {}).get(name, ())
