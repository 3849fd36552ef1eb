# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""A text-classification task that every Python installation carries: which standard-library package does this sentence of
a docstring come from?

The sources are read, not imported. Words that contain a package's name are masked. All sentences of one docstring are on
the same side of the split, and no sentence occurs twice. Versions of Python differ a little in their documentation;
the same version gives the same data.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


# class -> where its sources are, below the standard library's folder
PACKAGES = {
    "asyncio": "asyncio/**/*.py",
    "decimal": "_pydecimal.py",
    "email": "email/**/*.py",
    "http": "http/**/*.py",
    "importlib": "importlib/**/*.py",
    "ipaddress": "ipaddress.py",
    "logging": "logging/**/*.py",
    "multiprocessing": "multiprocessing/**/*.py",
    "typing": "typing.py",
    "xml": "xml/**/*.py",
}
MASK = "[MASK]"
NAMED = re.compile(rf"\w*(?:{'|'.join(PACKAGES)})\w*", re.IGNORECASE)
END_OF_SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n\s*\n")


@dataclass(frozen=True)
class Task:
    """Sentences with the index of their package in `labels`, balanced over the packages."""

    labels: list[str]
    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]


def make_task(n_train: int = 140, n_validation: int = 60, seed: int = 0) -> Task:
    """The task with so many sentences a package.

    Raises:
        RuntimeError: If this Python comes without the sources of its standard library, or with too few.
    """
    library = Path(sysconfig.get_path("stdlib"))
    documented = {label: _docstrings(library, pattern) for label, pattern in PACKAGES.items()}
    seen_in = Counter(s for docstrings in documented.values() for s in {s for found in docstrings for s in found})
    train, validation = [], []
    for index, (label, docstrings) in enumerate(documented.items()):
        random.Random(f"{seed} {label}").shuffle(docstrings)
        known: set[str] = set()
        sides: tuple[list[str], list[str]] = ([], [])
        for docstring in docstrings:
            side = sides[len(sides[0]) >= n_validation]
            side += [s for s in docstring if seen_in[s] == 1 and s not in known and not known.add(s)]
        if len(sides[1]) < n_train:
            raise RuntimeError(
                f"Found {len(sides[1])} training sentences on {label!r} in {library}, {n_train} are needed. This Python "
                "comes without the sources of its standard library: use one that has them, for instance from python.org."
            )
        validation += [(s, index) for s in sides[0][:n_validation]]
        train += [(s, index) for s in sides[1][:n_train]]
    return Task(list(PACKAGES), train, validation)


def _docstrings(library: Path, pattern: str) -> list[list[str]]:
    """The sentences of every docstring, one list a docstring."""
    found = []
    for path in sorted(library.glob(pattern)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found.append(_sentences(ast.get_docstring(node) or ""))
    return found


def _sentences(docstring: str) -> list[str]:
    """What reads as prose: five words or more, no examples."""
    pieces = (NAMED.sub(MASK, " ".join(piece.split())) for piece in END_OF_SENTENCE.split(docstring))
    return [piece for piece in pieces if piece.count(" ") >= 4 and ">>>" not in piece and re.search("[a-z]{3}", piece)]
