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

import copy
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from data import DataArguments, Task, encode, find_task, is_labelled, load_splits
from datasets import Dataset, DatasetDict
from methods import (
    MethodArguments,
    adapter_config,
    add_allocation,
    allocation_span,
    check_new_weights_are_kept,
    family_of,
    final_ranks,
)
from metrics import glue_metric
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from peft_rank import export_lora


@dataclass
class ModelArguments:
    """Which model, and what to keep of it."""

    model_name_or_path: str = field(default="microsoft/deberta-v3-base", metadata={"help": "Encoder to fine-tune."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the encoder."})
    classifier_dropout: float | None = field(default=None, metadata={"help": "Dropout before the classifier."})
    seeds: int = field(default=1, metadata={"help": "Number of runs, with seeds counted up from --seed."})
    export_lora: str | None = field(default=None, metadata={"help": "Also write a plain LoRA adapter to this folder."})


Arguments = tuple[ModelArguments, DataArguments, MethodArguments, TrainingArguments]


def parse(argv: list[str]) -> Arguments:
    """Flags, or a YAML file and flags that override it."""
    parser = HfArgumentParser((ModelArguments, DataArguments, MethodArguments, TrainingArguments))
    if argv and argv[0].endswith((".yaml", ".yml")):
        values = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
        unknown = set(values) - {action.dest for action in parser._actions}
        if unknown:
            raise ValueError(f"{argv[0]}: unknown settings {sorted(unknown)}.")
        parser.set_defaults(**values)
        argv = argv[1:]
    args = parser.parse_args_into_dataclasses(argv)
    model_args, _, method_args, training_args = args
    if model_args.export_lora is not None and method_args.method != "salientlora":
        raise ValueError(
            "export_lora is for --method salientlora; PEFT saves lora as such and cannot convert adalora."
        )
    if training_args.load_best_model_at_end and method_args.method == "adalora":
        raise ValueError(
            "load_best_model_at_end: PEFT cannot load an AdaLoRA checkpoint of other ranks; leave it off."
        )
    return args


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


def commit_of(args: ModelArguments) -> str | None:
    """The commit of the encoder on the Hub, so that a result can be traced; none for a local folder."""
    return extract_commit_hash(cached_file(args.model_name_or_path, CONFIG_NAME, revision=args.model_revision), None)


def trainable_parameters(model: PreTrainedModel | PeftModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def metric_values(logs: dict[str, Any]) -> dict[str, float]:
    """What an evaluation found, without its timings and without the prefix."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    found = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
    return {key: value for key, value in found.items() if not key.endswith(timings)}


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
    at_start = trainable_parameters(model)
    trainer = make_trainer(args, model, tokenizer, data, task)
    trained = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    metrics = metric_values(trainer.evaluate())
    trainer.save_model()
    if model_args.export_lora is not None and trainer.is_world_process_zero():
        export_lora(model, model_args.export_lora)
    for split in data:
        if not is_labelled(split):
            write_predictions(trainer, split, data[split], task)
    ranks = final_ranks(method_args, model)
    return {
        "seed": training_args.seed,
        "metrics": metrics,
        "history": [{"step": h["step"]} | metric_values(h) for h in trainer.state.log_history if metric_values(h)],
        "steps": trainer.state.global_step,
        "allocation": allocation_span(method_args, trainer.state.max_steps),
        "trainable_parameters": {"start": at_start, "end": trainable_parameters(model)},
        "total_rank": sum(ranks.values()),
        "ranks": ranks,
        "seconds": trained.metrics["train_runtime"],
        "checkpoint": commit_of(model_args),
    }


def summarize(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each metric over the seeds."""
    columns = {key: [run["metrics"][key] for run in runs] for key in runs[0]["metrics"]}
    return {
        key: {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}
        for key, values in columns.items()
    }


def finite(value: Any) -> Any:
    """The same with null in place of numbers that JSON does not have (the correlation of a constant)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: list[str]) -> None:
    model_args, data_args, method_args, training_args = parse(argv)
    root = Path(training_args.output_dir)
    runs = []
    for seed in range(training_args.seed, training_args.seed + model_args.seeds):
        once, model_once = copy.copy(training_args), copy.copy(model_args)
        once.seed = seed
        if model_args.seeds > 1:
            once.output_dir = str(root / f"seed-{seed}")
            if model_args.export_lora is not None:
                model_once.export_lora = str(Path(model_args.export_lora, f"seed-{seed}"))
        runs.append(run((model_once, data_args, method_args, once)))
    defaults = TrainingArguments().to_dict()
    results = {
        "task": data_args.task_name,
        "method": method_args.method,
        "model": asdict(model_args),
        "data": asdict(data_args),
        "hyperparameters": asdict(method_args),
        "training": {key: v for key, v in training_args.to_dict().items() if v != defaults[key]},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "peft_rank", "datasets")},
        "summary": summarize(runs),
        "runs": runs,
    }
    if training_args.process_index == 0:
        root.mkdir(parents=True, exist_ok=True)
        text = json.dumps(finite(results), indent=2, allow_nan=False)
        (root / "results.json").write_text(text + "\n", encoding="utf-8")
        print(f"\n{data_args.task_name or data_args.train_file}, {method_args.method}, {len(runs)} seed(s)")
        for name, value in results["summary"].items():
            print(f"  {name:<28}{value['mean']:9.4f} ± {value['std']:.4f}")
        for one in runs:
            start, end = one["trainable_parameters"].values()
            print(f"  seed {one['seed']}: total rank {one['total_rank']}, trainable parameters {start:,} -> {end:,}")


if __name__ == "__main__":
    main(sys.argv[1:])
