# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The files of a saved adapter, which are looked at before they are believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from peft_rank.tuners.names import plain_name
from peft_rank.tuners.packing import read_state
from peft_rank.tuners.salientlora import SalientLoRALayer


FACTORS = SalientLoRALayer.adapter_layer_names
STATE = "salientlora_state"


def read_config(directory: str | Path) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Raises:
        ValueError: If the directory has no such file, or it is damaged.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{directory} is no adapter directory: it has no {CONFIG_NAME}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of bytes that are no text
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object. Save the adapter anew.")
    return content


def weights_path(directory: str | Path) -> Path:
    path = Path(directory) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{directory} has no {SAFETENSORS_WEIGHTS_NAME}.")
    return path


def factors_in(state: dict[str, torch.Tensor], path: Path) -> dict[str, tuple[torch.Tensor, ...]]:
    """A (r, in), E (r,) and B (out, r) of every module, sorted by name.

    Raises:
        ValueError: If there are none, or a module's are incomplete or do not fit together.
    """
    tensors = {plain_name(key): tensor for key, tensor in state.items()}
    names = {name for name, _, attribute in (key.rpartition(".") for key in tensors) if attribute in FACTORS}
    if not names:
        raise ValueError(f"{path} holds no factors of SalientLoRA. It is damaged or belongs to another PEFT method.")
    factors = {name: tuple(tensors.get(f"{name}.{attribute}") for attribute in FACTORS) for name in sorted(names)}
    for name, found in factors.items():
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in found]
        A, E, B = shapes
        if None in shapes or [len(A), len(E), len(B)] != [2, 1, 2] or not A[0] == E[0] == B[1]:
            raise ValueError(
                f"{path} is damaged: the factors A (r, in), E (r,) and B (out, r) of {name} have shapes {A}, {E} and {B}. Save "
                "the adapter anew."
            )
    return factors


def has_pruned(state: dict[str, torch.Tensor], path: Path) -> bool:
    """Whether the factors hold pruned ranks, as they may in a checkpoint of an unfinished allocation."""
    packed = next((tensor for key, tensor in state.items() if key.endswith("." + STATE)), None)
    if packed is None:
        return False
    try:
        tensors, _ = read_state(packed)
    except ValueError as error:
        raise ValueError(f"The allocation state in {path} is damaged.") from error
    return not tensors["alive"].all()
