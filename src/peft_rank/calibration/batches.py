# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Batches on their way into a model: where they go, which of their tokens are real, how they fall into samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel


Batch = dict[str, Any]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without trainable parameters, as it was before at the end."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def device_of(model: nn.Module) -> torch.device:
    """Where inputs go: to the first parameter that is in memory."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def moved(batches: Iterable[Mapping[str, Any]], device: torch.device, label: str, progress: bool) -> Iterator[Batch]:
    """The batches on a device, with a progress bar.

    Raises:
        TypeError: If a batch is not a mapping.
        ValueError: If there are none.
    """
    total = len(batches) if isinstance(batches, Sized) else None
    empty = True
    for batch in tqdm(batches, desc=label, total=total, disable=not progress):
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"`batches` must yield dictionaries of a model's inputs, got {type(batch).__name__}. Give a DataLoader "
                "with a collator, or `[tokenizer(text, return_tensors='pt') for text in texts]`."
            )
        empty = False
        yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    if empty:
        raise ValueError(
            "`batches` is empty: give at least one batch. A generator can be read only once; give a list or a DataLoader."
        )


def samples_in(batch: Batch) -> int:
    """Length of the first dimension of the inputs."""
    return next((value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim), 1)


def singles(batch: Batch) -> Iterator[Batch]:
    """The samples of a batch, each as a batch of one."""
    size = samples_in(batch)
    for i in range(size):
        yield {
            key: value[i : i + 1] if isinstance(value, Tensor) and value.ndim and value.shape[0] == size else value
            for key, value in batch.items()
        }


def equal_shares(batch: Batch) -> bool:
    """Whether every sample has the same part in a mean loss: one label each, or as many labelled tokens, first token
    counted or not."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return False
    labelled = (labels != -100).flatten(1) if labels.ndim > 1 else (labels != -100)[:, None]  # (n, tokens)
    counts, first = labelled.sum(1), labelled[:, 0]
    return bool(((counts == counts[0]) & (first == first[0])).all())


class TokenMask:
    """
    Which tokens of the present batch are real.

    Encoders and decoder-only models see the tokens of the batch's `attention_mask`. A decoder behind an encoder sees those
    of `decoder_attention_mask` or, without one, those that `labels` does not set to -100, and in cross-attention those of
    the encoder. Inputs that are not laid out as (batch, token) or (batch * token), such as pooled sentences and tokens
    routed to an expert, are not masked.

    Args:
        model (`torch.nn.Module`): The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.encoder: set[nn.Module] = set()
        self.decoder: nn.Module | None = None
        if isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder:
            self.encoder = set(model.get_encoder().modules())
            self.decoder = model.get_decoder()
        self._masks: dict[str, tuple[Tensor, Tensor]] = {}  # (batch, token) bool, and the places of the real ones
        self._memory: int | None = None
        self._size = 0
        self.unmasked: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[TokenMask]:
        """Take note of what the decoder gets from the encoder."""
        if self.decoder is None:
            yield self
            return
        handle = self.decoder.register_forward_pre_hook(self._remember, with_kwargs=True)
        try:
            yield self
        finally:
            handle.remove()

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states = kwargs.get("encoder_hidden_states")
        self._memory = states.data_ptr() if isinstance(states, Tensor) else None

    def start(self, batch: Batch) -> None:
        """Read the masks of the next batch."""
        masks = {"encoder": batch.get("attention_mask"), "decoder": batch.get("decoder_attention_mask")}
        labels = batch.get("labels")
        if masks["decoder"] is None and isinstance(labels, Tensor) and labels.ndim == 2:
            masks["decoder"] = labels != -100
        self._size, self._memory, self._masks = samples_in(batch), None, {}
        for side, mask in masks.items():
            if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
                mask = mask.bool()
                self._masks[side] = mask, mask.flatten().nonzero().flatten()

    def _find(self, name: str, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
        side = "encoder"
        if self.decoder is not None and module not in self.encoder and x.data_ptr() != self._memory:
            side = "decoder"
        found = self._masks.get(side)
        if found is None:
            return None
        mask = found[0]
        if x.shape[:-1] == mask.shape or (x.ndim == 2 and x.shape[0] == mask.numel()):
            return found
        if x.ndim == 2 and x.shape[0] != self._size:
            self.unmasked.add(name)
        return None

    def rows(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        """The real tokens of an input, (tokens, in)."""
        found, rows = self._find(name, module, x), x.detach().flatten(0, -2)
        return rows if found is None else rows.index_select(0, found[1].to(x.device))

    def silenced(self, name: str, module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        """The input with zeros for padding, in its own shape, and the number of real tokens."""
        found, x = self._find(name, module, x), x.detach()
        if found is None:
            return x, x[..., 0].numel()
        padding = ~found[0].to(x.device).view(*x.shape[:-1], 1)
        return x.masked_fill(padding, 0), len(found[1])
