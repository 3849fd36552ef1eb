# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""PEFT's side of the tuner: wraps modules, decides what is trained, saves and loads adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.other import get_pattern_key
from torch import nn

from ...calibration.targets import injected_modules, is_targeted
from ..additive import AdditiveTuner, check_linear, check_widths, find_tuner, is_transposed, named_layers
from ..lowrank.linear import LowRankLinear
from ..lowrank.plan import check_untied
from ..names import PEFT_PREFIX, plain_name
from .config import InRankConfig
from .layer import STATE_NUMEL, InRankFactors, InRankLinear
from .training import Clock, InRankTraining, rank_pattern


class InRankModel(InRankTraining, AdditiveTuner):
    """
    Adds a product B A to the weights of a model, or puts it in their place, and lets its rank grow with the spectrum of
    the product while it trains (InRank, 2023, https://huggingface.co/papers/2306.11250).

    Args:
        model (`torch.nn.Module`): The model to adapt.
        peft_config ([`InRankConfig`]): The configuration.
        adapter_name (`str`): Name of the adapter, by default `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Create the adapter on the meta device.

    Raises:
        TypeError: If a target module is neither linear (quantized or not) nor a `Conv1D`, or, with `from_scratch`, is
            quantized.
        ValueError: If, with `from_scratch`, a weight is shared with another module, or there is another adapter. The model
            is unchanged then.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_rank import InRankConfig

        >>> model = get_peft_model(model, InRankConfig(max_r=32, task_type="CAUSAL_LM"))
        ```
    """

    prefix = "inrank_"
    tuner_layer_cls = InRankLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _check_new_adapter_config(self, config: InRankConfig) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1 and any(other.from_scratch for other in self.peft_config.values()):
            raise ValueError(
                "With `from_scratch=True` the adapter is the model's weight: there can be no other beside it. Finalize it, and "
                "adapt `model.get_base_model()`."
            )

    def _create_and_replace(
        self,
        config: InRankConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        key, kwargs = get_pattern_key(config.rank_pattern.keys(), current_key), get_quantization_kwargs(self)
        if config.from_scratch:
            targets = {current_key: target}
            if not named_layers(self.model, adapter_name, InRankLinear):
                # all of them before the first weight is freed; only now `target_modules` is resolved
                targets |= injected_modules(self.model, lambda name: is_targeted(InRankModel, config, name))
            _check_replaceable(self.model, targets, **kwargs)
        kwargs["fixed_r"] = config.rank_pattern.get(key)
        # by class, not by self: `PeftMixedModel` borrows this method
        InRankModel._adapt(self, config, adapter_name, target, target_name, parent, **kwargs)

    @staticmethod
    def _create_new_module(config: InRankConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> InRankLinear:
        config.fan_in_fan_out = check_linear(target, config.fan_in_fan_out, **kwargs)
        layer_class = InRankFactors if config.from_scratch else InRankLinear
        return layer_class(target, adapter_name, config=config, **kwargs)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        before = {parameter: parameter.requires_grad for parameter in model.parameters()}
        super()._mark_only_adapters_as_trainable(model)
        configs = [self.peft_config[name] for name in self.active_adapters]
        if any(config.from_scratch and not config.inference_mode for config in configs):
            for parameter, requires_grad in before.items():
                parameter.requires_grad_(requires_grad)
        elif any(config.train_base and not config.inference_mode for config in configs):
            for layer in self.modules():
                if isinstance(layer, InRankLinear):
                    layer.get_base_layer().weight.requires_grad_(True)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # factors that are the weights have their dtype, as everything else in the model has its own
        in_place = self.peft_config[adapter_name].from_scratch
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype and not in_place)

    def delete_adapter(self, adapter_name: str) -> None:
        self._check_removable("deleted")
        super().delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        self._check_removable("unloaded")
        return super().unload()

    def _check_removable(self, verb: str) -> None:
        if any(config.from_scratch for config in self.peft_config.values()):
            raise RuntimeError(
                f"The adapter cannot be {verb}: with `from_scratch=True` the targeted modules have no other weight. Use "
                "`merge_and_unload()` for dense weights, or `finalize()` and `get_base_model()` for factors."
            )

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for adapter_name in self.active_adapters:
            self._warn_if_never_grown(adapter_name)

    def _warn_if_never_grown(self, adapter_name: str) -> None:
        message = self._never_grown(adapter_name)
        if message is not None and not self.peft_config[adapter_name].inference_mode:
            warnings.warn(message, stacklevel=3)

    # ---- saving ----

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: InRankConfig,
        adapter_name: str,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        layers = named_layers(model, adapter_name, InRankLinear)
        if config.from_scratch:
            selected |= _rest_of_the_model(model, layers, state_dict)
        elif config.train_base:
            selected |= {
                key: layer.unmerged_weight() if layer.merged else state_dict[key]
                for key, layer in ((f"{name}.base_layer.weight", layer) for name, layer in layers.items())
            }
        tuner = find_tuner(cls, model)
        if tuner is None:
            return selected
        tuner._warn_if_never_grown(adapter_name)
        selected |= _compressed_entries(model, tuner._compressed, adapter_name, selected)
        clock = tuner.clock(adapter_name)
        stepped = clock.last_step > 0 and not clock.closed
        if stepped:
            states = {name: clock.state(layer.inrank_r[adapter_name]) for name, layer in layers.items()}
            selected |= {f"{name}.inrank_state.{adapter_name}": state for name, state in states.items()}
        plain = {plain_name(name): layer for name, layer in layers.items()}
        if stepped or any(
            layer.width(adapter_name) != _initial_width(layer, name, config) for name, layer in plain.items()
        ):
            config.write_ranks(rank_pattern(plain, adapter_name), {"numel": 4} if stepped else None)
        return selected

    # ---- loading ----

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: InRankConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        layers = {plain_name(name): layer for name, layer in named_layers(model, adapter_name, InRankLinear).items()}
        if not layers:
            raise ValueError(
                f"The model has no InRank layer of adapter {adapter_name!r}: it was finalized, or has other target modules; "
                "nothing was loaded."
            )
        widths = check_widths(layers, adapter_name, state_dict, "InRank")
        states, others = _split(state_dict, ".inrank_state")
        rest = _rest_of_the_checkpoint(model, layers, others) if config.from_scratch else {}
        shapes = {key: tuple(present.shape) for key, (_, present) in rest.items()}
        _check_shapes(state_dict, shapes | {f"{name}.inrank_state": (STATE_NUMEL,) for name in states})
        for layer in layers.values():
            layer.unmerge_before_change(adapter_name)
        tuner = find_tuner(cls, model)
        if tuner is not None:
            tuner._restore(adapter_name, widths, {plain_name(name): state.tolist() for name, state in states.items()})
            state_dict = others
        with torch.no_grad():
            for value, present in rest.values():
                present.copy_(value)
        state_dict = {key: value for key, value in state_dict.items() if key not in rest}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _restore(self, adapter_name: str, widths: Mapping[str, int], states: Mapping[str, list[int]]) -> None:
        """Take over widths, ranks and clock of a checkpoint; without states its ranks are those of a fresh or of a
        finished adapter."""
        config, layers = self.peft_config[adapter_name], self.adapter_layers(adapter_name)
        fresh = all(width == _initial_width(layers[name], name, config) for name, width in widths.items())
        for name, layer in layers.items():
            rank = layer.inrank_r[adapter_name] if fresh else widths[name]
            layer.resize(adapter_name, states[name][0] if name in states else rank, widths[name])
            if adapter_name in layer.inrank_state:
                del layer.inrank_state[adapter_name]
        before = self.clock(adapter_name)
        clock = self._clocks[adapter_name] = Clock(end=before.end, planned=before.planned)
        if states:
            clock.last_step, clock.checked_step, clock.checks = next(iter(states.values()))[1:]


def _initial_width(layer: InRankLinear, name: str, config: InRankConfig) -> int:
    """The width that a module gets from the configuration."""
    fixed = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name))
    return layer.initial_width(config) if fixed is None else fixed


