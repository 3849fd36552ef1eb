# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What mkdocs does to pages besides: links that leave `docs/` are for readers of the repository, and plain words in the site."""

from __future__ import annotations

import re
from typing import Any


OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    return OUTSIDE.sub(r"\1", markdown)
