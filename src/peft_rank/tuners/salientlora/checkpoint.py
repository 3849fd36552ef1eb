# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What an adapter looks like on disk.

A finished adapter holds its ranks and nothing else. A checkpoint of an unfinished allocation has the widths of the live
parameters, so that the optimizer's moments fit, E of pruned ranks set to 0, so that it is right for every reader, and the
allocator's state as bytes in `salientlora_state` of the first module. The configuration agrees with either:
`rank_pattern` equals the saved widths and `allocation_state` says where the state is, so that a loader that builds the
layers from the configuration alone expects exactly what the file holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..names import exact_pattern, plain_name
from ..sharding import is_sharded
from .allocator import RankAllocator
from .config import SalientLoRAConfig
from .layer import SalientLoRALayer


def exact_rank_pattern(ranks: Mapping[str, int], init_r: int) -> dict[str, int]:
    """`rank_pattern` of these modules: all of them, or nothing where none differs from `init_r`."""
    if all(rank == init_r for rank in ranks.values()):
        return {}
    return {exact_pattern(name): rank for name, rank in ranks.items()}


def to_checkpoint(
    selected: dict[str, torch.Tensor],
    layers: Mapping[str, SalientLoRALayer],
    config: SalientLoRAConfig,
    adapter_name: str,
    allocator: RankAllocator | None,
) -> dict[str, torch.Tensor]:
    """
    The entries to save, and `config` brought into agreement with them.

    Args:
        selected (`dict[str, torch.Tensor]`): The adapter's entries of the model's state dict; not changed.
        layers (`Mapping[str, SalientLoRALayer]`): The adapter's layers by their name in that state dict.
        config (`SalientLoRAConfig`): Its `rank_pattern` and `allocation_state` are written.
        adapter_name (`str`): The adapter.
        allocator (`RankAllocator`, *optional*): Absent where the adapter was never trained here.

    Raises:
        RuntimeError: If the entries are placeholders of sharded parameters.
    """
    entries = dict(selected)
    masks = [None] * len(layers) if allocator is None else allocator.alive.split(allocator.sizes)
    ranks = {}
    for (name, layer), mask in zip(layers.items(), masks, strict=True):
        keys = [f"{name}.{attribute}.{adapter_name}" for attribute in layer.adapter_layer_names]
        if not all(key in entries for key in keys):
            continue
        A, E, B = (entries[key] for key in keys)
        if A.dim() != 2 or is_sharded(A):
            raise RuntimeError(
                f"The factors of {name} are sharded over processes. Save through the Trainer, or pass "
                "`state_dict=accelerator.get_state_dict(engine)` to `save_pretrained`."
            )
        if mask is not None and not mask.all():
            mask = mask.to(A.device)
            A, E, B = (A[mask], E[mask], B[:, mask].contiguous()) if allocator.closed else (A, E * mask.to(E.dtype), B)
            entries.update(zip(keys, (A, E, B), strict=True))
        ranks[plain_name(name)] = A.shape[0]
    state_key = f"{next(iter(layers), '')}.salientlora_state.{adapter_name}"
    state = entries.get(state_key) if allocator is None else _state_to_save(allocator)
    where = None
    if state is not None:
        entries[state_key] = state
        where = {"module": plain_name(next(iter(layers))), "numel": state.numel()}
    config.write_ranks(exact_rank_pattern(ranks, config.init_r), where)
    return entries


def _state_to_save(allocator: RankAllocator) -> torch.Tensor | None:
    # in reference mode the budget may stay unmet, so that the ranks alone do not tell that all was decided
    plain = allocator.finished and bool(allocator.alive.all()) and allocator.total <= allocator.target_total
    return allocator.pack() if allocator.last_step > 0 and not plain and not allocator.closed else None
