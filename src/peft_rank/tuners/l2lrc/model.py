# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The tuner of Learning to Low-Rank Compress."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...allocation.masks import bounded_compression_loss, keep_probability, straight_through, total_variation_loss
from ..lowrank.linear import LowRankLinear
from ..search.factors import SearchFactors
from ..search.layer import SearchLayer
from ..search.model import RankSearchModel
from ..search.state import SearchState
from .config import L2LRCConfig
from .distillation import Distillation


class L2LRCLayer(SearchLayer):
    """The first layer of a search holds the logits of all masks, (sum of ranks,), one module after the other: one parameter
    takes a step far less time than hundreds."""

    adapter_layer_names = ("l2lrc_logits",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, factors: SearchFactors | LowRankLinear | None
    ) -> None:
        super().__init__(base_layer, adapter_name, factors)
        self.l2lrc_logits = nn.ParameterDict()


class L2LRCModel(RankSearchModel):
    """
    Learns which singular values each weight keeps, with free logits and distillation from the dense model (Learning to
    Low-Rank Compress, https://huggingface.co/papers/2512.13733).

    The model in evaluation mode is the compressed one, as it would be if the search ended now; `disable_adapter` gives the
    dense one. `finalize` makes the compression final.

    Args:
        model (`torch.nn.Module`): The model to compress.
        peft_config ([`L2LRCConfig`]): The configuration.
        adapter_name (`str`): Name of the adapter, by default `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Create the factors on the meta device, to be loaded.

    Raises:
        TypeError: If a target module is neither an `nn.Linear` nor a `Conv1D`, or is quantized.
        ValueError: If a ratio cannot be reached, statistics are missing, a weight is tied or not finite, or the model cannot
            be distilled. The model is unchanged.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_rank import L2LRCConfig

        >>> model = get_peft_model(model, L2LRCConfig(target_ratio=0.8, exclude_modules=["lm_head"]))
        ```
    """

    prefix = "l2lrc_"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._distillation: Distillation | None = None
        super().__init__(*args, **kwargs)

    def _keeps_prefix(self, config: L2LRCConfig) -> bool:
        return config.keep == "prefix"

    def _wrap(
        self,
        config: L2LRCConfig,
        adapter_name: str,
        base: nn.Module,
        factors: SearchFactors | LowRankLinear | None,
    ) -> L2LRCLayer:
        return L2LRCLayer(base, adapter_name, factors)

    def _after_injection(self, config: L2LRCConfig, adapter_name: str) -> None:
        layers = list(self.searching_layers(adapter_name).values())
        device = layers[0].factors.values.device
        starts = [torch.linspace(*config.init_logits, k, device=device) for k in self._states[adapter_name].sizes]
        logits = nn.Parameter(torch.cat(starts), requires_grad=not config.inference_mode)
        layers[0].l2lrc_logits[adapter_name] = logits
        if config.distillation_weight > 0 and not config.inference_mode:
            self._distillation = Distillation(
                self.model, layers, config.distillation_weight, config.pretraining_weight
            )

    def _forget_masks(self, adapter_name: str) -> None:
        super()._forget_masks(adapter_name)
        if self._distillation is not None:
            self._distillation.remove()
            self._distillation = None

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        if self._distillation is not None:
            self._distillation.remove()
        return model

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        distillation = self._distillation
        if distillation is not None and distillation._state == "dense":
            return
        if distillation is not None and module.training and torch.is_grad_enabled() and self._trained_adapters():
            distillation.prepare(args, kwargs)
        super()._before_forward(module, args, kwargs)

    def mask_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        return [next(iter(self.searching_layers(adapter_name).values())).l2lrc_logits[adapter_name]]

    def mask_logits(self, adapter_name: str) -> Tensor:
        (logits,) = self.mask_parameters(adapter_name)
        return self._states[adapter_name].padded(logits.float())

    def _set_logits(self, adapter_name: str, starts: list[Tensor]) -> None:
        (logits,) = self.mask_parameters(adapter_name)
        logits.copy_(torch.cat(starts))

    def annealed_target(self, config: L2LRCConfig, state: SearchState) -> float:
        """From 1 to the target, in equal steps; the target itself where the search starts there."""
        if config.start == "spectral":
            return state.target
        steps = config.anneal_steps
        if steps is None:
            steps = round(config.anneal_ratio * (state.total_steps or 0))
        progress = min(1.0, state.step / steps) if steps else 1.0
        return 1.0 + progress * (state.target - 1.0)

    def _check_schedule(self, name: str) -> None:
        config, state = self.peft_config[name], self._states[name]
        anneals = config.start == "full" and config.anneal_steps is None and config.anneal_ratio > 0
        if anneals and state.total_steps is None:
            raise RuntimeError(
                f"`anneal_ratio={config.anneal_ratio}` is a fraction of the training, whose length is not known. Add "
                "`RankAllocationCallback()` to the Trainer, call `resolve_schedule(total_steps)` before the first step, or "
                "give `anneal_steps`."
            )

    def regularizer(self, adapter_name: str, logits: Tensor, hard: Tensor) -> Tensor:
        """Distance of the expected parameters from the target of the step, and total variation.

        The value of the first is that of the keep probabilities, which has no noise; its gradient is that of the mask of
        the step, whose slope is the one that the gradient of the model's loss has.
        """
        config, state = self.peft_config[adapter_name], self._states[adapter_name]
        probability = keep_probability(logits)
        kept = straight_through(state.ratio(probability.sum(dim=1)), state.ratio(hard.sum(dim=1)))
        loss = config.compression_weight * bounded_compression_loss(kept, self.annealed_target(config, state))
        if config.total_variation_weight > 0:
            sizes = state.on(logits.device)[2]
            loss = loss + config.total_variation_weight * total_variation_loss(probability, sizes)
        return loss

    def rank_summary(self) -> dict[str, float]:
        summary = super().rank_summary()
        distance = None if self._distillation is None else self._distillation.distance
        return summary if distance is None else {**summary, "search/distillation": float(distance)}
