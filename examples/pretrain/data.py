# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Text to pre-train on: WikiText-103 from the Hub, or local files; blocks of tokens. Knows nothing of models."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"


@dataclass
class DataArguments:
    """Which text, and how it is cut."""

    dataset_name: str = field(default="Salesforce/wikitext", metadata={"help": "Data set on the Hub."})
    dataset_config: str = field(default="wikitext-103-raw-v1", metadata={"help": "Its configuration."})
    train_files: list[str] | None = field(
        default=None,
        metadata={
            "help": "Local text in place of the Hub's: plain or JSON lines with a field `text`, gzipped or not."
        },
    )
    validation_files: list[str] | None = field(
        default=None, metadata={"help": "Local text to evaluate on; the last 5 % of the blocks by default."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer, a folder or a name on the Hub; without it one is trained on the local text."},
    )
    vocab_size: int = field(default=8192, metadata={"help": "Vocabulary of a tokenizer that is trained."})
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens of an example; the model's context if not given."}
    )
    max_train_blocks: int | None = field(default=None, metadata={"help": "Use the first so many blocks."})


class Blocks(Dataset):
    """(n, block) token ids, each both the input and the labels of a causal language model."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.tokens[index].long()
        return {"input_ids": ids, "labels": ids}


def read_texts(path: str | Path) -> Iterator[str]:
    """The texts of a file: one a line of JSON, or all of it."""
    path = Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        if ".json" in path.name:
            yield from (json.loads(line)["text"] for line in file if line.strip())
        else:
            yield file.read()


def load_texts(args: DataArguments, split: str) -> list[str] | None:
    """The texts of `"train"` or `"validation"`; None if there is nothing for it."""
    files = args.train_files if split == "train" else args.validation_files
    if files:
        return list(chain.from_iterable(read_texts(file) for file in files))
    if args.train_files:
        return None
    from datasets import load_dataset

    return load_dataset(args.dataset_name, args.dataset_config, split=split)["text"]


def load_tokenizer(args: DataArguments, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that was asked for, or GPT-2's kind of tokenizer trained on `texts`."""
    if args.tokenizer_name is not None:
        return AutoTokenizer.from_pretrained(args.tokenizer_name)
    if not args.train_files:
        raise ValueError("Give tokenizer_name: a tokenizer is trained on local files only. The paper's is gpt2.")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, args.vocab_size, min_frequency=2, special_tokens=[END_OF_TEXT])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def to_blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block: int) -> torch.Tensor:
    """All texts one after the other, cut into blocks, (n, block) int32; the rest is dropped."""
    backend = tokenizer.backend_tokenizer
    ids: list[int] = []
    texts = iter(texts)
    while batch := list(islice(texts, 1024)):
        ids.extend(chain.from_iterable(encoding.ids for encoding in backend.encode_batch(batch)))
    tokens = torch.tensor(ids, dtype=torch.int32)
    if len(tokens) < block:
        raise ValueError(
            f"The text has {len(tokens)} tokens, less than one block of {block}. Give more, or lower block_size."
        )
    return tokens[: len(tokens) // block * block].view(-1, block)


def load_blocks(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, train: list[str], block: int
) -> tuple[Blocks, Blocks]:
    """Blocks to train on and to evaluate on."""
    tokens = to_blocks(train, tokenizer, block)
    held_out = load_texts(args, "validation")
    if held_out is None:
        count = max(1, len(tokens) // 20)
        tokens, validation = tokens[:-count], tokens[-count:]
    else:
        validation = to_blocks(held_out, tokenizer, block)
    return Blocks(tokens[: args.max_train_blocks]), Blocks(validation)
