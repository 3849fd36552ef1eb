# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Whether a file is what a search can go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check_entries(
    expected: Mapping[str, Mapping[str, torch.Size]], stored: Mapping[str, Tensor], ignored: Sequence[str]
) -> None:
    """
    Make sure that every module finds what it is to hold in a file, and nothing else.

    Args:
        expected (`Mapping[str, Mapping[str, torch.Size]]`): Shapes by entry, by module.
        stored (`Mapping[str, Tensor]`): The file's entries, by module name in the base model and entry.
        ignored (`Sequence[str]`): Beginnings of entries that are not looked at.

    Raises:
        ValueError: If an entry is missing, has another shape, or is of another method.
    """
    problem = None
    for name, shapes in expected.items():
        beside = tuple(f"{name}.{part}" for part in ignored)
        found = [key for key in stored if key.startswith(f"{name}.") and not key.startswith(beside)]
        for key, shape in shapes.items():
            if f"{name}.{key}" not in stored:
                problem = f"{name}.{key} is missing in the file; it has {tuple(shape)} here"
            elif stored[f"{name}.{key}"].shape != shape:
                there = tuple(stored[f"{name}.{key}"].shape)
                problem = f"{name}.{key} is of shape {there} in the file; it has {tuple(shape)} here"
        if len(found) > len(shapes) and problem is None:
            other = next(key for key in found if key.removeprefix(f"{name}.") not in shapes)
            problem = f"{other} in the file is nothing that this search has"
        if problem is not None:
            raise ValueError(
                f"{problem}. The file is damaged or belongs to another model or method; nothing was loaded."
            )
