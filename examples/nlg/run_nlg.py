# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.11"
# dependencies = ["peft_rank[examples]"]
# ///
"""
Fine-tune BART, T5 or their like on XSum, CNN/DailyMail or local pairs of texts, with SalientLoRA, AdaLoRA, LoRA, rsLoRA or
in full, and measure what the model generates.

The paper's settings, one YAML file for each model and data set; flags after the file override it:

    python examples/nlg/run_nlg.py examples/nlg/configs/bart-large-xsum.yaml --output_dir out/xsum --bf16 true

The same with LoRA, over five seeds:

    python examples/nlg/run_nlg.py examples/nlg/configs/bart-large-xsum.yaml --output_dir out/xsum-lora \
        --method lora --seeds 5

Local files, a schedule in shares of the training steps:

    python examples/nlg/run_nlg.py --model_name_or_path google-t5/t5-small --train_file train.jsonl \
        --validation_file dev.jsonl --source_prefix "summarize: " --learning_rate 1e-3 --output_dir out/mine

A smoke test of the whole way:

    python examples/nlg/run_nlg.py examples/nlg/configs/t5-base-xsum.yaml --output_dir out/smoke --max_steps 5 \
        --allocation_warmup_steps 1 --allocation_steps 3 --max_train_samples 64 --max_eval_samples 16

`output_dir` then holds the adapter, `ranks.jsonl` and `results.json`.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from peft import PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.trainer_utils import PredictionOutput

from peft_rank import export_lora


sys.path.append(str(Path(__file__).parents[1]))  # where `common` is

from common import runs
from common.methods import MethodArguments, adapter_config, add_allocation
from common.runs import RunArguments, run_seeds, write_results
from data import DataArguments, encode, find_columns, load_splits
from metrics import text_metric


# Every linear layer of the blocks: self-attention, cross-attention and feed-forward.
_BART = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
_T5 = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]
TARGETS = {"bart": _BART, "mbart": _BART, "pegasus": _BART, "t5": _T5, "mt5": _T5}


@dataclass
class ModelArguments(RunArguments):
    """Which model, how often, what to keep of it, and how it generates."""

    model_name_or_path: str = field(default="facebook/bart-large", metadata={"help": "Model to fine-tune."})
    target_tokenizer_subfolder: str | None = field(
        default=None,
        metadata={"help": "Folder in the model's with the tokenizer of the targets, if they have another."},
    )
    length_penalty: float | None = field(default=None, metadata={"help": "Of beam search. Default: the checkpoint's."})
    generation_min_length: int | None = field(default=None, metadata={"help": "In tokens. Default: the checkpoint's."})
    no_repeat_ngram_size: int | None = field(default=None, metadata={"help": "Default: the checkpoint's."})


Arguments = tuple[ModelArguments, DataArguments, MethodArguments, Seq2SeqTrainingArguments]
Tokenizers = tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]


def parse(argv: list[str]) -> Arguments:
    """Flags, or a YAML file and flags that override it."""
    classes = (ModelArguments, DataArguments, MethodArguments, Seq2SeqTrainingArguments)
    args = runs.parse(argv, classes, predict_with_generate=True)
    _, data_args, _, training_args = args
    if training_args.generation_max_length is None:
        training_args.generation_max_length = data_args.max_target_length
    text_metric(data_args.metrics)  # a wrong name is refused before anything is loaded
    return args


def load_tokenizers(args: ModelArguments) -> Tokenizers:
    """Of the sources and of the targets, mostly the same."""
    where = {"pretrained_model_name_or_path": args.model_name_or_path, "revision": args.model_revision}
    sources = AutoTokenizer.from_pretrained(**where)
    if args.target_tokenizer_subfolder is None:
        return sources, sources
    return sources, AutoTokenizer.from_pretrained(**where, subfolder=args.target_tokenizer_subfolder)


def load_model(args: Arguments) -> PreTrainedModel | PeftModel:
    """The pretrained model, set to generate as it will be measured, and the adapter on it."""
    model_args, _, method_args, training_args = args
    model = AutoModelForSeq2SeqLM.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, dtype=torch.float32
    )
    generation = {
        "max_length": training_args.generation_max_length,
        "min_length": model_args.generation_min_length,
        "num_beams": training_args.generation_num_beams,
        "length_penalty": model_args.length_penalty,
        "no_repeat_ngram_size": model_args.no_repeat_ngram_size,
    }
    model.generation_config.update(**{name: value for name, value in generation.items() if value is not None})
    if method_args.method == "full":
        return model
    family = model.config.model_type
    if family not in TARGETS and method_args.target_modules is None:
        raise ValueError(f"No defaults for the {family!r} family: set --target_modules.")
    return get_peft_model(model, adapter_config(method_args, TaskType.SEQ_2_SEQ_LM, TARGETS.get(family, [])))


def read_back(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> list[str]:
    """The texts of generated tokens or of labels, as the data spells them."""
    ids = np.where(ids < 0, tokenizer.pad_token_id, ids)
    return [text.strip().translate(args.reading) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def metric_function(tokenizer: PreTrainedTokenizerBase, args: DataArguments):
    """The Trainer's `compute_metrics`: the chosen metrics, and the mean length of what was generated."""
    metric = text_metric(args.metrics)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        texts = (read_back(ids, tokenizer, args) for ids in (prediction.predictions, prediction.label_ids))
        tokens = prediction.predictions[:, 1:]  # the first is the start, which is not generated
        lengths = (tokens >= 0) & (tokens != tokenizer.pad_token_id)
        return metric(*texts) | {"generated_tokens": float(lengths.sum(-1).mean())}

    return compute


