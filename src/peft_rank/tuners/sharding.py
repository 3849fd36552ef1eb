# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Parameters of which every process holds a part, as FSDP2 and DeepSpeed leave them outside of a forward pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from peft.utils.integrations import gather_params_ctx


_AVAILABLE = dist.is_available()  # kept, like what else is asked of hundreds of tensors in every step

if _AVAILABLE:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    ROWS = (Shard(0),)


def is_distributed() -> bool:
    """Whether this process is one of a group."""
    return _AVAILABLE and dist.is_initialized()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether every process holds some rows of the tensor only.

    Raises:
        RuntimeError: If it is distributed in another way: by columns, or over several dimensions of devices.
    """
    if not _AVAILABLE or not isinstance(tensor, DTensor):
        return False
    if tensor.device_mesh.ndim != 1 or tensor.placements != ROWS:
        raise RuntimeError(
            f"A factor is distributed as {tensor.placements} over {tensor.device_mesh}. Ranks are allocated where every process "
            "holds rows of the factors, as FSDP2 does: not with tensor parallelism, nor where groups of processes hold copies."
        )
    return True


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, in the same memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # autograd's way to it takes five times as long
        return tensor.to_local()


def own_rows(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a full tensor, what this process would hold if it were sharded as `like` is."""
    if not is_sharded(like):
        return full
    processes, rank = _place(like.device_mesh)
    rows = math.ceil(len(full) / processes)
    # with offload, the parts are in another memory than what is gathered
    return full[rows * rank : rows * (rank + 1)].to(own_part(like).device)


@cache
def _place(mesh: DeviceMesh) -> tuple[int, int]:
    """Number of processes and which of them this one is. Kept: finding out takes as long as adding a small tensor."""
    return mesh.size(), mesh.get_local_rank()


@torch.no_grad()
def gather(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors in full, on every process, to be read only. An adapter has hundreds of small ones, which come in as few
    messages as possible: one for all of a shape (FSDP2) or a dtype (ZeRO-3)."""
    full = list(tensors)
    alike: dict[tuple, list[int]] = defaultdict(list)
    for position, tensor in enumerate(tensors):
        if is_sharded(tensor):
            alike[_join_rows, tensor.device_mesh, tensor.shape, tensor.dtype].append(position)
        elif _is_partitioned(tensor):
            join = _of_partitions if _is_at_hand(tensor.ds_tensor) else _copies
            alike[join, tensor.dtype].append(position)
    for (join, *_), positions in alike.items():
        for position, whole in zip(positions, join([tensors[position] for position in positions]), strict=True):
            full[position] = whole
    return full


def _join_rows(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """FSDP2: each process holds some rows of every tensor, the last ones fewer. All are of one shape."""
    mesh, total = tensors[0].device_mesh, len(tensors[0])
    rows = math.ceil(total / mesh.size())
    own = torch.stack([_fill(tensor.to_local(), rows) for tensor in tensors])  # (g, rows, ...)
    together = DTensor.from_local(own, mesh, [Shard(1)], run_check=False).full_tensor()
    return [whole[:total] for whole in together.unbind()]


def _is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 has left a placeholder of the tensor."""
    return "ds_status" in vars(tensor) and tensor.ds_status.name == "NOT_AVAILABLE"


def _is_at_hand(partition: torch.Tensor) -> bool:
    """Whether a partition of ZeRO-3 is in memory, and not quantized (ZeRO++)."""
    return partition.status.name == "AVAILABLE" and "ds_quant_scale" not in vars(partition)


def _of_partitions(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return _join_partitions(parameters, [parameter.ds_tensor for parameter in parameters])


def _copies(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """As DeepSpeed itself gathers, message by message."""
    with gather_params_ctx(parameters, modifier_rank=None):
        return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def in_full_precision(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The parameters, or where DeepSpeed trains float32 copies in their place, these, in full and on every process: small
    steps vanish in half precision. All copies come in one message, where DeepSpeed's own function sends one for each."""
    full = list(parameters)
    # attributes that DeepSpeed sets; it keeps copies of what it trains only
    trained = [i for i, p in enumerate(parameters) if p.dtype != torch.float32 and p.requires_grad]
    for attribute, gather_copies in (("ds_id", _of_zero3), ("_hp_mapping", _of_zero)):
        held = [i for i in trained if attribute in vars(parameters[i])]
        if held:
            for i, copy in zip(held, gather_copies([parameters[i] for i in held]), strict=True):
                full[i] = copy
            break
    return full


def _of_zero(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Stages 1 and 2: each process holds pieces of one long vector, which may begin and end within a parameter."""
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=parameters[0].device)
    parts = flat.split([p.numel() for p in parameters])
    own, fragments = [], []
    for parameter, part in zip(parameters, parts, strict=True):
        mapping = parameter._hp_mapping
        if mapping is not None:  # or all of it is elsewhere
            address = mapping.lp_fragment_address
            own.append(part[address.start : address.start + address.numel])
            fragments.append(mapping.get_hp_fragment().view(-1))
    if own:
        torch._foreach_copy_(own, fragments)  # with offload from another memory
    dist.all_reduce(flat, group=parameters[0]._dp_group)
    return [part.view(parameter.shape) for parameter, part in zip(parameters, parts, strict=True)]


def _of_zero3(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    from deepspeed.utils import safe_get_local_fp32_param

    return _join_partitions(parameters, [safe_get_local_fp32_param(parameter).flatten() for parameter in parameters])


def _join_partitions(parameters: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """ZeRO-3: each process holds an equal part of every parameter, the last one with padding."""
    sizes, group = [len(part) for part in own], parameters[0].ds_process_group
    mine = torch.cat(own).to(parameters[0].device)  # with offload, the parts are in another memory
    together = mine.new_empty(dist.get_world_size(group) * len(mine))
    dist.all_gather_into_tensor(together, mine, group=group)
    pieces = together.view(-1, len(mine)).split(sizes, 1)
    alike: dict[int, list[int]] = defaultdict(list)
    for position, size in enumerate(sizes):
        alike[size].append(position)
    full: list[torch.Tensor | None] = [None] * len(pieces)
    for positions in alike.values():
        # the parts of a parameter one after the other, with one copy for all of a size
        joined = torch.stack([pieces[position] for position in positions]).flatten(1)
        for position, whole in zip(positions, joined.unbind(), strict=True):
            parameter = parameters[position]
            full[position] = whole[: parameter.ds_numel].view(parameter.ds_shape)
    return full


def _fill(part: torch.Tensor, rows: int) -> torch.Tensor:
    """The part with zeros up to so many rows: the last processes have fewer."""
    missing = rows - len(part)
    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
