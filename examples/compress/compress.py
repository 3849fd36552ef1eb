# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.11"
# dependencies = ["peft_rank[examples]"]
# ///
"""
Compress a model, measure it before and after, heal it by training, measure it again, and save it.

A decoder: calibrated on text, measured by perplexity and, with `--lm_eval_tasks`, by lm-evaluation-harness:

    python examples/compress/compress.py examples/compress/configs/smollm2-135m.yaml --output_dir out/smollm2

An encoder that was fine-tuned for classification or regression, fine-tuned again after compression:

    python examples/compress/compress.py examples/compress/configs/bert-mrpc.yaml --output_dir out/bert-mrpc

Local files, any model; flags after a YAML file override it:

    python examples/compress/compress.py --model_name_or_path my-model --train_data train.jsonl --eval_data dev.jsonl \
        --ratio 0.8 --decomposition whitening --heal lora --max_steps 200 --output_dir out/mine

`output_dir` then holds the compressed model, which `peft_rank.load_compressed` loads, and `results.json`.
"""

import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from data import Blocks, DataArguments, encode, load_labelled, load_texts, token_ids, write_json
from healing import HealingArguments, add_allocation, finish, prepare
from peft import get_peft_model
from perplexity import perplexity
from searching import SearchArguments, search
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_rank import LowRankConfig, calibrate, load_compressed, save_compressed
from peft_rank.calibration.texts import text_batches
from peft_rank.reporting.compression import compressed_table, finish_compression
from peft_rank.tuners.lowrank.config import CompressionConfig


