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
from .hypernetwork import Hypernetwork, PerLayerHypernetwork, SharedHypernetwork


class AdaptiveRankSVDLayer(SearchLayer):
    """A layer with a hypernetwork of its own. Where all share one, the first layer of a search holds it, so that whoever
    loads the layers loads it."""

    adapter_layer_names = ("adaptive_rank_svd_hypernetwork",)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        factors: SearchFactors | LowRankLinear | None,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__(base_layer, adapter_name, factors)
        self.adaptive_rank_svd_hypernetwork = nn.ModuleDict({} if network is None else {adapter_name: network})


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
        network = None
        if isinstance(factors, SearchFactors) and config.hypernetwork == "per_layer":
            network = PerLayerHypernetwork(len(factors.values)).to(factors.values.device)
        return AdaptiveRankSVDLayer(base, adapter_name, factors, network)

    def _after_injection(self, config: AdaptiveRankSVDConfig, adapter_name: str) -> None:
        if config.hypernetwork == "per_layer":
            return
        first = next(iter(self.searching_layers(adapter_name).values()))
        network = SharedHypernetwork(self._states[adapter_name].sizes).to(first.factors.values.device)
        first.adaptive_rank_svd_hypernetwork[adapter_name] = network.requires_grad_(not config.inference_mode)

    def _networks(self, adapter_name: str) -> Iterator[Hypernetwork]:
        """One for each module in search, or the one that they share."""
        for layer in self.searching_layers(adapter_name).values():
            yield layer.adaptive_rank_svd_hypernetwork[adapter_name]
            if self.peft_config[adapter_name].hypernetwork == "shared":
                return

    def mask_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        return [parameter for network in self._networks(adapter_name) for parameter in network.parameters()]

    def mask_logits(self, adapter_name: str) -> Tensor:
        config, rows = self.peft_config[adapter_name], [network() for network in self._networks(adapter_name)]
        logits = rows[0] if config.hypernetwork == "shared" else pad_rows(rows, float("-inf"))
        return logits + config.mask_bias

    def _set_logits(self, adapter_name: str, starts: list[Tensor]) -> None:
        # what the features add to them is small at first
        (network,) = self._networks(adapter_name)
        network.start_at([start - self.peft_config[adapter_name].mask_bias for start in starts])

    def regularizer(self, adapter_name: str, logits: Tensor, hard: Tensor) -> Tensor:
        """lambda R(parameters of the mask, target) + gamma R_align, equation 8 of ARS, with the parameters of a module
        capped at those of its weight."""
        config, state = self.peft_config[adapter_name], self._states[adapter_name]
        kept = state.ratio(hard.sum(dim=1))
        align = alignment_loss(hard, self.singular_values(adapter_name))
        return config.compression_weight * compression_loss(kept, state.target) + config.alignment_weight * align
