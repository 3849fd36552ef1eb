# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The networks whose outputs are the logits of the masks.

Source: ARS (NAACL 2024), appendix B and table A1. Inputs are random and fixed; what is learned are the weights. Everything
runs in float32, autocast or not, because the noise of the masks is added to the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from ..functional import without_autocast


INPUT_SIZE = 32
HIDDEN_SIZE = 64
OUTPUT_SIZE = 2 * HIDDEN_SIZE  # both directions


class Hypernetwork(nn.Module):
    """
    A bidirectional GRU over a sequence of fixed random vectors, one for each module, layer norm and GELU.

    Args:
        length (`int`): Number of modules.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("z", torch.randn(1, length, INPUT_SIZE))
        self.bi_gru = nn.GRU(INPUT_SIZE, HIDDEN_SIZE, batch_first=True, bidirectional=True)
        self.layer_norm = nn.LayerNorm(OUTPUT_SIZE)

    def forward(self) -> Tensor:
        """(length, 128) features."""
        with torch.autocast(self.z.device.type, enabled=False):
            # a model that is cast as a whole casts its buffers, too, and PEFT brings back parameters only
            z = self.z.to(self.layer_norm.weight.dtype)
            return F.gelu(self.layer_norm(self.bi_gru(z)[0])).squeeze(0)


class PerLayerHypernetwork(Hypernetwork):
    """
    The same over the singular values of one module, and a linear map to one logit for each: the released code's.

    Args:
        length (`int`): Number of singular values.
    """

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.linear = nn.Linear(OUTPUT_SIZE, 1)

    def forward(self) -> Tensor:
        """(length,) logits, without the mask bias."""
        with torch.autocast(self.z.device.type, enabled=False):
            return self.linear(super().forward()).squeeze(1)


class SharedHypernetwork(Hypernetwork):
    """
    With a linear map for each module, from its features to the logits of its ranks. The maps of all modules with as many
    ranks are one parameter: hundreds of small ones would take a step longer than the network.

    Args:
        sizes (`Sequence[int]`): Ranks of each module.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(len(sizes))
        # ranks -> modules
        self.members: dict[int, list[int]] = {}
        for i, k in enumerate(sizes):
            self.members.setdefault(k, []).append(i)
        groups = self.members.items()
        weights = {str(k): nn.Parameter(torch.empty(len(members), k, OUTPUT_SIZE)) for k, members in groups}
        biases = {str(k): nn.Parameter(torch.empty(len(members), k)) for k, members in groups}
        self.weight, self.bias = nn.ParameterDict(weights), nn.ParameterDict(biases)
        for parameter in (*weights.values(), *biases.values()):
            nn.init.uniform_(parameter, -(OUTPUT_SIZE**-0.5), OUTPUT_SIZE**-0.5)  # as that of `nn.Linear`

    def forward(self) -> Tensor:
        """(modules, K) logits without the mask bias, padded with -inf."""
        features = super().forward()
        groups = [torch.tensor(members, device=features.device) for members in self.members.values()]
        parts = []
        for k, members in zip(self.members, groups, strict=True):
            part = LinearMaps.apply(features.index_select(0, members), self.weight[str(k)], self.bias[str(k)])
            parts.append(F.pad(part, (0, max(self.members) - k), value=float("-inf")))
        return torch.cat(parts).index_select(0, torch.cat(groups).argsort())

    def start_at(self, logits: Sequence[Tensor]) -> None:
        """Let the biases of the modules be (k,) tensors."""
        for k, members in self.members.items():
            self.bias[str(k)].copy_(torch.stack([logits[i] for i in members]))


class LinearMaps(Function):
    """weight @ features + bias of g modules, whose gradient takes no product of matrices where an outer one will do.

    Shapes: features (g, 128), weight (g, k, 128), bias (g, k) -> (g, k).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(features, weight)
        with without_autocast(features.device.type):
            return torch.baddbmm(bias.unsqueeze(2), weight, features.unsqueeze(2)).squeeze(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        features, weight = ctx.saved_tensors
        with without_autocast(features.device.type):
            grad_features = torch.bmm(gradient.unsqueeze(1), weight).squeeze(1)
        return grad_features, gradient.unsqueeze(2) * features.unsqueeze(1), gradient
