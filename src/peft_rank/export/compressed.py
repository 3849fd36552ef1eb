# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Compressed models as directories that `from_pretrained` reads, and back to dense ones that need nothing of ours."""

from __future__ import annotations

import copy
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from peft_rank.ranks import bare_model
from peft_rank.reporting.picture import PICTURE_FILE, plot_ranks
from peft_rank.tuners.lowrank.config import CompressionConfig
from peft_rank.tuners.lowrank.entry import low_rank_modules, read_entry, record_ranks

from .card import CARD_NAME, write_compressed_card
from .directory import not_compressed, read_compressed
from .draft import draft_of
from .quantizer import linear_shape
from .record import copy_record


WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(SAFE_WEIGHTS_INDEX_NAME))
LOCATION = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")


# ---- write ----


def save_compressed(
    model: nn.Module, directory: str | os.PathLike[str], *, tokenizer: Any = None, **save_pretrained_kwargs: Any
) -> Path:
    """
    Write a model that holds `LowRankLinear` modules as a directory that `from_pretrained` reads once `peft_rank` is
    imported. transformers without it refuses the directory.

    Args:
        model (`torch.nn.Module`): A transformers model, or what a tuner of this package left after `finalize()`. Its
            weights are not changed; its configuration learns the ranks, so that a plain `save_pretrained` works, too.
        directory (`str` or `os.PathLike`): Where to write. Weights that are there are replaced, other files stay. The
            directory changes once everything is written beside it.
        tokenizer (*optional*): A tokenizer or processor to save with the model.
        save_pretrained_kwargs (*optional*): For the model's `save_pretrained`, `max_shard_size` for one.

    Returns:
        `Path`: The directory.

    Raises:
        TypeError: If this is no transformers model.
        ValueError: If the model has no `LowRankLinear`, one that cannot be built again, or `directory` is a file.
        RuntimeError: If a tuner has not been finalized, or adapters have not been merged.

    Example:

        ```py
        >>> save_compressed(model, "my-model", tokenizer=tokenizer)
        >>> load_compressed("my-model")
        ```
    """
    if "push_to_hub" in save_pretrained_kwargs:
        raise ValueError(
            "`push_to_hub` is no argument here: call `model.push_to_hub(...)`, which uploads the same files."
        )
    trained, model = model, plain_model(model)
    _check_savable(model)
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file. Name a directory to write the model to.")
    known = (read_entry(model.config) or {}).get("base_model")
    record_ranks(model, base_model=known or model.name_or_path or None)
    with draft_of(directory) as draft:
        model.save_pretrained(draft, **save_pretrained_kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        copy_record(trained, draft)
        write_compressed_card(draft, directory / CARD_NAME)
        _move(draft, directory)
    return directory


def add_picture(directory: str | os.PathLike[str]) -> None:
    """
    Draw the ranks and errors of a saved compressed model beside it, and show the picture in its card.

    Args:
        directory (`str` or `os.PathLike`): What `save_compressed` wrote.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    directory = Path(directory)
    plot_ranks(directory, directory / PICTURE_FILE)
    write_compressed_card(directory, directory / CARD_NAME)


def plain_model(model: nn.Module) -> PreTrainedModel:
    """
    The transformers model inside of engines and a tuner that has done its work.

    Raises:
        TypeError: If there is none.
        RuntimeError: If a tuner has not been finalized, or adapters have not been merged.
    """
    model = bare_model(model)
    configs = {}
    if isinstance(model, PeftModel):
        configs, model = model.peft_config, model.get_base_model()
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        # InRank from scratch compresses, too
        replaces = [isinstance(c, CompressionConfig) or vars(c).get("from_scratch", False) for c in configs.values()]
        raise RuntimeError(
            "The compression is not final. Call `model.base_model.finalize()` first."
            if any(replaces)
            else "The model has adapters, which are no part of a compressed model. Call `model.merge_and_unload()` first, or "
            "save the adapters with `model.save_pretrained`."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is no transformers model, which has a configuration to record ranks in."
        )
    return model


def _check_savable(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: If there is nothing to save, or loading could not build it.
    """
    modules = low_rank_modules(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no `LowRankLinear`: nothing is compressed. Save it with `model.save_pretrained`."
        )
    originals = dict(_skeleton(model).named_modules())
    foreign = [name for name, module in modules.items() if linear_shape(originals.get(name)) != linear_shape(module)]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)}: a {type(model).__name__} of this configuration has no linear of the same sizes and bias "
            "there, so that loading could not build the model again."
        )
    entry = vars(model.config).get("quantization_config")
    if entry is not None and read_entry(model.config) is None:
        raise ValueError(
            f"The model is quantized, too ({entry}). A directory can name one of both only: save it unquantized."
        )
    tied = {key.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for key in pair}
    if tied & modules.keys():
        raise ValueError(
            f"{', '.join(sorted(tied & modules.keys()))}: the weight is tied to another one and cannot be of limited rank. "
            "Leave the module dense, or untie the weights (`tie_word_embeddings=False`)."
        )


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model without memory."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def _move(draft: Path, directory: Path) -> None:
    """Without a configuration the directory is no model: it goes first and comes last."""
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_NAME).unlink(missing_ok=True)
    for path in directory.iterdir():
        # shards of another number, or one file beside shards: transformers would read them
        if WEIGHTS.fullmatch(path.name):
            path.unlink()
    for path in sorted(draft.iterdir(), key=lambda path: path.name == CONFIG_NAME):
        target = directory / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)


