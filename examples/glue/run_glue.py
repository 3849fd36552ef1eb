# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.11"
# dependencies = ["peft_rank[examples]"]
# ///
"""
Fine-tune an encoder on a GLUE task, or on local files, with SalientLoRA, AdaLoRA, LoRA, rsLoRA or in full.

The paper's settings, one YAML file for each task; flags after the file override it:

    python examples/glue/run_glue.py examples/glue/configs/cola.yaml --output_dir out/cola --bf16 true

The same with AdaLoRA, over five seeds:

    python examples/glue/run_glue.py examples/glue/configs/cola.yaml --output_dir out/cola-adalora \
        --method adalora --seeds 5

Local files, a small encoder, a schedule in shares of the training steps:

    python examples/glue/run_glue.py --train_file train.jsonl --validation_file dev.jsonl --output_dir out/mine \
        --model_name_or_path google/electra-small-discriminator --learning_rate 1e-3 --num_train_epochs 3

A smoke test of the whole way:

    python examples/glue/run_glue.py examples/glue/configs/rte.yaml --output_dir out/smoke --max_steps 5 \
        --allocation_warmup_steps 1 --allocation_steps 3 --max_train_samples 64 --max_eval_samples 64

`output_dir` then holds the adapter with its pooler and classifier, `ranks.jsonl` and `results.json`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_rank import export_lora


sys.path.append(str(Path(__file__).parents[1]))  # where `common` is

from common import runs
from common.methods import MethodArguments, add_allocation
from common.runs import RunArguments, run_seeds, write_results
from data import DataArguments, Task, encode, find_task, is_labelled, load_splits
from heads import adapter_config, check_new_weights_are_kept, family_of
from metrics import glue_metric


@dataclass
class ModelArguments(RunArguments):
    """Which encoder, how often, and what to keep of it."""

    model_name_or_path: str = field(default="microsoft/deberta-v3-base", metadata={"help": "Encoder to fine-tune."})
    classifier_dropout: float | None = field(default=None, metadata={"help": "Dropout before the classifier."})


Arguments = tuple[ModelArguments, DataArguments, MethodArguments, TrainingArguments]


def parse(argv: list[str]) -> Arguments:
    """Flags, or a YAML file and flags that override it."""
    return runs.parse(argv, (ModelArguments, DataArguments, MethodArguments, TrainingArguments))


def load_model(args: ModelArguments, method_args: MethodArguments, task: Task) -> PreTrainedModel | PeftModel:
    """The pretrained encoder with a new head, and the adapter on it."""
    config = AutoConfig.from_pretrained(args.model_name_or_path, revision=args.model_revision)
    config.num_labels = max(1, len(task.labels))
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    if not task.is_regression:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: i for i, name in enumerate(task.labels)}
    if args.classifier_dropout is not None:
        setattr(config, family_of(config).dropout, args.classifier_dropout)
    # The DeBERTa-v3 checkpoint is in half precision, in which its weights cannot be trained.
    model, info = AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path,
        config=config,
        revision=args.model_revision,
        dtype=torch.float32,
        output_loading_info=True,
    )
    if method_args.method == "full":
        return model
    model = get_peft_model(model, adapter_config(method_args, model))
    check_new_weights_are_kept(model, sorted(info["missing_keys"]))
    return model


def metric_function(task_name: str | None, task: Task):
    """The Trainer's `compute_metrics`: the task's metrics, and their mean as `score`."""
    metric = glue_metric(task_name, task.is_regression)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        values = metric.compute(predictions=prediction.predictions, references=prediction.label_ids)
        return values | {"score": mean(values.values())}

    return compute


def make_trainer(
    args: Arguments,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    task: Task,
) -> Trainer:
    """A Trainer that evaluates on every validation split (MNLI has two) and allocates ranks."""
    _, data_args, method_args, training_args = args
    evaluation = {name.removeprefix("validation_"): d for name, d in data.items() if name.startswith("validation")}

    def predictions(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.squeeze(-1) if task.is_regression else logits.argmax(-1)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=evaluation if len(evaluation) > 1 else next(iter(evaluation.values())),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metric_function(data_args.task_name, task),
        preprocess_logits_for_metrics=predictions,
    )
    add_allocation(trainer, method_args)
    return trainer


def write_predictions(trainer: Trainer, split: str, data: Dataset, task: Task) -> None:
    """A tab-separated file in the form of a GLUE submission."""
    values = trainer.predict(data, metric_key_prefix=split).predictions.tolist()
    if task.submits_names and not task.is_regression:
        values = [task.labels[value] for value in values]
    rows = "".join(f"{i}\t{value}\n" for i, value in enumerate(values))
    Path(trainer.args.output_dir, f"predictions_{split}.tsv").write_text(
        "index\tprediction\n" + rows, encoding="utf-8"
    )


def run(args: Arguments) -> dict[str, Any]:
    """One training with one seed: everything that it writes is in `output_dir`, what it found is returned."""
    model_args, data_args, method_args, training_args = args
    set_seed(training_args.seed)  # the head and the adapter are drawn before the Trainer sets it
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    with training_args.main_process_first(desc="preparing the data"):
        raw = load_splits(data_args, with_test=training_args.do_predict or data_args.test_file is not None)
        task = find_task(data_args, raw["train"])
        data = DatasetDict({name: encode(d, task, tokenizer, data_args, is_labelled(name)) for name, d in raw.items()})
    model = load_model(model_args, method_args, task)
    trainer = make_trainer(args, model, tokenizer, data, task)
    report = runs.train(trainer, args)
    if model_args.export_lora is not None and trainer.is_world_process_zero():
        export_lora(model, model_args.export_lora)
    for split in data:
        if not is_labelled(split):
            write_predictions(trainer, split, data[split], task)
    return report


def main(argv: list[str]) -> None:
    args = parse(argv)
    write_results(args, run_seeds(run, args))


if __name__ == "__main__":
    main(sys.argv[1:])
