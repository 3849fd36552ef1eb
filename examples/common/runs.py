# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What the scripts do around a training: flags and YAML files, several seeds, and the results that they leave."""

import copy
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from peft import PeftModel
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from .methods import MethodArguments, allocation_span, final_ranks


@dataclass
class RunArguments:
    """Which model, how often, and what to keep of it."""

    model_name_or_path: str = field(metadata={"help": "Model to fine-tune: a folder, or a name on the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    seeds: int = field(default=1, metadata={"help": "Number of runs, with seeds counted up from --seed."})
    export_lora: str | None = field(default=None, metadata={"help": "Also write a plain LoRA adapter to this folder."})


# Which model, which data, which method, how it is trained.
Arguments = tuple[RunArguments, Any, MethodArguments, TrainingArguments]


def parse(argv: list[str], classes: Sequence[type], **defaults: Any) -> Arguments:
    """Flags, or a YAML file and flags that override it; `defaults` are overridden by both."""
    parser = HfArgumentParser(classes)
    parser.set_defaults(**defaults)
    if argv and argv[0].endswith((".yaml", ".yml")):
        values = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
        actions = {action.dest: action for action in parser._actions}
        unknown = set(values) - set(actions)
        if unknown:
            raise ValueError(f"{argv[0]}: unknown settings {sorted(unknown)}.")
        parser.set_defaults(**values)
        for name in values:
            actions[name].required = False
        argv = argv[1:]
    args = parser.parse_args_into_dataclasses(argv)
    run_args, _, method_args, training_args = args
    if run_args.export_lora is not None and method_args.method != "salientlora":
        raise ValueError(
            "export_lora is for --method salientlora; PEFT saves lora as such and cannot convert adalora."
        )
    if run_args.export_lora is not None and holds_parts(training_args):
        raise ValueError(
            "export_lora: under ZeRO-3 and FSDP no process holds whole factors; leave it out, and run `peft-rank export "
            f"{training_args.output_dir} {run_args.export_lora}` afterwards."
        )
    if training_args.load_best_model_at_end and method_args.method == "adalora":
        raise ValueError(
            "load_best_model_at_end: PEFT cannot load an AdaLoRA checkpoint of other ranks; leave it off."
        )
    return args


def holds_parts(args: TrainingArguments) -> bool:
    """Whether every process holds a part of the weights only."""
    plugin = args.deepspeed_plugin
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # as accelerate says it
    return fsdp or (plugin is not None and plugin.zero_stage == 3)


def commit_of(args: RunArguments) -> str | None:
    """The commit of the model on the Hub, so that a result can be traced; none for a local folder."""
    return extract_commit_hash(cached_file(args.model_name_or_path, CONFIG_NAME, revision=args.model_revision), None)


def trainable_parameters(model: PreTrainedModel | PeftModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def metric_values(logs: dict[str, Any], prefix: str = "eval") -> dict[str, float]:
    """What an evaluation found, without its timings and without the prefix."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    found = {key.removeprefix(f"{prefix}_"): v for key, v in logs.items() if key.startswith(f"{prefix}_")}
    return {key: value for key, value in found.items() if not key.endswith(timings)}


def train(trainer: Trainer, args: Arguments) -> dict[str, Any]:
    """Train, evaluate and save; what is to be reported of it."""
    run_args, _, method_args, training_args = args
    model = trainer.model
    at_start = trainable_parameters(model)
    trained = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    metrics = metric_values(trainer.evaluate())
    trainer.save_model()
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
        "checkpoint": commit_of(run_args),
    }


def run_seeds(run: Callable[[Arguments], dict[str, Any]], args: Arguments) -> list[dict[str, Any]]:
    """What `run` reports with each seed. Several seeds write to a folder each."""
    run_args, data_args, method_args, training_args = args
    runs = []
    for seed in range(training_args.seed, training_args.seed + run_args.seeds):
        once, run_once = copy.copy(training_args), copy.copy(run_args)
        once.seed = seed
        if run_args.seeds > 1:
            once.output_dir = str(Path(training_args.output_dir, f"seed-{seed}"))
            if run_args.export_lora is not None:
                run_once.export_lora = str(Path(run_args.export_lora, f"seed-{seed}"))
        runs.append(run((run_once, data_args, method_args, once)))
    return runs


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


def write_results(args: Arguments, runs: list[dict[str, Any]]) -> None:
    """`results.json` in the output folder, and a few lines on the screen."""
    run_args, data_args, method_args, training_args = args
    if training_args.process_index != 0:
        return
    # TRL's defaults need a GPU
    defaults = type(training_args)(use_cpu=training_args.use_cpu).to_dict()
    results = {
        "task": data_args.task_name,
        "method": method_args.method,
        "model": asdict(run_args),
        "data": asdict(data_args),
        "hyperparameters": asdict(method_args),
        "training": {key: v for key, v in training_args.to_dict().items() if v != defaults[key]},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "peft_rank", "datasets")},
        "summary": summarize(runs),
        "runs": runs,
    }
    root = Path(training_args.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(results), indent=2, allow_nan=False)
    (root / "results.json").write_text(text + "\n", encoding="utf-8")
    print(f"\n{data_args.task_name or data_args.train_file}, {method_args.method}, {len(runs)} seed(s)")
    for name, value in results["summary"].items():
        print(f"  {name:<28}{value['mean']:9.4f} ± {value['std']:.4f}")
    for one in runs:
        start, end = one["trainable_parameters"].values()
        print(f"  seed {one['seed']}: total rank {one['total_rank']}, trainable parameters {start:,} -> {end:,}")
