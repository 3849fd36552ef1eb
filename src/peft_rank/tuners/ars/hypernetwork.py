# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The networks whose outputs are the logits of the masks.

Source: ARS (NAACL 2024), appendix B and table A1. Inputs are random and fixed; what is learned are the weights. Everything
runs in float32, autocast or not, because the noise of the masks is added to the outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..search.functional import pad_rows


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


def apply_heads(features: Tensor, heads: list[nn.Linear]) -> Tensor:
    """
    The output of each head for its row of the features, with few kernels: heads of equal size go together.

    Args:
        features (`Tensor`): (modules, 128).
        heads (`list[torch.nn.Linear]`): One for each module, from 128 to the number of its ranks.

    Returns:
        `Tensor`: (modules, K) logits, padded with -inf.
    """
    groups: dict[int, list[int]] = {}
    for i, head in enumerate(heads):
        groups.setdefault(head.out_features, []).append(i)
    rows: list[Tensor | None] = [None] * len(heads)
    with torch.autocast(features.device.type, enabled=False):
        for members in groups.values():
            weight = torch.stack([heads[i].weight for i in members])  # (g, k, 128)
            bias = torch.stack([heads[i].bias for i in members])  # (g, k)
            chosen = features if len(groups) == 1 else features[members]
            result = torch.baddbmm(bias.unsqueeze(2), weight, chosen.unsqueeze(2)).squeeze(2)
            if len(groups) == 1:
                return result
            for i, row in zip(members, result, strict=True):
                rows[i] = row
    return pad_rows(rows, float("-inf"))
