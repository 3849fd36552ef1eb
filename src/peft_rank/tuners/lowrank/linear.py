# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What a compressed linear becomes: two ordinary linears one after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...decomposition import Factors


class LowRankLinear(nn.Module):
    """A linear of limited rank, `x -> up(down(x))`.

    Both factors are `nn.Linear`, so that PEFT and quantizers can target them.

    Args:
        in_features (`int`): Size of the input's last dimension.
        out_features (`int`): Size of the output's last dimension.
        rank (`int`): Size between the factors, at least 1.
        bias (`bool`, *optional*, defaults to `True`): Whether `up` has a bias.
        device (`torch.device`, *optional*): Of the parameters.
        dtype (`torch.dtype`, *optional*): Of the parameters.

    Raises:
        ValueError: If `rank` is less than 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}.")
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, factors: Factors, bias: Tensor | None = None) -> LowRankLinear:
        """Takes over the factors (and the bias, shape (out,)) as they are: dtype, device and memory."""
        (out_features, rank), in_features = factors.up.shape, factors.down.shape[1]
        module = cls(in_features, out_features, rank, bias is not None, device="meta")
        module.down.weight = nn.Parameter(factors.down)
        module.up.weight = nn.Parameter(factors.up)
        if bias is not None:
            module.up.bias = nn.Parameter(bias)
        return module

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def rank(self) -> int:
        return self.down.out_features

    @property
    def weight(self) -> Tensor:
        """The weight of `up`: models that read the dtype or device of a linear's weight, as T5 does, find it there."""
        return self.up.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of `up`, shape (out,)."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    @torch.no_grad()
    def dense(self) -> nn.Linear:
        """The same map as one linear; the product is taken in float32 or better."""
        up, down = self.up.weight, self.down.weight
        work = torch.promote_types(up.dtype, torch.float32)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter((up.to(work) @ down.to(work)).to(up.dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear

    def extra_repr(self) -> str:
        return f"rank={self.rank}"
