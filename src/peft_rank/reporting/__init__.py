# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Shows ranks to people: a table of a model's ranks, and a picture of `ranks.jsonl`."""

from .grid import RankGrid, rank_grid, rank_table
from .picture import plot_ranks


__all__ = ["RankGrid", "plot_ranks", "rank_grid", "rank_table"]
