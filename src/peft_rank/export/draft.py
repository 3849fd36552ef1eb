# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Directories are written beside their place and then moved, so that a failure leaves what was there as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def draft_of(directory: Path) -> Iterator[Path]:
    """An empty directory on the same file system, removed at the end with all that was not moved out of it."""
    draft = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    draft.mkdir(parents=True)
    try:
        yield draft
    finally:
        shutil.rmtree(draft)
