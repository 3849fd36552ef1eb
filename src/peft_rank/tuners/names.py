# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Names of modules, as state dicts, the base model and `rank_pattern` have them."""

import re


PEFT_PREFIX = "base_model.model."


def plain_name(name: str) -> str:
    """Name of a module in the base model."""
    return name.removeprefix(PEFT_PREFIX)


def uncompiled(name: str) -> str:
    """Name of a module without what `torch.compile` puts before it."""
    return name.removeprefix("_orig_mod.")


def exact_pattern(name: str) -> str:
    """Pattern that PEFT matches with this module only (a bare name also matches longer paths that end with it)."""
    return "^" + re.escape(name)
