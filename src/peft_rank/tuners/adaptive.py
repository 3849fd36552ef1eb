# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What every tuner whose ranks change while it trains offers to a training loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.optim import Optimizer

from .sharding import own_part, own_rows


ShrinkPolicy = Literal["each", "last"]


def add_to_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """
    Add to `.grad`, in one call. Parameters without elements get none: optimizers and clipping by the largest entry cannot
    make anything of it.

    Args:
        parameters (`Sequence[torch.nn.Parameter]`): Where to; under FSDP every process has rows of them.
        gradients (`Sequence[Tensor]`): In full, the same on every process.
    """
    pairs = [pair for pair in zip(parameters, gradients, strict=True) if pair[0].numel()]
    for parameter, _ in pairs:
        if parameter.grad is None:
            # in the parameter's own layout, which fused optimizers insist on
            parameter.grad = torch.zeros_like(parameter)
    if pairs:
        parts = [own_rows(gradient, parameter) for parameter, gradient in pairs]
        torch._foreach_add_([own_part(parameter.grad) for parameter, _ in pairs], parts)


def check_step(global_step: int) -> None:
    """Raises `ValueError` if this cannot be a number of completed optimizer steps."""
    if global_step < 0:
        raise ValueError(f"`global_step={global_step}` must not be negative: it counts completed optimizer steps.")


class RankLayer(BaseTunerLayer):
    """A layer whose adapters have ranks. Where `adapters` is not overridden, the first of `adapter_layer_names` is keyed by
    all of them."""

    in_features: int
    out_features: int

    def adapters(self) -> Collection[str]:
        """Names of the adapters that this layer holds."""
        return getattr(self, self.adapter_layer_names[0]).keys()

    @abstractmethod
    def rank(self, adapter_name: str) -> int | None:
        """Number of ranks that the adapter keeps; None where a search leaves the module dense."""