def _check_replaceable(model: nn.Module, targets: Mapping[str, nn.Module], **kwargs: Any) -> None:
    """Raises if the weight of a target of `from_scratch` cannot be given up."""
    for name, target in targets.items():
        if isinstance(target, BaseTunerLayer):
            raise ValueError(f"Target module {name} has an adapter. With `from_scratch=True` there can be no other.")
        if resolve_quantization_backend(target, **kwargs) is not None:
            raise TypeError(
                f"Target module {name} is quantized ({type(target).__name__}): its weight cannot be replaced by trained "
                "factors. Load the model without quantization, or set `from_scratch=False`."
            )
        is_transposed(target, **kwargs)  # raises if it is no linear
    check_untied(targets, targets, model)


def _rest_of_the_model(
    model: nn.Module, layers: Mapping[str, InRankLinear], state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Everything that is trained beside the factors: all of the model but what PEFT saves by itself."""
    own = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    factors = tuple(f"{name}.{part}" for name in layers for part in ("inrank_", "base_layer.weight"))
    return {key: value for key, value in state_dict.items() if not key.startswith((*own, *factors))}


def _compressed_entries(
    model: nn.Module, compressed: Mapping[str, LowRankLinear], adapter_name: str, selected: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The entries of finalized modules, renamed to those of our layers and taken out of `selected`."""
    modules, renamed = set(compressed.values()), {}
    names = {
        "down.weight": f"inrank_A.{adapter_name}",
        "up.weight": f"inrank_B.{adapter_name}",
        "up.bias": "base_layer.bias",
    }
    for name, module in model.named_modules():
        if module in modules:
            found = {new: selected.pop(f"{name}.{old}", None) for old, new in names.items()}
            renamed |= {f"{name}.{new}": value for new, value in found.items() if value is not None}
    return renamed


def _rest_of_the_checkpoint(
    model: nn.Module, layers: Mapping[str, InRankLinear], state_dict: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What is not ours, each with the tensor of the model to copy it into: so tied weights stay tied however the factors
    are loaded."""
    ours = tuple(f"{PEFT_PREFIX}{name}.inrank_" for name in layers)
    present = model.state_dict(keep_vars=True)
    return {k: (value, present[k]) for k, value in state_dict.items() if not k.startswith(ours) and k in present}


def _check_shapes(state_dict: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `ValueError` if an entry of a checkpoint does not have the shape that it takes."""
    for key, expected in shapes.items():
        found = tuple(state_dict[key].shape)
        if found != expected:
            raise ValueError(
                f"{key} is of shape {found} in the checkpoint, and {expected} here. It is damaged or belongs to another model; "
                "nothing was loaded."
            )


def _split(state_dict: Mapping[str, torch.Tensor], ending: str) -> tuple[dict, dict]:
    """The entries whose name has an ending, without it, and the others."""
    found = {key.removesuffix(ending): value for key, value in state_dict.items() if key.endswith(ending)}
    return found, {key: value for key, value in state_dict.items() if not key.endswith(ending)}
