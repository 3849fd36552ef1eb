# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""PEFT's side of low-rank compression: replaces modules, saves and loads adapters, and makes the compression final."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.other import _get_submodules
from torch import nn

from ...calibration.targets import injected_modules, is_targeted
from ...decomposition import Factors
from ..additive import find_tuner
from ..names import exact_pattern, plain_name, uncompiled
from .config import CompressionConfig, LowRankConfig
from .entry import record_compression
from .final import entries_inside, renamed_entries, settle_trained_modules, warn_of_unsaved
from .layer import FactorizedLinear
from .plan import check_dense, check_target, check_untied, choose_ranks, device_of, empty_factors, factorize


@dataclass
class _Injection:
    """One call of `inject_adapter`: what it was told, and from the first target on the factors by module name."""

    meta: bool
    ranks: dict[str, int] | None
    factors: dict[str, Factors] | None = None


class CompressionTuner(BaseTuner):
    """What tuners that put factors in the place of weights have in common."""

    tuner_layer_cls = FactorizedLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    _injection: _Injection | None = None
    # once the compression is final: names of the modules that became `LowRankLinear`, by adapter, and of those that were
    # trained beside them
    _final: dict[str, list[str]] | None = None
    _beside: tuple[str, ...] = ()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # the base class would move the factors to the weight, which may be offloaded
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # frozen factors gain nothing from float32
        trained = self.peft_config[adapter_name].train_factors
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype and trained)

    def factorized_layers(self, adapter_name: str | None = None) -> dict[str, FactorizedLinear]:
        """Layers by module name in the base model: all, or those that hold an adapter."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, FactorizedLinear) and (adapter_name is None or adapter_name in module.adapters())
        }

    def finalize(self) -> None:
        """
        Make the compression final: every layer becomes a [`LowRankLinear`] or, where it stayed dense, the module that it
        was, and all else is freed. `get_base_model()` is then the plain model, in the dtype that it had, with the factors
        trainable if they were. The active adapter is the one that stays, and can still be saved.

        Raises:
            ValueError: If several adapters are active in one layer.
            RuntimeError: If factors were to be loaded, and never were.
        """
        if self._final is not None:
            return
        layers = self.factorized_layers()
        for layer in layers.values():
            layer.check_final()
        self._final = {name: [] for name in self.active_adapters}
        for name, layer in layers.items():
            parent, _, child_name = _get_submodules(self.model, name)
            setattr(parent, child_name, layer.compressed())
            for adapter_name in self._final.keys() & layer.adapters():
                self._final[adapter_name].append(name)
        self._beside = tuple(settle_trained_modules(self.model))
        self.peft_config = {name: self.peft_config[name].without_statistics() for name in self._final}
        # a plain model, which another adapter may wrap
        del self.model.peft_config
        # and which `save_pretrained` writes completely
        record_compression(self.model, self.peft_config[self.active_adapters[0]])

    def _check_not_final(self) -> None:
        if self._final is not None:
            raise RuntimeError(
                "The compression is final, its dense weights are freed. Go on with the plain model, "
                "`model.get_base_model()`: train it, adapt it, `save_compressed(model, directory)`, or `densify(model)`."
            )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._check_not_final()
        for layer in self.factorized_layers().values():
            layer.onload()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._check_not_final()
        super().merge_adapter(*args, **kwargs)

    def disable_adapter_layers(self) -> None:
        self._check_not_final()
        super().disable_adapter_layers()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: CompressionConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        tuner = find_tuner(cls, model)
        if tuner is not None and tuner._final is not None:
            entries |= entries_inside(tuner._beside, model, state_dict)
            final = renamed_entries(tuner._final[adapter_name], model, state_dict, biases=config.bias != "none")
            warn_of_unsaved(model, entries.keys() | final.keys())
            entries = {key: tensor for key, tensor in entries.items() if key not in final}
            entries |= dict(final.values())
        ranks = {}
        for key, tensor in entries.items():
            name, factor, _ = key.partition(".lowrank_down")
            if not factor:
                continue
            if tensor.dim() != 2:
                raise RuntimeError(
                    f"The factors of {name} are sharded over processes. Save through the Trainer, or pass "
                    "`state_dict=accelerator.get_state_dict(engine)` to `save_pretrained`."
                )
            ranks[exact_pattern(uncompiled(plain_name(name)))] = tensor.shape[0]
        config.write_ranks(ranks)
        return entries

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CompressionConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        tuner, renames = find_tuner(cls, model), {}
        expected = {
            f"{plain_name(name)}.{attribute}": getattr(layer, attribute)[adapter_name]
            for name, layer in model.named_modules()
            if isinstance(layer, FactorizedLinear) and adapter_name in layer.adapters()
            for attribute in layer.adapter_layer_names
        }
        if tuner is not None and tuner._final is not None:
            final = renamed_entries(tuner._final[adapter_name], model, model.state_dict(), biases=True)
            renames = {in_file: key for key, (in_file, _) in final.items()}
            expected = {plain_name(key): tensor for key, tensor in final.values() if not key.endswith(".bias")}
        _check_factors(expected, adapter_name, state_dict)
        state_dict = {renames.get(key, key): tensor for key, tensor in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


class LowRankModel(CompressionTuner):
    """
    Replaces weights by two factors of fixed rank.

    The adapter is the compressed model, `disable_adapter` the dense one. `finalize` makes the compression final.

    Args:
        model (`torch.nn.Module`): The model to compress.
        peft_config ([`LowRankConfig`]): The configuration.
        adapter_name (`str`): Name of the adapter, by default `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Create the factors on the meta device, to be loaded.

    Raises:
        TypeError: If a target module is neither an `nn.Linear` nor a `Conv1D`, or is quantized.
        ValueError: If a ratio cannot be reached, statistics are missing, or a weight is tied or not finite. The model is
            unchanged.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_rank import LowRankConfig

        >>> model = get_peft_model(model, LowRankConfig(ratio=0.8, target_modules="all-linear"))
        >>> model.base_model.finalize()
        >>> model.get_base_model().generate(...)
        ```
    """

    prefix = "lowrank_"

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self._check_not_final()
        self.peft_config[adapter_name].forget_ranks()
        self._injection = _Injection(low_cpu_mem_usage, None if state_dict is None else _ranks_in(state_dict))
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            self._injection = None

    def _create_and_replace(
        self,
        config: LowRankConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        injection = self._injection
        if injection.factors is None:
            # only now `target_modules` is resolved; nothing has been replaced yet
            injection.factors = self._factors(config, injection)
        factors = injection.factors.pop(uncompiled(current_key), None)
        if factors is None:
            return  # stays dense
        layer, device = target, device_of(target)
        if not isinstance(target, FactorizedLinear):
            layer = FactorizedLinear(target)
            self._replace_module(parent, target_name, layer, target)
        if config.offload_dense:
            # before its factors come: the two of all modules together may not fit
            layer.offload()
        if not factors.down.is_meta:
            factors = Factors(*(factor.to(device) for factor in factors))
        layer.update_layer(
            adapter_name,
            factors,
            trained=config.train_factors,
            awaited=config.factors_saved or factors.down.is_meta,
            inference_mode=config.inference_mode,
        )

    def _factors(self, config: LowRankConfig, injection: _Injection) -> dict[str, Factors]:
        """Factors of all modules that do not stay dense."""
        modules = _targets(self.model, config, injection.ranks)
        check_dense(modules, self.model)
        kwargs = get_quantization_kwargs(self)
        shapes = {name: check_target(name, module, **kwargs) for name, module in modules.items()}
        ranks, splits = injection.ranks, {}
        if not ranks:
            ranks, splits = choose_ranks(modules, shapes, self.model, config)
        ranks = {name: ranks[name] for name in modules if ranks[name] is not None}
        check_untied(ranks, modules, self.model)
        if not ranks and not config.factors_saved:
            warnings.warn(
                f"All {len(modules)} targeted modules stay dense: factors of the given ranks would not be smaller than "
                "their weights. Lower `rank`, `rank_pattern` or `ratio`.",
                stacklevel=2,
            )
        if config.factors_saved or injection.meta:
            device = torch.device("meta" if injection.meta else "cpu")
            return {name: empty_factors(rank, modules[name], device) for name, rank in ranks.items()}
        return factorize(ranks, modules, self.model, config, splits)


def _ranks_in(state_dict: dict[str, torch.Tensor]) -> dict[str, int]:
    """Ranks by module name, of a state dict that modules are to be injected for."""
    ending = ".lowrank_down"
    return {
        uncompiled(key).removesuffix(ending): tensor.shape[0]
        for key, tensor in state_dict.items()
        if key.endswith(ending)
    }


def _targets(model: nn.Module, config: PeftConfig, names: Iterable[str] | None) -> dict[str, nn.Module]:
    """The modules that injection visits: those of the given names, or those that the configuration targets."""

    def wanted(key: str) -> bool:
        return is_targeted(LowRankModel, config, key) if names is None else uncompiled(key) in names

    return {uncompiled(key): module for key, module in injected_modules(model, wanted).items()}


def _check_factors(expected: dict[str, torch.Tensor], adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """
    Make sure that a file has the factors that the model has room for.

    Raises:
        ValueError: If one is missing, or has another shape.
    """
    found = {plain_name(key): tuple(tensor.shape) for key, tensor in state_dict.items()}
    for key, tensor in expected.items():
        shape = tuple(tensor.shape)
        if found.get(key) != shape:
            what = "is missing" if key not in found else f"is of shape {found[key]}"
            raise ValueError(
                f"{key} {what} in the file; adapter {adapter_name!r} has {shape} here. The file is damaged or belongs to "
                "another adapter; nothing was loaded."
            )
