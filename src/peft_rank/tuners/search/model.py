# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""PEFT's side of a search: splits weights, wraps modules, saves and loads adapters."""

from __future__ import annotations

import copy
import math
import re
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import PartialState
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_quantization_kwargs
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn

from ...calibration.targets import find_targets, linear, weight_of
from ..additive import find_tuner
from ..lowrank.final import entries_inside
from ..lowrank.linear import LowRankLinear
from ..lowrank.plan import (
    check_dense,
    check_target,
    check_untied,
    multiples,
    over_weights,
    statistics_by_module,
    uncompressed_parameters,
)
from ..names import PEFT_PREFIX, exact_pattern, plain_name, uncompiled
from .checkpoint import check_entries
from .config import RankSearchConfig
from .factors import SearchFactors, Spectrum, decompose_weight, empty_spectrum
from .layer import SearchLayer
from .state import SearchState, Selection
from .training import RankSearchTraining


_FACTORS = "factors"
NO_MODULE = "(none)"
"""In `modules_to_save`, where PEFT's classes for classification cannot do with nothing."""
_LINEAR = ("down.weight", "up.weight", "up.bias")


class _Plan(NamedTuple):
    """One call of `inject_adapter`: the factors by module name, None for dense, and the search if there is one."""

    factors: dict[str, SearchFactors | LowRankLinear | None]
    state: SearchState | None


