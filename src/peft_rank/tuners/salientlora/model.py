# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The SalientLoRA tuner: wraps modules, and carries out what its allocator decides."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    load_peft_weights,
    resolve_quantization_backend,
)
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import get_pattern_key
from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from peft_rank.orthogonality import orthogonality, orthogonality_gradient

from ..adaptive import AdaptiveRankTuner, ShrinkPolicy
from ..shrinking import can_slice_state, narrow, swap_parameters, unwrap_optimizer
from .allocator import RankAllocator
from .checkpoint import check_widths, exact_pattern, plain_name, to_checkpoint
from .config import SalientLoRAConfig
from .layer import SalientLoRALayer, SalientLoRALinear


class SalientLoRAModel(AdaptiveRankTuner):
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
        # injection, which the base class starts, needs both
        self._allocators: dict[str, RankAllocator] = {}
        self._layers: dict[str, dict[str, SalientLoRALayer]] = {}
        super().__init__(*args, **kwargs)

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._layers.clear()
        super().inject_adapter(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._layers.clear()
        self._allocators.pop(adapter_name, None)

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
        if isinstance(target, SalientLoRALayer):
            target.update_layer(adapter_name, config=config, **kwargs)
            return
        # by class, not by self: `PeftMixedModel` borrows this method
        new_module = SalientLoRAModel._create_new_module(config, adapter_name, target, **kwargs)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(
        config: SalientLoRAConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> SalientLoRALinear:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        transposed = isinstance(base, Conv1D)
        if not transposed and not isinstance(base, nn.Linear):
            backend = resolve_quantization_backend(base, **kwargs)
            if backend is None or backend.layer_type != "linear":
                raise TypeError(
                    f"Target module {target} is not supported. Currently, only `torch.nn.Linear` (optionally quantized) "
                    "and `transformers.pytorch_utils.Conv1D` are supported. Leave it out of `target_modules`, or name "
                    "it in `exclude_modules`."
                )
        if config.fan_in_fan_out != transposed:
            warnings.warn(
                f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is `{type(base).__name__}`. "
                f"Setting fan_in_fan_out to {transposed}.",
                stacklevel=2,
            )
            config.fan_in_fan_out = transposed
        return SalientLoRALinear(target, adapter_name, config=config, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of a mixed-batch inference down to the layers."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, SalientLoRALayer)]
        known = {name for layer in layers for name in layer.salientlora_A} | {"__base__"}
        unknown = set(adapter_names) - known
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")

        receivers = [m for m in self.modules() if isinstance(m, (SalientLoRALayer, AuxiliaryTrainingWrapper))]
        beams = kwargs.get("num_beams") or 1
        in_encoder: set[nn.Module] = set()
        if beams > 1 and self.get_model_config(self.model).get("is_encoder_decoder"):
            # beams repeat the samples in the decoder only
            in_encoder = set(self.model.get_encoder().modules())
        repeated = [name for name in adapter_names for _ in range(beams)]
        handles = []
        for module in receivers:
            names = adapter_names if module in in_encoder else repeated
            hook = partial(_pass_adapter_names, adapter_names=names)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for adapter_name in self.active_adapters:
            self._warn_if_never_allocated(adapter_name)

    # ---- allocation ----

    def adapter_layers(self, adapter_name: str) -> dict[str, SalientLoRALayer]:
        """The layers that hold the adapter, by module name in the base model, in injection order."""
        if adapter_name not in self._layers:
            self._layers[adapter_name] = {
                name: module
                for name, module in self.model.named_modules()
                if isinstance(module, SalientLoRALayer) and adapter_name in module.salientlora_A
            }
        return self._layers[adapter_name]

    def allocator(self, adapter_name: str) -> RankAllocator:
        """The allocator of the adapter, made on first use."""
        if adapter_name not in self._allocators:
            sizes = [layer.salientlora_r[adapter_name] for layer in self.adapter_layers(adapter_name).values()]
            self._allocators[adapter_name] = RankAllocator(self.peft_config[adapter_name], sizes)
        return self._allocators[adapter_name]

    def _trained_adapters(self) -> list[str]:
        """Active adapters whose factors are being trained."""
        return [
            name
            for name in self.active_adapters
            if any(layer.salientlora_A[name].requires_grad for layer in self.adapter_layers(name).values())
        ]

    def _allocating_adapters(self) -> list[str]:
        return [name for name in self._trained_adapters() if self.peft_config[name].allocates]

    def resolve_schedule(self, total_steps: int) -> str:
        plans = []
        for name in self._trained_adapters():
            allocator = self.allocator(name)
            if not self.peft_config[name].allocates or allocator.finished:
                plans.append(
                    f"{name}: ranks fixed at {allocator.total} in {len(allocator.sizes)} modules, no allocation"
                )
            else:
                plans.append(f"{name}: {allocator.plan(total_steps)}")
        return "\n".join(plans)

    def add_regularization_gradient(self) -> None:
        for name in self._trained_adapters():
            self._refuse_sharded(name)
            for parameter, gradient in self._regularization_gradients(name):
                if parameter.grad is None:
                    parameter.grad = gradient.to(parameter.dtype)
                else:
                    parameter.grad.add_(gradient)

    def arm_regularization(self, loss_scale: float = 1.0) -> None:
        for name in self._trained_adapters():
            layers = self.adapter_layers(name).values()
            with self._gathered(name):
                gradients = [gradient for _, gradient in self._regularization_gradients(name, loss_scale)]
            for layer, *pair in zip(layers, gradients[0::2], gradients[1::2], strict=False):
                layer._armed[name] = pair

    def _regularization_gradients(
        self, adapter_name: str, factor: float = 1.0
    ) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Yields A, then B, of every module with the gradient of the weighted regularizer; nothing if its weight is 0."""
        weight = self.peft_config[adapter_name].orth_reg_weight * factor
        if weight == 0:
            return
        layers = list(self.adapter_layers(adapter_name).values())
        down, up, alive = self._factors(adapter_name)
        for layer, *pair in zip(layers, *orthogonality_gradient(down, up, alive, weight), strict=True):
            yield layer.salientlora_A[adapter_name], pair[0]
            yield layer.salientlora_B[adapter_name], pair[1]

    def _factors(self, adapter_name: str):
        """A, B and the masks of pruned ranks of all modules."""
        layers = self.adapter_layers(adapter_name).values()
        down = [layer.salientlora_A[adapter_name] for layer in layers]
        up = [layer.salientlora_B[adapter_name] for layer in layers]
        return down, up, [layer.salientlora_mask.get(adapter_name) for layer in layers]

    @contextmanager
    def _gathered(self, adapter_name: str) -> Iterator[None]:
        """All factors of the adapter in full, where an engine holds shards of them."""
        layers = self.adapter_layers(adapter_name).values()
        parameters = [getattr(layer, a)[adapter_name] for layer in layers for a in layer.adapter_layer_names]
        with gather_params_ctx(parameters, modifier_rank=None):
            yield

    def _refuse_sharded(self, adapter_name: str) -> None:
        for name, layer in self.adapter_layers(adapter_name).items():
            if layer.salientlora_A[adapter_name].dim() != 2:
                raise RuntimeError(
                    f"The factors of {name} are sharded, so that their gradient cannot be added to here. Call "
                    "`arm_regularization()` before the first forward of every optimizer step instead."
                )

    @torch.no_grad()
    def update_and_allocate(
        self, global_step: int, optimizer: Optimizer | None = None, shrink: ShrinkPolicy = "each"
    ) -> bool:
        decided = False
        for name in self._allocating_adapters():
            allocator = self.allocator(name)
            if allocator.schedule is None and not allocator.finished:
                self._plan_from_steps(allocator)
            if global_step <= allocator.last_step:
                continue
            allocator.last_step = global_step
            if not allocator.wants(global_step):
                continue
            self._record(name)
            decision = allocator.due(global_step)
            if decision is not None:
                decided = True
                self._prune(name, allocator.decide(decision))
                if shrink == "each" or allocator.finished:
                    self._remove_pruned(name, optimizer)
        return decided

    def _plan_from_steps(self, allocator: RankAllocator) -> None:
        try:
            allocator.plan(None)
        except ValueError as error:
            raise RuntimeError(
                f"The allocation has no schedule: `resolve_schedule` was not called. {error}"
            ) from error

    def _record(self, adapter_name: str) -> None:
        with self._gathered(adapter_name):
            layers = self.adapter_layers(adapter_name).values()
            masks = [layer.salientlora_mask.get(adapter_name) for layer in layers]
            values = [layer.salientlora_E[adapter_name] for layer in layers]
            values = [E if mask is None else E * mask for E, mask in zip(values, masks, strict=True)]
            down, up, alive = self._factors(adapter_name)
            self.allocator(adapter_name).record(values, orthogonality(down, up, alive))

    def _prune(self, adapter_name: str, keep: torch.Tensor) -> None:
        layers = self.adapter_layers(adapter_name).values()
        for layer, mask in zip(layers, keep.split(self.allocator(adapter_name).sizes), strict=True):
            if adapter_name in layer.salientlora_mask or not mask.all():
                layer.set_mask(adapter_name, mask)

    def _remove_pruned(self, adapter_name: str, optimizer: Optimizer | None, training: bool = True) -> None:
        """Replace the factors by new, narrower parameters; while training, only where the optimizer can follow exactly."""
        layers = list(self.adapter_layers(adapter_name).values())
        parameters = [getattr(layer, a)[adapter_name] for layer in layers for a in layer.adapter_layer_names]
        optimizer = None if optimizer is None else unwrap_optimizer(optimizer)
        follows = optimizer is not None and can_slice_state(optimizer, parameters)
        if training and (_is_data_parallel() or not follows):
            return
        replacements = {}
        for layer, mask in zip(layers, self.allocator(adapter_name).remove_dead(), strict=True):
            layer.salientlora_mask.pop(adapter_name, None)
            if not mask.all():
                replacements.update(_narrow_layer(layer, adapter_name, mask))
        if follows:
            swap_parameters(optimizer, replacements)

    @torch.no_grad()
    def finalize(self, optimizer: Optimizer | None = None, compact: bool = True) -> None:
        for name in self._allocating_adapters():
            allocator = self.allocator(name)
            if not allocator.finished:
                self._finish_early(name, allocator)
            for layer in self.adapter_layers(name).values():
                layer._armed.pop(name, None)
            if compact:
                self._remove_pruned(name, optimizer, training=False)
            allocator.closed = True
            config = self.peft_config[name]
            config.rank_pattern = self._rank_pattern(name)
            config.allocation_state = None

    def _finish_early(self, name: str, allocator: RankAllocator) -> None:
        if allocator.rolled_back:
            warnings.warn(
                f"Adapter {name!r} was loaded from a checkpoint before the end of its allocation. It keeps its "
                f"{allocator.total} ranks; the budget of {allocator.target_total} was not reached. Select the best model "
                "among later checkpoints to have it met.",
                stacklevel=2,
            )
            return
        if allocator.recorded == 0:
            raise RuntimeError(self._never_allocated(name))
        if allocator.schedule is None:
            self._plan_from_steps(allocator)
        if not allocator.pending:
            return
        last = allocator.pending[-1]
        warnings.warn(
            f"The allocation of adapter {name!r} was cut short at step {allocator.last_step}, before its end at step "
            f"{last.step}. The last decision, to {last.budget} ranks, is taken now.",
            stacklevel=2,
        )
        if allocator.due(last.step) is None:
            self._record(name)
        self._prune(name, allocator.decide(last))

    @property
    def allocation_finished(self) -> bool:
        return all(self.allocator(name).finished for name in self._allocating_adapters())

    def check_resumed(self, global_step: int, checkpoint: Path | None = None) -> None:
        for name in self._allocating_adapters():
            allocator = self.allocator(name)
            if checkpoint is not None and allocator.last_step < global_step:
                folder = checkpoint if name == "default" else checkpoint / name
                self._restore_state(name, load_peft_weights(str(folder), device="cpu"))
                allocator = self.allocator(name)
            if not allocator.finished and global_step > max(allocator.last_step, allocator.schedule.warmup_steps):
                raise RuntimeError(
                    f"The training resumes at step {global_step}, but the allocation of adapter {name!r} knows only its "
                    f"first {allocator.last_step} steps. Was it trained without RankAllocationCallback, or were the "
                    "weights loaded without their checkpoint? Resume from a checkpoint that the callback was part of, or "
                    "start afresh."
                )

    def _restore_state(self, adapter_name: str, weights: dict[str, torch.Tensor]) -> None:
        state = next((value for key, value in weights.items() if key.endswith(".salientlora_state")), None)
        if state is not None:
            ranks = [layer.salientlora_r[adapter_name] for layer in self.adapter_layers(adapter_name).values()]
            self._restore(adapter_name, ranks, state)
            self._prune(adapter_name, self._allocators[adapter_name].alive)

    def _rank_pattern(self, adapter_name: str) -> dict[str, int]:
        allocator = self.allocator(adapter_name)
        kept = [int(mask.sum()) for mask in allocator.alive.split(allocator.sizes)]
        initial = self.peft_config[adapter_name].init_r
        names = self.adapter_layers(adapter_name)
        return {exact_pattern(name): r for name, r in zip(names, kept, strict=True) if r != initial}

    def _never_allocated(self, adapter_name: str) -> str | None:
        """What to tell of an allocation that was configured and never ran; None if there is nothing to tell."""
        config = self.peft_config[adapter_name]
        allocator = self._allocators.get(adapter_name) or self.allocator(adapter_name)
        if not config.allocates or allocator.finished or allocator.recorded > 0:
            return None
        return (
            f"The rank allocation of adapter {adapter_name!r} never ran: it still has {allocator.total} ranks instead of "
            f"{allocator.target_total}. Add `RankAllocationCallback()` to the Trainer's callbacks, or call "
            "`model.base_model.update_and_allocate(step)` after every optimizer step; for an adapter of fixed rank set "
            "`target_r` to `init_r`."
        )

    def _warn_if_never_allocated(self, adapter_name: str) -> None:
        message = self._never_allocated(adapter_name)
        seen = adapter_name in self._allocators and self._allocators[adapter_name].last_step > 0
        if message is not None and not seen and not self.peft_config[adapter_name].inference_mode:
            warnings.warn(message, stacklevel=2)

    def rank_summary(self) -> dict[str, float]:
        name = (self._trained_adapters() or self.active_adapters)[0]
        allocator = self.allocator(name)
        with self._gathered(name):
            regularizer = orthogonality(*self._factors(name))
        return {
            "rank/total": allocator.total,
            "rank/mean": allocator.total / len(allocator.sizes),
            "rank/budget": allocator.budget,
            "orthogonality": float(regularizer),
            "allocation/window": allocator.window_length,
            "parameters/trainable": sum(p.numel() for p in self.parameters() if p.requires_grad),
        }

    # ---- state dict: hooks of PEFT ----

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: SalientLoRAConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        tuner = _find_tuner(cls, model)
        allocator = None
        if tuner is not None:
            tuner._warn_if_never_allocated(adapter_name)
            allocator = tuner._allocators.get(adapter_name)
        return to_checkpoint(selected, _named_layers(model, adapter_name), config, adapter_name, allocator)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SalientLoRAConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        layers = {plain_name(name): layer for name, layer in _named_layers(model, adapter_name).items()}
        ranks = check_widths(layers, adapter_name, state_dict)
        tuner = _find_tuner(cls, model)
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

    def _restore(self, adapter_name: str, ranks: list[int], state: torch.Tensor | None) -> None:
        """Continue from a checkpoint's allocator, or, if it has none, start with its ranks."""
        allocator = RankAllocator(self.peft_config[adapter_name], ranks)
        if state is not None:
            allocator.unpack(state, ranks)
        before = self._allocators.get(adapter_name)
        if before is not None:
            allocator.schedule, allocator.decisions = before.schedule, before.decisions
            allocator.rolled_back = before.recorded > 0 and allocator.last_step < before.last_step
        if before is not None or state is not None:
            self._allocators[adapter_name] = allocator
        for layer in self.adapter_layers(adapter_name).values():
            layer.salientlora_mask.pop(adapter_name, None)
            layer._armed.pop(adapter_name, None)
            if adapter_name in layer.salientlora_state:
                del layer.salientlora_state[adapter_name]


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]):
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def _find_tuner(cls: type[SalientLoRAModel], model: nn.Module) -> SalientLoRAModel | None:
    """The tuner inside a PeftModel; None where only the layers were injected."""
    return next((module for module in model.modules() if isinstance(module, cls)), None)


def _named_layers(model: nn.Module, adapter_name: str) -> dict[str, SalientLoRALayer]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SalientLoRALayer) and adapter_name in module.salientlora_A
    }


def _is_data_parallel() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1


def _narrow_layer(layer: SalientLoRALayer, adapter_name: str, mask: torch.Tensor):
    """Cut the factors of one layer; returns what `swap_parameters` wants to know."""
    replacements = {}
    for attribute in layer.adapter_layer_names:
        old = getattr(layer, attribute)[adapter_name]
        index = mask.nonzero().squeeze(1).to(old.device)
        dim = 1 if attribute == "salientlora_B" else 0
        new = getattr(layer, attribute)[adapter_name] = narrow(old, dim, index)
        replacements[old] = (new, dim, index)
    layer.salientlora_r[adapter_name] = int(mask.sum())
    return replacements
