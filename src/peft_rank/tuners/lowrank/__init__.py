# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Fixed low-rank compression."""

from .linear import LowRankLinear


__all__ = ["LowRankLinear"]
