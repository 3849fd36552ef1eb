# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The eight GLUE tasks, or local files in their place: loading, label ids, tokens. Knows nothing of models."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from common.files import check_files, read_file, text_columns
from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """What a task looks like: its text columns and its classes (none: a score is predicted)."""

    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()
    label_ids: dict[Hashable, int] = field(default_factory=dict)  # value in the label column -> class
    submits_names: bool = True  # whether predictions are written as names of classes, or as their numbers

    @property
    def is_regression(self) -> bool:
        return not self.labels


def _glue(columns: str, labels: str = "", submits_names: bool = True) -> Task:
    names = tuple(labels.split())
    ids = {name: i for i, name in enumerate(names)} | {i: i for i in range(len(names))}
    return Task(tuple(columns.split()), names, ids, submits_names)


# Classes in the order of the Hub's label numbers; names or numbers as a GLUE submission wants them.
TASKS = {
    "cola": _glue("sentence", "unacceptable acceptable", submits_names=False),
    "sst2": _glue("sentence", "negative positive", submits_names=False),
    "mrpc": _glue("sentence1 sentence2", "not_equivalent equivalent", submits_names=False),
    "stsb": _glue("sentence1 sentence2"),
    "qqp": _glue("question1 question2", "not_duplicate duplicate", submits_names=False),
    "mnli": _glue("premise hypothesis", "entailment neutral contradiction"),
    "qnli": _glue("question sentence", "entailment not_entailment"),
    "rte": _glue("sentence1 sentence2", "entailment not_entailment"),
}


@dataclass
class DataArguments:
    """Which data: a GLUE task from the Hub, or local files."""

    task_name: str | None = field(default=None, metadata={"help": f"One of {', '.join(TASKS)}; sets the metric."})
    dataset_name: str = field(default="nyu-mll/glue", metadata={"help": "Data set with the GLUE tasks on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "Local json, jsonl or csv file in place of GLUE."})
    validation_file: str | None = field(default=None, metadata={"help": "Local file to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "Local file to write predictions for."})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two columns with text. Default: the task's, else every text column."}
    )
    label_column: str = field(default="label", metadata={"help": "Column with the class or the score."})
    max_length: int = field(default=128, metadata={"help": "Tokens after which a text is cut."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many of other splits."})

    def __post_init__(self):
        if self.task_name is not None and self.task_name not in TASKS:
            raise ValueError(f"task_name: {self.task_name!r} is none of {', '.join(TASKS)}.")
        check_files(self.train_file, self.validation_file, self.test_file)
        if self.train_file is None and self.task_name is None:
            raise ValueError("Give task_name for a GLUE task, or train_file and validation_file for local files.")


def is_labelled(split: str) -> bool:
    """Whether the labels of a split are used; GLUE's test splits have none."""
    return not split.startswith("test")


def load_splits(args: DataArguments, with_test: bool = True) -> DatasetDict:
    """The raw splits: train, one or more validation splits, test splits where asked for."""
    if args.train_file is None:
        splits = load_dataset(args.dataset_name, args.task_name, revision=args.dataset_revision)
    else:
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        splits = DatasetDict({name: read_file(file) for name, file in files.items() if file is not None})
    wanted = {name: data for name, data in splits.items() if with_test or is_labelled(name)}
    limits = {name: args.max_train_samples if name == "train" else args.max_eval_samples for name in wanted}
    return DatasetDict(
        {name: data if limits[name] is None else data.take(limits[name]) for name, data in wanted.items()}
    )


def find_task(args: DataArguments, train: Dataset) -> Task:
    """The GLUE task, or the columns and classes seen in the training file."""
    known = TASKS.get(args.task_name)
    others = [name for name in text_columns(train) if name != args.label_column]
    columns = tuple(args.text_columns or (known.columns if known else others))
    missing = [name for name in (*columns, args.label_column) if name not in train.column_names]
    if missing or len(columns) not in (1, 2):
        raise ValueError(
            f"text_columns {list(columns)} and label_column {args.label_column!r} should be one or two columns and one "
            f"more of {train.column_names}: set --text_columns and --label_column."
        )
    if known:
        return Task(columns, known.labels, known.label_ids, known.submits_names)
    values = sorted(set(train[args.label_column]))
    if isinstance(values[0], float):
        return Task(columns)
    return Task(columns, tuple(str(value) for value in values), {value: i for i, value in enumerate(values)})


def encode(
    data: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, args: DataArguments, labelled: bool = True
) -> Dataset:
    """Tokens, and `labels` as class numbers or scores where `labelled`."""

    def encode_batch(batch: dict[str, list]) -> dict[str, list]:
        texts = [batch[name] for name in task.columns]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=args.max_length))
        if labelled:
            values = batch[args.label_column]
            encoded["labels"] = [float(v) if task.is_regression else task.label_ids[v] for v in values]
        return encoded

    if labelled and not task.is_regression:
        unknown = set(data[args.label_column]) - set(task.label_ids)
        if unknown:
            raise ValueError(f"{args.label_column}: {sorted(unknown)} are not among the classes {list(task.labels)}.")
    return data.map(encode_batch, batched=True, remove_columns=data.column_names, desc="Tokenizing")
