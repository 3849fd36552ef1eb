# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""An adapter as plain data, read from a model or from the files that `save_pretrained` wrote; no base weights needed."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import ModulesToSaveWrapper
from torch import nn

from peft_rank.ranks import adapter_layers, bare_model
from peft_rank.tuners.adaptive import RankLayer
from peft_rank.tuners.config import AdaptedModulesConfig
from peft_rank.tuners.inrank import InRankConfig, InRankModel
from peft_rank.tuners.lowrank import LowRankLinear
from peft_rank.tuners.names import PEFT_PREFIX, plain_name
from peft_rank.tuners.salientlora import SalientLoRAConfig, SalientLoRALayer
from peft_rank.tuners.search.layer import SearchLayer

from .files import FACTORS, STATE, factors_in, has_pruned, read_config, weights_path


CLASSIFIERS = tuple(f"{PEFT_PREFIX}{name}.weight" for name in ("classifier", "score", "classifier.out_proj"))


@dataclass(frozen=True)
class AdapterSummary:
    """
    What there is to say about an adapter without looking at its values.

    Args:
        config (`AdaptedModulesConfig`): The adapter's configuration.
        ranks (`dict[str, int]`): Module name in the base model -> ranks that are not pruned.
        parameters (`int`): Numbers in the factors of these ranks.
        other_parameters (`int`): Numbers in `modules_to_save` and trained biases.
        bytes (`int`): Size of all of them.
        num_labels (`int`, *optional*): Labels of the model; means nothing where it is no classifier.
        in_progress (`bool`): Ranks are still being learned.
    """

    config: AdaptedModulesConfig
    ranks: dict[str, int]
    parameters: int
    other_parameters: int
    bytes: int
    num_labels: int | None
    in_progress: bool = False

    @property
    def total(self) -> int:
        return sum(self.ranks.values())

    @property
    def target_total(self) -> int | None:
        """The total rank that the adapter was to end with, where it was to end with one."""
        allocates = isinstance(self.config, SalientLoRAConfig) and self.config.allocates
        return self.config.target_r * len(self.ranks) if allocates else None

    @property
    def finished(self) -> bool:
        """Whether nothing is left to allocate."""
        return not self.in_progress and (self.target_total is None or self.total <= self.target_total)

    @property
    def budget(self) -> str:
        """What the ranks had to meet."""
        if self.target_total is not None:
            return f"{self.config.target_r} a module on average, {self.target_total} in {len(self.ranks)} modules"
        settings = vars(self.config)
        if isinstance(self.config, InRankConfig) and self.config.allocates:
            return f"none: every rank grows until it explains {self.config.explained_ratio} of the {self.config.criterion}"
        ratio = settings.get("target_ratio", settings.get("ratio"))
        if ratio is None:
            return "fixed ranks, no allocation"
        ratio = " then ".join(map(str, ratio)) if isinstance(ratio, list) else ratio
        scope = "the model" if settings["ratio_scope"] == "model" else "the targeted modules"
        how = f", {settings['allocation']}" if "allocation" in settings else ""
        return f"{ratio} of the parameters of {scope}{how}"


@dataclass(frozen=True)
class AdapterSnapshot:
    """
    The values of an adapter.

    Args:
        config (`SalientLoRAConfig`): The adapter's configuration, a copy.
        factors (`dict[str, tuple]`): Module name in the base model -> A (r, in), E (r,), B (out, r), of the ranks that
            are not pruned.
        others (`dict[str, torch.Tensor]`): `modules_to_save` and trained biases, under the keys of PEFT's files.
        module_names (`frozenset[str]`): All modules of the base model, as far as they are known.
        num_labels (`int`, *optional*): As in `AdapterSummary`, as far as it is known.
    """

    config: SalientLoRAConfig
    factors: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    others: dict[str, torch.Tensor]
    module_names: frozenset[str]
    num_labels: int | None

    @property
    def summary(self) -> AdapterSummary:
        factors = [factor for triple in self.factors.values() for factor in triple]
        others = list(self.others.values())
        return AdapterSummary(
            config=self.config,
            ranks={name: len(E) for name, (_, E, _) in self.factors.items()},
            parameters=sum(tensor.numel() for tensor in factors),
            other_parameters=sum(tensor.numel() for tensor in others),
            bytes=sum(tensor.nbytes for tensor in [*factors, *others]),
            num_labels=self.num_labels,
        )


