# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""From texts to batches that calibrate a model. Knows files and tokenizers, not models."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


CHARACTERS = 12  # a token of ordinary text is shorter, on average


def read_texts(path: str | Path, column: str = "text") -> list[str]:
    """
    Texts of a local file: a `.txt` is one, a `.jsonl` holds one a line; either may be compressed (`.gz`).

    Args:
        path (`str` or `Path`): The file.
        column (`str`, *optional*, defaults to `"text"`): Key of the text in a line of JSON.

    Raises:
        ValueError: If the file is of another kind, or a line has no such text.
    """
    path = Path(path)
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    kind = suffixes[-1] if suffixes else ""
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: expected a file that ends in .txt or .jsonl, or in either with .gz.")
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    if kind == ".txt":
        return [text]
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) and isinstance(row.get(column), str) for row in rows):
        raise ValueError(f"{path}: every line must be a JSON object with a text in {column!r}. Name another column.")
    return [row[column] for row in rows]


def text_batches(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 256,
    length: int = 2048,
    batch_size: int = 1,
) -> list[dict[str, Tensor]]:
    """
    Stretches of running text for a causal language model, spread evenly over the texts and without padding.

    Args:
        texts (`Sequence[str]`): Joined by empty lines.
        tokenizer ([`PreTrainedTokenizerBase`]): The model's.
        samples (`int`, *optional*, defaults to 256): How many at most; fewer if the texts end before.
        length (`int`, *optional*, defaults to 2048): Tokens of each.
        batch_size (`int`, *optional*, defaults to 1): Stretches in a batch.

    Returns:
        `list[dict[str, Tensor]]`: `input_ids`, `attention_mask` and `labels`, each (batch_size, length).

    Raises:
        ValueError: If the texts have fewer than `length` tokens.
    """
    text = "\n\n".join(texts)
    stride = len(text) // samples
    ends = min(stride, length * CHARACTERS)
    starts = range(0, stride * samples, stride) if stride else ()
    rows = [_tokens(tokenizer, text[start : start + ends])[:length] for start in starts]
    if not rows or min(map(len, rows)) < length:
        # too little text for so many: all of it, one after the other
        tokens = _tokens(tokenizer, text)
        rows = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)][:samples]
    if not rows:
        raise ValueError(
            f"The text has {len(_tokens(tokenizer, text))} tokens, fewer than the {length} of one sample. Give more text, or "
            "a smaller length."
        )
    ids = torch.tensor(rows)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part.clone()}
        for part in ids.split(batch_size)
    ]


def sentence_batches(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 256,
    length: int = 128,
    batch_size: int = 1,
) -> list[dict[str, Any]]:
    """
    Single texts for an encoder, evenly spread, with the tokens that it expects around them; without labels.

    Args:
        texts, tokenizer, samples, length, batch_size: As in [`text_batches`]; longer texts are cut.

    Raises:
        ValueError: If all texts are empty.
    """
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("All texts are empty.")
    chosen = [texts[i * len(texts) // samples] for i in range(samples)] if len(texts) > samples else texts
    parts = (chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size))
    settings = {"truncation": True, "max_length": length, "padding": batch_size > 1, "return_tensors": "pt"}
    return [dict(tokenizer(part, **settings)) for part in parts]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
