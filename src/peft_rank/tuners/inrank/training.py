# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The training loop's side of the tuner: when ranks are checked, and what then happens to parameters and optimizer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers.trainer_pt_utils import get_model_param_count

from peft_rank.allocation.growth import explained_ratio, next_rank
from peft_rank.decomposition.product import Truncation

from ..adaptive import AdaptiveRankTuner, ShrinkPolicy, check_step
from ..growing import (
    active_data_parallel,
    check_rebuildable,
    optimizers_of,
    rebuild_data_parallel,
    remember_optimizers,
)
from ..lowrank.entry import record_compression
from ..lowrank.linear import LowRankLinear
from ..names import exact_pattern
from ..sharding import is_distributed
from ..shrinking import Replacement, hold, replace_parameters, unwrap_optimizer
from .layer import InRankFactors, InRankLinear


# who averages the gradients of a tuner's model; not in the model, which can be copied and saved as a whole
_wrappers: WeakKeyDictionary[BaseTuner, weakref.ref[DistributedDataParallel]] = WeakKeyDictionary()


@dataclass
class Clock:
    """
    Where the growth of one adapter stands.

    Args:
        last_step: The last optimizer step that was seen.
        checked_step: The step of the last check, 0 for none.
        checks: How many there were.
        end: The step that ends the growth; None if only `finalize` does.
        planned: Whether `end` is known.
        closed: Whether the adapter was finalized: what is saved carries no state.
        explained: Mean share that the ranks explained at the last check.
    """

    last_step: int = 0
    checked_step: int = 0
    checks: int = 0
    end: int | None = None
    planned: bool = False
    closed: bool = False
    explained: float | None = None

    def state(self, rank: int) -> torch.Tensor:
        """What a checkpoint keeps in each layer, (4,) int64."""
        return torch.tensor([rank, self.last_step, self.checked_step, self.checks])


