# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The record of a training, `ranks.jsonl` and its picture, beside what came of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from peft import PeftModel
from torch import nn

from peft_rank.reporting.picture import PICTURE_FILE, RANKS_FILE
from peft_rank.tuners.adaptive import AdaptiveRankTuner


PICTURE = f"![Ranks of the modules, and how they came about]({PICTURE_FILE})"


def copy_record(source: nn.Module | Path, directory: Path) -> list[str]:
    """
    Copy the record of a training.

    Args:
        source (`torch.nn.Module` or `Path`): A model that was trained with `RankAllocationCallback`, or a folder.
        directory (`Path`): Where to.

    Returns:
        `list[str]`: Names of the files that were there to copy.
    """
    folder = source if isinstance(source, Path) else _folder_of(source)
    if folder is None:
        return []
    names = [name for name in (RANKS_FILE, PICTURE_FILE) if (folder / name).is_file()]
    for name in names:
        if folder.resolve() != directory.resolve():
            shutil.copyfile(folder / name, directory / name)
    return names


def _folder_of(model: nn.Module) -> Path | None:
    tuner = model.base_model if isinstance(model, PeftModel) else None
    return tuner.record_folder if isinstance(tuner, AdaptiveRankTuner) else None


def picture_in(directory: Path) -> list[str]:
    """What shows the picture in a card, if there is one in the directory."""
    return [PICTURE] if (directory / PICTURE_FILE).is_file() else []
