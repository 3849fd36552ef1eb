# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""A compressed model's directory, its weights aside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from peft_rank.tuners.lowrank.entry import QUANT_METHOD

from .quantizer import LowRankQuantizationConfig


@dataclass(frozen=True)
class CompressedSummary:
    """
    What there is to say about a compressed model without looking at its weights.

    Args:
        architecture (`str`, *optional*): Name of the transformers class.
        base_model (`str`, *optional*): The dense model, as far as it is known.
        ranks (`dict[str, int]`): Module name -> rank; what is not listed is dense.
        parameters (`int`): Numbers in the model.
        dense_parameters (`int`): Numbers in the model that it was.
        bytes (`int`): Size of the files of weights.
        facts (`dict`): What else was recorded: the method, the version of this package.
    """

    architecture: str | None
    base_model: str | None
    ranks: dict[str, int]
    parameters: int
    dense_parameters: int
    bytes: int
    facts: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Kept parameters / dense parameters of the whole model."""
        return self.parameters / self.dense_parameters


def is_compressed(directory: str | os.PathLike[str]) -> bool:
    """
    Whether a local directory says that it holds a compressed model.

    Raises:
        ValueError: If its `config.json` is damaged.
    """
    return (Path(directory) / CONFIG_NAME).is_file() and _says_so(_read_json(Path(directory) / CONFIG_NAME))


def read_compressed(directory: str | os.PathLike[str]) -> CompressedSummary:
    """
    The summary of a local directory that `save_compressed` or, for a compressed model, `save_pretrained` wrote.

    Args:
        directory (`str` or `os.PathLike`): Holds `config.json` and the weights.

    Raises:
        ValueError: If the directory holds no compressed model, or files are missing or damaged.
    """
    directory = Path(directory)
    config = _read_json(directory / CONFIG_NAME)
    if not _says_so(config):
        raise ValueError(not_compressed(directory, config.get("quantization_config")))
    facts = LowRankQuantizationConfig(**config["quantization_config"]).to_dict()
    del facts["quant_method"]
    return CompressedSummary(
        architecture=next(iter(config.get("architectures") or []), None),
        base_model=facts.pop("base_model", None),
        ranks=facts.pop("ranks"),
        parameters=facts.pop("parameters", 0),
        dense_parameters=facts.pop("dense_parameters", 0),
        bytes=sum(_checked_size(path) for path in _weight_files(directory)),
        facts=facts,
    )


def not_compressed(directory: str | os.PathLike[str], entry: Any) -> str:
    """The message for a model of another kind."""
    kind = (
        f"is of the kind {entry['quant_method']!r}" if isinstance(entry, Mapping) and "quant_method" in entry else None
    )
    return (
        f"{directory} holds no model that peft_rank compressed: `quantization_config` in its {CONFIG_NAME} "
        f"{kind or 'is missing'}. Load it with the `from_pretrained` of its transformers class."
    )


def _says_so(config: Mapping[str, Any]) -> bool:
    entry = config.get("quantization_config")
    return isinstance(entry, Mapping) and entry.get("quant_method") == QUANT_METHOD


def _weight_files(directory: Path) -> list[Path]:
    if (directory / SAFE_WEIGHTS_NAME).is_file():
        return [directory / SAFE_WEIGHTS_NAME]
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise ValueError(f"{directory} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} lists no weights.")
    return [directory / name for name in sorted(set(names.values()))]


def _checked_size(path: Path) -> int:
    """Bytes of a file of weights, of which the header and the length are right."""
    if not path.is_file():
        raise ValueError(f"{path} is missing.")
    try:
        with safetensors.safe_open(path, framework="pt"):
            return path.stat().st_size
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or was not written to its end: {error}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} is no directory of a model: it has no {path.name}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content
