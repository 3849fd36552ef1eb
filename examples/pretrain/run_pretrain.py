# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.11"
# dependencies = ["peft_rank[examples]"]
# ///
"""
Pre-train a GPT-2 from scratch: in full, at a fixed rank, or with InRank, which finds its ranks.

The paper's settings, one YAML file for each size; flags after the file override it:

    python examples/pretrain/run_pretrain.py examples/pretrain/configs/gpt2.yaml --output_dir out/gpt2

The baselines, by one flag:

    python examples/pretrain/run_pretrain.py examples/pretrain/configs/gpt2.yaml --method full --output_dir out/full
    python examples/pretrain/run_pretrain.py examples/pretrain/configs/gpt2.yaml --method fixed --output_dir out/fixed

A small model on text at hand:

    python examples/pretrain/run_pretrain.py examples/pretrain/configs/small.yaml --output_dir out/small \
        --train_files train.jsonl.gz --validation_files validation.jsonl.gz

`output_dir` then holds checkpoints, `ranks.jsonl`, `results.json`, and in `model` a normal `from_pretrained` directory
with the found factors (the dense model with `--method full`).
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml
from data import DataArguments, load_blocks, load_texts, load_tokenizer
from peft import PeftModel, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from peft_rank import InRankConfig, RankAllocationCallback, get_rank_pattern, save_compressed


TARGETS = {"mlp": r".*\.mlp\.(c_fc|c_proj)", "all": r".*\.(c_attn|c_fc|c_proj)"}


@dataclass
class ModelArguments:
    """The size of the GPT-2."""

    n_layer: int = field(default=12, metadata={"help": "Blocks."})
    n_embd: int = field(default=768, metadata={"help": "Width."})
    n_head: int = field(default=12, metadata={"help": "Attention heads."})
    n_positions: int = field(default=1024, metadata={"help": "Context in tokens."})
    dropout: float = field(default=0.1, metadata={"help": "Every dropout of the model."})


@dataclass
class MethodArguments:
    """How the weights are parametrised. All steps are optimizer steps."""

    method: Literal["full", "fixed", "inrank"] = field(
        default="inrank", metadata={"help": "Dense weights; products of fixed_r ranks; products whose rank grows."}
    )
    targets: Literal["mlp", "all"] = field(
        default="mlp", metadata={"help": "Which linears become products: the MLP's, as in the paper, or all."}
    )
    init_scale: float = field(default=1.0, metadata={"help": "Start of products, as multiples of the dense weights."})
    fixed_r: int = field(default=256, metadata={"help": "Rank of --method fixed."})
    init_r: int = field(default=2, metadata={"help": "Rank that InRank starts with."})
    buffer_r: int = field(default=100, metadata={"help": "Ranks that are trained beyond the found ones."})
    max_r: int | None = field(default=None, metadata={"help": "Largest width; half of the smaller side if not given."})
    explained_ratio: float = field(default=0.9, metadata={"help": "Share of the spectrum to explain."})
    criterion: Literal["energy", "variance"] = field(
        default="energy", metadata={"help": "Of what the share is taken."}
    )
    growth_warmup_steps: int = field(default=100, metadata={"help": "Steps before the first check."})
    check_interval: int = field(default=25, metadata={"help": "Steps between checks."})
    growth_steps: int | None = field(default=None, metadata={"help": "Step that fixes the ranks (or growth_ratio)."})
    growth_ratio: float | None = field(default=None, metadata={"help": "The same as a fraction of the training."})
    rank_multiple: int = field(default=1, metadata={"help": "Round widths and ranks up to a multiple of this."})
    reference: bool = field(default=False, metadata={"help": "Grow by the rule of the released code."})


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
    _, _, method_args, training_args = args
    if training_args.deepspeed and method_args.method == "inrank":
        raise ValueError(
            "deepspeed: ranks cannot grow under DeepSpeed, whose shards cannot be widened. Use DDP for --method inrank, or "
            "--method fixed with the ranks that were found."
        )
    return args


def make_model(args: Arguments, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel | PeftModel:
    """A new GPT-2, with products in the place of its targeted linears unless it is trained in full."""
    model_args, _, method_args, _ = args
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=model_args.n_layer,
        n_embd=model_args.n_embd,
        n_head=model_args.n_head,
        n_positions=model_args.n_positions,
        resid_pdrop=model_args.dropout,
        embd_pdrop=model_args.dropout,
        attn_pdrop=model_args.dropout,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    return model if method_args.method == "full" else get_peft_model(model, adapter_config(method_args))


def adapter_config(args: MethodArguments) -> InRankConfig:
    common = {
        "from_scratch": True,
        "target_modules": TARGETS[args.targets],
        "fan_in_fan_out": True,
        "init_scale": args.init_scale,
    }
    if args.method == "fixed":
        return InRankConfig(init_r=args.fixed_r, buffer_r=0, **common)
    return InRankConfig(
        init_r=args.init_r,
        buffer_r=args.buffer_r,
        max_r=args.max_r,
        explained_ratio=args.explained_ratio,
        criterion=args.criterion,
        warmup_steps=args.growth_warmup_steps,
        check_interval=args.check_interval,
        growth_steps=args.growth_steps,
        growth_ratio=args.growth_ratio,
        rank_multiple=args.rank_multiple,
        reference=args.reference,
        **common,
    )


def save_model(trainer: Trainer, directory: Path) -> None:
    """A `from_pretrained` directory of the plain model: dense, or with factors."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        trainer.save_model(str(directory))
        return
    # under DDP and DeepSpeed the callback leaves this to whoever knows that the training is over
    model.base_model.finalize()
    if trainer.is_world_process_zero():
        save_compressed(model, directory)
        trainer.processing_class.save_pretrained(directory)


