# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""A linear whose weight is replaced by two factors, and which can go back to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...decomposition import Factors
from ..adaptive import RankLayer
from .linear import LowRankLinear


class FactorizedLinear(nn.Module, RankLayer):
    """
    A linear or `Conv1D` that computes with the factors of its active adapter instead of its weight.

    For an adapter of rank r, `lowrank_down` is (r, in_features) and `lowrank_up` is (out_features, r). Adapters are
    replacements of the weight W, not additions to it. Several active ones add up their changes: W + sum(U_i V_i - W).

    Args:
        base_layer (`torch.nn.Module`): An `nn.Linear` or `Conv1D`; its weight and bias stay there.
    """

    adapter_layer_names = ("lowrank_down", "lowrank_up")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        out_features, in_features = transpose(base_layer.weight, self.fan_in_fan_out).shape
        self.in_features, self.out_features = in_features, out_features
        self.lowrank_down = nn.ParameterDict({})
        self.lowrank_up = nn.ParameterDict({})
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.cast_input_dtype_enabled = True  # read by `peft.helpers.disable_input_dtype_casting`
        self._disable_adapters = False
        # the weight as it was before adapters were merged
        self._original: Tensor | None = None
        self._offloaded = False
        # adapters whose factors are still to come from a file
        self._awaited: set[str] = set()

    def update_layer(
        self, adapter_name: str, factors: Factors, *, trained: bool, awaited: bool, inference_mode: bool
    ) -> None:
        """
        Add an adapter.

        Args:
            adapter_name (`str`): Its name.
            factors (`Factors`): Taken over as they are.
            trained (`bool`): False keeps the factors frozen, whichever adapter is active.
            awaited (`bool`): The factors have no values yet; they are NaN or on the meta device.
            inference_mode (`bool`): Do not train for now.
        """
        self.lowrank_down[adapter_name] = nn.Parameter(factors.down)
        self.lowrank_up[adapter_name] = nn.Parameter(factors.up)
        if not trained:
            self.frozen_peft_weight_names[adapter_name] = self.adapter_layer_names
        if awaited:
            self._awaited.add(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def rank(self, adapter_name: str) -> int:
        return self.lowrank_down[adapter_name].shape[0]

    def factors(self, adapter_name: str) -> Factors:
        """
        The factors of an adapter.

        Raises:
            RuntimeError: If they were to be loaded, and never were.
        """
        down, up = self.lowrank_down[adapter_name], self.lowrank_up[adapter_name]
        if adapter_name in self._awaited:
            if down.is_meta or bool(down.detach().flatten()[0].isnan()):
                raise RuntimeError(
                    f"The factors of adapter {adapter_name!r} were never loaded: its configuration was read from a saved "
                    "adapter, and says that they are in that file. Use `PeftModel.from_pretrained(model, directory)`; or, "
                    "to decompose the weights again, set `config.factors_saved = False`."
                )
            self._awaited.discard(adapter_name)
        return Factors(up, down)

    def product(self, adapter_name: str) -> Tensor:
        """(out_features, in_features) in float32 or better."""
        up, down = (factor.detach() for factor in self.factors(adapter_name))
        dtype = torch.promote_types(up.dtype, torch.float32)
        return up.to(dtype) @ down.to(dtype)

    def original_weight(self) -> Tensor:
        """The dense weight in its own layout, whatever was merged."""
        return self.base_layer.weight.data if self._original is None else self._original

    def offload(self) -> None:
        """Move the dense weight to the CPU; it stays there when the model is moved."""
        self._offloaded = True
        self._settle()

    def onload(self) -> None:
        """Undo `offload`."""
        if self._offloaded:
            self._offloaded = False
            self.base_layer.weight.data = self.base_layer.weight.data.to(self.lowrank_device)

    @property
    def lowrank_device(self) -> torch.device:
        """Where this layer computes."""
        return next(iter(self.lowrank_down.values()), self.base_layer.weight).device

    def _settle(self) -> None:
        weight = self.base_layer.weight
        if self._offloaded and not self.merged and not weight.is_meta:
            weight.data = weight.data.cpu()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactorizedLinear:
        super()._apply(fn, recurse)
        self._settle()
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Put the product of the factors into the base weight.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Check it for NaNs first.
            adapter_names (`list[str]`, *optional*): The adapters to merge, by default all active ones.

        Raises:
            ValueError: If `safe_merge` finds a merged weight that is not finite; the base weight is unchanged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapters()]
        if not names:
            return
        weight, original = self.base_layer.weight, self.original_weight()
        merged = sum(self.product(name) for name in (*self.merged_adapters, *names))
        extra = len(self.merged_adapters) + len(names) - 1
        if extra:
            dense = transpose(original, self.fan_in_fan_out)
            merged = merged - extra * dense.to(merged.device, merged.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        self._original = original
        weight.data = transpose(merged, self.fan_in_fan_out).to(weight.dtype).contiguous()
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Put the original weight back, to the last bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        weight = self.base_layer.weight
        # the model may have been moved or cast since
        weight.data = self._original.to(weight.device, weight.dtype)
        self._original = None
        self._settle()

    def check_final(self) -> None:
        """
        Make sure that `compressed` will succeed.

        Raises:
            ValueError: If several active adapters have factors.
            RuntimeError: If factors were to be loaded, and never were.
        """
        names = [name for name in self.active_adapters if name in self.adapters()]
        if len(names) > 1:
            raise ValueError(
                f"The adapters {', '.join(names)} are active together; only one can stay for good. Activate it by "
                "`set_adapter` first."
            )
        for name in names:
            self.factors(name)

    def compressed(self) -> nn.Module:
        """What this layer becomes for good: two linears, or the base layer where no active adapter has factors."""
        if self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.adapters()]
        if not names:
            self.onload()
            return self.base_layer
        dtype, base = self.base_layer.weight.dtype, self.base_layer
        up, down = self.factors(names[0])
        module = LowRankLinear.from_factors(Factors(up.detach().to(dtype), down.detach().to(dtype)))
        module.down.weight.requires_grad_(down.requires_grad)
        module.up.weight.requires_grad_(up.requires_grad)
        module.up.bias = base.bias
        return module.train(base.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._dense(x)
        names = [] if self.merged else [name for name in self.active_adapters if name in self.lowrank_down]
        if len(names) == 1:
            return self._factorized(x, names[0], self.base_layer.bias)
        result = self._dense(x)
        if names:
            bias = self.base_layer.bias
            dense = result if bias is None else result - bias.to(result.dtype)
            changes = [self._factorized(x, name, None) - dense for name in names]
            result = result + sum(changes)
        return result

    def _factorized(self, x: Tensor, adapter_name: str, bias: Tensor | None) -> Tensor:
        up, down = self.factors(adapter_name)
        # the small factors, never the activation; autocast sees to it itself
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype), bias)

    def _dense(self, x: Tensor) -> Tensor:
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if weight.device == x.device or not self._offloaded:
            return self.base_layer(x)
        return F.linear(x, transpose(weight, self.fan_in_fan_out).to(x.device), bias)

    def __repr__(self) -> str:
        return "lowrank." + super().__repr__()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: rank={self.rank(name)}" for name in self.adapters())