def read_model(model: nn.Module, adapter_name: str | None = None) -> AdapterSnapshot:
    """
    The adapter in a model.

    Args:
        model (`torch.nn.Module`): A model with an adapter of this package.
        adapter_name (`str`, *optional*): The adapter, by default the first active one.

    Raises:
        TypeError: If the model has no such adapter, or only one of another method.
        ValueError: If the adapter is merged.
        RuntimeError: If its parameters are sharded over processes.
    """
    model = bare_model(model)
    others = {type(module).__name__ for module in model.modules() if isinstance(module, (RankLayer, LowRankLinear))}
    if others and not any(isinstance(module, SalientLoRALayer) for module in model.modules()):
        raise TypeError(
            f"The model's adapter is made of {', '.join(sorted(others))}; only SalientLoRA becomes plain LoRA exactly. "
            "`model.merge_and_unload()` gives a model without adapter; of a compression, `finalize()` and "
            "`save_compressed` write a smaller one."
        )
    adapter_name, layers = adapter_layers(model, adapter_name, SalientLoRALayer)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"The adapter {adapter_name!r} is merged into the base weights. Call `model.unmerge_adapter()` first."
        )
    # raises if the factors are sharded; gathers what PEFT saves beside them
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    config = copy.deepcopy(model.peft_config[adapter_name])
    if isinstance(model, PeftModel) and config.task_type is None:
        base = model._get_base_model_class()
        config.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return AdapterSnapshot(
        config=config,
        factors={name: _alive(layer, adapter_name) for name, layer in layers.items()},
        others=_others(state),
        module_names=frozenset(plain_name(name) for name, _ in model.named_modules()),
        num_labels=_num_labels(model),
    )