def make_trainer(
    args: Arguments, model: PreTrainedModel | PeftModel, tokenizers: Tokenizers, data: DatasetDict
) -> Seq2SeqTrainer:
    """A Trainer that generates where it evaluates, and allocates ranks."""
    _, data_args, method_args, training_args = args
    sources, targets = tokenizers
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=sources,
        data_collator=DataCollatorForSeq2Seq(sources, model=model),
        compute_metrics=metric_function(targets, data_args),
    )
    add_allocation(trainer, method_args)
    return trainer


def write_predictions(output: PredictionOutput, file: Path, tokenizer: PreTrainedTokenizerBase, args: DataArguments):
    """One line of json for each example: what was generated, and the reference if there is one."""
    columns = {"prediction": read_back(output.predictions, tokenizer, args)}
    if output.label_ids is not None:
        columns["reference"] = read_back(output.label_ids, tokenizer, args)
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")


def run(args: Arguments) -> dict[str, Any]:
    """One training with one seed: everything that it writes is in `output_dir`, what it found is returned."""
    model_args, data_args, _, training_args = args
    set_seed(training_args.seed)  # the adapter is drawn before the Trainer sets it
    tokenizers = load_tokenizers(model_args)
    with training_args.main_process_first(desc="preparing the data"):
        raw = load_splits(data_args, with_test=training_args.do_predict or data_args.test_file is not None)
        columns = find_columns(data_args, raw["train"])
        data = {name: encode(d, columns, tokenizers, data_args, name == "train") for name, d in raw.items()}
    model = load_model(args)
    trainer = make_trainer(args, model, tokenizers, DatasetDict(data))
    report = runs.train(trainer, args)
    if model_args.export_lora is not None and trainer.is_world_process_zero():
        export_lora(model, model_args.export_lora)
    if "test" in data:
        output = trainer.predict(data["test"], metric_key_prefix="test")
        report["test"] = runs.metric_values(output.metrics, "test")
        if trainer.is_world_process_zero():
            file = Path(training_args.output_dir, "predictions_test.jsonl")
            write_predictions(output, file, tokenizers[1], data_args)
    return report


def main(argv: list[str]) -> None:
    args = parse(argv)
    write_results(args, run_seeds(run, args))


if __name__ == "__main__":
    main(sys.argv[1:])