# ---- back to dense ----


@torch.no_grad()
def densify(model: nn.Module) -> PreTrainedModel:
    """
    Turn every `LowRankLinear` into the dense linear that computes the same, after which `save_pretrained` writes a
    directory that needs nothing of this package. The model is as large and as fast as before it was compressed.

    Args:
        model (`torch.nn.Module`): A compressed model, or what a tuner of this package left after `finalize()`; changed in
            place.

    Returns:
        `transformers.PreTrainedModel`: The plain model.

    Raises:
        TypeError: If this is no transformers model.
        RuntimeError: If a tuner has not been finalized, adapters have not been merged, or weights are offloaded.

    Example:

        ```py
        >>> densify(load_compressed("my-model")).save_pretrained("my-dense-model")
        ```
    """
    model = plain_model(model)
    modules = low_rank_modules(model)
    offloaded = [name for name, module in modules.items() if module.weight.is_meta]
    if offloaded:
        raise RuntimeError(
            f"The weights of {', '.join(offloaded)} are offloaded. Load the model without `device_map`, or with one that "
            "keeps all of it in memory."
        )
    originals = dict(_skeleton(model).named_modules()) if modules else {}
    for name, module in modules.items():
        linear = module.dense()
        if isinstance(originals.get(name), Conv1D):
            linear = _conv1d(linear)
        model.set_submodule(name, linear.train(module.training))
    record_ranks(model)
    return model


def _conv1d(linear: nn.Linear) -> Conv1D:
    """The same map as GPT-2 stores it: (in, out), and never without a bias."""
    with torch.device("meta"):
        conv = Conv1D(linear.out_features, linear.in_features)
    weight = linear.weight
    conv.weight = nn.Parameter(weight.T.contiguous())
    conv.bias = nn.Parameter(weight.new_zeros(linear.out_features)) if linear.bias is None else linear.bias
    return conv


# ---- read ----


def load_compressed(directory: str | os.PathLike[str], **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """
    Load a compressed model as the class that it was saved as, and make sure that every weight came from the file.

    Args:
        directory (`str` or `os.PathLike`): What `save_compressed` wrote, or its repository on the Hub.
        from_pretrained_kwargs (*optional*): For the model's `from_pretrained`: `dtype`, `device_map`, `revision`, ...

    Returns:
        `transformers.PreTrainedModel`: The model, in evaluation mode. It is ready for generation, for adapters on the
        factors (`down` and `up` of each `LowRankLinear`), and for a Trainer.

    Raises:
        ValueError: If the directory holds no compressed model, or damaged files.
        RuntimeError: If weights are missing, of another shape, or left over.
    """
    directory = os.fspath(directory)
    location = {key: from_pretrained_kwargs[key] for key in LOCATION if key in from_pretrained_kwargs}
    if os.path.isdir(directory):
        read_compressed(Path(directory, location.get("subfolder", "")))
    config = from_pretrained_kwargs.get("config") or AutoConfig.from_pretrained(directory, **location)
    if read_entry(config) is None:
        raise ValueError(not_compressed(directory, getattr(config, "quantization_config", None)))
    model, info = _model_class(config.architectures).from_pretrained(
        directory, **{**from_pretrained_kwargs, "output_loading_info": True}
    )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        told = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys)}" for kind, keys in wrong.items())
        raise RuntimeError(
            f"{directory} does not hold the weights of this model: {told}. It is damaged, incomplete, or not of the class "
            "and configuration that it is loaded as."
        )
    return (model, info) if from_pretrained_kwargs.get("output_loading_info") else model


def _model_class(architectures: list[str] | None) -> type[PreTrainedModel]:
    name = (architectures or ["no class"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(
            f"`config.json` names {name}, which transformers does not have. Load the model with its own class, whose "
            "`from_pretrained` works after `import peft_rank`."
        )
    return model_class
