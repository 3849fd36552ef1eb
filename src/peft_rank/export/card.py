# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Model cards: a section of `README.md` that names method, budget, ranks and versions, and how to load the adapter.

PEFT writes the cards of all methods in `PeftModel.create_or_update_model_card`, which asks tuners nothing, and
transformers' `push_to_hub` then replaces the file by a card of its own, of compressed models, too. `register_model_card`
extends both.
"""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftConfig, PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from transformers import PreTrainedModel

from peft_rank.reporting import rank_grid
from peft_rank.tuners.config import AdaptedModulesConfig
from peft_rank.tuners.lowrank import LowRankConfig
from peft_rank.tuners.lowrank.config import CompressionConfig
from peft_rank.tuners.salientlora import SalientLoRAConfig

from .directory import CompressedSummary, is_compressed, read_compressed
from .record import copy_record, picture_in
from .snapshot import AdapterSummary, summarize_model


CARD_NAME = "README.md"
START, END = "<!-- peft_rank: start -->", "<!-- peft_rank: end -->"
LORA_TAGS = ("peft_rank", "adaptive-rank", "salientlora")
LOW_RANK_TAGS = ("peft_rank", "low-rank")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what `--max-lora-rank` may be; newer versions allow 1, too
HERE = "path/or/repository-of-this-adapter"
MODEL_HERE = "path/or/repository-of-this-model"
METHODS = {
    "SALIENTLORA": "SalientLoRA",
    "LOWRANK": "low-rank factors",
    "ADAPTIVE_RANK_SVD": "Adaptive Rank Selections",
    "L2LRC": "Learning to Low-Rank Compress",
    "INRANK": "InRank",
}
LOADING = (
    "`pip install peft-rank` provides the package. `load_compressed` makes sure that every weight came from these files. "
    "After `import peft_rank`, which has to come first, the classes of transformers and `pipeline` load the model, too:"
)
TO_LORA = [
    "`pip install peft-rank` provides the first. To do without it, export to plain LoRA, which is exact:",
    '```python\npeft_rank.export_lora(model, "plain-lora")\n```',
    "or `peft-rank export DIR plain-lora` in a shell, which needs a folder with the adapter's files only.",
]
TO_COMPRESSED = [
    "`pip install peft-rank` provides the first. The factors stand in for weights of the base model, which is loaded, too. To "
    + "have the compressed model alone, as a directory for `from_pretrained`:",
    '```python\nmodel.base_model.finalize()\npeft_rank.save_compressed(model, "compressed")\n```',
]
TO_MERGED = [
    "`pip install peft-rank` provides the first. To do without it, merge the adapter into the base model:",
    '```python\nmodel.merge_and_unload().save_pretrained("merged")\n```',
]


# ---- the extension of PEFT and transformers ----


def register_model_card() -> None:
    """
    Let PEFT's model cards tell of our adapters, and those on the Hub of compressed models. Repeating it changes nothing;
    cards of other adapters and models stay as they are.
    """
    own = vars(PeftModel).get("_peft_rank_own_card")
    if own is None:
        own = PeftModel._peft_rank_own_card = PeftModel.create_or_update_model_card

    @wraps(own)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        _write_card(self, Path(output_dir), own)

    def _upload_modified_files(self: PeftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if _our_adapters(self):
            _write_card(self, Path(working_dir), own, location=repo_id)
        return super(PeftModel, self)._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    PeftModel.create_or_update_model_card = create_or_update_model_card
    PeftModel._upload_modified_files = _upload_modified_files
    PreTrainedModel._upload_modified_files = _upload_compressed


def _upload_compressed(self: PreTrainedModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    directory = Path(working_dir)
    if is_compressed(directory):
        write_compressed_card(directory, directory / CARD_NAME, repo_id)
    return super(PreTrainedModel, self)._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def _write_card(
    model: PeftModel, directory: Path, own: Callable[[PeftModel, str], None], location: str = HERE
) -> None:
    """Write PEFT's card, then our part of it. An adapter is worth more than its card: here a failure only warns."""
    adapters = _our_adapters(model)
    path = directory / CARD_NAME
    # PEFT forgets the tags that a card already has
    tags = ModelCard.load(path).data.tags if adapters and path.exists() else None
    own(model, str(directory))
    if not adapters:
        return
    try:
        copy_record(model, directory)
        card = ModelCard.load(path)
        summaries = {name: summarize_model(model, name) for name in adapters}
        base_model = card.data.base_model or next(iter(adapters.values())).base_model_name_or_path
        # on the disk PEFT's own entry stands, a local folder too; the Hub refuses what is no repository
        base_model = base_model if location == HERE else _repository(base_model)
        _put_data(card, "peft", base_model, [*(tags or []), *_tags(adapters.values())])
        _put_section(card, _adapter_section(summaries, location, picture_in(directory)))
        card.save(path)
    except Exception as error:  # noqa: BLE001 - whatever it is, the adapter is still to be saved
        warnings.warn(f"The model card says nothing of the ranks: {type(error).__name__}: {error}", stacklevel=3)


