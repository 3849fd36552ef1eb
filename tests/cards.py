# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Readers of model cards, and a stand-in of the Hub's client."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from huggingface_hub import ModelCard


def snippets(card: ModelCard | str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", str(card), re.DOTALL)


def run(snippet: str, names: dict[str, Any]) -> None:
    exec(snippet, names)  # noqa: S102 - a reader of the card does the same


class Hub:
    """Takes what transformers and Trainer send to the Hub."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: list[Any], **kwargs: Any) -> None:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
