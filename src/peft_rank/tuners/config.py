# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What the configurations of all tuners have in common: which modules, and their ranks."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig


@dataclass
class AdaptedModulesConfig(PeftConfig):
    """
    The fields that every method has. A method's `__post_init__` sets `peft_type` before it calls this one.

    Raises:
        ValueError: If a field, or a combination of fields, is outside its legal range.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt, a regular expression, or 'all-linear'. By default those that LoRA "
            "adapts in the architecture."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules, or a regular expression, that are not adapted."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; all by default."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that `layers_to_transform` counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules besides the adapters that are trained and saved, such as a classifier."},
    )
    bias: str = field(
        default="none",
        metadata={
            "help": "Which biases are trained: 'none', 'all', or those of the adapted modules: the method's name in "
            "lower case and '_only'."
        },
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "True for layers that store their weight as (in, out), such as `Conv1D`."}
    )
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict,
        metadata={
            "help": "Ranks of single modules, by name or regular expression, matched as in LoRA. Written by the "
            "allocation."
        },
    )
    allocation_state: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Written to checkpoints of an unfinished allocation: where in the checkpoint its state is kept. "
            "Not to be set by hand."
        },
    )
    peft_rank_version: str | None = field(
        default=None, metadata={"help": "Version of peft_rank that wrote the configuration, leave empty."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peft_rank_version is None:
            self.peft_rank_version = importlib.metadata.version("peft-rank")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.rank_pattern = {} if self.rank_pattern is None else self.rank_pattern
        if not isinstance(self.rank_pattern, dict):
            raise ValueError(f"`rank_pattern={self.rank_pattern!r}` must be a dict of module names and ranks.")
        for name, rank in self.rank_pattern.items():
            check_int(f"rank_pattern[{name!r}]", rank, 0)
        self._check_modules()

    def write_ranks(self, rank_pattern: dict[str, int], allocation_state: dict[str, Any] | None = None) -> None:
        """Describe an adapter that is about to be saved, or is finished."""
        # not a field: what the user gave is for the next model that is made from this configuration
        vars(self).setdefault("_given_rank_pattern", self.rank_pattern)
        self.rank_pattern, self.allocation_state = rank_pattern, allocation_state

    def forget_ranks(self) -> None:
        """Undo `write_ranks`: a new adapter starts from what the user gave, not from the ranks of the last one."""
        if "_given_rank_pattern" in vars(self):
            self.rank_pattern, self.allocation_state = vars(self).pop("_given_rank_pattern"), None

    def _check_modules(self) -> None:
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` cannot be used when `target_modules` is a string. Give a list of names."
            )
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError(
                "`layers_pattern` cannot be used when `target_modules` is a string. Give a list of names."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`: which layers of the list to adapt.")
        only = f"{self.peft_type.value.lower()}_only"
        if self.bias not in ("none", "all", only):
            raise ValueError(f"`bias={self.bias!r}` must be 'none', 'all' or {only!r}.")


def check_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}={value!r}` must be an integer of {minimum} or more.")


def check_number(name: str, value: Any, legal: Callable[[float], bool], text: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not legal(value):
        raise ValueError(f"`{name}={value!r}` must be a number {text}.")
