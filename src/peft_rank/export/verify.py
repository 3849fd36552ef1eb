# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Whether two saved artifacts are the same model: their outputs for random token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch import nn

from .card import auto_class
from .compressed import load_compressed
from .directory import is_compressed
from .snapshot import read_summary


SAMPLES, LENGTH = 4, 16


class Difference(NamedTuple):
    """The largest absolute difference of two models' outputs, and the largest absolute output."""

    largest: float
    scale: float

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most `tolerance`, relative to outputs above 1. NaN never is."""
        return self.largest <= tolerance * max(1.0, self.scale)


def compare(
    adapter: str | Path, other: str | Path, *, base_model: str | None = None, num_labels: int | None = None
) -> Difference:
    """
    Compare an adapter or a compressed model with another form of it, both in float32 and one after the other in memory.

    Args:
        adapter (`str` or `Path`): Directory of an adapter of this package, or of a compressed model.
        other (`str` or `Path`): Directory of a plain LoRA or of any other adapter, or of a merged, compressed or dense
            model.
        base_model (`str`, *optional*): The base model, by default the one that the adapter recorded.
        num_labels (`int`, *optional*): Labels of the classifier, by default those of the one that the adapter holds, or
            the base model's.

    Raises:
        ValueError: If `adapter` holds nothing of this package, names no base model, or does not fit it.
        RuntimeError: If a compressed model is incomplete.
        OSError: If a model cannot be loaded.
    """
    if is_compressed(adapter):
        return _compare_compressed(adapter, other)
    summary = read_summary(adapter)
    config = summary.config
    base_model = base_model or config.base_model_name_or_path
    if not base_model:
        raise ValueError(f"{adapter} does not name its base model. Name it with --base.")
    settings: dict[str, Any] = {"dtype": torch.float32}
    if num_labels is None:
        num_labels = summary.num_labels
    if num_labels is not None:
        # the adapter brings its own classifier
        settings.update(num_labels=num_labels, ignore_mismatched_sizes=True)
    model_class = _model_class(config)
    first = _outputs(_with_adapter(model_class.from_pretrained(base_model, **settings), adapter))
    if (Path(other) / CONFIG_NAME).is_file():
        model = _with_adapter(model_class.from_pretrained(base_model, **settings), other)
    else:
        model = model_class.from_pretrained(str(other), **settings)
    return _difference(first, _outputs(model))


def _compare_compressed(directory: str | Path, other: str | Path) -> Difference:
    model = load_compressed(directory, dtype=torch.float32)
    model_class, first = type(model), _outputs(model)
    del model
    load = load_compressed if is_compressed(other) else model_class.from_pretrained
    return _difference(first, _outputs(load(str(other), dtype=torch.float32)))


def _difference(first: torch.Tensor, second: torch.Tensor) -> Difference:
    return Difference((first - second).abs().max().item(), first.abs().max().item())


def _with_adapter(base_model: nn.Module, directory: str | Path) -> PeftModel:
    try:
        return PeftModel.from_pretrained(base_model, str(directory))
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"{error} If these are the weights of a classifier, name its number of labels with --num-labels."
        ) from error


def _model_class(config: PeftConfig) -> type:
    """The transformers class that the adapter was trained with."""
    by_task = auto_class(config)._target_class
    if by_task is not None:
        return by_task
    name = (config.auto_mapping or {}).get("base_model_class", "AutoModel")
    return getattr(transformers, name, transformers.AutoModel)


@torch.no_grad()
def _outputs(model: nn.Module) -> torch.Tensor:
    """Outputs for random sentences, one at a time since a model may know no padding."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for _ in range(SAMPLES):
        ids = torch.randint(config.vocab_size, (1, LENGTH), generator=generator)
        if isinstance(config.eos_token_id, int):
            # some classifiers read the state of the end of the sentence
            ids[:, -1] = config.eos_token_id
        inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        outputs.append(model.eval()(input_ids=ids, **inputs)[0].flatten())
    return torch.cat(outputs)