class InRankTraining(AdaptiveRankTuner):
    """What a training loop calls, over the clock of each adapter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # injection, which the base class starts, needs them
        self._clocks: dict[str, Clock] = {}
        # modules that took the place of our layers for good, by name in the base model
        self._compressed: dict[str, LowRankLinear] = {}
        remember_optimizers()
        super().__init__(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._clocks.pop(adapter_name, None)

    def clock(self, adapter_name: str) -> Clock:
        """The clock of the adapter, made on first use."""
        return self._clocks.setdefault(adapter_name, Clock())

    def is_growing(self, adapter_name: str) -> bool:
        """Whether a module of the adapter has a buffer."""
        return any(layer.is_growing(adapter_name) for layer in self.adapter_layers(adapter_name).values())

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Remember who averages gradients: called around every forward pass of the model."""
        wrapper = active_data_parallel() if self.training else None
        if wrapper is not None:
            _wrappers[self] = weakref.ref(wrapper)
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _wrapper(self) -> DistributedDataParallel | None:
        return _wrappers[self]() if self in _wrappers else None

    # ---- plan ----

    def restart_allocation(self) -> None:
        for name in self._trained_adapters():
            self._clocks[name] = Clock()

    def resolve_schedule(self, total_steps: int) -> str:
        if self._compressed:
            return f"ranks fixed at {sum(m.rank for m in self._compressed.values())}, the adapter is finalized"
        self._check_trained()
        plans = []
        for name in self._trained_adapters():
            clock, layers = self.clock(name), list(self.adapter_layers(name).values())
            clock.closed = False
            total = sum(layer.inrank_r[name] for layer in layers)
            if not self.is_growing(name):
                plans.append(f"{name}: ranks fixed at {total} in {len(layers)} modules, no allocation")
                continue
            config = self.peft_config[name]
            clock.end, clock.planned = config.growth_end(total_steps), True
            limit = sum(layer.inrank_max_r[name] for layer in layers)
            plans.append(
                f"{name}: ranks of {len(layers)} modules grow from {total}, up to {limit}, to explain {config.explained_ratio:g} "
                f"of the {config.criterion}: a check every {config.check_interval} steps after step {config.warmup_steps}, "
                f"ranks fixed from step {clock.end} of {total_steps} on"
            )
        return "\n".join(plans)

    def _plan_from_config(self, name: str, clock: Clock) -> None:
        try:
            clock.end, clock.planned = self.peft_config[name].growth_end(None), True
        except ValueError as error:
            raise RuntimeError(f"The growth has no schedule: `resolve_schedule` was not called. {error}") from error

    # ---- steps ----

    def add_regularization_gradient(self) -> None:
        """Nothing: InRank has no regularizer."""

    def arm_regularization(self, loss_scale: float = 1.0) -> None:
        """
        Nothing to arm; called where an engine steps by itself.

        Raises:
            RuntimeError: If a rank may still grow: engines that shard parameters or states cannot take others.
        """
        growing = [name for name in self._trained_adapters() if self.is_growing(name)]
        if growing:
            raise RuntimeError(
                f"Adapter {growing[0]!r} cannot grow under DeepSpeed, whose shards cannot be widened. Find the ranks without "
                "it (one process or DDP, until `growth_steps`), save, and load the adapter to train it further under "
                "DeepSpeed; or train fixed ranks with `buffer_r=0`."
            )

    @torch.no_grad()
    def update_and_allocate(
        self, global_step: int, optimizer: Optimizer | None = None, shrink: ShrinkPolicy = "each"
    ) -> bool:
        check_step(global_step)
        decided = False
        for name in self._trained_adapters():
            clock, config = self.clock(name), self.peft_config[name]
            if not config.allocates:
                continue
            if not clock.planned and self.is_growing(name):
                self._plan_from_config(name, clock)
            if global_step <= clock.last_step:
                continue
            clock.last_step = global_step
            if not self.is_growing(name):
                continue
            due = global_step // config.check_interval * config.check_interval
            if due > max(config.warmup_steps, clock.checked_step):
                self._check(name, optimizer)
                decided = True
            if clock.end is not None and global_step >= clock.end:
                self._fix_ranks(name, optimizer)
                decided = True
        return decided

    def skip_step(self, global_step: int) -> None:
        for name in self._trained_adapters():
            clock = self.clock(name)
            clock.last_step = max(clock.last_step, global_step)

    def _check(self, name: str, optimizer: Optimizer | None) -> None:
        """Decide the rank of every module that can grow, the same on every process, and widen."""
        clock, config, layers = self.clock(name), self.peft_config[name], self.adapter_layers(name)
        optimizers = self._holders(name, optimizer)
        decided, shares = [], []
        for module, layer in layers.items():
            rank, share = self._decide(name, module, layer)
            decided.append(rank)
            shares.append(share)
        ranks = torch.tensor(decided, device=next(iter(layers.values())).inrank_B[name].device)
        _from_first_process(ranks)
        clock.checked_step, clock.explained = clock.last_step, sum(shares) / len(shares)
        clock.checks += 1
        replacements = {}
        for (module, layer), rank in zip(layers.items(), ranks.tolist(), strict=True):
            if not layer.is_growing(name):
                continue
            layer.inrank_r[name] = rank
            width = layer.wanted_width(name, config)
            if width > layer.width(name):
                replacements.update(layer.widen(name, width, seed=module))
        self._replace(replacements, optimizers)

    def _decide(self, name: str, module: str, layer: InRankLinear) -> tuple[int, float]:
        """The module's next rank, and what it explains."""
        config, current = self.peft_config[name], layer.inrank_r[name]
        if not layer.is_growing(name):
            return current, 1.0
        try:
            values = layer.spectrum(name)
        except ValueError as error:
            raise RuntimeError(
                f"The product of {module} is not finite after step {self.clock(name).last_step}: the training has diverged. "
                "Lower the learning rate, clip gradients, or resume from an earlier checkpoint."
            ) from error
        size = min(layer.in_features, layer.out_features)
        rank = next_rank(
            values,
            current,
            config.buffer_r,
            layer.inrank_max_r[name],
            config.explained_ratio,
            config.criterion,
            config.reference,
            size=size,
        )
        return rank, explained_ratio(values, rank, config.criterion, size=size)

    def _fix_ranks(self, name: str, optimizer: Optimizer | None) -> None:
        """Cut every product that has a buffer to its rank, rotating the moments along."""
        optimizers = self._holders(name, optimizer)
        if self.clock(name).checks == 0:
            self._check(name, optimizer)
        replacements = {}
        for layer in self.adapter_layers(name).values():
            if layer.is_growing(name):
                cut = Truncation(*(tensor.contiguous() for tensor in layer.truncation(name, self.peft_config[name])))
                for tensor in cut:
                    # singular vectors have no sign, and moments have to follow those that all processes get
                    _from_first_process(tensor)
                replacements.update(layer.truncate(name, cut))
        self._replace(replacements, optimizers)

    def _holders(self, name: str, optimizer: Optimizer | None) -> list[Optimizer]:
        """The optimizers that have to follow when parameters are replaced; empty if nobody trains them yet."""
        layers = self.adapter_layers(name).values()
        factors = [getattr(layer, part)[name] for layer in layers for part in layer.adapter_layer_names]
        optimizers = optimizers_of(factors) if optimizer is None else [unwrap_optimizer(optimizer)]
        if not (hold(optimizers, factors) if optimizers else all(p.grad is None for p in factors)):
            raise RuntimeError(
                f"The parameters of adapter {name!r} change their size, and the optimizer that trains them has to follow: "
                "call `update_and_allocate(step, optimizer)` and `finalize(optimizer)` with the optimizer that holds them."
            )
        wrapper = self._wrapper()
        if wrapper is not None:
            check_rebuildable(wrapper)
        return optimizers

    def _replace(self, replacements: Mapping[nn.Parameter, Replacement], optimizers: list[Optimizer]) -> None:
        if not replacements:
            return
        for optimizer in optimizers:
            replace_parameters(optimizer, replacements)
        wrapper = self._wrapper()
        if wrapper is not None:
            rebuild_data_parallel(wrapper)

    # ---- end ----

    @torch.no_grad()
    def finalize(self, optimizer: Optimizer | None = None, compact: bool = True) -> None:
        for name in self.active_adapters:
            layers, clock = self.adapter_layers(name), self.clock(name)
            if self.is_growing(name):
                self._finish(name, clock, optimizer)
            if layers:
                clock.closed = True
                self.peft_config[name].write_ranks(rank_pattern(layers, name))
        factors = {name: m for name, m in self.model.named_modules() if isinstance(m, InRankFactors)}
        # the parameters stay, so that DDP does not notice; DeepSpeed has hooks on modules
        if factors and (compact or self._wrapper() is not None):
            self._compress(factors)

    def _finish(self, name: str, clock: Clock, optimizer: Optimizer | None) -> None:
        message = self._never_grown(name)
        if message is not None:
            raise RuntimeError(message)
        if clock.planned and clock.end is not None and clock.last_step < clock.end or clock.checks == 0:
            warnings.warn(
                f"The growth of adapter {name!r} was cut short at step {clock.last_step}"
                f"{'' if clock.end is None else f', before its end at step {clock.end}'}, after {clock.checks} checks. Its ranks are "
                "fixed now.",
                stacklevel=3,
            )
        self._fix_ranks(name, optimizer)

    def _compress(self, factors: Mapping[str, InRankFactors]) -> None:
        """Make the model a plain one, with two linears in the place of each of our layers."""
        for name, layer in factors.items():
            parent, _, child = name.rpartition(".")
            module = self._compressed[name] = layer.compressed(layer.active_adapters[0])
            setattr(self.model.get_submodule(parent), child, module)
        for name, wrapper in list(self.model.named_modules()):
            if isinstance(wrapper, AuxiliaryTrainingWrapper):
                parent, _, child = name.rpartition(".")
                plain = wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
                setattr(self.model.get_submodule(parent), child, plain)
        self._forget_layers()
        # a plain model, which another adapter may wrap
        if "peft_config" in vars(self.model):
            del self.model.peft_config
        # `save_pretrained` of the plain model writes it completely
        record_compression(self.model, self.peft_config[self.active_adapters[0]])

    @property
    def allocation_finished(self) -> bool:
        return not any(self.is_growing(name) for name in self._trained_adapters())

    def check_resumed(self, global_step: int, checkpoint: Path | None = None) -> None:
        for name in self._trained_adapters():
            clock = self.clock(name)
            if self.is_growing(name) and global_step > max(clock.last_step, self.peft_config[name].warmup_steps):
                raise RuntimeError(
                    f"The training resumes at step {global_step}, but the growth of adapter {name!r} knows only its first "
                    f"{clock.last_step} steps. Was it trained without RankAllocationCallback, or were the weights loaded "
                    "without their checkpoint? Resume from a checkpoint that the callback was part of, or start afresh."
                )

    def _never_grown(self, name: str) -> str | None:
        """What to tell of a growth that was configured and never ran; None if there is nothing to tell."""
        clock = self.clock(name)
        if not self.peft_config[name].allocates or not self.is_growing(name) or clock.last_step > 0:
            return None
        return (
            f"The ranks of adapter {name!r} were never checked: no optimizer step was recorded. Add "
            "`RankAllocationCallback()` to the Trainer's callbacks, or call "
            "`model.base_model.update_and_allocate(step, optimizer)` after every optimizer step; for fixed ranks set "
            "`buffer_r=0`."
        )

    def rank_summary(self) -> dict[str, float]:
        name = (self._trained_adapters() or self.active_adapters)[0]
        clock, layers = self.clock(name), list(self.adapter_layers(name).values())
        ranks = [layer.inrank_r[name] for layer in layers] or [m.rank for m in self._compressed.values()]
        limits = [layer.inrank_max_r[name] for layer in layers] or ranks
        summary = {
            "rank/total": sum(ranks),
            "rank/mean": sum(ranks) / len(ranks),
            "rank/budget": sum(limits),
            "rank/width": sum(layer.width(name) for layer in layers) or sum(ranks),
            "parameters/trainable": get_model_param_count(self, trainable_only=True),
        }
        return summary if clock.explained is None else {**summary, "rank/explained": clock.explained}


def rank_pattern(layers: Mapping[str, InRankLinear], adapter_name: str) -> dict[str, int]:
    """`rank_pattern` of these modules, which tells their widths, that is the shapes of what is saved."""
    return {exact_pattern(name): layer.width(adapter_name) for name, layer in layers.items()}


def _from_first_process(tensor: torch.Tensor) -> None:
    if is_distributed():
        distributed.broadcast(tensor, src=0)