class RankSearchModel(RankSearchTraining):
    """What tuners that learn which singular values to keep have in common. One adapter at a time."""

    tuner_layer_cls = SearchLayer

    def _keeps_prefix(self, config: RankSearchConfig) -> bool:
        """Whether a module keeps its leading ranks, or any."""
        return True

    @abstractmethod
    def _wrap(self, config: RankSearchConfig, adapter_name: str, base: nn.Module, factors: nn.Module) -> SearchLayer:
        """The layer of a module, with the masks' parameters where it is in search."""

    def _prepare_adapter_config(self, peft_config: RankSearchConfig, model_config: dict) -> RankSearchConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _check_new_adapter_config(self, config: RankSearchConfig) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1:
            raise ValueError(
                f"{type(self).__name__} holds one adapter at a time, of which there is one already. End it by `finalize()`, "
                "or remove it by `unload()`, first."
            )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._plan: _Plan | None = None
        config = self.peft_config[adapter_name]
        if config.modules_to_save is not None:
            # only masks are trained, and what was asked for
            config.modules_to_save = list(config.asked_modules_to_save or [NO_MODULE])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        state, self._plan = self._plan.state, None
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        if state is not None:
            self._states[adapter_name] = state
            for layer in self.searching_layers(adapter_name).values():
                layer.select_all = self._select_ranks
            self._after_injection(self.peft_config[adapter_name], adapter_name)
            values = [layer.factors.values for layer in self.searching_layers(adapter_name).values()]
            if config.start == "spectral" and not config.factors_saved and not values[0].is_meta:
                with torch.no_grad():
                    self._set_logits(adapter_name, state.spectral_start(values))

    @abstractmethod
    def _set_logits(self, adapter_name: str, starts: list[Tensor]) -> None:
        """Let the logits of the modules start at (k,) tensors."""

    def _after_injection(self, config: RankSearchConfig, adapter_name: str) -> None:
        """Make what the layers share."""

    def _create_and_replace(
        self,
        config: RankSearchConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if self._plan is None:
            # only now `target_modules` is resolved; nothing has been replaced yet
            self._plan = self._make_plan(config)
        factors = self._plan.factors.pop(uncompiled(current_key))
        if factors is None:
            return  # stays dense
        layer = self._wrap(config, adapter_name, target, factors)
        state = config.allocation_state or {}
        if state.get("module") == uncompiled(current_key):
            layer.reserve_state(f"{self.prefix}state", state["numel"])
        if layer.searching:
            layer.tell_ranks(f"{self.prefix}ranks")
        layer.train(target.training)
        layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        setattr(parent, target_name, layer)

    def _make_plan(self, config: RankSearchConfig) -> _Plan:
        """What happens to every targeted module; checks all that can be wrong with them."""
        # PEFT leaves the prefix out of the keys of a state dict that it injects modules for
        modules = {uncompiled(name): module for name, module in find_targets(self.model, config).items()}
        check_dense(modules, self.model)
        kwargs = get_quantization_kwargs(self)
        shapes = {name: check_target(name, module, **kwargs) for name, module in modules.items()}
        check_untied(modules, modules, self.model)
        ranks = {name: config.rank_pattern.get(get_pattern_key(config.rank_pattern, name)) for name in modules}
        if config.factors_saved and config.allocation_state is None:
            factors = {name: None if rank is None else _empty(modules[name], rank) for name, rank in ranks.items()}
            return _Plan(factors, None)
        fixed = {name: rank for name, rank in ranks.items() if rank is not None}
        searched = {name: shape for name, shape in shapes.items() if name not in fixed}
        if not searched:
            raise ValueError(
                f"`rank_pattern` fixes the ranks of all {len(modules)} targeted modules, so that none is left to search. "
                "Use `LowRankConfig` for fixed ranks."
            )
        others = uncompressed_parameters(modules, self.model, config)
        state = SearchState(
            config,
            list(searched.values()),
            multiples(modules, searched, config),
            others + sum(rank * sum(shapes[name]) for name, rank in fixed.items()),
            others + sum(math.prod(shapes[name]) for name in fixed),
            self._keeps_prefix(config),
        )
        if config.factors_saved:
            return _Plan({name: _empty(modules[name], rank) for name, rank in ranks.items()}, state)
        statistics = statistics_by_module(modules, self.model, config)

        def split(name: str, weight: Tensor) -> SearchFactors | LowRankLinear:
            return _split(modules[name], weight, ranks[name], statistics[name], config)

        factors = over_weights(split, modules, modules, statistics)
        return _Plan(factors, state)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        if self._compact:
            raise RuntimeError(
                "The search is over, and the weights that factors took the place of are freed. Go on with the plain model, "
                "`model.get_base_model()`: train it, adapt it, `save_compressed(model, directory)`, or `densify(model)`."
            )
        self._hook.remove()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for adapter_name in self._states:
            self._warn_if_never_searched(adapter_name)

    def _warn_if_never_searched(self, adapter_name: str) -> None:
        state = self._states[adapter_name]
        if state.recorded == state.step == 0 and not self.peft_config[adapter_name].inference_mode:
            warnings.warn(self._never_searched(adapter_name), stacklevel=3)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _linears(self, adapter_name: str) -> dict[str, LowRankLinear]:
        """What modules have become, by name in the base model."""
        if adapter_name in self._compact:
            return {name: self.model.get_submodule(name) for name in self._compact[adapter_name]}
        layers = self.adapter_layers(adapter_name).items()
        return {name: layer.factors for name, layer in layers if not layer.searching and layer.factors is not None}

    def save_snapshot(self, ratio: float, directory: str | Path) -> None:
        """
        Write the adapter as it was when a target was reached, with its ranks final.

        Args:
            ratio (`float`): One of `target_ratio` that was reached.
            directory (`str` or `Path`): Folder to write to; `PeftModel.from_pretrained` reads it.

        Raises:
            ValueError: If it was not reached, or the search is over.
        """
        for name, state in self._states.items():
            if ratio in state.snapshots:
                self._save_selection(name, state.snapshots[ratio], Path(directory))
                return
        raise ValueError(f"No snapshot at `ratio={ratio}`: it was not reached, or the search is over.")

    def _write_snapshot(self, adapter_name: str, ratio: float) -> None:
        folder = self.peft_config[adapter_name].snapshot_dir
        if folder is not None and PartialState().is_main_process:
            self.save_snapshot(ratio, Path(folder, f"ratio-{ratio}"))

    def _save_selection(self, adapter_name: str, selection: Selection, directory: Path) -> None:
        config = copy.copy(self.peft_config[adapter_name])
        entries = {}
        linears = {
            name: layer.factors.select(ranks, layer.base_layer.bias)
            for (name, layer), ranks in zip(self.searching_layers(adapter_name).items(), selection, strict=True)
            if ranks is not None
        } | self._linears(adapter_name)
        for name, linear_ in linears.items():
            entries |= {f"{PEFT_PREFIX}{name}.{_FACTORS}.{key}": value for key, value in linear_.state_dict().items()}
        config.write_ranks({exact_pattern(name): linear_.rank for name, linear_ in linears.items()})
        config.inference_mode = True
        config.save_pretrained(str(directory))
        save_file({key: value.cpu() for key, value in entries.items()}, directory / SAFETENSORS_WEIGHTS_NAME)

    def _restore_state(self, adapter_name: str, weights: dict[str, Tensor]) -> None:
        """Clock and snapshots out of a checkpoint; removes them from it."""
        key = next((key for key in weights if key.endswith(f".{self.prefix}state")), None)
        if key is not None:
            self._states[adapter_name].unpack(weights.pop(key))
        self._armed.pop(adapter_name, None)
        for layer in self.searching_layers(adapter_name).values():
            layer._modules.pop(f"{self.prefix}state", None)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # modules under the adapter's name have parameters of several levels
        return re.sub(rf"(\.{cls.prefix}\w+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: RankSearchConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        tuner = find_tuner(cls, model)
        if tuner is None:
            if config.allocation_state is None and not config.factors_saved:
                warnings.warn(
                    f"The search of adapter {adapter_name!r} cannot run: the model holds its layers without the tuner. Use "
                    "`get_peft_model(model, config)`.",
                    stacklevel=2,
                )
            return entries
        entries |= entries_inside(tuner._beside, model, state_dict)
        linears, state = tuner._linears(adapter_name), tuner._states.get(adapter_name)
        if adapter_name in tuner._compact:
            for name, _ in model.named_modules():
                if plain_name(name) in linears:
                    found = {key: state_dict.get(f"{name}.{key}") for key in _LINEAR}
                    entries |= {f"{name}.{_FACTORS}.{key}": value for key, value in found.items() if value is not None}
        where = None
        if state is not None:
            tuner._warn_if_never_searched(adapter_name)
            first = next(iter(tuner.searching_layers(adapter_name)))
            blob = state.pack()
            entries[f"{PEFT_PREFIX}{first}.{cls.prefix}state"] = blob
            where = {"module": first, "numel": blob.numel()}
        config.write_ranks({exact_pattern(name): module.rank for name, module in linears.items()}, where)
        if state is not None and not config.save_factors:
            config.factors_saved = False
            entries = {key: value for key, value in entries.items() if f".{_FACTORS}." not in key}
        return entries

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: RankSearchConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tuner, state_dict = find_tuner(cls, model), dict(state_dict)
        if tuner is not None:
            if adapter_name in tuner._compact:
                raise ValueError(
                    "The search is over and its layers are gone, so that no adapter can be loaded into this model. Load it "
                    "into the base model by `PeftModel.from_pretrained`."
                )
            tuner._adopt(adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _adopt(self, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
        """Become what a checkpoint describes: a search at another step, or its end. Raises before anything changes."""
        stored = {plain_name(key): value for key, value in state_dict.items()}
        searching = self.searching_layers(adapter_name)
        # masks without a state are those of a search that never began
        masks = tuple(f"{name}.{self.prefix}" for name in self.adapter_layers(adapter_name))
        unfinished = any(key.startswith(masks) for key in stored)
        if unfinished and not searching:
            raise ValueError(
                "The checkpoint is of an unfinished search, and the ranks of this model are final. Load it into the base "
                "model by `PeftModel.from_pretrained(model, directory, is_trainable=True)`."
            )
        final = {} if unfinished else {name: _final(layer, name, stored) for name, layer in searching.items()}
        without_factors = unfinished and not any(f".{_FACTORS}." in key for key in stored)
        ignored = ["base_layer.", f"{self.prefix}state", *([f"{_FACTORS}."] if without_factors else [])]
        expected = {}
        for name, layer in self.adapter_layers(adapter_name).items():
            own = _own_state(layer) if name not in final else _final_state(final[name])
            named = {self._remove_adapter_name_from_key(f".{key}", adapter_name)[1:]: own[key].shape for key in own}
            expected[name] = {key: shape for key, shape in named.items() if not key.startswith(tuple(ignored))}
        check_entries(expected, stored, ignored)
        if final:
            for name, layer in searching.items():
                layer.end_search(final[name])
            del self._states[adapter_name]
            self._forget_masks(adapter_name)
        elif unfinished:
            self._restore_state(adapter_name, state_dict)
            self._selected_from = None
            for layer in searching.values():
                layer._selected.clear()


def _own_state(layer: SearchLayer) -> dict[str, Tensor]:
    return {key: value for key, value in layer.state_dict().items() if not key.startswith("base_layer.")}


def _final_state(made: LowRankLinear | None) -> dict[str, Tensor]:
    return {} if made is None else made.state_dict(prefix=f"{_FACTORS}.")


def _final(layer: SearchLayer, name: str, stored: Mapping[str, Tensor]) -> LowRankLinear | None:
    """What a layer in search becomes by the end of a search in a file; None if it stays dense."""
    down = stored.get(f"{name}.{_FACTORS}.down.weight")
    return None if down is None else _empty(layer.base_layer, down.shape[0])


def _empty(module: nn.Module, rank: int | None) -> SearchFactors | LowRankLinear:
    """Factors that are still to be loaded: of all ranks, or of a final one."""
    with weight_of(module) as weight:
        if rank is None:
            return SearchFactors(empty_spectrum(tuple(weight.shape), weight))
        bias = linear(module).bias is not None
        made = LowRankLinear(weight.shape[1], weight.shape[0], rank, bias, device=weight.device, dtype=weight.dtype)
        return made.requires_grad_(False)


def _split(
    module: nn.Module, weight: Tensor, rank: int | None, statistics: dict[str, Tensor], config: RankSearchConfig
) -> SearchFactors | LowRankLinear:
    """Factors of all ranks, or of the fixed one of `rank_pattern`, where the module is."""
    base = linear(module)
    if weight.is_meta:
        factors = SearchFactors(empty_spectrum(tuple(weight.shape), weight))
    else:
        found = decompose_weight(weight, config.decomposition, statistics, config.alpha, config.factor_cache)
        factors = SearchFactors(Spectrum(*(tensor.to(base.weight.device) for tensor in found)))
    if rank is None:
        return factors
    return factors.select(torch.arange(min(rank, *weight.shape)), base.bias).requires_grad_(False)
