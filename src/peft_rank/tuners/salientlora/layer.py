# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Linear layers with an update B diag(E) A whose rank can change while the model trains."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.integrations import check_deepspeed_zero3_enabled
from peft.utils.other import transpose
from torch import nn

from ..additive import AdditiveLayer
from ..functional import compute_dtype
from ..sharding import is_distributed
from ..shrinking import narrow
from .config import SalientLoRAConfig
from .functional import (
    Factors,
    LinearWithUpdate,
    MaskRanks,
    Pending,
    PreparedUpdate,
    prepare_updates,
    with_pending,
)


class SalientLoRALayer(AdditiveLayer):
    """State of the adapters of one module, whatever its type.

    Every attribute that is keyed by adapter name starts with the tuner's prefix. For an adapter of rank r, A is
    (r, in_features), E is (r,) and B is (out_features, r). `salientlora_mask`, where present, is (r,) of the factors'
    dtype, 0 for ranks that are pruned but not yet removed.
    """

    adapter_layer_names = ("salientlora_A", "salientlora_E", "salientlora_B")
    other_param_names = (
        "salientlora_r",
        "salientlora_scaling",
        "salientlora_dropout",
        "salientlora_mask",
        "salientlora_state",
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.salientlora_r: dict[str, int] = {}
        self.salientlora_scaling: dict[str, float] = {}
        self.salientlora_dropout = nn.ModuleDict({})
        self.salientlora_A = nn.ParameterDict({})
        self.salientlora_E = nn.ParameterDict({})
        self.salientlora_B = nn.ParameterDict({})
        # plain tensors: DDP broadcasts the buffers of a module in every forward
        self.salientlora_mask: dict[str, torch.Tensor] = {}
        self.salientlora_state = BufferDict({}, persistent=True)
        # gradients of the regularizer that the next backward adds, by adapter: (of A, of B)
        self._armed: dict[str, list[torch.Tensor | None]] = {}
        # where an engine takes gradients away: that of E, summed over the micro-batches of this process, by adapter
        self._watched: dict[str, torch.Tensor | None] = {}
        # one entry while the whole model's forward runs, if this layer can be fused; a dict, because setting an
        # attribute of a module takes longer than the rest
        self._prepared: dict[str, PreparedUpdate] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True  # read by `peft.helpers.disable_input_dtype_casting`
        self.kwargs = kwargs
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        if self.in_features is None or self.out_features is None:
            raise TypeError(f"Unsupported layer type {type(self.get_base_layer())}.")

    def update_layer(
        self, adapter_name: str, r: int, config: SalientLoRAConfig, state_numel: int = 0, **kwargs: Any
    ) -> None:
        """Create the adapter `adapter_name` with rank `r`; `state_numel` bytes of a checkpoint's state are reserved."""
        self.salientlora_r[adapter_name] = r
        self.salientlora_scaling[adapter_name] = config.scaling
        self.salientlora_dropout[adapter_name] = (
            nn.Dropout(p=config.lora_dropout) if config.lora_dropout > 0.0 else nn.Identity()
        )
        self.salientlora_A[adapter_name] = nn.Parameter(torch.empty(r, self.in_features))
        self.salientlora_E[adapter_name] = nn.Parameter(torch.empty(r))
        self.salientlora_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, r))
        self.reset_parameters(adapter_name, config.start)
        if state_numel:
            self.salientlora_state[adapter_name] = torch.zeros(state_numel, dtype=torch.uint8)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, start: bool | str) -> None:
        """Initialise the factors, see `SalientLoRAConfig.init_weights`."""
        A, E, B = self.salientlora_A[adapter_name], self.salientlora_E[adapter_name], self.salientlora_B[adapter_name]
        if A.device.type == "meta" or A.shape[0] == 0:
            return
        if start == "orthogonal":
            nn.init.orthogonal_(A)
            nn.init.zeros_(E)
            nn.init.orthogonal_(B)
        elif start == "gaussian":
            nn.init.normal_(A, std=0.02)
            nn.init.zeros_(E)
            nn.init.normal_(B, std=0.02)
        elif start:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.ones_(E)
            nn.init.zeros_(B)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.constant_(E, 1 / self.salientlora_scaling[adapter_name])
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))

    def resize(self, adapter_name: str, r: int) -> None:
        """Give the adapter rank `r` with undefined values; the Parameter objects stay, so that optimizers keep them."""
        if self.salientlora_r[adapter_name] == r:
            return
        self.salientlora_r[adapter_name] = r
        A, E, B = self.salientlora_A[adapter_name], self.salientlora_E[adapter_name], self.salientlora_B[adapter_name]
        A.data = A.data.new_zeros(r, self.in_features)
        E.data = E.data.new_zeros(r)
        B.data = B.data.new_zeros(self.out_features, r)
        for parameter in (A, E, B):
            parameter.grad = None

    def narrow(
        self, adapter_name: str, keep: torch.Tensor
    ) -> dict[nn.Parameter, tuple[nn.Parameter, int, torch.Tensor]]:
        """Keep only the ranks where `keep`, (r,) bool, is True, in new parameters.

        Returns:
            For every old parameter the new one, and the dimension and index that it was cut by, as `swap_parameters`
            takes them.
        """
        replacements = {}
        for attribute in self.adapter_layer_names:
            parameters = getattr(self, attribute)
            old = parameters[adapter_name]
            dim = 1 if attribute == "salientlora_B" else 0
            index = keep.nonzero().squeeze(1).to(old.device)
            parameters[adapter_name] = narrow(old, dim, index)
            replacements[old] = (parameters[adapter_name], dim, index)
        self.salientlora_r[adapter_name] = int(keep.sum())
        return replacements

    def set_mask(self, adapter_name: str, keep: torch.Tensor) -> None:
        """Prune the ranks where `keep`, (r,) bool, is False, without removing them."""
        self.unmerge_before_change(adapter_name)
        E = self.salientlora_E[adapter_name]
        # E has no data yet where the adapter is still being loaded
        keep = keep.to(keep.device if E.is_meta else E.device, E.dtype)
        if adapter_name in self.salientlora_mask:
            # in place: a compiled model does not notice
            self.salientlora_mask[adapter_name].copy_(keep)
        else:
            self.salientlora_mask[adapter_name] = keep

    def width(self, adapter_name: str) -> int:
        return self.salientlora_r[adapter_name]

    def factor_shapes(self, width: int) -> list[tuple[int, ...]]:
        return [(width, self.in_features), (width,), (self.out_features, width)]

    def rank(self, adapter_name: str) -> int:
        """Number of ranks that are not pruned."""
        mask = self.salientlora_mask.get(adapter_name)
        return self.salientlora_r[adapter_name] if mask is None else int(mask.count_nonzero())

    def masked_E(self, adapter_name: str) -> torch.Tensor:
        """E, (r,), with 0 for pruned ranks."""
        E, mask = self.stored(adapter_name).E, self._mask_of_E(adapter_name)
        if mask is None:
            return E
        return E * mask if torch.compiler.is_compiling() else MaskRanks.apply(E, mask)

    def _mask_of_E(self, adapter_name: str) -> torch.Tensor | None:
        mask, E = self.salientlora_mask.get(adapter_name), self.stored(adapter_name).E
        # the model may have been moved or cast since
        return None if mask is None else mask.to(E.device, E.dtype)

    def stored(self, adapter_name: str) -> Factors:
        """The parameters as they are. Called for every layer of a model in every step: `nn.ParameterDict` itself takes
        ten times as long to find an entry."""
        modules = self._modules
        return Factors(
            modules["salientlora_A"]._parameters[adapter_name],
            modules["salientlora_E"]._parameters[adapter_name],
            modules["salientlora_B"]._parameters[adapter_name],
        )

    def disarm(self, adapter_name: str) -> None:
        """Add and watch no gradients any more."""
        self._armed.pop(adapter_name, None)
        self._watched.pop(adapter_name, None)

    def factors(self, adapter_name: str) -> Factors:
        """The factors for a forward pass: gathered, masked and, if armed, with the regularizer in their backward and the
        gradient of E watched."""
        factors = self.stored(adapter_name)
        self._gather_sharded(*factors)
        if self.has_pending(adapter_name):
            return with_pending(adapter_name, [factors], [self.pending(adapter_name)])[0]
        return factors._replace(E=self.masked_E(adapter_name))

    def has_pending(self, adapter_name: str) -> bool:
        """Whether the next backward adds or watches gradients."""
        return torch.is_grad_enabled() and (adapter_name in self._armed or adapter_name in self._watched)

    def pending(self, adapter_name: str) -> Pending:
        return Pending(self._armed, self._watched, self._mask_of_E(adapter_name))

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """`scaling * B diag(E) A` in the layout of the base weight and the dtype of A, computed in float32 at least."""
        A, E, B = (factor.detach() for factor in self.factors(adapter_name))
        dtype = torch.promote_types(A.dtype, torch.float32)
        delta = (B.to(dtype) * (E.to(dtype) * self.salientlora_scaling[adapter_name])) @ A.to(dtype)
        return transpose(delta, self.fan_in_fan_out).to(A.dtype)


