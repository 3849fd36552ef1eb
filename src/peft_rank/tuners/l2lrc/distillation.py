# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Distillation from the dense model without a second copy of it, and without a change of the loss that is reported.

The weights of the dense model are there: it is the model with its adapters off. Its final hidden states are taken in a
pass without gradient. In the pass that trains, the final hidden states go through an identity whose backward adds the
gradient of the distance, so that whatever follows them (a head, a loss, label smoothing) is none of our business.

Which distance, and of which layers, the paper's text does not tell; this one is our own choice: of each token the squared
error relative to the squared norm of the dense hidden state, averaged over tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ...calibration.targets import base_model
from ..search.layer import SearchLayer


class Distillation:
    """
    One model's distillation.

    Args:
        model (`transformers.PreTrainedModel`): The model. Its final hidden states are what the head of a language model
            gets, and what the encoder, or else the backbone, of another one returns.
        layers (`list[SearchLayer]`): The layers to switch off for the dense pass.
        weight (`float`): Of the distance.
        pretraining_weight (`float`): Of the gradient that comes from the model's own loss.

    Raises:
        ValueError: If the model is not of transformers' kind.
    """

    def __init__(self, model: nn.Module, layers: list[SearchLayer], weight: float, pretraining_weight: float) -> None:
        model = base_model(model)
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"`distillation_weight={weight}` needs a transformers model, got {type(model).__name__}. Set "
                "`distillation_weight=0`, which learns from the model's loss alone."
            )
        head = model.get_output_embeddings()
        self.model, self.layers, self.weight, self.pretraining_weight = model, layers, weight, pretraining_weight
        self.dense: Tensor | None = None
        self.tokens: Tensor | None = None
        # the micro-batch's part in the step
        self.share: Any = 1.0
        # how much the backward pass scales the loss; None where the model did not compute it
        self.scale: Tensor | None = None
        self.distance: Tensor | None = None
        self._handles = [
            _encoder(model).register_forward_hook(self._take_output)
            if head is None
            else head.register_forward_pre_hook(self._take_input),
            model.register_forward_hook(self._take_loss),
        ]
        self._state = "idle"
        self._told = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def prepare(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Run the dense model on a batch that the model is about to be trained on."""
        self.scale = None
        self.share = _share(kwargs.get("labels"), kwargs.get("num_items_in_batch"))
        self.tokens = _real_tokens(self.model, kwargs)
        with torch.no_grad(), switched_off(self.model, self.layers):
            self._state = "dense"
            try:
                self.model(*args, **kwargs)
            finally:
                # also when memory runs out: the next batch begins anew
                self._state = "idle"
        self._state = "training"

    def _take_input(self, module: nn.Module, args: tuple) -> tuple:
        return (self._take_hidden(args[0]), *args[1:])

    def _take_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        old, new = output[0], self._take_hidden(output[0])
        if isinstance(output, tuple):
            return _replaced(output, old, new)
        for key, value in list(output.items()):
            output[key] = _replaced(value, old, new)
        return output

    def _take_hidden(self, hidden: Tensor) -> Tensor:
        if self._state == "dense":
            self.dense = hidden.detach()
        elif self._state == "training":
            self._state = "loss"
            return _AddDistance.apply(hidden, self)
        return hidden

    def _take_loss(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._state == "training":
            raise RuntimeError(
                f"{type(self.model).__name__} does not use its head, so that its final hidden states are not known. Set "
                "`distillation_weight=0`, which learns from the model's loss alone."
            )
        if self._state != "loss":
            return output
        self._state = "idle"
        if isinstance(output, tuple):
            # of `return_dict=False`: the loss comes first, where there is one
            return (self._tapped(output[0]), *output[1:]) if output[0].dim() == 0 else output
        if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
            output["loss"] = self._tapped(output["loss"])
        return output

    def _tapped(self, loss: Tensor) -> Tensor:
        return _TakeScale.apply(loss, self) if loss.requires_grad else loss

    def gradient(self, hidden: Tensor) -> Tensor:
        """Of weight * distance with respect to the hidden states, (batch, tokens, d)."""
        work = torch.float32
        dense = self.dense.to(hidden.device, work)
        difference = hidden.to(work) - dense
        norms = dense.square().sum(-1).clamp(min=torch.finfo(work).tiny)  # (batch, tokens)
        real = torch.ones_like(norms) if self.tokens is None else self.tokens.to(norms)
        real = torch.ones_like(norms) if real.shape != norms.shape else real
        share = self.share.to(norms.device) if isinstance(self.share, Tensor) else self.share
        per_token = real / norms * (share / real.sum().clamp(min=1))
        self.distance = (difference.square().sum(-1) * per_token).sum()
        if self.scale is None and not self._told:
            self._told = True
            warnings.warn(
                "The loss is not the model's own, so that nothing tells by how much it is scaled: every backward adds the whole "
                "distillation. With gradient accumulation or a loss scale (fp16) let the model compute the loss (`labels`, no "
                "label smoothing), or set `distillation_weight=0`.",
                stacklevel=2,
            )
        scale = 1.0 if self.scale is None else self.scale.to(hidden.device, work)
        return (difference * (2 * self.weight * scale * per_token).unsqueeze(-1)).to(hidden.dtype)


class _AddDistance(Function):
    """The identity on hidden states; backward weighs the gradient of the loss and adds that of the distance."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, distillation: Distillation) -> Tensor:
        ctx.distillation = distillation
        ctx.save_for_backward(hidden)
        ctx.batch = distillation.dense, distillation.tokens, distillation.share
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):
        (hidden,) = ctx.saved_tensors
        distillation = ctx.distillation
        distillation.dense, distillation.tokens, distillation.share = ctx.batch
        return distillation.pretraining_weight * grad_output + distillation.gradient(hidden), None


class _TakeScale(Function):
    """The identity on the loss; backward notes by how much it was scaled: by fp16, accumulation or the number of
    processes."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, distillation: Distillation) -> Tensor:
        ctx.distillation = distillation
        return loss.clone()  # the Trainer scales it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):
        ctx.distillation.scale = grad_output
        return grad_output, None


def _encoder(model: PreTrainedModel) -> nn.Module:
    """What returns the final hidden states of a model without a language model's head; its pooler may come after."""
    if model.config.is_encoder_decoder:
        return model.get_decoder()
    return dict(model.base_model.named_children()).get("encoder", model.base_model)


def _replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """The value with the new tensor wherever the old one is: DeBERTa goes on with the last of all hidden states."""
    if isinstance(value, tuple):
        return tuple(_replaced(item, old, new) for item in value)
    return new if value is old else value


def _share(labels: Tensor | None, items: Any) -> Any:
    """Of a micro-batch in its optimizer step: that of its labels, where the Trainer tells how many there are in all."""
    return 1.0 if items is None or labels is None else (labels != -100).sum() / items


def _real_tokens(model: PreTrainedModel, kwargs: dict[str, Any]) -> Tensor | None:
    """(batch, tokens) of the final hidden states: 1 for tokens that are no padding; None for all."""
    if not model.config.is_encoder_decoder:
        return kwargs.get("attention_mask")
    mask, labels = kwargs.get("decoder_attention_mask"), kwargs.get("labels")
    return labels != -100 if mask is None and labels is not None else mask


@contextmanager
def switched_off(model: nn.Module, layers: list[SearchLayer]) -> Iterator[None]:
    """The dense model, in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        for module, mode in modes:
            module.training = mode
