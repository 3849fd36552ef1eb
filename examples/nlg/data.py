# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Pairs of texts, from the Hub or from local files: loading, respelling, tokens. Knows nothing of models."""

from dataclasses import dataclass, field
from typing import NamedTuple

from common.files import check_files, read_file, text_columns
from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase


class Task(NamedTuple):
    """Where a data set is found on the Hub in parquet form, and which columns hold the source and the target."""

    dataset: str
    config: str | None
    revision: str | None
    source: str
    target: str


TASKS = {
    # The main branch may hold a script, which `datasets` no longer runs; the Hub converts every data set to this branch.
    "xsum": Task("EdinburghNLP/xsum", None, "refs/convert/parquet", "document", "summary"),
    "cnn_dailymail": Task("abisee/cnn_dailymail", "3.0.0", None, "article", "highlights"),
}


@dataclass
class DataArguments:
    """Which data: a known task, another data set on the Hub, or local files; and how it is read."""

    task_name: str | None = field(default=None, metadata={"help": f"One of {', '.join(TASKS)}; sets the columns."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, if not the task's."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit."})
    train_file: str | None = field(default=None, metadata={"help": "Local json, jsonl or csv file, also as .gz."})
    validation_file: str | None = field(default=None, metadata={"help": "Local file to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "Local file to write predictions for."})
    source_column: str | None = field(
        default=None, metadata={"help": "Column to read. Default: the task's, else the first that holds text."}
    )
    target_column: str | None = field(
        default=None, metadata={"help": "Column to write. Default: the task's, else the second that holds text."}
    )
    source_prefix: str = field(default="", metadata={"help": "Put before every source, as T5 was taught."})
    max_source_length: int = field(default=1024, metadata={"help": "Tokens after which a source is cut."})
    max_target_length: int = field(
        default=128, metadata={"help": "Tokens after which a target is cut in training, and generation ends."}
    )
    respell: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Characters of the targets that the model writes otherwise, as new=old: Q=O writes O for Q."
        },
    )
    metrics: list[str] = field(default_factory=lambda: ["rouge"], metadata={"help": "Names in metrics.py."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many of other splits."})

    def __post_init__(self):
        if self.task_name is not None and self.task_name not in TASKS:
            raise ValueError(f"task_name: {self.task_name!r} is none of {', '.join(TASKS)}.")
        check_files(self.train_file, self.validation_file, self.test_file)
        if self.train_file is None and self.task_name is None and self.dataset_name is None:
            raise ValueError(
                "Give task_name or dataset_name for data from the Hub, or train_file and validation_file for local files."
            )
        wrong = [pair for pair in self.respell if len(pair) != 3 or pair[1] != "="]
        if wrong:
            raise ValueError(f"respell: {wrong} should be pairs of single characters such as Q=O.")
        for side in (0, 2):
            if len({pair[side] for pair in self.respell}) < len(self.respell):
                raise ValueError(
                    f"respell: a character occurs twice on one side of {self.respell}; then nobody could read it back."
                )

    @property
    def respelling(self) -> dict[int, str]:
        """Character of the data -> character that the model writes, for `str.translate`."""
        return str.maketrans({pair[0]: pair[2] for pair in self.respell})

    @property
    def reading(self) -> dict[int, str]:
        """The way back."""
        return str.maketrans({pair[2]: pair[0] for pair in self.respell})


def load_splits(args: DataArguments, with_test: bool = True) -> DatasetDict:
    """The raw splits: train, validation, and test where asked for."""
    if args.train_file is None:
        known = TASKS.get(args.task_name) if args.dataset_name is None else None
        name, config, revision = known[:3] if known else (args.dataset_name, None, None)
        splits = load_dataset(name, args.dataset_config or config, revision=args.dataset_revision or revision)
    else:
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        splits = {name: read_file(file) for name, file in files.items() if file is not None}
    missing = {"train", "validation"} - set(splits)
    if missing:
        raise ValueError(
            f"{args.dataset_name} has no {sorted(missing)} split: pass --train_file and --validation_file."
        )
    wanted = {name: data for name, data in splits.items() if with_test or name != "test"}
    limits = {name: args.max_train_samples if name == "train" else args.max_eval_samples for name in wanted}
    return DatasetDict(
        {name: data if limits[name] is None else data.take(limits[name]) for name, data in wanted.items()}
    )


def find_columns(args: DataArguments, train: Dataset) -> tuple[str, str]:
    """Names of the columns with the source and the target."""
    known, texts = TASKS.get(args.task_name), [*text_columns(train), None, None]
    source = args.source_column or (known.source if known else texts[0])
    target = args.target_column or (known.target if known else texts[1])
    if source not in train.column_names or target not in train.column_names or source == target:
        raise ValueError(
            f"source_column {source!r} and target_column {target!r} should be two of {train.column_names}: set "
            "--source_column and --target_column."
        )
    return source, target


def encode(
    data: Dataset,
    columns: tuple[str, str],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    args: DataArguments,
    cut_targets: bool,
) -> Dataset:
    """
    Tokens of the sources, and of the targets as `labels`, where there are any.

    Args:
        columns: Names of the columns with the sources and the targets.
        tokenizers: Of the sources and of the targets.
        cut_targets: Whether targets end after `max_target_length`. In evaluation they should not: a summary is compared
            with the whole reference.
    """
    source, target = columns
    reader, writer = tokenizers

    def encode_batch(batch: dict[str, list]) -> dict[str, list]:
        texts = [args.source_prefix + text for text in batch[source]]
        encoded = dict(reader(texts, truncation=True, max_length=args.max_source_length))
        if target in batch:
            written = [text.translate(args.respelling) for text in batch[target]]
            length = args.max_target_length if cut_targets else None
            encoded["labels"] = writer(text_target=written, truncation=True, max_length=length)["input_ids"]
        return encoded

    if target in data.column_names and args.respell:
        _check_readable(data[target], args)
    return data.map(encode_batch, batched=True, remove_columns=data.column_names, desc="Tokenizing")


def _check_readable(targets: list[str], args: DataArguments) -> None:
    found = {character for text in targets for character in text}
    unreadable = [pair for pair in args.respell if pair[2] in found and ord(pair[2]) not in args.respelling]
    if unreadable:
        raise ValueError(
            f"respell: {unreadable} cannot be read back, because the targets hold the second characters too."
        )