class SalientLoRALinear(nn.Module, SalientLoRALayer):
    """A linear layer, quantized or not, or a `Conv1D`, plus the updates of its active adapters."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SalientLoRAConfig, r: int, **kwargs: Any
    ) -> None:
        super().__init__()
        SalientLoRALayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = config.fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config=config, **kwargs)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """(..., in_features) -> (..., out_features); `adapter_names` names the adapter of every sample."""
        if self._prepared and adapter_names is None:
            (prepared,) = self._prepared.values()
            if prepared.low.dtype == compute_dtype(x):
                return self._fused_forward(x, prepared)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        adapters = [] if self.merged else [name for name in self.active_adapters if name in self.salientlora_A]
        if (
            len(adapters) == 1
            and not torch.compiler.is_compiling()
            and self.fused_dtype(adapters[0]) == compute_dtype(x)
        ):
            scaling = self.salientlora_scaling[adapters[0]]
            (update,) = prepare_updates([self.factors(adapters[0])], [scaling], compute_dtype(x))
            return self._fused_forward(x, update)
        result = self.base_layer(x, *args, **kwargs)
        if adapters and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter_name in adapters:
            result = self._add_update(result, x, adapter_name)
        return result

    def _fused_forward(self, x: torch.Tensor, update: PreparedUpdate) -> torch.Tensor:
        parameters = self._modules["base_layer"]._parameters
        return LinearWithUpdate.apply(x, parameters["weight"], parameters["bias"], *update)

    def fused_dtype(self, adapter_name: str) -> torch.dtype | None:
        """The dtype in which base product and update can be one autograd function; None if they cannot: the base layer
        has to be a plain, frozen `nn.Linear` without hooks."""
        base = self._modules["base_layer"]
        if type(base) is not nn.Linear or "forward" in base.__dict__:
            return None
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        possible = (
            type(weight) is nn.Parameter
            and weight.dim() == 2
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and not (
                base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
            )
            and self.salientlora_r[adapter_name] > 0
            and type(self._modules["salientlora_dropout"]._modules[adapter_name]) is nn.Identity
        )
        return compute_dtype(weight) if possible else None

    def _add_update(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """`result + scaling * B diag(E) A x`, in the dtype of `result`; the factors are cast, never the activation."""
        if self.salientlora_r[adapter_name] == 0:
            return self._touch_empty(result, adapter_name)
        A, E, B = self.factors(adapter_name)
        x = self.salientlora_dropout[adapter_name](x)
        scaled = B * (E * self.salientlora_scaling[adapter_name])
        update = F.linear(F.linear(x, A.to(x.dtype)), scaled.to(x.dtype))
        return result + update.to(result.dtype)

    def _touch_empty(self, result: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """`result`, with the empty factors in its graph where data-parallel training waits for every gradient."""
        # ZeRO-3 does not wait, and cannot gather an empty parameter
        if not is_distributed() or check_deepspeed_zero3_enabled():
            return result
        A, E, B = self.salientlora_A[adapter_name], self.salientlora_E[adapter_name], self.salientlora_B[adapter_name]
        return result + (A.sum() + E.sum() + B.sum()).to(result.dtype)

    def __repr__(self) -> str:
        return "salientlora." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