@dataclass
class ModelArguments:
    """Which model, and what for."""

    model_name_or_path: str = field(metadata={"help": "Model to compress: a folder, or a name on the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    task: Literal["language", "classification"] = field(
        default="language",
        metadata={"help": "A causal language model, or an encoder with a head; scores count as it."},
    )
    dtype: str = field(default="float32", metadata={"help": "Of the model. Training needs float32 or bfloat16."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to compress and measure."}
    )


@dataclass
class CompressionArguments(SearchArguments):
    """How it is compressed: fields of `LowRankConfig` and of the calibration, and whether ranks are learned."""

    ratio: float | None = field(default=None, metadata={"help": "Kept / dense parameters of the targeted modules."})
    rank: int | None = field(default=None, metadata={"help": "Or: the same rank everywhere."})
    decomposition: str = field(default="whitening", metadata={"help": "See `LowRankConfig`."})
    alpha: float = field(default=0.5, metadata={"help": "Power of the statistic."})
    allocation: Literal["uniform", "spectral"] = field(default="uniform", metadata={"help": "How the ratio is spent."})
    ratio_scope: Literal["targets", "model"] = field(default="targets", metadata={"help": "What the ratio counts."})
    rank_multiple: int | None = field(default=None, metadata={"help": "Ranks are multiples of this."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Default: all linears but the head."})
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Stay dense."})
    calibration_samples: int = field(default=256, metadata={"help": "Samples to calibrate on."})
    calibration_batch_size: int = field(default=1, metadata={"help": "Samples in a batch."})
    max_bytes: int | None = field(default=None, metadata={"help": "Memory for statistics; see `calibrate`."})

    def config(self, task: str) -> CompressionConfig:
        if self.search != "none":
            shared = ("decomposition", "alpha", "ratio_scope", "rank_multiple")
            # without a task type, which would train the head of a classifier along
            heads = [] if task == "language" else ["classifier", "score"]
            return self.search_config(
                target_ratio=self.ratio,
                target_modules=self.target_modules or "all-linear",
                exclude_modules=[*(self.exclude_modules or []), *heads] or None,
                **{name: vars(self)[name] for name in shared},
            )
        shared = ("ratio", "rank", "decomposition", "alpha", "allocation", "ratio_scope", "rank_multiple")
        return LowRankConfig(
            **{name: vars(self)[name] for name in shared},
            target_modules=self.target_modules or "all-linear",
            exclude_modules=self.exclude_modules,
            task_type="CAUSAL_LM" if task == "language" else "SEQ_CLS",
        )


@dataclass
class EvaluationArguments:
    """How a language model is measured, and the length of its samples."""

    context: int = field(default=2048, metadata={"help": "Tokens of a window of perplexity, and of a sample."})
    stride: int | None = field(default=None, metadata={"help": "Step of the window. Default: context."})
    max_eval_tokens: int | None = field(default=None, metadata={"help": "Measure on the first so many tokens."})
    lm_eval_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks of lm-evaluation-harness; needs `pip install peft_rank[eval]`."}
    )
    lm_eval_limit: int | None = field(default=None, metadata={"help": "Examples of each of these tasks."})

    def __post_init__(self):
        if self.lm_eval_tasks and find_spec("lm_eval") is None:
            raise ImportError('lm_eval_tasks needs lm-evaluation-harness: pip install "peft_rank[eval]"')


Arguments = tuple[
    ModelArguments, DataArguments, CompressionArguments, EvaluationArguments, HealingArguments, TrainingArguments
]


def parse(argv: list[str]) -> Arguments:
    """Flags, or a YAML file and flags that override it."""
    parser = HfArgumentParser(Arguments.__args__)
    if argv and argv[0].endswith((".yaml", ".yml")):
        values = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
        unknown = set(values) - {action.dest for action in parser._actions}
        if unknown:
            raise ValueError(f"{argv[0]}: unknown settings {sorted(unknown)}.")
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        parser.set_defaults(**values)
        argv = argv[1:]
    return parser.parse_args_into_dataclasses(argv)


# --- the two flows ----------------------------------------------------------------------------------------------------


class Language:
    """A decoder: batches, training data and figures of running text."""

    auto_class = AutoModelForCausalLM
    collator = None

    def __init__(self, args: Arguments, tokenizer: PreTrainedTokenizerBase) -> None:
        _, self.data, self.compression, self.evaluation, *_ = args
        self.tokenizer = tokenizer
        self.texts = load_texts(self.data.train_data, "train", self.data)[: self.data.max_train_samples]
        texts = load_texts(self.data.eval_data, "test", self.data)[: self.data.max_eval_samples]
        self.eval_ids = token_ids(texts, tokenizer)[: self.evaluation.max_eval_tokens]

    def batches(self) -> list[dict[str, torch.Tensor]]:
        return text_batches(
            self.texts,
            self.tokenizer,
            samples=self.compression.calibration_samples,
            length=self.evaluation.context,
            batch_size=self.compression.calibration_batch_size,
        )

    def train_set(self) -> torch.utils.data.Dataset:
        return Blocks(token_ids(self.texts, self.tokenizer), self.evaluation.context)

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        evaluation = self.evaluation
        found = {"perplexity": perplexity(model, self.eval_ids, context=evaluation.context, stride=evaluation.stride)}
        return found | (self._harness(model) if evaluation.lm_eval_tasks else {})

    def _harness(self, model: PreTrainedModel) -> dict[str, float]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=8)
        tasks, limit = self.evaluation.lm_eval_tasks, self.evaluation.lm_eval_limit
        results = simple_evaluate(model=wrapped, tasks=tasks, limit=limit)["results"]
        metrics = {"acc_norm,none": "acc_norm", "acc,none": "acc", "word_perplexity,none": "word_perplexity"}
        return {
            f"{task}/{short}": values[name]
            for task, values in results.items()
            for name, short in metrics.items()
            if name in values
        }


class Classification:
    """An encoder with a head: the same of labelled sentences."""

    auto_class = AutoModelForSequenceClassification

    def __init__(self, args: Arguments, tokenizer: PreTrainedTokenizerBase, label2id: dict[str, int]) -> None:
        _, data, self.compression, *_, training = args
        rows = load_labelled(data.train_data, "train", data.max_train_samples)
        self.train = encode(rows, tokenizer, label2id, data)
        self.eval = encode(
            load_labelled(data.eval_data, "validation", data.max_eval_samples), tokenizer, label2id, data
        )
        self.collator = DataCollatorWithPadding(tokenizer)
        self.batch_size = training.per_device_eval_batch_size

    def batches(self) -> DataLoader:
        rows = self.train.take(min(len(self.train), self.compression.calibration_samples))
        return DataLoader(rows, self.compression.calibration_batch_size, collate_fn=self.collator)

    def train_set(self) -> torch.utils.data.Dataset:
        return self.train

    @torch.no_grad()
    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        model.eval()
        outputs, labels = [], []
        for batch in DataLoader(self.eval, self.batch_size, collate_fn=self.collator):
            labels.append(batch.pop("labels").numpy())
            outputs.append(model(**batch.to(model.device)).logits.float().cpu().numpy())
        outputs, labels = np.concatenate(outputs), np.concatenate(labels)
        if outputs.shape[1] == 1:
            return {"pearson": float(np.corrcoef(outputs[:, 0], labels)[0, 1])}
        found = outputs.argmax(-1)
        figures = {"accuracy": accuracy_score(labels, found), "matthews": matthews_corrcoef(labels, found)}
        if outputs.shape[1] == 2:
            figures["f1"] = f1_score(labels, found)
        return {name: float(value) for name, value in figures.items()}


# --- the steps --------------------------------------------------------------------------------------------------------


def compress(model: PreTrainedModel, flow: Language | Classification, args: Arguments) -> PreTrainedModel:
    """Calibrate, decompose, search for ranks if asked to, and leave a plain model."""
    config = flow.compression.config(args[0].task)
    config.statistics = calibrate(model, flow.batches(), config=config, max_bytes=flow.compression.max_bytes)
    if flow.compression.search != "none":
        train_set = flow.train_set()
        return search(model, config, flow.compression, args[-1], train_set, flow.collator).to(args[0].device)
    # what follows is `finalize()` and `get_base_model()`, with the errors on record for the table
    return finish_compression(get_peft_model(model, config))


def heal(model: PreTrainedModel, flow: Language | Classification, args: Arguments) -> PreTrainedModel:
    """Train the compressed model; its size stays."""
    *_, healing, training = args
    model = prepare(model, healing)
    trainer = Trainer(model, training, train_dataset=flow.train_set(), data_collator=flow.collator)
    add_allocation(trainer, healing)
    trainer.train()
    return finish(model).to(args[0].device)


def check_worth_healing(before: dict[str, float], after: dict[str, float], most: float) -> None:
    """Training on top of a ruined model learns the new text, not what was lost."""
    grown = after.get("perplexity", 1.0) / before.get("perplexity", 1.0)
    if not grown <= most:
        raise ValueError(
            f"Perplexity grew from {before['perplexity']:.4g} to {after['perplexity']:.4g}, more than {most:g} times: too "
            "much is lost to be healed. Raise --ratio, choose a decomposition that knows the data (fisher_two_sided, "
            "whitening), calibrate on more of it, or raise --max_damage."
        )


def main(argv: list[str]) -> dict[str, Any]:
    args = parse(argv)
    model_args, data_args, compression, evaluation, healing, training = args
    set_seed(training.seed)
    source = {"revision": model_args.model_revision}
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **source)
    auto_class = {"language": Language, "classification": Classification}[model_args.task].auto_class
    model = auto_class.from_pretrained(model_args.model_name_or_path, dtype=model_args.dtype, **source)
    model = model.to(model_args.device)
    if model_args.task == "language":
        flow = Language(args, tokenizer)
    else:
        flow = Classification(args, tokenizer, model.config.label2id)

    figures = {"dense": flow.measure(model)}
    sizes = {"dense": model.num_parameters()}
    started = time.perf_counter()
    model = compress(model, flow, args)
    seconds = {"compression": round(time.perf_counter() - started, 1)}
    figures["compressed"] = flow.measure(model)
    sizes["compressed"] = model.num_parameters()
    # before healing, so that it is there should that fail
    save_compressed(model, training.output_dir, tokenizer=tokenizer)
    if healing.heal != "none":
        check_worth_healing(figures["dense"], figures["compressed"], healing.max_damage)
        started = time.perf_counter()
        model = heal(model, flow, args)
        seconds["healing"] = round(time.perf_counter() - started, 1)
        figures["healed"] = flow.measure(model)
        save_compressed(model, training.output_dir, tokenizer=tokenizer)
    # what was saved is what was measured
    last = list(figures)[-1]
    saved = flow.measure(load_compressed(training.output_dir, dtype=model_args.dtype).to(model_args.device))
    if saved != figures[last]:
        print(f"The saved model gives {saved}, the one in memory {figures[last]}.", file=sys.stderr)

    results = {
        "model": asdict(model_args),
        "data": asdict(data_args),
        "compression": asdict(compression),
        "evaluation": asdict(evaluation),
        "healing": asdict(healing),
        "training": {k: v for k, v in training.to_dict().items() if v != TrainingArguments().to_dict().get(k)},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "peft_rank")},
        "parameters": sizes,
        "seconds": seconds,
        "figures": figures,
    }
    write_json(str(Path(training.output_dir, "results.json")), results)
    print(f"\n{compressed_table(training.output_dir)}\n")
    for stage, values in figures.items():
        text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"{stage:<12}{sizes.get(stage, sizes['compressed']):>15,} parameters  {text}")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
