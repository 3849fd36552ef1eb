# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The training loop's side of the tuner: carries out on the layers what the allocators decide."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import load_peft_weights
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_pt_utils import get_model_param_count

from peft_rank.orthogonality import orthogonality, orthogonality_with_gradient

from ..adaptive import AdaptiveRankTuner, ShrinkPolicy, add_to_gradients, check_step
from ..sharding import gather, in_full_precision, is_distributed
from ..shrinking import can_follow, swap_parameters, unwrap_optimizer
from .allocator import RankAllocator
from .checkpoint import exact_rank_pattern
from .functional import replace


class SalientLoRATraining(AdaptiveRankTuner):
    """What a training loop calls, over the allocator of each adapter."""

    allocates_under_fsdp = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # injection, which the base class starts, needs it
        self._allocators: dict[str, RankAllocator] = {}
        self._loss_scale = 1.0  # of the gradients that are watched
        # adapters whose regularizer was computed since their last step was recorded
        self._regularized: set[str] = set()
        super().__init__(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._allocators.pop(adapter_name, None)
        self._regularized.discard(adapter_name)

    def allocator(self, adapter_name: str) -> RankAllocator:
        """The allocator of the adapter, made on first use."""
        if adapter_name not in self._allocators:
            sizes = [layer.salientlora_r[adapter_name] for layer in self.adapter_layers(adapter_name).values()]
            self._allocators[adapter_name] = RankAllocator(self.peft_config[adapter_name], sizes)
        return self._allocators[adapter_name]

    def _allocating_adapters(self) -> list[str]:
        return [name for name in self._trained_adapters() if self.peft_config[name].allocates]

    def restart_allocation(self) -> None:
        for name in self._trained_adapters():
            self.allocator(name).restart()

    def resolve_schedule(self, total_steps: int) -> str:
        plans = []
        self._check_trained()
        for name in self._trained_adapters():
            allocator = self.allocator(name)
            # checkpoints of a further training fit its parameters, masked ranks included
            allocator.closed = False
            if not self.peft_config[name].allocates or allocator.finished:
                plans.append(
                    f"{name}: ranks fixed at {allocator.total} in {len(allocator.sizes)} modules, no allocation"
                )
            else:
                plans.append(f"{name}: {allocator.plan(total_steps)}")
        return "\n".join(plans)

    def add_regularization_gradient(self) -> None:
        for name in self._trained_adapters():
            stored = self._stored(name)
            self._refuse_sharded(name, stored[0])
            # each factor for itself: where one gradient's layout is another, that of all would be added one by one
            for parameters, gradients in zip(stored[::2], self._regularization(name, stored), strict=False):
                add_to_gradients(parameters, gradients)

    def arm_regularization(self, loss_scale: float = 1.0) -> None:
        for name in self._trained_adapters():
            layers = self.adapter_layers(name).values()
            allocator = self.allocator(name)
            if self.peft_config[name].weighs_gradients and allocator.wants(allocator.last_step + 1):
                self._loss_scale = loss_scale
                for layer in layers:
                    layer._watched[name] = None
            stored = self._stored(name)
            # cast for all modules at once, not by each of them in the backward
            gradients = self._regularization(name, stored, loss_scale, stored[0][0].dtype)
            if gradients:
                for layer, *pair in zip(layers, *gradients, strict=True):
                    layer._armed[name] = pair

    def _regularization(
        self,
        adapter_name: str,
        stored: list[tuple[nn.Parameter, ...]],
        factor: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Sequence[list[torch.Tensor]]:
        """The weighted regularizer's gradients for A of all modules and for B of all; nothing at weight 0. Its value goes
        to the step that was recorded last, since when nothing has been trained."""
        weight = self.peft_config[adapter_name].orth_reg_weight * factor
        if weight == 0:
            return ()
        value, gradients = orthogonality_with_gradient(*self._factors(adapter_name, stored), weight, dtype)
        self._regularized.add(adapter_name)
        if self.allocator(adapter_name).awaits:
            self.allocator(adapter_name).complete(value)
        return gradients

    def _stored(self, adapter_name: str) -> list[tuple[nn.Parameter, ...]]:
        """A of all modules, E of all, B of all: the parameters as they are."""
        layers = self.adapter_layers(adapter_name).values()
        return list(zip(*(layer.stored(adapter_name) for layer in layers), strict=True))

    def _factors(self, adapter_name: str, stored: list[tuple[nn.Parameter, ...]] | None = None):
        """A, B and the masks of pruned ranks of all modules, in full where an engine holds parts. What is stored is found
        out where it is not given, which takes a while under ZeRO-3."""
        down, _, up = stored or self._stored(adapter_name)
        full = gather([*down, *up])
        return full[: len(down)], full[len(down) :], self._masks(adapter_name)

    def _masks(self, adapter_name: str) -> list[torch.Tensor | None]:
        return [layer.salientlora_mask.get(adapter_name) for layer in self.adapter_layers(adapter_name).values()]

    def _refuse_sharded(self, adapter_name: str, down: tuple[nn.Parameter, ...]) -> None:
        for name, A in zip(self.adapter_layers(adapter_name), down, strict=True):
            if A.dim() != 2:
                raise RuntimeError(
                    f"The factors of {name} are sharded, so that their gradient cannot be added to here. Call "
                    "`arm_regularization()` before the first forward of every optimizer step instead."
                )

    @torch.no_grad()
    def update_and_allocate(
        self, global_step: int, optimizer: Optimizer | None = None, shrink: ShrinkPolicy = "each"
    ) -> bool:
        check_step(global_step)
        decided = False
        for name in self._allocating_adapters():
            allocator = self.allocator(name)
            if allocator.schedule is None and not allocator.finished:
                self._plan_from_steps(allocator)
            if global_step <= allocator.last_step:
                continue
            self._warn_if_begun_late(name, global_step)
            allocator.last_step = global_step
            # the training goes on from the older checkpoint
            allocator.rolled_back = False
            if not allocator.wants(global_step):
                continue
            self._record(name)
            decision = allocator.due(global_step)
            if decision is not None:
                decided = True
                self._complete_window(name)
                self._warn_if_without_gradient(name)
                self._prune(name, allocator.decide(decision))
                if shrink == "each" or allocator.finished:
                    self._remove_pruned(name, optimizer)
        return decided

    def _warn_if_begun_late(self, adapter_name: str, step: int) -> None:
        allocator = self.allocator(adapter_name)
        if allocator.last_step == 0 and not allocator.finished and step > allocator.schedule.warmup_steps + 1:
            warnings.warn(
                f"The allocation of adapter {adapter_name!r} begins at step {step} and knows nothing of the steps before, although "
                f"its plan begins after step {allocator.schedule.warmup_steps}. Were the weights loaded by `load_state_dict`? A "
                "plain state dict holds neither the allocation's state nor which ranks are masked: save by `save_pretrained` and "
                "load by `PeftModel.from_pretrained(..., is_trainable=True)`.",
                stacklevel=4,
            )

    def skip_step(self, global_step: int) -> None:
        for name in self._allocating_adapters():
            allocator = self.allocator(name)
            allocator.last_step = max(allocator.last_step, global_step)

    def _plan_from_steps(self, allocator: RankAllocator) -> None:
        try:
            allocator.plan(None)
        except ValueError as error:
            raise RuntimeError(
                f"The allocation has no schedule: `resolve_schedule` was not called. {error}"
            ) from error

    def _record(self, adapter_name: str, at_hand: torch.Tensor | None = None) -> None:
        """Append the present state to the window; `at_hand` stands in for the gradient of E where that is gone. In a loop
        that regularizes, the regularizer's value comes with its next gradient."""
        self._complete_window(adapter_name)
        stored = self._stored(adapter_name)
        values = gather(in_full_precision(stored[1]))
        masks = {i: mask.to(values[i]) for i, mask in enumerate(self._masks(adapter_name)) if mask is not None}
        replace(values, masks, torch._foreach_mul)
        gradient = None
        if self.peft_config[adapter_name].weighs_gradients:
            gradient = self._gradient_of_E(adapter_name, stored[1], values)
            if at_hand is not None and (gradient is None or not gradient.any()):
                gradient = at_hand
        regularizer = (
            None if adapter_name in self._regularized else orthogonality(*self._factors(adapter_name, stored))
        )
        self._regularized.discard(adapter_name)
        self.allocator(adapter_name).record(values, regularizer, gradient)

    def _complete_window(self, adapter_name: str) -> None:
        """Compute the regularizer's value of the last step, if it is missing."""
        if self.allocator(adapter_name).awaits:
            self.allocator(adapter_name).complete(orthogonality(*self._factors(adapter_name)))

    def _gradient_of_E(
        self, adapter_name: str, stored: tuple[nn.Parameter, ...], values: list[torch.Tensor]
    ) -> torch.Tensor | None:
        """(N,) float32, of the step, for E as it is stored and its values; None where gradients are gone, as after
        `zero_grad`."""
        layers = list(self.adapter_layers(adapter_name).values())
        watched = adapter_name in layers[0]._watched
        if watched:
            found = [layer._watched.pop(adapter_name) for layer in layers]
        else:
            found = [E.grad for E in stored]
            if all(gradient is None for gradient in found):
                return None
        pairs = zip(found, values, strict=True)
        parts = gather([torch.zeros_like(E) if gradient is None else gradient for gradient, E in pairs])
        gradient = torch.cat([part.to(values[0].device, torch.float32) for part in parts])
        if not watched:
            return gradient
        if is_distributed():
            # each process has seen its part of the batch
            torch.distributed.all_reduce(gradient)
        return gradient / self._loss_scale

    def _warn_if_without_gradient(self, adapter_name: str) -> None:
        if not self.peft_config[adapter_name].weighs_gradients or self.allocator(adapter_name).gradient is not None:
            return
        # as long as B is 0 nothing has been trained
        if any(B.any() for B in self._factors(adapter_name)[1]):
            warnings.warn(
                f"The ranks of adapter {adapter_name!r} are compared by E alone, which says little where it starts at 1: there "
                "was no gradient of E. Call `update_and_allocate` after `optimizer.step()` and before `optimizer.zero_grad()`.",
                stacklevel=3,
            )

    def _prune(self, adapter_name: str, keep: torch.Tensor) -> None:
        layers = self.adapter_layers(adapter_name).values()
        for layer, mask in zip(layers, keep.split(self.allocator(adapter_name).sizes), strict=True):
            if adapter_name in layer.salientlora_mask or not mask.all():
                layer.set_mask(adapter_name, mask)

    def _remove_pruned(self, adapter_name: str, optimizer: Optimizer | None, training: bool = True) -> None:
        """Replace the factors by new, narrower parameters; while training, only where the optimizer can follow exactly."""
        layers = list(self.adapter_layers(adapter_name).values())
        parameters = [getattr(layer, a)[adapter_name] for layer in layers for a in layer.adapter_layer_names]
        optimizer = None if optimizer is None else unwrap_optimizer(optimizer)
        if training and (_is_data_parallel() or optimizer is None or not can_follow(optimizer, parameters)):
            return
        replacements = {}
        for layer, mask in zip(layers, self.allocator(adapter_name).remove_dead(), strict=True):
            layer.salientlora_mask.pop(adapter_name, None)
            if not mask.all():
                replacements.update(layer.narrow(adapter_name, mask))
        if optimizer is not None:
            swap_parameters(optimizer, replacements)

    @torch.no_grad()
    def finalize(self, optimizer: Optimizer | None = None, compact: bool = True) -> None:
        for name in self._allocating_adapters():
            allocator = self.allocator(name)
            if not allocator.finished:
                self._finish_early(name, allocator)
            for layer in self.adapter_layers(name).values():
                layer.disarm(name)
            if compact:
                self._remove_pruned(name, optimizer, training=False)
            allocator.closed = True
            config = self.peft_config[name]
            kept = (int(mask.sum()) for mask in allocator.alive.split(allocator.sizes))
            ranks = dict(zip(self.adapter_layers(name), kept, strict=True))
            config.write_ranks(exact_rank_pattern(ranks, config.init_r))
        for name, allocator in self._allocators.items():
            if allocator.last_step > 0 and not allocator.finished and not allocator.closed:
                warnings.warn(
                    f"Adapter {name!r} is in the middle of its allocation and is not finalized, since it is not being "
                    "trained. Activate it with `set_adapter` first.",
                    stacklevel=2,
                )

    def _finish_early(self, name: str, allocator: RankAllocator) -> None:
        if allocator.rolled_back:
            warnings.warn(
                f"Adapter {name!r} was loaded from a checkpoint before the end of its allocation. It keeps its "
                f"{allocator.total} ranks; the budget of {allocator.target_total} was not reached. Select the best model "
                "among later checkpoints to have it met.",
                stacklevel=2,
            )
            return
        if allocator.recorded == 0:
            # whoever goes on nevertheless is told again when saving
            allocator.last_step = 0
            raise RuntimeError(self._never_allocated(name))
        if allocator.schedule is None:
            self._plan_from_steps(allocator)
        if not allocator.pending:
            return
        last = allocator.pending[-1]
        owed = last.step <= allocator.last_step
        end = "before its last window was recorded" if owed else f"before its end at step {last.step}"
        warnings.warn(
            f"The allocation of adapter {name!r} was cut short at step {allocator.last_step}, {end}. The last decision, to "
            f"{last.budget} ranks, is taken now.",
            stacklevel=2,
        )
        if not allocator.has_window:
            # nothing has been trained since the last decision, so that its gradients are the latest
            self._record(name, allocator.gradient)
        self._complete_window(name)
        self._warn_if_without_gradient(name)
        self._prune(name, allocator.decide(last))

    @property
    def allocation_finished(self) -> bool:
        return all(self.allocator(name).finished for name in self._allocating_adapters())

    def check_resumed(self, global_step: int, checkpoint: Path | None = None) -> None:
        for name in self._allocating_adapters():
            allocator, hint = self.allocator(name), ""
            if checkpoint is not None and allocator.last_step != global_step:
                folder = checkpoint if name == "default" else checkpoint / name
                if folder.is_dir():
                    self._restore_state(name, load_peft_weights(str(folder), device="cpu"))
                    allocator = self.allocator(name)
                else:
                    hint = f" Under DeepSpeed and FSDP it is read from {folder}, which does not exist: keep it in `output_dir`."
            if not allocator.finished and global_step > max(allocator.last_step, allocator.schedule.warmup_steps):
                raise RuntimeError(
                    f"The training resumes at step {global_step}, but the allocation of adapter {name!r} knows only its "
                    f"first {allocator.last_step} steps. Was it trained without RankAllocationCallback, or were the "
                    "weights loaded without their checkpoint? Resume from a checkpoint that the callback was part of, or "
                    f"start afresh.{hint}"
                )

    def _restore_state(self, adapter_name: str, weights: dict[str, torch.Tensor]) -> None:
        state = next((value for key, value in weights.items() if key.endswith(".salientlora_state")), None)
        if state is not None:
            ranks = [layer.salientlora_r[adapter_name] for layer in self.adapter_layers(adapter_name).values()]
            self._restore(adapter_name, ranks, state)
            self._prune(adapter_name, self._allocators[adapter_name].alive)

    def _never_allocated(self, adapter_name: str) -> str | None:
        """What to tell of an allocation that was configured and never ran; None if there is nothing to tell."""
        config = self.peft_config[adapter_name]
        allocator = self._allocators.get(adapter_name) or self.allocator(adapter_name)
        if not config.allocates or allocator.finished or allocator.recorded > 0:
            return None
        return (
            f"The rank allocation of adapter {adapter_name!r} never ran: it still has {allocator.total} ranks instead of "
            f"{allocator.target_total}. Add `RankAllocationCallback()` to the Trainer's callbacks, or call "
            "`model.base_model.update_and_allocate(step)` after every optimizer step; for an adapter of fixed rank set "
            "`target_r` to `init_r`."
        )

    def rank_summary(self) -> dict[str, float]:
        name = (self._trained_adapters() or self.active_adapters)[0]
        allocator = self.allocator(name)
        return {
            "rank/total": allocator.total,
            "rank/mean": allocator.total / len(allocator.sizes),
            "rank/budget": allocator.budget,
            "orthogonality": float(orthogonality(*self._factors(name))),
            "allocation/window": allocator.window_length,
            "parameters/trainable": get_model_param_count(self, trainable_only=True),
        }

    def _restore(self, adapter_name: str, ranks: list[int], state: torch.Tensor | None) -> None:
        """Continue from a checkpoint's allocator, or, if it has none, start with its ranks."""
        allocator = RankAllocator(self.peft_config[adapter_name], ranks)
        if state is not None:
            allocator.unpack(state, ranks)
        before = self._allocators.get(adapter_name)
        if before is not None:
            allocator.schedule, allocator.decisions = before.schedule, before.decisions
            allocator.rolled_back = before.recorded > 0 and allocator.last_step < before.last_step
        if before is not None or state is not None:
            self._allocators[adapter_name] = allocator
        for layer in self.adapter_layers(adapter_name).values():
            layer.unmerge_before_change(adapter_name)
            layer.salientlora_mask.pop(adapter_name, None)
            layer.disarm(adapter_name)
            if adapter_name in layer.salientlora_state:
                del layer.salientlora_state[adapter_name]


def _is_data_parallel() -> bool:
    return is_distributed() and torch.distributed.get_world_size() > 1
