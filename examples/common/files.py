# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Data sets from local files."""

from pathlib import Path

from datasets import Dataset, Value, load_dataset


def read_file(file: str) -> Dataset:
    """A json, jsonl or csv file, gzipped or not."""
    suffix = Path(file.removesuffix(".gz")).suffix
    if suffix in (".json", ".jsonl"):
        return load_dataset("json", data_files=file, split="train")
    if suffix == ".csv":
        # Otherwise the words "None", "NA" and "null" are read as missing text.
        return load_dataset("csv", data_files=file, split="train", keep_default_na=False)
    raise ValueError(f"{file}: expected a file that ends in .json, .jsonl or .csv.")


def check_files(train: str | None, validation: str | None, test: str | None) -> None:
    """Raise ValueError unless local files are complete: a training and a validation file, or none at all."""
    if (train is None) != (validation is None):
        raise ValueError("train_file and validation_file: give both, or neither for data from the Hub.")
    if train is None and test is not None:
        raise ValueError("test_file goes with train_file; for data from the Hub pass --do_predict.")


def text_columns(data: Dataset) -> list[str]:
    """The columns that hold strings."""
    return [name for name in data.column_names if data.features[name] in (Value("string"), Value("large_string"))]
