# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The state of an unfinished allocation as one tensor of bytes, which goes wherever an adapter's tensors go."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save


def pack_state(tensors: dict[str, torch.Tensor], clock: dict[str, Any]) -> torch.Tensor:
    """Tensors and clock, which JSON can hold, as (n,) uint8: an integer tensor survives any cast of the model."""
    data = save(tensors, metadata={"clock": json.dumps(clock)})
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def read_state(blob: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and clock in what `pack_state` returned, (n,) uint8.

    Raises:
        ValueError: If the bytes are damaged.
    """
    data = blob.cpu().numpy().tobytes()
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return tensors, json.loads(header["__metadata__"]["clock"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            "The allocation state in the checkpoint is damaged, so that the allocation cannot go on where it stopped. "
            "Resume from an earlier checkpoint."
        ) from error