def _our_adapters(model: PeftModel) -> dict[str, AdaptedModulesConfig]:
    return {name: config for name, config in model.peft_config.items() if isinstance(config, AdaptedModulesConfig)}


def _tags(configs: Iterable[AdaptedModulesConfig]) -> set[str]:
    return {tag for config in configs for tag in _tags_of(config)}


def _tags_of(config: AdaptedModulesConfig) -> set[str]:
    """What it is, and the method: `salientlora`, `adaptive-rank-svd`, ..."""
    kind = {"low-rank"} if isinstance(config, CompressionConfig) else set()
    kind |= set() if isinstance(config, LowRankConfig) else {"adaptive-rank"}
    return {"peft_rank", config.peft_type.value.lower().replace("_", "-")} | kind


# ---- cards ----


def lora_card(
    summary: AdapterSummary, config: LoraConfig, path: Path, picture: list[str], location: str = HERE
) -> ModelCard:
    """
    The card of a plain LoRA export.

    Args:
        summary (`AdapterSummary`): The adapter that was exported.
        config (`LoraConfig`): The configuration of the export.
        path (`Path`): A card that is there already keeps its text outside of our section.
        picture (`list[str]`): What shows the picture of the ranks, if there is one.
        location (`str`): Where readers will find the adapter.
    """
    card = ModelCard.load(path) if path.exists() else ModelCard("---\n{}\n---\n\n# LoRA adapter\n")
    base = config.base_model_name_or_path
    _put_data(card, "peft", _repository(base), ["lora", *LORA_TAGS])
    rows = {
        "format": "plain LoRA, converted exactly from SalientLoRA",
        "base model": f"`{base}`" if base else "not recorded",
        "largest rank": f"{config.r}" if config.rank_pattern else f"{config.r}, in every module",
        "scale": "`lora_alpha` equals the rank of every module: the factor is 1",
        **_facts(summary),
    }
    parts = [
        "## Plain LoRA, ranks chosen by peft_rank",
        _table(rows),
        "### Load",
        f"```python\nimport peft\nmodel = {_load_call(config, location, summary.num_labels)}\n```",
        _serving(config, location),
    ]
    parts += ["### Ranks", rank_grid(summary.ranks).markdown(), *picture]
    _put_section(card, "\n\n".join(parts))
    return card


def write_compressed_card(directory: Path, known: Path, location: str = MODEL_HERE) -> None:
    """
    Write the card of a compressed model. A model is worth more than its card: here a failure only warns.

    Args:
        directory (`Path`): The model; the card is written here.
        known (`Path`): A card that is there already keeps its text outside of our section.
        location (`str`): Where readers will find the model.
    """
    try:
        card = ModelCard.load(known) if known.exists() else ModelCard("---\n{}\n---\n\n# Compressed model\n")
        summary = read_compressed(directory)
        base_model = _repository(summary.base_model) or card.data.base_model
        _put_data(card, "transformers", base_model, [*LOW_RANK_TAGS, "compressed"])
        _put_section(card, "\n\n".join([_compressed_section(summary, location), *picture_in(directory)]))
        card.save(directory / CARD_NAME)
    except Exception as error:  # noqa: BLE001 - whatever it is, the model is still to be saved
        warnings.warn(f"There is no model card: {type(error).__name__}: {error}", stacklevel=3)


def _compressed_section(summary: CompressedSummary, location: str) -> str:
    base = summary.base_model
    rows = {
        "method": ", ".join(filter(None, ["low-rank factors", *map(summary.facts.get, ("method", "decomposition"))])),
        "dense model": f"`{base}`" if base else "not recorded",
        "parameters": f"{summary.parameters:,}, {summary.ratio:.1%} of {summary.dense_parameters:,}",
        "modules": f"{len(summary.ranks)} of limited rank, total rank {sum(summary.ranks.values())}",
        "size": f"{summary.bytes / 1e6:.3g} MB",
        "versions": _versions(),
    }
    by_class = f'model = transformers.{summary.architecture}.from_pretrained("{location}")'
    parts = [
        "## Compressed by peft_rank",
        _table(rows),
        "### Load",
        f'```python\nimport peft_rank\nmodel = peft_rank.load_compressed("{location}")\n```',
        LOADING,
        f"```python\nimport peft_rank, transformers\n{by_class}\n```",
        "To do without the package, write the model dense once. It is as large as the original then:",
        '```python\npeft_rank.densify(model).save_pretrained("dense")\n```',
        "### Ranks",
        rank_grid(summary.ranks).markdown(),
    ]
    return "\n\n".join(parts)


