# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The masks of a step, whose graph all modules, micro-batches and the regularizer share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from .functional import needed_rows


@dataclass
class DrawnMasks:
    """The masks of all modules for one step, with their graph, and what they were drawn from.

    Attributes:
        logits (`Tensor`), when (`tuple[int, int]`): What they are for, and the noise's seed and step.
        soft (`Tensor`), hard (`Tensor`): (modules, K) masks, padded with 0.
        sizes (`list[int]`): Ranks of each module.
    """

    logits: Tensor
    when: tuple[int, int]
    soft: Tensor
    hard: Tensor
    sizes: list[int]
    _rows: list[tuple[Tensor | None, int]] | None = None

    def rows(self) -> list[tuple[Tensor | None, int]]:
        """See `needed_rows`. The first call waits for the device."""
        if self._rows is None:
            self._rows = needed_rows(self.soft, self.hard, self.sizes)
        return self._rows


class SharedGraph(Function):
    """The identity on a tensor whose own graph outlives the backward passes that go through it, of which there may be many.

    Takes the tensor in a list, for it is no input in the eyes of autograd: the parameters behind it are. `pending` holds
    further tensors of that graph, each with a gradient that was computed beforehand. Backward empties it, so that of all
    the passes of an optimizer step (micro-batches, recomputed layers) exactly one adds what these come to.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, made: list[Tensor], pending: list[tuple[Tensor, Tensor]], *parameters: Tensor
    ) -> Tensor:
        ctx.made, ctx.pending, ctx.parameters = made[0], pending, parameters
        return made[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):
        pairs = [(ctx.made, grad_output)]
        while ctx.pending:
            pairs.append(ctx.pending.pop())
        made, gradients = zip(*pairs, strict=True)
        return None, None, *torch.autograd.grad(made, ctx.parameters, gradients, retain_graph=True)


def versions(tensors: list[Tensor]) -> tuple:
    """Changes whenever one of them does."""
    # casting a model puts other storage under the same parameter
    return tuple((id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad) for tensor in tensors)


def check_checkpointing(model: nn.Module) -> None:
    """Reentrant checkpointing goes backward once for every block, and the first of them would free the graph of the
    masks, which all blocks share."""
    for module in model.modules():
        # attributes of a module that transformers made checkpoint its forward pass
        function = vars(module).get("_gradient_checkpointing_func")
        reentrant = isinstance(function, partial) and function.keywords.get("use_reentrant")
        if reentrant and module.gradient_checkpointing:
            raise RuntimeError(
                "A search cannot go backward through reentrant checkpointing. Set "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`, in the `TrainingArguments` or where "
                "`gradient_checkpointing_enable` is called."
            )
