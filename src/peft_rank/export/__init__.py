# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What leaves the package: artifacts for readers that do not know it, and model cards."""

from .lora import export_lora


__all__ = ["export_lora"]
