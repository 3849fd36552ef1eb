# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The tuner of adaptive-rank SVD."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ...allocation.masks import alignment_loss, compression_loss
from ..lowrank.linear import LowRankLinear
from ..search.factors import SearchFactors
from ..search.functional import pad_rows
from ..search.layer import SearchLayer
from ..search.model import RankSearchModel
from .config import AdaptiveRankSVDConfig
from .hypernetwork import OUTPUT_SIZE, Hypernetwork, PerLayerHypernetwork, apply_heads


class AdaptiveRankSVDLayer(SearchLayer):
    """A layer with its part of the hypernetwork: a linear head, or a network of its own. The first layer of a search also
    holds what the heads share, so that whoever loads the layers loads it."""

    adapter_layer_names = ("adaptive_rank_svd_head", "adaptive_rank_svd_hypernetwork")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        factors: SearchFactors | LowRankLinear | None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__(base_layer, adapter_name, factors)
        self.adaptive_rank_svd_head = nn.ModuleDict({} if head is None else {adapter_name: head})
        self.adaptive_rank_svd_hypernetwork = nn.ModuleDict()


class AdaptiveRankSVDModel(RankSearchModel):
    """
    Learns how many singular values each weight keeps, with a hypernetwork (Adaptive Rank Selections, NAACL 2024).

    The model in evaluation mode is the compressed one, as it would be if the search ended now; `disable_adapter` gives the
    dense one. `finalize` makes the compression final.

    Args:
        model (`torch.nn.Module`): The model to compress.
        peft_config ([`AdaptiveRankSVDConfig`]): The configuration.
        adapter_name (`str`): Name of the adapter, by default `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Create the factors on the meta device, to be loaded.

    Raises:
        TypeError: If a target module is neither an `nn.Linear` nor a `Conv1D`, or is quantized.
        ValueError: If a ratio cannot be reached, statistics are missing, or a weight is tied or not finite. The model is
            unchanged.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_rank import AdaptiveRankSVDConfig

        >>> model = get_peft_model(model, AdaptiveRankSVDConfig(target_ratio=0.8, exclude_modules=["lm_head"]))
        ```
    """

    prefix = "adaptive_rank_svd_"

    def _wrap(
        self,
        config: AdaptiveRankSVDConfig,
        adapter_name: str,
        base: nn.Module,
        factors: SearchFactors | LowRankLinear | None,
    ) -> AdaptiveRankSVDLayer:
        head = None
        if isinstance(factors, SearchFactors):
            ranks = len(factors.values)
            head = nn.Linear(OUTPUT_SIZE, ranks) if config.hypernetwork == "shared" else PerLayerHypernetwork(ranks)
            head = head.to(factors.values.device)
        return AdaptiveRankSVDLayer(base, adapter_name, factors, head)

    def _after_injection(self, config: AdaptiveRankSVDConfig, adapter_name: str) -> None:
        if config.hypernetwork == "per_layer":
            return
        layers = list(self.searching_layers(adapter_name).values())
        network = Hypernetwork(len(layers)).to(layers[0].factors.values.device)
        layers[0].adaptive_rank_svd_hypernetwork[adapter_name] = network.requires_grad_(not config.inference_mode)

    def _hypernetwork(self, adapter_name: str) -> Hypernetwork:
        """The shared one."""
        first = next(iter(self.searching_layers(adapter_name).values()))
        return first.adaptive_rank_svd_hypernetwork[adapter_name]

    def _heads(self, adapter_name: str) -> list[nn.Module]:
        layers = self.searching_layers(adapter_name).values()
        # straight from where they are: `nn.ModuleDict` takes ten times as long to find one
        return [layer._modules["adaptive_rank_svd_head"]._modules[adapter_name] for layer in layers]

    def each_mask_parameter(self, adapter_name: str) -> Iterator[nn.Parameter]:
        heads = self._heads(adapter_name)
        if self.peft_config[adapter_name].hypernetwork == "per_layer":
            for head in heads:
                yield from head.parameters()
            return
        yield from self._hypernetwork(adapter_name).parameters()
        for head in heads:
            # as `parameters`, which takes ten times as long
            yield from head._parameters.values()

    def mask_logits(self, adapter_name: str) -> Tensor:
        config, heads = self.peft_config[adapter_name], self._heads(adapter_name)
        if config.hypernetwork == "per_layer":
            logits = pad_rows([head() for head in heads], float("-inf"))
        else:
            logits = apply_heads(self._hypernetwork(adapter_name)(), heads)
        return logits + config.mask_bias

    def _set_logits(self, adapter_name: str, starts: list[Tensor]) -> None:
        # what the features add to them is small at first
        for head, start in zip(self._heads(adapter_name), starts, strict=True):
            head.bias.copy_(start - self.peft_config[adapter_name].mask_bias)

    def regularizer(self, adapter_name: str, logits: Tensor, hard: Tensor) -> Tensor:
        """lambda R(parameters of the mask, target) + gamma R_align, equation 8 of ARS, with the parameters of a module
        capped at those of its weight."""
        config, state = self.peft_config[adapter_name], self._states[adapter_name]
        kept = state.ratio(hard.sum(dim=1))
        align = alignment_loss(hard, self.singular_values(adapter_name))
        return config.compression_weight * compression_loss(kept, state.target) + config.alignment_weight * align
