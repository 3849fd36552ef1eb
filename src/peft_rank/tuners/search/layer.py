# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""A linear whose weight is split into all its ranks while a search finds out which of them to keep."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adaptive import RankLayer
from ..lowrank.linear import LowRankLinear
from .factors import SearchFactors
from .functional import StepMask, masked_product


class SearchLayer(nn.Module, RankLayer):
    """
    A linear or `Conv1D` in a search, or after one.

    In training it computes with all the ranks of its weight and the mask of the step. In evaluation it computes with the
    ranks that would be kept if the search ended now, by the two products that the module would then become, or with the
    weight where the module would stay dense. Once the ranks are final, `factors` is a `LowRankLinear`, in training too.

    Args:
        base_layer (`torch.nn.Module`): An `nn.Linear` or `Conv1D`; weight and bias stay there.
        adapter_name (`str`): The one adapter that it holds.
        factors (`SearchFactors` or `LowRankLinear`): All ranks, or the final ones. None once it is final that it stays
            dense.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, factors: SearchFactors | LowRankLinear | None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.out_features, self.in_features = transpose(base_layer.weight, self.fan_in_fan_out).shape
        self.factors = factors
        self.adapter_name = adapter_name
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True  # read by `peft.helpers.disable_input_dtype_casting`
        self._active_adapter = adapter_name
        self._disable_adapters = False
        # a dict, so that it is no parameter and no submodule: the mask of this step; what is kept (None: the weight)
        self._step: dict[str, StepMask] = {}
        self._selected: dict[str, LowRankLinear | None] = {}
        # set by the tuner: selects the ranks of all layers
        self.select_all: Callable[[], None] | None = None
        # whether a mask has ever had a gradient
        self._reached = False
        self._original: Tensor | None = None

    @property
    def searching(self) -> bool:
        """Whether the ranks are not final yet. Asked of every layer several times a step: `nn.Module` itself takes ten times
        as long to find a submodule."""
        return isinstance(self._modules.get("factors"), SearchFactors)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.out_features, self.in_features

    def adapters(self) -> Collection[str]:
        return (self.adapter_name,)

    def rank(self, adapter_name: str) -> int | None:
        """Ranks that are kept, None where the module stays dense."""
        linear = self.selected()
        return None if linear is None else linear.rank

    def selected(self) -> LowRankLinear | None:
        """What the module becomes if the search ends now; None if it stays dense."""
        if not self.searching:
            return self.factors
        if not self._selected:
            self.select_all()
        return self._selected["now"]

    def select(self, ranks: Tensor | None) -> None:
        """Keep `ranks`, (r,) int64, in evaluation; None for the weight."""
        linear = None if ranks is None else self.factors.select(ranks, self.base_layer.bias)
        self._selected["now"] = linear if linear is None else linear.requires_grad_(False)

    def begin_step(self, mask: StepMask) -> None:
        """Compute with `mask` until the next call."""
        self._selected.clear()
        self._step["now"] = mask

    def end_search(self, linear: LowRankLinear | None) -> None:
        """Make `linear`, or None for the weight, final and let go of the other ranks."""
        self.factors = None if linear is None else linear.requires_grad_(False)
        self._selected.clear()
        self._step.clear()

    def __getstate__(self) -> dict[str, Any]:
        # a copy has no part in the graph of this step
        return {**self.__dict__, "_step": {}, "_selected": {}}

    def reserve_state(self, attribute: str, numel: int) -> None:
        """Room for the bytes of a checkpoint's search, for loaders that know of modules only."""
        setattr(
            self, attribute, BufferDict({self.adapter_name: torch.zeros(numel, dtype=torch.uint8)}, persistent=True)
        )

    def tell_ranks(self, attribute: str) -> None:
        """An entry of the state dict for every module in search: by these PEFT finds the modules of a state dict, and the
        masks of all are in the first alone. A parameter, as factors are, since buffers are sent around by DDP."""
        ranks = torch.tensor(len(self.factors.values), device=self.factors.values.device)
        setattr(self, attribute, nn.ParameterDict({self.adapter_name: nn.Parameter(ranks, requires_grad=False)}))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Put the product of the selected ranks into the base weight.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Check it for NaNs first.
            adapter_names (`list[str]`, *optional*): The adapters to merge, by default all active ones.

        Raises:
            ValueError: If `safe_merge` finds a merged weight that is not finite; the base weight is unchanged.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            linear, weight = self.selected(), self.base_layer.weight
            if name != self.adapter_name:
                continue
            if linear is not None:
                merged = transpose(linear.dense().weight.detach(), self.fan_in_fan_out).to(weight.dtype)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                self._original = weight.data.clone()
                weight.data.copy_(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the weight back."""
        self.merged_adapters.clear()
        if self._original is not None:
            self.base_layer.weight.data.copy_(self._original)
            self._original = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        if self.merged or self.adapter_name not in self.active_adapters:
            return self.base_layer(x)
        step = self._step.get("now") if self.training and self.searching else None
        if step is None:
            linear = self.selected()
            return self.base_layer(x) if linear is None else linear(x)
        if not self._reached and step.mask.requires_grad:
            step.mask.register_hook(self._take_note)
        factors = self._modules["factors"]._parameters
        bias = self._modules["base_layer"]._parameters["bias"]
        return masked_product(x, factors["down"], factors["up"], bias, step)

    def _take_note(self, gradient: Tensor) -> None:
        self._reached = True

    def extra_repr(self) -> str:
        return "searching" if self.searching else "final"
