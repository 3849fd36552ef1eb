# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Pieces of arithmetic that the layers of several methods share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a linear layer multiplies `x` in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def round_up(count: int, multiple: int) -> int:
    """The next multiple that is not below."""
    return -(-count // multiple) * multiple


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in that dtype; asking first is faster than a cast that does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def without_autocast(device: str) -> AbstractContextManager:
    """Autocast off on a type of device. Where it is off already nothing is entered, which takes longer than a product's
    launch."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


_AS_IT_IS = nullcontext()
