# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""PEFT's side of the tuner: wraps modules, saves and loads adapters."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import torch
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
)
from peft.utils.integrations import check_deepspeed_zero3_enabled
from peft.utils.other import get_pattern_key
from torch import nn

from ..additive import AdditiveTuner, check_linear, check_widths, find_tuner, named_layers
from ..names import plain_name
from ..sharding import is_sharded
from .checkpoint import to_checkpoint
from .config import SalientLoRAConfig
from .functional import prepare_updates, with_pending
from .layer import SalientLoRALayer, SalientLoRALinear
from .training import SalientLoRATraining


class SalientLoRAModel(AdditiveTuner, SalientLoRATraining):
    """
    Adapts a model by `W + lora_alpha / init_r * B diag(E) A` and prunes the ranks while it trains (SalientLoRA, NeurIPS
    2024).

    Args:
        model (`torch.nn.Module`): The model to adapt.
        peft_config ([`SalientLoRAConfig`]): The configuration.
        adapter_name (`str`): Name of the adapter, by default `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Create the adapter on the meta device.

    Raises:
        TypeError: If a target module is neither linear (quantized or not) nor a `Conv1D`.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_rank import SalientLoRAConfig

        >>> model = get_peft_model(model, SalientLoRAConfig(init_r=8, target_r=2, task_type="CAUSAL_LM"))
        ```
    """

    prefix = "salientlora_"
    tuner_layer_cls = SalientLoRALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepared_layers: list[SalientLoRALayer] = []
        self._hooks = (
            self.model.register_forward_pre_hook(self._prepare_updates),
            self.model.register_forward_hook(self._forget_updates, always_call=True),
        )

    def _create_and_replace(
        self,
        config: SalientLoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), current_key), config.init_r)
        state = config.allocation_state or {}
        kwargs = {
            "r": rank,
            "state_numel": state["numel"] if state.get("module") == current_key else 0,
            **get_quantization_kwargs(self),
        }
        # by class, not by self: `PeftMixedModel` borrows this method
        SalientLoRAModel._adapt(self, config, adapter_name, target, target_name, parent, **kwargs)

    @staticmethod
    def _create_new_module(
        config: SalientLoRAConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> SalientLoRALinear:
        config.fan_in_fan_out = check_linear(target, config.fan_in_fan_out, **kwargs)
        return SalientLoRALinear(target, adapter_name, config=config, **kwargs)

    def _prepare_updates(self, *_: Any) -> None:
        """Before the model's forward: cast the factors of all layers at once. A hook, since `PeftModel` calls the model
        itself where no task type is configured."""
        # ZeRO-3 gathers every weight that is looked at here, and keeps it for the whole forward pass
        if torch.compiler.is_compiling() or len(self.active_adapters) != 1 or check_deepspeed_zero3_enabled():
            return
        name = self.active_adapters[0]
        by_dtype: dict[torch.dtype, list[SalientLoRALayer]] = defaultdict(list)
        for layer in self.adapter_layers(name).values():
            # the layers alone know which adapter is active where transformers manages them
            if not layer.disable_adapters and not layer.merged and layer.active_adapters == [name]:
                dtype = layer.fused_dtype(name)
                # FSDP gathers its parts later, block by block
                if dtype is not None and not is_sharded(layer.stored(name).E):
                    by_dtype[dtype].append(layer)
        for dtype, layers in by_dtype.items():
            if layers[0].has_pending(name):
                pending = [layer.pending(name) for layer in layers]
                factors = with_pending(name, [layer.stored(name) for layer in layers], pending)
            else:
                factors = [layer.factors(name) for layer in layers]
            scalings = [layer.salientlora_scaling[name] for layer in layers]
            for layer, update in zip(layers, prepare_updates(factors, scalings, dtype), strict=True):
                layer._prepared[name] = update
                self._prepared_layers.append(layer)

    def _forget_updates(self, *_: Any) -> None:
        """After it: they are the parameters' values of that forward pass; what is recomputed later casts for itself."""
        for layer in self._prepared_layers:
            layer._prepared.clear()
        self._prepared_layers.clear()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        return model

    def living_ranks(self) -> dict[str, list[int]]:
        name = (self._trained_adapters() or self.active_adapters)[0]
        return dict(zip(self.adapter_layers(name), self.allocator(name).living(), strict=True))

    def _warn_if_never_allocated(self, adapter_name: str, in_training: bool = True) -> None:
        message = self._never_allocated(adapter_name)
        # a checkpoint of the warm-up has recorded nothing yet
        warming_up = in_training and self.allocator(adapter_name).last_step > 0
        if message is not None and not warming_up and not self.peft_config[adapter_name].inference_mode:
            warnings.warn(message, stacklevel=2)

    def _warn_if_unfinished(self, adapter_name: str) -> None:
        """Also of an adapter that was loaded for inference. One that never ran is told of by `_warn_if_never_allocated`."""
        allocator = self.allocator(adapter_name)
        begun = allocator.recorded > 0 or (allocator.last_step > 0 and self.peft_config[adapter_name].inference_mode)
        if begun and not allocator.finished and not allocator.closed:
            warnings.warn(
                f"The allocation has not finished: adapter {adapter_name!r} is merged with {allocator.total} ranks, "
                f"{allocator.target_total} are the budget. Train it to the end, or call `model.base_model.finalize()` first.",
                stacklevel=3,
            )

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for adapter_name in self.active_adapters:
            self._warn_if_never_allocated(adapter_name, in_training=False)
            self._warn_if_unfinished(adapter_name)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        """Take on the widths in a plain state dict, which may be those of another moment of an allocation."""
        for adapter_name in self.peft_config:
            layers = self.adapter_layers(adapter_name)
            widths = {name: layer.width(adapter_name) for name, layer in layers.items()}
            for name, layer in layers.items():
                A = state_dict.get(f"{prefix}model.{name}.salientlora_A.{adapter_name}")
                stored = layer.stored(adapter_name).A
                # engines that shard load into what they hold
                if A is not None and A.dim() == stored.dim() == 2 and not is_sharded(stored):
                    widths[name] = A.shape[0]
            if any(layer.width(adapter_name) != widths[name] for name, layer in layers.items()):
                self._restore(adapter_name, list(widths.values()), None)
                for name, layer in layers.items():
                    layer.resize(adapter_name, widths[name])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: SalientLoRAConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        tuner = find_tuner(cls, model)
        allocator = None
        if tuner is not None:
            tuner._warn_if_never_allocated(adapter_name)
            allocator = tuner._allocators.get(adapter_name)
        layers = named_layers(model, adapter_name, SalientLoRALayer)
        total, target = sum(layer.rank(adapter_name) for layer in layers.values()), config.target_r * len(layers)
        if tuner is None and total > target and not config.inference_mode and config.allocation_state is None:
            warnings.warn(
                f"The rank allocation of adapter {adapter_name!r} cannot run: it has {total} ranks instead of {target}, "
                "and the model holds its layers without the tuner. Use `get_peft_model(model, config)`; for an adapter "
                "of fixed rank set `target_r` to `init_r`.",
                stacklevel=2,
            )
        return to_checkpoint(selected, layers, config, adapter_name, allocator)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SalientLoRAConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        layers = {
            plain_name(name): layer for name, layer in named_layers(model, adapter_name, SalientLoRALayer).items()
        }
        ranks = check_widths(layers, adapter_name, state_dict, "SalientLoRA")
        for layer in layers.values():
            layer.unmerge_before_change(adapter_name)
        tuner = find_tuner(cls, model)
        if tuner is not None:
            state_key = next((key for key in state_dict if key.endswith(".salientlora_state")), None)
            state_dict = dict(state_dict)
            tuner._restore(
                adapter_name, list(ranks.values()), None if state_key is None else state_dict.pop(state_key)
            )
        for name, layer in layers.items():
            layer.resize(adapter_name, ranks[name])
        if tuner is not None and adapter_name in tuner._allocators:
            tuner._prune(adapter_name, tuner._allocators[adapter_name].alive)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
