# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Adapters that add an update of changing rank to a linear map: what does not depend on how the update is factored."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..calibration.targets import linear
from .adaptive import RankLayer
from .names import plain_name


TunerT = TypeVar("TunerT", bound=BaseTuner)
LayerT = TypeVar("LayerT", bound=RankLayer)


class AdditiveLayer(RankLayer):
    """A layer that adds the updates of its adapters to the output of a base layer."""

    merged_adapters: list[str]

    @abstractmethod
    def width(self, adapter_name: str) -> int:
        """Number of ranks that the factors hold, whatever of them is pruned or not open yet."""

    @abstractmethod
    def factor_shapes(self, width: int) -> list[tuple[int, ...]]:
        """Shapes of the factors at a width, in the order of `adapter_layer_names`."""

    @abstractmethod
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The update of the base weight, in its layout."""

    @abstractmethod
    def _add_update(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """`result` plus the update's output for `x`, in the dtype of `result`."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapters into the base weight.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Merge into a copy and check it for NaNs first.
            adapter_names (`list[str]`, *optional*): The adapters to merge, by default all active ones.

        Raises:
            ValueError: If `safe_merge` finds a merged weight that is not finite; the base weight is unchanged.
            TypeError: If the base layer is quantized in a way that cannot be undone.
        """
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapters()]
        if adapters and self.quantization_backend is not None:
            warnings.warn(
                "Merging into a quantized weight rounds the sum to its format again, which may take most of the update away. "
                "Keep the adapter apart, or merge it into the base model loaded without quantization.",
                stacklevel=2,
            )
        for active_adapter in adapters:
            weight = self.get_base_weight()
            merged = (weight + self.get_delta_weight(active_adapter).to(weight.device)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {active_adapter} seems to be broken"
                )
            self._store_base_weight(merged)
            self.merged_adapters.append(active_adapter)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.unmerged_weight()
        self.merged_adapters.clear()
        self._store_base_weight(weight)

    def unmerged_weight(self) -> torch.Tensor:
        """The base weight without the adapters that are merged into it."""
        weight = self.get_base_weight().detach()
        for adapter_name in reversed(self.merged_adapters):
            weight = (weight - self.get_delta_weight(adapter_name).to(weight.device)).to(weight.dtype)
        return weight

    def unmerge_before_change(self, adapter_name: str) -> None:
        """To be called before the adapter's update changes: nobody could take the present one out of the base weight
        afterwards."""
        if adapter_name in self.merged_adapters:
            self.unmerge()

    def _store_base_weight(self, weight: torch.Tensor) -> None:
        if self.quantization_backend is None:
            # in place, so that a weight that is tied or shared with other processes stays so
            self.get_base_layer().weight.data.copy_(weight)
        else:
            self.set_base_weight(weight)

    def _gather_sharded(self, *parameters: nn.Parameter) -> None:
        """Make the parameters, the first of which is a matrix, whole for a forward pass where ZeRO-3 partitions them."""
        if parameters[0].dim() == 2:
            return
        from deepspeed.zero import register_external_parameter

        # ZeRO-3 shows a placeholder for a partitioned parameter and gathers those of the running module only; once
        # registered, it gathers these with the layer
        for parameter in parameters:
            register_external_parameter(self, parameter)
            parameter.all_gather()

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = self.base_layer(x, *args, **kwargs).clone()
        for name in sorted(set(adapter_names) & set(self.adapters())):
            rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
            result[rows] = self._add_update(result[rows], x[rows], name)
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class AdditiveTuner(BaseTuner):
    """PEFT's side of a tuner with `AdditiveLayer`s: wrapping, and batches that mix adapters."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, AdditiveLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # put back when unloading: the base class would look for a weight, which a pooler in `modules_to_save` has not
            setattr(parent, child_name, new_module)

    @staticmethod
    @abstractmethod
    def _create_new_module(config: PeftConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> AdditiveLayer:
        """The layer around `target`."""

    @classmethod
    def _adapt(
        cls,
        tuner: BaseTuner,
        config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Give the target the adapter: in the layer that it is, or in a new one. `tuner` may be a `PeftMixedModel`'s, which
        borrows `_create_and_replace` of this class."""
        if isinstance(target, cls.tuner_layer_cls):
            target.update_layer(adapter_name, config=config, **kwargs)
            return
        new_module = cls._create_new_module(config, adapter_name, target, **kwargs)
        if adapter_name not in tuner.active_adapters:
            new_module.requires_grad_(False)
        tuner._replace_module(parent, target_name, new_module, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of a mixed-batch inference down to the layers."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, AdditiveLayer)]
        known = {name for layer in layers for name in layer.adapters()} | {"__base__"}
        unknown = set(adapter_names) - known
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")

        receivers = [m for m in self.modules() if isinstance(m, (AdditiveLayer, AuxiliaryTrainingWrapper))]
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


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]):
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def is_transposed(target: nn.Module, **kwargs: Any) -> bool:
    """
    Whether the weight of a module is (in, out).

    Args:
        target (`torch.nn.Module`): The module, or a tuner's layer around it.
        kwargs: What `get_quantization_kwargs` returned.

    Raises:
        TypeError: If the module cannot be adapted: it is neither linear (quantized or not) nor a `Conv1D`.
    """
    base = linear(target)
    transposed = isinstance(base, Conv1D)
    if not transposed and not isinstance(base, nn.Linear):
        backend = resolve_quantization_backend(base, **kwargs)
        if backend is None or backend.layer_type != "linear":
            raise TypeError(
                f"Target module {target} is not supported. Currently, only `torch.nn.Linear` (optionally quantized) "
                "and `transformers.pytorch_utils.Conv1D` are supported. Leave it out of `target_modules`, or name "
                "it in `exclude_modules`."
            )
    return transposed


def check_linear(target: nn.Module, fan_in_fan_out: bool, **kwargs: Any) -> bool:
    """`is_transposed`; a warning says so where the configuration has it wrong."""
    transposed = is_transposed(target, **kwargs)
    if fan_in_fan_out != transposed:
        warnings.warn(
            f"fan_in_fan_out is set to {fan_in_fan_out} but the target module is `{type(linear(target)).__name__}`. "
            f"Setting fan_in_fan_out to {transposed}.",
            stacklevel=2,
        )
    return transposed


def find_tuner(tuner_class: type[TunerT], model: nn.Module) -> TunerT | None:
    """The tuner inside a PeftModel; None where only the layers were injected."""
    return next((module for module in model.modules() if isinstance(module, tuner_class)), None)


def named_layers(model: nn.Module, adapter_name: str, layer_class: type[LayerT]) -> dict[str, LayerT]:
    """The layers that hold an adapter, by their full name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, layer_class) and adapter_name in module.adapters()
    }


