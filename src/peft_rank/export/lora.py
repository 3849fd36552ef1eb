# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Plain LoRA, exactly: `scaling * B diag(E) A` is the product of `lora_B = scaling * B diag(E)` and `lora_A = A`.

Readers of LoRA disagree about the scale where ranks differ between modules. Here the scale is part of `lora_B`, and
`lora_alpha` equals the rank, for every module and for the whole: whichever way a reader divides, the factor is 1.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from peft_rank.ranks import bare_model, exact_modules
from peft_rank.tuners.names import PEFT_PREFIX, exact_pattern

from .card import CARD_NAME, HERE, START, lora_card
from .draft import draft_of
from .files import read_config
from .record import copy_record, picture_in
from .snapshot import AdapterSnapshot, read_directory, read_model


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    pad: bool = False,
    adapter_name: str | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """
    Write an adapter as plain LoRA, which PEFT, transformers and servers load without this package. The conversion is
    exact, no decomposition is involved. Modules without any rank left are not part of it.

    Args:
        model (`torch.nn.Module`): A model with an adapter of this package; it is not changed.
        directory (`str` or `os.PathLike`): Where to write `adapter_config.json`, `adapter_model.safetensors` and
            `README.md`. Other files in it stay. The card of an earlier export keeps its text outside of our section; a
            `README.md` without it stays as it is.
        pad (`bool`): Fill every module up with zeros to the largest rank, for readers that know one rank only (older
            vLLM, llama.cpp).
        adapter_name (`str`, *optional*): The adapter, by default the first active one.
        push_to_hub (`str`, *optional*): A repository of the Hub, such as `"me/my-lora"`, to upload these files to. It is
            made if it does not exist, and the card's snippets name it.

    Returns:
        `Path`: The directory.

    Raises:
        TypeError: If the model has no such adapter.
        ValueError: If the adapter is merged, has no rank left, or `directory` holds an adapter of another kind.
        RuntimeError: If the adapter's parameters are sharded over processes.

    Example:

        ```py
        >>> export_lora(model, "my-lora")
        >>> PeftModel.from_pretrained(base_model, "my-lora")  # in any process, without peft_rank
        ```
    """
    snapshot, path = read_model(model, adapter_name), Path(directory)
    names = _write(snapshot, path, pad, bare_model(model), push_to_hub or HERE)
    if push_to_hub is not None:
        huggingface_hub.create_repo(push_to_hub, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=push_to_hub, folder_path=path, allow_patterns=names)
    return path


def export_lora_files(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    pad: bool = False,
    base_model: str | None = None,
) -> Path:
    """
    The same as `export_lora` for an adapter that `save_pretrained` wrote. Needs its files only, not the base model.

    Args:
        source (`str` or `os.PathLike`): The adapter's directory.
        directory (`str` or `os.PathLike`), pad (`bool`): As for `export_lora`.
        base_model (`str`, *optional*): The base model to name in the export instead of the recorded one.

    Returns:
        `Path`: The directory.

    Raises:
        ValueError: If `source` holds no adapter of this package, or as for `export_lora`.
    """
    snapshot = read_directory(source)
    if base_model is not None:
        snapshot.config.base_model_name_or_path = base_model
    _write(snapshot, Path(directory), pad, Path(source))
    return Path(directory)


def _write(
    snapshot: AdapterSnapshot, directory: Path, pad: bool, source: nn.Module | Path, location: str = HERE
) -> list[str]:
    """Write the export, and return the names of its files."""
    _check_target(directory)
    summary = snapshot.summary
    if summary.total == 0:
        raise ValueError("No module has any rank left, so that there is nothing to export.")
    if not summary.finished:
        warnings.warn(
            f"The allocation has not finished: {summary.total} ranks are left, {summary.target_total} are the budget. "
            "They are exported as they are now.",
            stacklevel=3,
        )
    config = _lora_config(snapshot, pad)
    tensors = _lora_tensors(snapshot, config.r if pad else None)
    names = [SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, *_card_names(directory)]
    with draft_of(directory) as draft:
        save_file(tensors, draft / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(draft), auto_mapping_dict=snapshot.config.auto_mapping)
        names += copy_record(source, draft)
        lora_card(summary, config, directory / CARD_NAME, picture_in(draft), location).save(draft / CARD_NAME)
        directory.mkdir(exist_ok=True)
        for name in names:
            os.replace(draft / name, directory / name)
    return names


def _card_names(directory: Path) -> list[str]:
    """The card, unless there is a `README.md` that has no section of ours."""
    path = directory / CARD_NAME
    if path.exists() and START not in path.read_text(encoding="utf-8"):
        warnings.warn(f"{path} is not the card of an export and stays as it is.", stacklevel=4)
        return []
    return [CARD_NAME]


def _check_target(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file. Name a directory to write the LoRA adapter to.")
    if (directory / CONFIG_NAME).exists():
        kind = read_config(directory).get("peft_type")
        if kind != "LORA":
            raise ValueError(
                f"{directory} holds an adapter of type {kind}, which would be overwritten. Name another directory."
            )


def _lora_config(snapshot: AdapterSnapshot, pad: bool) -> LoraConfig:
    config = snapshot.config
    ranks = {name: r for name, r in snapshot.summary.ranks.items() if r}
    largest = max(ranks.values())
    pattern = {} if pad else {exact_pattern(name): r for name, r in ranks.items() if r != largest}
    bias = config.bias
    if bias == "salientlora_only":
        # the biases of modules that are no LoRA modules any more are to survive, too
        bias = "lora_only" if len(ranks) == len(snapshot.factors) else "all"
    lora = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        modules_to_save=None if config.modules_to_save is None else list(config.modules_to_save),
        lora_dropout=config.lora_dropout,
        fan_in_fan_out=config.fan_in_fan_out,
        bias=bias,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    # the constructor makes a set of a list, whose order would change from file to file
    lora.target_modules = exact_modules(sorted(ranks), snapshot.module_names)
    return lora


@torch.no_grad()
def _lora_tensors(snapshot: AdapterSnapshot, width: int | None) -> dict[str, torch.Tensor]:
    """Keys and tensors of the file, in float32 at least; `width` is the rank to fill up to."""
    tensors = {}
    for name, (A, E, B) in snapshot.factors.items():
        if len(E) == 0:
            continue
        dtype = torch.promote_types(A.dtype, torch.float32)
        missing = 0 if width is None else width - len(E)
        up = B.to(dtype) * (E.to(dtype) * snapshot.config.scaling)  # (out, r)
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = F.pad(A.to(dtype), (0, 0, 0, missing))
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = F.pad(up, (0, missing))
    for key, tensor in snapshot.others.items():
        tensors[_unwrapped(key, snapshot)] = tensor
    # copies, since safetensors refuses tensors that share memory
    return {key: tensor.cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}


def _unwrapped(key: str, snapshot: AdapterSnapshot) -> str:
    """The key of a bias; without `base_layer` for modules that LoRA does not wrap."""
    name, found, rest = key.removeprefix(PEFT_PREFIX).rpartition(".base_layer.")
    wrapped = found and (name not in snapshot.factors or len(snapshot.factors[name][1]))
    return key if wrapped or not found else f"{PEFT_PREFIX}{name}.{rest}"
