# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Parameters of which every process holds a part, as FSDP2 leaves them outside of a forward pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist


if dist.is_available():
    from torch.distributed.tensor import DTensor, Shard


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a part of a larger one, and says so."""
    return dist.is_available() and isinstance(tensor, DTensor)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def own_rows(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a full tensor, what this process would hold if it were sharded as `like` is."""
    if not is_sharded(like):
        return full
    if not _in_rows(like):
        return (
            like.from_local(full, like.device_mesh, run_check=False)
            .redistribute(placements=like.placements)
            .to_local()
        )
    rows = math.ceil(len(full) / like.device_mesh.size())
    start = rows * like.device_mesh.get_local_rank()
    return full[start : start + rows]


@torch.no_grad()
def gather(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors in full, on every process. All that are sharded alike come in one message: an adapter has hundreds of
    small ones."""
    full = list(tensors)
    alike: dict[tuple, list[int]] = defaultdict(list)
    for position, tensor in enumerate(tensors):
        if is_sharded(tensor):
            if _in_rows(tensor):
                alike[tensor.device_mesh, tensor.dtype, tensor.device].append(position)
            else:
                full[position] = tensor.full_tensor()
    for (mesh, dtype, device), positions in alike.items():
        shapes = [tensors[position].shape for position in positions]
        sizes = [math.ceil(shape[0] / mesh.size()) * math.prod(shape[1:]) for shape in shapes]
        own = torch.zeros(sum(sizes), dtype=dtype, device=device)
        for part, position in zip(own.split(sizes), positions, strict=True):
            values = tensors[position].to_local().flatten()
            part[: len(values)] = values
        together = DTensor.from_local(own, mesh, [Shard(0)], run_check=False).full_tensor()
        columns = together.view(mesh.size(), -1).split(sizes, 1)
        for position, shape, parts in zip(positions, shapes, columns, strict=True):
            full[position] = parts.reshape(-1)[: shape.numel()].view(shape)
    return full


def _in_rows(tensor: torch.Tensor) -> bool:
    """Whether the processes hold equally many rows each, the last ones fewer."""
    return tensor.device_mesh.ndim == 1 and tensor.placements == (Shard(0),)
