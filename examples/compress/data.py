# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Running text and labelled sentences from local files or the Hub, as token ids. Knows nothing of models."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, Value, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peft_rank.calibration.texts import read_texts


LOCAL = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


@dataclass
class DataArguments:
    """Which data. A local file ends in .txt or .jsonl (or .gz of it); anything else is a data set of the Hub:
    `owner/name`, `owner/name:split` or `owner/name/configuration:split`."""

    train_data: str = field(metadata={"help": "To calibrate on and, if asked for, to heal on."})
    eval_data: str = field(metadata={"help": "To measure on, before and after."})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns with text. Default: text, or for classification every text column."}
    )
    label_column: str = field(default="label", metadata={"help": "Classification: column with the class or score."})
    max_length: int = field(default=128, metadata={"help": "Classification: tokens after which a text is cut."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on the first so many examples."})


def load_rows(name: str, split: str) -> Dataset:
    """A local file of JSON lines, or a data set of the Hub."""
    if name.endswith((".jsonl", ".jsonl.gz")):
        return load_dataset("json", data_files=name, split="train")
    name, _, wanted = name.partition(":")
    owner, _, rest = name.partition("/")
    dataset, _, configuration = rest.partition("/")
    return load_dataset("/".join(filter(None, [owner, dataset])), configuration or None, split=wanted or split)


# --- running text -----------------------------------------------------------------------------------------------------


def load_texts(name: str, split: str, args: DataArguments) -> list[str]:
    """Texts in their order."""
    column = (args.text_columns or ["text"])[0]
    if name.endswith(LOCAL):
        return read_texts(name, column)
    return list(load_rows(name, split)[column])


def token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """All texts as one, (tokens,): joined by empty lines, as is usual for WikiText."""
    return torch.tensor(tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"])


class Blocks(torch.utils.data.Dataset):
    """Running text in pieces of equal length, for training."""

    def __init__(self, ids: Tensor, length: int) -> None:
        self.ids = ids[: len(ids) // length * length].view(-1, length)
        if not len(self.ids):
            raise ValueError(f"The text has {len(ids)} tokens, fewer than the {length} of one block.")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


# --- labelled sentences -----------------------------------------------------------------------------------------------


def load_labelled(name: str, split: str, limit: int | None) -> Dataset:
    rows = load_rows(name, split)
    return rows if limit is None else rows.take(limit)


def encode(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, label2id: dict[str, int], args: DataArguments
) -> Dataset:
    """Tokens and `labels`: numbers as they are, names as the model's classes."""
    columns = args.text_columns or [
        key
        for key, feature in rows.features.items()
        if feature in (Value("string"), Value("large_string")) and key != args.label_column
    ]
    if args.label_column not in rows.column_names or not 1 <= len(columns) <= 2:
        raise ValueError(
            f"text_columns {columns} and label_column {args.label_column!r} should be one or two columns and one more of "
            f"{rows.column_names}: set --text_columns and --label_column."
        )

    def number(value: Any) -> float | int:
        if not isinstance(value, str):
            return value
        if value not in label2id:
            raise ValueError(f"{args.label_column}: {value!r} is none of the model's classes {sorted(label2id)}.")
        return label2id[value]

    def encode_batch(batch: dict[str, list]) -> dict[str, list]:
        encoded = dict(tokenizer(*(batch[key] for key in columns), truncation=True, max_length=args.max_length))
        return encoded | {"labels": [number(value) for value in batch[args.label_column]]}

    return rows.map(encode_batch, batched=True, remove_columns=rows.column_names, desc="Tokenizing")


def write_json(path: str, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
