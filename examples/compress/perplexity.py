# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Perplexity of a causal language model on running text, with a sliding window. Knows models and token ids only.

A figure depends on the window: the more tokens before it a token can see, the better it is predicted. Never compare figures of
different `context` or `stride`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor, *, context: int = 2048, stride: int | None = None) -> float:
    """
    exp of the mean negative log-likelihood of every token but the first.

    Args:
        model ([`PreTrainedModel`]): A causal language model; runs in evaluation mode and is left in the mode it was in.
        ids (`Tensor`): Shape (tokens,).
        context (`int`, *optional*, defaults to 2048): Tokens that the model sees at once.
        stride (`int`, *optional*): The window moves on by so many tokens, and only tokens that are new to it count:
            those after the first window have at least `context - stride` tokens before them. By default `context`:
            windows side by side, of which the first tokens have few before them.

    Raises:
        ValueError: If there are fewer than two tokens, or `stride` is not between 1 and `context`.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be between 1 and context={context}, but is {stride}.")
    if len(ids) < 2:
        raise ValueError(f"Perplexity needs at least 2 tokens, got {len(ids)}.")
    training = model.training
    model.eval()
    total, counted, seen = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        window = ids[start : start + context]
        new = start + len(window) - seen  # tokens of this window that no window before it had
        seen = start + len(window)
        if len(window) > 1:
            logits = model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1]
            # the first token of a window has nothing before it, and is counted only where it is not new
            new = min(new, len(window) - 1)
            losses = F.cross_entropy(logits[-new:].float(), window[-new:].to(logits.device), reduction="sum")
            total, counted = total + losses.item(), counted + new
        if seen == len(ids):
            break
    model.train(training)
    return math.exp(total / counted)