def run(args: Arguments) -> dict[str, Any]:
    """One training: everything that it writes is in `output_dir`, what it found is returned."""
    model_args, data_args, method_args, training_args = args
    set_seed(training_args.seed)
    texts = load_texts(data_args, "train")
    tokenizer = load_tokenizer(data_args, texts)
    block = data_args.block_size or model_args.n_positions
    train, validation = load_blocks(data_args, tokenizer, texts, block)
    model = make_model(args, tokenizer)
    at_start = sum(parameter.numel() for parameter in model.parameters())
    callbacks = [RankAllocationCallback()] if method_args.method == "inrank" else []
    trainer = Trainer(
        model,
        training_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    trained = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    save_model(trainer, Path(training_args.output_dir, "model"))
    ranks = {} if method_args.method == "full" else get_rank_pattern(model)
    return {
        "validation_loss": loss,
        "perplexity": math.exp(loss),
        "history": [
            {"step": h["step"], "loss": h["eval_loss"]} for h in trainer.state.log_history if "eval_loss" in h
        ],
        "steps": trainer.state.global_step,
        "tokens": {"train": train.tokens.numel(), "validation": validation.tokens.numel()},
        "parameters": {"start": at_start, "end": sum(parameter.numel() for parameter in model.parameters())},
        "total_rank": sum(ranks.values()),
        "ranks": ranks,
        "seconds": trained.metrics["train_runtime"],
    }


def main(argv: list[str]) -> None:
    model_args, data_args, method_args, training_args = args = parse(argv)
    found = run(args)
    if training_args.process_index != 0:
        return
    defaults = TrainingArguments().to_dict()
    results = {
        "method": method_args.method,
        "model": asdict(model_args),
        "data": asdict(data_args),
        "hyperparameters": asdict(method_args),
        "training": {key: value for key, value in training_args.to_dict().items() if value != defaults[key]},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "peft_rank")},
        **found,
    }
    text = json.dumps(results, indent=2)
    Path(training_args.output_dir, "results.json").write_text(text + "\n", encoding="utf-8")
    start, end = found["parameters"].values()
    print(
        f"\n{method_args.method}: perplexity {found['perplexity']:.2f} after {found['steps']} steps, "
        f"total rank {found['total_rank']}, parameters {start:,} -> {end:,}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
