# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The full factors of one weight that a search chooses from, and where they are kept between searches."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...decomposition import Factors, weighted_svd
from ...decomposition.svd import balanced
from ..lowrank.linear import LowRankLinear


_FORMAT = "1"  # of the cached files: a new decomposition needs a new one


class Spectrum(NamedTuple):
    """A weight split into all its ranks: `down` (k, in), `up` (k, out) and singular values (k,)."""

    down: Tensor
    up: Tensor
    values: Tensor


class SearchFactors(nn.Module):
    """
    All ranks of a weight, k = min(in, out): `down` (k, in), `up` (k, out) and `values` (k,), frozen.

    Parameters rather than buffers, which DDP would send around in every forward pass. `up` lies transposed, so that the
    ranks that a step needs are rows of both factors.
    """

    def __init__(self, spectrum: Spectrum) -> None:
        super().__init__()
        self.down = nn.Parameter(spectrum.down, requires_grad=False)
        self.up = nn.Parameter(spectrum.up, requires_grad=False)
        self.values = nn.Parameter(spectrum.values, requires_grad=False)

    @torch.no_grad()
    def select(self, ranks: Tensor, bias: Tensor | None) -> LowRankLinear:
        """The ranks `ranks`, (r,) int64, as the two linears that the module would become."""
        ranks = ranks.to(self.down.device)
        factors = Factors(self.up.index_select(0, ranks).T.contiguous(), self.down.index_select(0, ranks))
        linear = LowRankLinear.from_factors(factors)
        linear.up.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return linear


def empty_spectrum(shape: tuple[int, int], like: Tensor) -> Spectrum:
    """To be filled from a checkpoint; shape (out, in), dtype and device of `like`."""
    k = min(shape)
    down, up = like.new_zeros(k, shape[1]), like.new_zeros(k, shape[0])
    return Spectrum(down, up, torch.zeros(k, device=like.device))


def decompose_weight(
    weight: Tensor, method: str, statistics: Mapping[str, Tensor], alpha: float, cache: str | None = None
) -> Spectrum:
    """
    Split a weight into all its ranks, in its own dtype, on its own device.

    Args:
        weight (`Tensor`): (out, in).
        method (`str`), statistics, alpha: As in `weighted_svd`.
        cache (`str`, *optional*): Folder to look in first, and to write to.
    """
    path = None if cache is None else Path(cache, f"{_digest(weight, method, statistics, alpha)}.safetensors")
    if path is not None and path.is_file():
        return Spectrum(**{key: tensor.to(weight.device) for key, tensor in load_file(path).items()})
    up, down, values = weighted_svd(weight, method, alpha=alpha, **statistics)
    up, down = balanced(up, down)
    found = Spectrum(
        *(factor.to(weight.device, weight.dtype).contiguous() for factor in (down, up.T)),
        values.to(weight.device, torch.float32),
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # another process may do the same
        partial = path.with_suffix(f".{uuid.uuid4().hex}")
        save_file(found._asdict(), partial)
        partial.replace(path)
    return found


def _digest(weight: Tensor, method: str, statistics: Mapping[str, Tensor], alpha: float) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {method} {alpha}".encode())
    for name, tensor in [("weight", weight), *sorted(statistics.items())]:
        tensor = tensor.detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
