# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Instructions and their answers as conversations: Alpaca from the Hub, or local files. Knows nothing of models."""

from dataclasses import dataclass, field
from typing import Any

from common.files import read_file
from datasets import Dataset, DatasetDict, load_dataset


@dataclass
class DataArguments:
    """Which data: a set from the Hub, or local files."""

    dataset_name: str = field(default="tatsu-lab/alpaca", metadata={"help": "Data set on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "Local json, jsonl or csv file in place of it."})
    validation_file: str | None = field(default=None, metadata={"help": "Local file to evaluate on."})
    validation_examples: int = field(
        default=500, metadata={"help": "The last so many training examples are for evaluation if nothing else is."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many others."})

    def __post_init__(self):
        if self.validation_file is not None and self.train_file is None:
            raise ValueError("validation_file goes with train_file.")
        if self.validation_examples < 1:
            raise ValueError(f"validation_examples must be at least 1, but is {self.validation_examples}.")

    @property
    def task_name(self) -> str | None:
        return self.dataset_name if self.train_file is None else None


def load_splits(args: DataArguments) -> DatasetDict:
    """`train` and `validation`, each with the columns `prompt` and `completion`."""
    if args.train_file is None:
        splits = load_dataset(args.dataset_name, revision=args.dataset_revision)
        train, validation = splits["train"], splits.get("validation")
    else:
        train = read_file(args.train_file)
        validation = None if args.validation_file is None else read_file(args.validation_file)
    if validation is None:
        if len(train) <= args.validation_examples:
            raise ValueError(
                f"validation_examples={args.validation_examples} of {len(train)} examples leave none to train on: set "
                "--validation_examples lower, or give --validation_file."
            )
        first = len(train) - args.validation_examples
        train, validation = train.take(first), train.skip(first)
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    splits = {"train": train, "validation": validation}
    return DatasetDict({name: to_conversations(data.take(limits[name] or len(data))) for name, data in splits.items()})


def to_conversations(data: Dataset) -> Dataset:
    """Rows with `instruction`, `input` and `output` (Alpaca), or with `messages`, as `prompt` and `completion`: what was
    said before, and the last answer, which alone is learned."""
    columns = set(data.column_names)
    if {"prompt", "completion"} <= columns:
        return data.select_columns(["prompt", "completion"])
    if "messages" in columns:
        convert = from_messages
    elif {"instruction", "output"} <= columns:
        convert = from_instruction
    else:
        raise ValueError(
            f"The data has the columns {sorted(columns)}: expected instruction, input and output; messages; or prompt and "
            "completion."
        )
    return data.map(convert, remove_columns=data.column_names, desc="Reading conversations")


def from_instruction(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    question = "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def from_messages(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    *prompt, answer = row["messages"]
    if answer["role"] != "assistant" or not prompt:
        raise ValueError(f"A conversation must end with an answer of the assistant, but one ends with {answer}.")
    return {"prompt": prompt, "completion": [answer]}
