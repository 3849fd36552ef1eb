# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Linear layers with a product B A, added to the weight or in its place, whose rank can grow while the model trains."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_rank.decomposition.product import Truncation, product_spectrum, truncate_product

from ..additive import AdditiveLayer
from ..functional import round_up
from ..growing import rotated, widened
from ..lowrank.linear import LowRankLinear
from ..shrinking import Replacement
from .config import InRankConfig


STATE_NUMEL = 4  # rank, and the three steps of the clock


def _limit(rank: int, smaller: int, config: InRankConfig) -> int:
    """The largest width; an initial rank above the default limit is a rank that the user wants."""
    return max(smaller // 2, rank) if config.max_r is None else min(config.max_r, smaller)


def _width(rank: int, limit: int, config: InRankConfig) -> int:
    return min(round_up(rank + config.buffer_r, config.rank_multiple), limit) if config.allocates else rank


class InRankLinear(nn.Module, AdditiveLayer):
    """
    A linear layer, quantized or not, or a `Conv1D`, plus the products of its active adapters.

    For an adapter of width w, A is (w, in_features) and B is (out_features, w). All of the width is trained and takes
    part in the forward pass; `rank` is how much of it is needed, and the rest the buffer.
    """

    adapter_layer_names = ("inrank_A", "inrank_B")
    other_param_names = ("inrank_r", "inrank_max_r", "inrank_scaling", "inrank_dropout", "inrank_state")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: InRankConfig, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(
            base, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.fan_in_fan_out = isinstance(base, Conv1D)
        shape = reversed(base.weight.shape) if self.fan_in_fan_out else (base.out_features, base.in_features)
        self.out_features, self.in_features = shape
        self.inrank_r: dict[str, int] = {}
        self.inrank_max_r: dict[str, int] = {}
        self.inrank_scaling: dict[str, float] = {}
        self.inrank_dropout = nn.ModuleDict({})
        self.inrank_A = nn.ParameterDict({})
        self.inrank_B = nn.ParameterDict({})
        self.inrank_state = BufferDict({}, persistent=True)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True  # read by `peft.helpers.disable_input_dtype_casting`
        self.kwargs = kwargs
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, **kwargs)

    def update_layer(self, adapter_name: str, config: InRankConfig, fixed_r: int | None = None, **kwargs: Any) -> None:
        """Create the adapter `adapter_name`, of the rank `fixed_r` and without a buffer if that is given."""
        smaller = min(self.in_features, self.out_features)
        rank = self.inrank_r[adapter_name] = min(config.init_r, smaller) if fixed_r is None else fixed_r
        self.inrank_max_r[adapter_name] = _limit(rank, smaller, config)
        width = self.initial_width(config) if fixed_r is None else fixed_r
        self.inrank_scaling[adapter_name] = config.scaling
        dropout = config.lora_dropout
        self.inrank_dropout[adapter_name] = nn.Dropout(p=dropout) if dropout > 0 else nn.Identity()
        self.inrank_A[adapter_name] = nn.Parameter(torch.empty(width, self.in_features))
        self.inrank_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, width))
        self.reset_parameters(adapter_name, config.init_weights)
        if config.allocation_state:
            self.inrank_state[adapter_name] = torch.zeros(STATE_NUMEL, dtype=torch.int64)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """A as in LoRA; B zero, so that the product is the identity, or else random."""
        A, B = self.inrank_A[adapter_name], self.inrank_B[adapter_name]
        if A.device.type == "meta" or A.shape[0] == 0:
            return
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(B)
        else:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))

    # ---- ranks ----

    def rank(self, adapter_name: str) -> int:
        if adapter_name in self.inrank_state:
            # loaded without a tuner that would have read it
            return int(self.inrank_state[adapter_name][0])
        return self.inrank_r[adapter_name]

    def width(self, adapter_name: str) -> int:
        """Ranks that exist, the buffer included."""
        return self.inrank_B[adapter_name].shape[-1]

    def factor_shapes(self, width: int) -> list[tuple[int, ...]]:
        return [(width, self.in_features), (self.out_features, width)]

    def wanted_width(self, adapter_name: str, config: InRankConfig) -> int:
        """The width for the present rank: with the buffer, rounded up, within the limit."""
        return _width(self.inrank_r[adapter_name], self.inrank_max_r[adapter_name], config)

    def initial_width(self, config: InRankConfig) -> int:
        """The width that a new adapter of this configuration has."""
        smaller = min(self.in_features, self.out_features)
        rank = min(config.init_r, smaller)
        return _width(rank, _limit(rank, smaller, config), config)

    def is_growing(self, adapter_name: str) -> bool:
        """Whether there is a buffer."""
        return self.width(adapter_name) > self.inrank_r[adapter_name]

    def spectrum(self, adapter_name: str) -> Tensor:
        """Singular values of the product, (width,) float64, largest first; see `product_spectrum`."""
        return product_spectrum(self.inrank_B[adapter_name], self.inrank_A[adapter_name])

    def truncation(self, adapter_name: str, config: InRankConfig) -> Truncation:
        """The product cut to its rank, see `truncate_product`."""
        rank = min(round_up(self.inrank_r[adapter_name], config.rank_multiple), self.width(adapter_name))
        return truncate_product(self.inrank_B[adapter_name], self.inrank_A[adapter_name], rank)

    @torch.no_grad()
    def widen(self, adapter_name: str, width: int, seed: str) -> dict[nn.Parameter, Replacement]:
        """
        Add ranks at the end that leave the function as it is, in new parameters.

        The new columns of B are 0. The new rows of A are random, in the norm of the present ones: with both zero, neither
        would ever have a gradient. They are drawn from a generator of their own, so that they are the same on every
        process and in a training that was interrupted.

        Args:
            adapter_name (`str`): The adapter.
            width (`int`): The new width.
            seed (`str`): Together with the old width it decides what is drawn.

        Returns:
            For every old parameter the new one and how its moments follow, as `replace_parameters` takes it.
        """
        A, B = self.inrank_A[adapter_name], self.inrank_B[adapter_name]
        added = width - A.shape[0]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{A.shape[0]}".encode()))
        rows = torch.randn(added, self.in_features, generator=generator)
        deviation = A.detach().float().square().mean().sqrt()
        replacements = {}
        self.inrank_A[adapter_name], replacements[A] = widened(A, 0, rows.to(A.device) * deviation)
        self.inrank_B[adapter_name], replacements[B] = widened(B, 1, B.new_zeros(self.out_features, added))
        return replacements

    @torch.no_grad()
    def truncate(self, adapter_name: str, cut: Truncation) -> dict[nn.Parameter, Replacement]:
        """Let the product become `cut`, in new parameters; returns what `widen` returns."""
        self.unmerge_before_change(adapter_name)
        A, B = self.inrank_A[adapter_name], self.inrank_B[adapter_name]
        up, down = rotated(B, A, cut)
        self.inrank_B[adapter_name], self.inrank_A[adapter_name] = up[0], down[0]
        self.inrank_r[adapter_name] = len(cut.down)
        return {A: down, B: up}

    def resize(self, adapter_name: str, rank: int, width: int) -> None:
        """Set rank and width, with undefined values; the Parameter objects stay, so that optimizers keep them."""
        self.inrank_r[adapter_name] = rank
        if self.width(adapter_name) == width:
            return
        A, B = self.inrank_A[adapter_name], self.inrank_B[adapter_name]
        A.data, B.data = A.data.new_zeros(width, self.in_features), B.data.new_zeros(self.out_features, width)
        A.grad = B.grad = None

    # ---- the map ----

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`scaling * B A` in the layout of the base weight and the dtype of A, computed in float32 at least."""
        A, B = self.inrank_A[adapter_name].detach(), self.inrank_B[adapter_name].detach()
        dtype = torch.promote_types(A.dtype, torch.float32)
        delta = (B.to(dtype) * self.inrank_scaling[adapter_name]) @ A.to(dtype)
        return transpose(delta, self.fan_in_fan_out).to(A.dtype)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """(..., in_features) -> (..., out_features); `adapter_names` names the adapter of every sample."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        adapters = [] if self.merged else [name for name in self.active_adapters if name in self.inrank_A]
        if adapters and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter_name in adapters:
            result = self._add_update(result, x, adapter_name)
        return result

    def _add_update(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        hidden = self._hidden(self.inrank_dropout[adapter_name](x), adapter_name)
        update = F.linear(hidden, self.inrank_B[adapter_name].to(x.dtype))
        return result + (update * self.inrank_scaling[adapter_name]).to(result.dtype)

    def _hidden(self, x: Tensor, adapter_name: str) -> Tensor:
        """A x, in the dtype of x: the factors are cast, never the activation."""
        A, B = self.inrank_A[adapter_name], self.inrank_B[adapter_name]
        self._gather_sharded(A, B)
        return F.linear(x, A.to(x.dtype))

    def __repr__(self) -> str:
        return "inrank." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


class InRankFactors(InRankLinear):
    """
    A linear layer or `Conv1D` whose weight is the product B A: the base layer keeps its bias, and an empty weight that
    tells device and dtype.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: InRankConfig, **kwargs: Any) -> None:
        weight = base_layer.weight
        deviation = 0.0 if weight.is_meta else float(weight.detach().float().std())
        self._deviation = config.init_scale * deviation if math.isfinite(deviation) else 0.0
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self._free_weight()

    def _free_weight(self) -> None:
        # of the same Parameter: a new one would be on the meta device while an adapter is made to be loaded
        weight = self.base_layer.weight.requires_grad_(False)
        weight.data = weight.data.new_empty(0)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """
        An orthogonal start for the product: its entries have the deviation s of the weight that it replaces, times
        `init_scale` (so that whatever the model does for its residual branches is kept), and all of its w directions have
        the same singular value, sigma = s sqrt(in out / w), which A and B share: A A^T = B^T B = sigma I.

        So no rank starts smaller than another, as in the paper's theory, which starts orthogonal; normal factors of
        the same size learn later. The released code draws both uniformly (variances 1 / (3 in) and 1 / (3 max_r)),
        whatever the model's own initialisation. A weight of zeros starts as LoRA does.
        """
        A, B = self.inrank_A[adapter_name], self.inrank_B[adapter_name]
        if self._deviation == 0:
            super().reset_parameters(adapter_name, init_weights=True)
        elif A.device.type != "meta" and A.shape[0] > 0:
            sigma = self._deviation * math.sqrt(self.in_features * self.out_features / A.shape[0])
            for factor in (A, B):
                exact = torch.empty_like(factor, dtype=torch.promote_types(factor.dtype, torch.float32))
                factor.copy_(nn.init.orthogonal_(exact, gain=math.sqrt(sigma)))

    def get_base_weight(self) -> Tensor:
        if self.merged:
            return self.base_layer.weight.data
        A = next(iter(self.inrank_A.values()))
        shape = (self.in_features, self.out_features) if self.fan_in_fan_out else (self.out_features, self.in_features)
        return torch.zeros(shape, dtype=self.base_layer.weight.dtype, device=A.device)

    def _store_base_weight(self, weight: Tensor) -> None:
        self.base_layer.weight.data = weight

    def unmerge(self) -> None:
        super().unmerge()
        self._free_weight()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            return self.base_layer(x)
        names = [name for name in self.active_adapters if name in self.inrank_A]
        if self.disable_adapters or not names:
            raise RuntimeError(
                "The adapter cannot be disabled: with `from_scratch=True` the weight is the product B A, and there is no "
                "other. Compare with a model that was trained in full instead."
            )
        B, bias = self.inrank_B[names[0]], self.base_layer.bias
        hidden = self._hidden(x, names[0])
        return F.linear(hidden, B.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def compressed(self, adapter_name: str) -> LowRankLinear:
        """Two linears of the same parameters, for good."""
        A, B = self.inrank_A[adapter_name], self.inrank_B[adapter_name]
        module = LowRankLinear(self.in_features, self.out_features, A.shape[0], bias=False, device="meta")
        module.down.weight, module.up.weight = A, B
        module.up.bias = self.base_layer.bias
        return module.train(self.training)