def _serving(config: LoraConfig, location: str) -> str:
    """How vLLM serves a plain LoRA, or why it does not."""
    if config.task_type not in (None, "CAUSAL_LM"):
        return "vLLM takes adapters of language models only."
    if config.bias != "none" or config.modules_to_save:
        return "vLLM takes no adapter with trained biases or modules. It serves the merged model."
    if config.r > VLLM_RANKS[-1]:
        return f"vLLM takes ranks up to {VLLM_RANKS[-1]}. It serves the merged model."
    return (
        f"```shell\nvllm serve {config.base_model_name_or_path or 'BASE_MODEL'} --enable-lora "
        f"--max-lora-rank {_vllm_rank(config.r)} --lora-modules adapter={location}\n```"
    )


def _vllm_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that admits the rank."""
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def _adapter_section(summaries: dict[str, AdapterSummary], location: str, picture: list[str]) -> str:
    parts = ["## Ranks chosen by peft_rank"]
    for name, summary in summaries.items():
        config = summary.config
        if len(summaries) > 1:
            parts.append(f"Adapter `{name}`:")
        base = config.base_model_name_or_path
        rows = {"method": _method(config), "base model": f"`{base}`" if base else "not recorded", **_facts(summary)}
        parts += [_table(rows), rank_grid(summary.ranks).markdown()]
    first = next(iter(summaries.values()))
    parts += [
        *picture,
        "### Load",
        f"```python\nimport peft_rank, peft\nmodel = {_load_call(first.config, location, first.num_labels)}\n```",
    ]
    return "\n\n".join(parts + _without_us(first.config))


def _method(config: AdaptedModulesConfig) -> str:
    name = METHODS[config.peft_type.value]
    return f"{name}, {config.decomposition}" if isinstance(config, CompressionConfig) else name


def _without_us(config: AdaptedModulesConfig) -> list[str]:
    """How to get a form of the adapter that needs less."""
    if isinstance(config, SalientLoRAConfig):
        return TO_LORA
    if isinstance(config, CompressionConfig) or vars(config).get("from_scratch", False):
        return TO_COMPRESSED
    return TO_MERGED


def _facts(summary: AdapterSummary) -> dict[str, str]:
    left = "0, every module stays dense"
    if summary.ranks:
        mean = summary.total / len(summary.ranks)
        left = f"{summary.total}, {mean:.4g} a module, largest {max(summary.ranks.values())}"
    return {
        "budget": summary.budget,
        "total rank": left if summary.finished else f"{left}; **the allocation has not finished**",
        "trainable parameters": f"{summary.parameters + summary.other_parameters:,}, "
        f"{summary.parameters:,} of them in the factors",
        "size": f"{summary.bytes / 1e6:.3g} MB",
        "versions": _versions(),
    }


def _versions() -> str:
    versions = {
        "peft_rank": importlib.metadata.version("peft-rank"),
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _load_call(config: PeftConfig, location: str, num_labels: int | None) -> str:
    """What loads base model and adapter. A base model gets two labels, or those that it was saved with, if not told."""
    told = config.task_type in ("SEQ_CLS", "TOKEN_CLS") and num_labels not in (None, 2)
    labels = f", num_labels={num_labels}" if told else ""
    return f'peft.{auto_class(config).__name__}.from_pretrained("{location}"{labels})'


def auto_class(config: PeftConfig) -> type:
    """PEFT's class that loads base model and adapter at once."""
    model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    return getattr(peft, f"Auto{model_class.__name__}")


def _put_data(card: ModelCard, library: str, base_model: str | list[str] | None, tags: list[str]) -> None:
    data: ModelCardData = card.data
    data.library_name = library
    data.base_model = base_model
    tags = {*(data.tags or []), *tags}
    if data.base_model is None:
        tags = {tag for tag in tags if not tag.startswith("base_model:")}
    data.tags = sorted(tags)


def _repository(name: str | list[str] | None) -> str | None:
    """The name if it can be one of a repository."""
    try:
        validate_repo_id(name if isinstance(name, str) else "")
    except HFValidationError:
        return None
    return name


def _put_section(card: ModelCard, section: str) -> None:
    """Replace our section, or put it below the title; all other text stays."""
    section = f"{START}\n\n{section}\n\n{END}"
    marked = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    if marked.search(card.text):
        card.text = marked.sub(lambda _: section, card.text, count=1)
        return
    title = re.search(r"^# .*$", card.text, re.MULTILINE)
    at = title.end() if title else 0
    card.text = f"{card.text[:at]}\n\n{section}\n{card.text[at:]}"