class AdaptiveRankTuner(BaseTuner):
    """
    A tuner that has to be told of every optimizer step.

    `RankAllocationCallback` does so for the HF Trainer. A hand-written loop does it itself:

        ```py
        >>> tuner = model.base_model
        >>> print(tuner.resolve_schedule(total_steps))
        >>> for step, batch in enumerate(batches, start=1):
        ...     model(**batch).loss.backward()
        ...     tuner.add_regularization_gradient()
        ...     optimizer.step()
        ...     tuner.update_and_allocate(step, optimizer)
        ...     optimizer.zero_grad()
        >>> tuner.finalize(optimizer)
        ```
    """

    # whether factors of which every process holds a part can be allocated
    allocates_under_fsdp = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # injection, which the base class starts, needs it
        self._layers: dict[str, dict[str, RankLayer]] = {}
        # the folder with the record of its training, which saving copies beside the adapter
        self.record_folder: Path | None = None
        super().__init__(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._forget_layers()
        self.peft_config[adapter_name].forget_ranks()
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._forget_layers()

    def _forget_layers(self) -> None:
        """Look for them again: they are others now, or of other kinds."""
        self._layers.clear()

    def adapter_layers(self, adapter_name: str) -> dict[str, RankLayer]:
        """The layers that hold the adapter, by module name in the base model, in injection order."""
        if adapter_name not in self._layers:
            self._layers[adapter_name] = {
                name: module
                for name, module in self.model.named_modules()
                if isinstance(module, self.tuner_layer_cls) and adapter_name in module.adapters()
            }
        return self._layers[adapter_name]

    def _trained_adapters(self) -> list[str]:
        """Active adapters whose factors are being trained."""
        return [
            name
            for name in self.active_adapters
            if any(
                getattr(layer, layer.adapter_layer_names[0])[name].requires_grad
                for layer in self.adapter_layers(name).values()
            )
        ]

    def _check_trained(self) -> None:
        if not self._trained_adapters():
            raise RuntimeError(
                f"None of the active adapters ({', '.join(self.active_adapters)}) is trained, so that nothing can be "
                "allocated. Load the adapter with `is_trainable=True`, or activate the one to train with `set_adapter`."
            )

    @abstractmethod
    def restart_allocation(self) -> None:
        """Forget an allocation that did not finish: for a training that starts at step 0 with this model."""

    @abstractmethod
    def resolve_schedule(self, total_steps: int) -> str:
        """Turn fractions of the training into steps, check them, and return the plan as text.

        Args:
            total_steps (`int`): Optimizer steps of the whole training, including those before a resume.

        Raises:
            ValueError: If the phases do not fit into `total_steps`.
            RuntimeError: If no active adapter is being trained.
        """

    @abstractmethod
    def add_regularization_gradient(self) -> None:
        """Add the gradient of the regularizers to `.grad`: once per optimizer step, after the last backward and before
        `optimizer.step()`, on gradients that carry no loss scale. For one process and for DDP."""

    @abstractmethod
    def arm_regularization(self, loss_scale: float = 1.0) -> None:
        """Let the next backward add the gradient of the regularizers: once per optimizer step, before its first forward.
        For engines that step inside of backward (DeepSpeed). `loss_scale` is the scale of the loss in that backward."""

    @abstractmethod
    def update_and_allocate(
        self, global_step: int, optimizer: Optimizer | None = None, shrink: ShrinkPolicy = "each"
    ) -> bool:
        """Record the state after an optimizer step and, if a decision is due, change the ranks: after
        `optimizer.step()`, before `zero_grad()`. Calling it again for the same step does nothing.

        Args:
            global_step (`int`): Number of completed optimizer steps, from 1; with 0 nothing happens.
            optimizer (`Optimizer`, *optional*): Given, parameters and moments follow the ranks at once, where that is
                exact; otherwise pruned ranks are masked and removed by `finalize`. Ranks that grow need it; without
                it, all optimizers that made a step with them follow.
            shrink (`str`): `"each"` removes at each decision, `"last"` only at the last one (for compiled models, which
                recompile every time).

        Returns:
            `bool`: Whether a decision was taken.

        Raises:
            RuntimeError: If fractions of the training were configured and `resolve_schedule` was not called.
            ValueError: If `global_step` is negative.
        """

    @abstractmethod
    def skip_step(self, global_step: int) -> None:
        """Take note that the optimizer skipped this step, as it does where fp16 gradients overflow: instead of
        `update_and_allocate`. Nothing is recorded, and a decision that was due waits for the next step."""

    @abstractmethod
    def finalize(self, optimizer: Optimizer | None = None, compact: bool = True) -> None:
        """Finish the allocation: meet the budget exactly, remove what is not kept, write `rank_pattern`.

        Args:
            optimizer (`Optimizer`, *optional*): As in `update_and_allocate`.
            compact (`bool`): False keeps the parameters as they are, for engines that hold shards of them; the adapter is
                then cut when it is saved.

        Raises:
            RuntimeError: If an allocation was configured but no step of it was ever recorded.
        """

    @property
    @abstractmethod
    def allocation_finished(self) -> bool:
        """Whether every trained adapter has the ranks that it ends with."""

    @property
    def should_stop(self) -> bool:
        """Whether the training may end early, for methods that can tell."""
        return False

    @abstractmethod
    def check_resumed(self, global_step: int, checkpoint: Path | None = None) -> None:
        """Make sure that an allocation that is resumed after `global_step` steps goes on where it stopped.

        Args:
            global_step (`int`): Number of completed optimizer steps.
            checkpoint (`Path`, *optional*): Folder to read the state from, where an engine restored the weights itself.

        Raises:
            RuntimeError: If steps of the allocation are missing.
        """

    def living_ranks(self) -> dict[str, list[int]]:
        """The ranks that are left, by module name, as numbers that each keeps from the start of the allocation on; empty
        for methods whose ranks have no identity."""
        return {}

    @abstractmethod
    def rank_summary(self) -> dict[str, float]:
        """Scalars to log: `rank/total`, `rank/mean`, `rank/budget` and `parameters/trainable`, and those of the method,
        such as `orthogonality` and `allocation/window`."""