@torch.no_grad()
def _alive(layer: SalientLoRALayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    A, E, B = (getattr(layer, attribute)[adapter_name].detach() for attribute in FACTORS)
    mask = layer.salientlora_mask.get(adapter_name)
    if mask is None:
        return A, E, B
    keep = mask.bool()
    return A[keep], E[keep], B[:, keep]


def _others(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ours = {*FACTORS, STATE}
    return {
        PEFT_PREFIX + plain_name(key): tensor.detach()
        for key, tensor in state.items()
        if key.rpartition(".")[2] not in ours
    }


def read_directory(directory: str | Path) -> AdapterSnapshot:
    """
    The SalientLoRA adapter in a local directory that `save_pretrained` wrote.

    Args:
        directory (`str` or `Path`): Holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: If the files are missing or damaged, or belong to another method.
    """
    if not issubclass(_config_class(directory), SalientLoRAConfig):
        kind = read_config(directory)["peft_type"]
        raise ValueError(
            f"{directory} holds an adapter of type {kind}, which replaces weights and is no LoRA. Load it, call "
            "`model.base_model.finalize()` and `save_compressed(model, directory)`."
        )
    path = weights_path(directory)
    config = SalientLoRAConfig.from_pretrained(str(directory))
    state = safetensors.torch.load_file(path)
    factors = factors_in(state, path)
    if has_pruned(state, path):
        # which are pruned is told by E = 0: the state lists modules in an order that the file does not have
        factors = {name: (A[E != 0], E[E != 0], B[:, E != 0]) for name, (A, E, B) in factors.items()}
    others = _others(state)
    return AdapterSnapshot(config, factors, others, frozenset(factors), _labels_in(others))


def read_summary(directory: str | Path) -> AdapterSummary:
    """
    The summary of any adapter of this package in a local directory that `save_pretrained` wrote.

    Args:
        directory (`str` or `Path`): Holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: If the files are missing or damaged, or belong to a method of another package.
    """
    config_class = _config_class(directory)
    if issubclass(config_class, SalientLoRAConfig):
        return read_directory(directory).summary
    state = safetensors.torch.load_file(weights_path(directory))
    config = config_class.from_pretrained(str(directory))
    # these methods list every module that has a rank, once one has another than it began with
    ranks = {re.sub(r"\\(.)", r"\1", key.removeprefix("^")): rank for key, rank in config.rank_pattern.items()}
    ranks = ranks or {
        plain_name(key.removesuffix(".inrank_A")): tensor.shape[0]
        for key, tensor in state.items()
        if key.endswith(".inrank_A")
    }
    inside = tuple(f"{PEFT_PREFIX}{name}." for name in ranks)
    parameters = sum(tensor.numel() for key, tensor in state.items() if key.startswith(inside))
    return AdapterSummary(
        config=config,
        ranks=dict(sorted(ranks.items())),
        parameters=parameters,
        other_parameters=sum(tensor.numel() for tensor in state.values()) - parameters,
        bytes=sum(tensor.nbytes for tensor in state.values()),
        num_labels=_labels_in(state),
        in_progress=config.allocation_state is not None,
    )


def _config_class(directory: str | Path) -> type[AdaptedModulesConfig]:
    kind = read_config(directory).get("peft_type")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind, object)
    if not issubclass(config_class, AdaptedModulesConfig):
        raise ValueError(f"{directory} holds an adapter of type {kind}, which is not peft_rank's.")
    return config_class


def _labels_in(others: dict[str, torch.Tensor]) -> int | None:
    weights = [others[key] for key in CLASSIFIERS if key in others]
    return weights[0].shape[0] if weights else None


def summarize_model(model: nn.Module, adapter_name: str) -> AdapterSummary:
    """
    The summary of an adapter in a model, also where an engine holds shards of its parameters.

    Args:
        model (`torch.nn.Module`): A model with an adapter of this package.
        adapter_name (`str`): The adapter.

    Raises:
        TypeError: If the model has no such adapter.
    """
    model = bare_model(model)
    if adapter_name not in model.peft_config:
        raise TypeError(f"The model has no adapter {adapter_name!r}; its adapters are {', '.join(model.peft_config)}.")
    config, modules = model.peft_config[adapter_name], dict(model.named_modules())
    layers = {
        plain_name(name): module
        for name, module in modules.items()
        if isinstance(module, RankLayer) and adapter_name in module.adapters()
    }
    if not layers:  # a search that is over, or all modules stay dense
        layers = {plain_name(name): module for name, module in modules.items() if isinstance(module, LowRankLinear)}
    found = {name: _rank_and_width(layer, adapter_name) for name, layer in layers.items()}
    found = {name: (rank, itemsize) for name, (rank, itemsize) in found.items() if rank is not None}
    singular_values = isinstance(config, SalientLoRAConfig)  # E
    numbers = {
        name: rank * (layers[name].in_features + singular_values + layers[name].out_features)
        for name, (rank, _) in found.items()
    }
    tuner = model.base_model if isinstance(model, PeftModel) else None
    others = list(dict.fromkeys(_trained_beside(model, layers.values(), adapter_name)))
    sizes = [_numel(parameter) for parameter in others]
    return AdapterSummary(
        config=config,
        ranks={name: rank for name, (rank, _) in found.items()},
        parameters=sum(numbers.values()),
        other_parameters=sum(sizes),
        bytes=sum(itemsize * numbers[name] for name, (_, itemsize) in found.items())
        + sum(n * p.element_size() for n, p in zip(sizes, others, strict=True)),
        num_labels=_num_labels(model),
        in_progress=any(isinstance(layer, SearchLayer) and layer.searching for layer in layers.values())
        or (isinstance(tuner, InRankModel) and tuner.is_growing(adapter_name)),
    )


def _rank_and_width(layer: RankLayer | LowRankLinear, adapter_name: str) -> tuple[int | None, int]:
    """Rank of a module, None where it stays dense, and bytes of each number in its factors."""
    if isinstance(layer, LowRankLinear):
        return layer.rank, layer.down.weight.element_size()
    if isinstance(layer, SearchLayer):
        return layer.rank(adapter_name), layer.base_layer.weight.element_size()
    return layer.rank(adapter_name), getattr(layer, layer.adapter_layer_names[0])[adapter_name].element_size()


def _num_labels(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "num_labels", None)


def _trained_beside(model: nn.Module, layers: Iterable[RankLayer], adapter_name: str) -> Iterator[nn.Parameter]:
    """Parameters of `modules_to_save`, the trained biases, and what InRank trains of the base model."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            yield from module.modules_to_save[adapter_name].parameters()
    config = model.peft_config[adapter_name]
    if isinstance(config, InRankConfig) and config.train_base:
        yield from (layer.get_base_layer().weight for layer in layers)
    elif isinstance(config, InRankConfig) and config.from_scratch:
        factors = {id(p) for layer in layers for name, p in layer.named_parameters() if not name.endswith("bias")}
        yield from (p for p in model.parameters() if id(p) not in factors)
    bias = config.bias
    if bias == "all":
        yield from (p for name, p in model.named_parameters() if name.endswith(".bias"))
    elif bias != "none":
        bases = (layer.get_base_layer() if isinstance(layer, RankLayer) else layer for layer in layers)
        yield from (base.bias for base in bases if base.bias is not None)


def _numel(parameter: nn.Parameter) -> int:
    """ZeRO-3 leaves an empty placeholder that knows its full size."""
    return parameter.numel() or vars(parameter).get("ds_numel", 0)
