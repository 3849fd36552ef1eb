# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""SalientLoRA on bitsandbytes bases beside a plain one: train, allocate, save, load, export, merge; time, memory, errors.

    python benchmarks/quantized.py                                   # LLaMA-1B shape with random weights, one GPU
    python benchmarks/quantized.py --shape tiny --vocabulary 64 --batch 2 --length 32    # on a CPU
    python benchmarks/quantized.py --model HuggingFaceTB/SmolLM2-135M

A base takes a minute or two; the result file is written after each, and bases that it holds are not measured again.
Texts are random tokens that repeat themselves. `change` is what the adapter changes in the logits, relative to them; errors are
relative to that change. An adapter that is loaded computes the same as the trained one; exported, the same but for PEFT's
other order of rounding; a merged base is quantized again, with the rounding of its format.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import SHORT_SCHEDULE, Results, argument_parser
from multi_gpu import SHAPES, STEPS, Clock, Texts
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from peft_rank import RankAllocationCallback, SalientLoRAConfig, export_lora, get_rank_pattern


KINDS = {
    "plain": None,
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}


def save_random_model(args: argparse.Namespace, folder: Path) -> str:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(vocab_size=args.vocabulary, **SHAPES[args.shape])).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    return str(folder)


def load_base(args: argparse.Namespace, kind: str) -> PreTrainedModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = KINDS[kind]
    if settings is not None and "load_in_4bit" in settings:
        settings = settings | {"bnb_4bit_compute_dtype": torch.bfloat16}
    quantization = None if settings is None else BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": device}
    )
    model.config.use_cache = False
    if quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def train(model: PeftModel, args: argparse.Namespace, folder: Path) -> Clock:
    clock = Clock(STEPS)
    training_args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = Texts(args.batch * STEPS, args.length, args.vocabulary)
    callbacks = [clock, RankAllocationCallback(log=False)]
    trainer = Trainer(model, training_args, train_dataset=data, callbacks=callbacks)
    trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # or it would compute as in the training forever
    return clock


@torch.no_grad()
def logits(model: torch.nn.Module, args: argparse.Namespace) -> Tensor:
    model.eval()
    rows = Texts(args.batch, args.length, args.vocabulary).rows
    return model(input_ids=rows.to(next(model.parameters()).device)).logits.float().cpu()


def distance(found: Tensor, expected: Tensor, base: Tensor) -> float:
    return round(float((found - expected).norm() / (expected - base).norm()), 6)


def measure(args: argparse.Namespace, kind: str, folder: Path) -> dict[str, Any]:
    """The whole way on one kind of base."""
    gc.collect()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    config = SalientLoRAConfig(
        init_r=args.init_r,
        target_r=args.target_r,
        **SHORT_SCHEDULE,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_base(args, kind), config)
    milliseconds = train(model, args, folder).milliseconds()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    ranks = get_rank_pattern(model)
    trained = logits(model, args)
    with model.disable_adapter():
        base = logits(model, args)
    model.save_pretrained(folder / "adapter")
    export_lora(model, folder / "lora")
    found = {
        name: distance(logits(PeftModel.from_pretrained(load_base(args, kind), folder / name), args), trained, base)
        for name in ("adapter", "lora")
    }
    merged = distance(logits(model.merge_and_unload(), args), trained, base)
    return {
        "base": kind,
        "layer": type(next(m for n, m in load_base(args, kind).named_modules() if n in ranks)).__name__,
        "milliseconds": round(milliseconds, 2),
        "peak_gib": None if peak is None else round(peak, 3),
        "modules": len(ranks),
        "total_rank": sum(ranks.values()),
        "change": round(float((trained - base).norm() / base.norm()), 4),
        "error_loaded": found["adapter"],
        "error_exported": found["lora"],
        "error_merged": merged,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "quantized")
    parser.add_argument("--model", help="a directory or a name on the Hub, in the place of random weights")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--init_r", type=int, default=16)
    parser.add_argument("--target_r", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every product of another dtype
    if args.model is not None:
        args.vocabulary = AutoConfig.from_pretrained(args.model).vocab_size
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "kinds")}
    results = Results(args.output, ("base",), **settings, steps=STEPS)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            args.model = save_random_model(args, Path(folder, "model"))
        for kind in args.kinds:
            if not results.find({"base": kind}):
                results.add(measure(args, kind, Path(folder, kind)))


if __name__ == "__main__":
    main()