def check_widths(
    layers: Mapping[str, AdditiveLayer], adapter_name: str, state_dict: Mapping[str, torch.Tensor], method: str
) -> dict[str, int]:
    """
    The width of every layer in a checkpoint; layers that it does not have keep theirs.

    Args:
        layers (`Mapping[str, AdditiveLayer]`): Layers by their name in the base model.
        adapter_name (`str`): The adapter that is loaded into.
        state_dict (`Mapping[str, torch.Tensor]`): The checkpoint, keys without adapter name.
        method (`str`): Its name, for messages.

    Raises:
        ValueError: If there is no factor at all, or one lacks or has a shape that does not fit its module or the others.
    """
    tensors = {plain_name(key): tensor for key, tensor in state_dict.items()}
    widths, present = {}, False
    for name, layer in layers.items():
        letters = ", ".join(attribute.rpartition("_")[2] for attribute in layer.adapter_layer_names)
        factors = [tensors.get(f"{name}.{attribute}") for attribute in layer.adapter_layer_names]
        if all(factor is None for factor in factors):
            widths[name] = layer.width(adapter_name)
            continue
        present = True
        width = 0 if factors[0] is None or factors[0].dim() == 0 else factors[0].shape[0]
        found = [None if factor is None else tuple(factor.shape) for factor in factors]
        expected = layer.factor_shapes(width)
        if found != expected:
            raise ValueError(
                f"The checkpoint has factors {letters} of shapes {found} for {name}, whose weight takes {expected}. It is "
                "damaged or belongs to another model; nothing was loaded."
            )
        widths[name] = width
    if layers and not present:
        raise ValueError(
            f"The checkpoint holds none of the {method} factors of adapter {adapter_name!r}. It belongs to another PEFT method "
            "or to other target modules; nothing was loaded."
        )
    return widths
