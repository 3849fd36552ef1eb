# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Validation loss of a small GPT-2 that is trained from scratch: full rank, fixed rank, InRank, in several precisions.

    python benchmarks/pretraining_quality.py --text train.jsonl.gz --validation validation.jsonl.gz
    python benchmarks/pretraining_quality.py --text a.txt b.txt --runs full-bf16 inrank0.9-bf16 --seconds 600

A run is named METHOD-PRECISION: `full`, `fixed` (a third of the ranks) or `inrank` and the ratio to explain; fp32, bf16 or
fp16 (autocast; fp16 with a loss scale). All runs see the same batches in the same order; --parallel of them share the
device, each in a process of its own. Texts are plain or JSON lines with a field `text`, gzipped or not. The tokenizer is
--tokenizer, or a byte-level BPE that is trained on the text.

Every evaluation appends a line to --output, and every change of ranks one to `ranks-RUN.jsonl` beside it, which
`peft_rank.plot_ranks` draws. At --seconds every run evaluates, says so, and stops.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, environment
from _pretraining import DEVICE, TARGETS, Shape, adamw, autocast, gpt2, with_factors
from tokenizers import ByteLevelBPETokenizer, Tokenizer


RUNS = [
    "full-bf16",
    "inrank0.9-bf16",
    "inrank0.8-bf16",
    "fixed-bf16",
    "full-fp32",
    "inrank0.9-fp32",
    "full-fp16",
    "inrank0.9-fp16",
]


def read_texts(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        if ".json" in path.name:
            yield from (json.loads(line)["text"] for line in file)
        else:
            yield file.read()


def load_tokenizer(args: argparse.Namespace) -> Tokenizer:
    if args.tokenizer:
        path = Path(args.tokenizer)
        return Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
    bpe = ByteLevelBPETokenizer()
    texts = (text for path in args.text for text in read_texts(path))
    bpe.train_from_iterator(texts, args.vocabulary, min_frequency=2, special_tokens=["<|endoftext|>"])
    return bpe._tokenizer


def encode(tokenizer: Tokenizer, paths: list[Path]) -> torch.Tensor:
    """All tokens of the files, one text after the other."""
    texts = [text for path in paths for text in read_texts(path)]
    return torch.tensor([i for encoded in tokenizer.encode_batch(texts) for i in encoded.ids], dtype=torch.int32)


class Training:
    """One run. Knows of nothing but its own name, the tokens and the arguments."""

    def __init__(self, name: str, data: Path, args: argparse.Namespace) -> None:
        self.name, self.args, self.step, self.started = name, args, 0, time.perf_counter()
        method, _, self.precision = name.partition("-")
        tokens = torch.load(data, weights_only=True)
        self.train, self.validation = (tokens[key].to(DEVICE, torch.long) for key in ("train", "validation"))
        shape = Shape(args.layers, args.width, args.heads, args.context, tokens["vocabulary"])
        self.model = gpt2(shape, args.dropout, args.seed)
        self.tuner = None
        if method == "fixed":
            self.model = with_factors(self.model, args.targets, init_r=args.fixed_rank, buffer_r=0)
        elif method != "full":
            self.model = with_factors(
                self.model,
                args.targets,
                explained_ratio=float(method.removeprefix("inrank")),
                buffer_r=args.buffer,
                max_r=args.max_rank,
                warmup_steps=args.growth_warmup,
                check_interval=args.check_interval,
                growth_ratio=args.growth_ratio,
                rank_multiple=args.rank_multiple,
            )
            self.tuner = self.model.base_model
            print(f"{name}: {self.tuner.resolve_schedule(args.steps)}", flush=True)
        self.optimizer = adamw(self.model, args.lr)
        self.scaler = torch.amp.GradScaler(DEVICE, enabled=self.precision == "fp16" and DEVICE == "cuda")
        # the same batches for all runs, whatever draws random numbers in between
        self.generator = torch.Generator().manual_seed(args.seed)
        self.losses: list[torch.Tensor] = []

    def batch(self) -> torch.Tensor:
        length = self.args.context + 1
        starts = torch.randint(len(self.train) - length, (self.args.batch, 1), generator=self.generator)
        return self.train[(starts + torch.arange(length)).to(DEVICE)]

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        args = self.args
        if self.step < args.warmup:
            return args.lr * (self.step + 1) / args.warmup
        progress = (self.step - args.warmup) / max(1, args.steps - args.warmup)
        return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))

    def advance(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.loss(self.batch())
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.losses.append(loss.detach())
        if self.tuner is not None:
            if self.scaler.get_scale() < scale:
                self.tuner.skip_step(self.step)
            elif self.tuner.update_and_allocate(self.step, self.optimizer):
                self.record_ranks()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        with autocast(self.precision):
            logits = self.model(input_ids=tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    @torch.no_grad()
    def validation_loss(self) -> float:
        self.model.eval()
        length = self.args.context + 1
        rows = self.validation[: len(self.validation) // length * length].view(-1, length)[: self.args.eval_rows]
        total = sum(float(self.loss(part)) * len(part) for part in rows.split(self.args.batch))
        self.model.train()
        return total / len(rows)

    def evaluate(self, event: str) -> dict[str, Any]:
        """Append a line of results."""
        loss = self.validation_loss()
        recent = float(torch.stack(self.losses).mean()) if self.losses else None
        self.losses.clear()
        row = {
            "run": self.name,
            "event": event,
            "step": self.step,
            "validation_loss": round(loss, 4),
            "perplexity": round(math.exp(min(loss, 30)), 3),
            "train_loss": None if recent is None else round(recent, 4),
            "seconds": round(time.perf_counter() - self.started, 1),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **({} if self.tuner is None else self.tuner.rank_summary()),
        }
        if self.tuner is not None:
            sides = [min(layer.in_features, layer.out_features) for layer in self.layers().values()]
            row["rank_share"] = round(row["rank/total"] / sum(sides), 4)
        append(self.args.output, row)
        print(row, flush=True)
        return row

    def layers(self) -> dict[str, Any]:
        return self.tuner.adapter_layers("default")

    def record_ranks(self) -> None:
        ranks = {name: layer.rank("default") for name, layer in self.layers().items()}
        line = {"step": self.step, "event": "decision", **self.tuner.rank_summary(), "ranks": ranks}
        append(self.args.output.with_name(f"ranks-{self.name}.jsonl"), line)


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def train(name: str, data: Path, args: argparse.Namespace, end: float) -> dict[str, Any]:
    """One run, to its last step or until `end` (of `time.time`)."""
    torch.set_float32_matmul_precision("highest" if name.endswith("fp32") else "high")
    try:
        training = Training(name, data, args)
        while training.step < args.steps and time.time() < end:
            training.advance()
            if training.step % args.eval_steps == 0 and training.step < args.steps:
                training.evaluate("evaluation")
        return training.evaluate("end" if training.step == args.steps else "out of time")
    except Exception as error:  # noqa: BLE001 - the other runs go on, and the file says why this one did not
        row = {"run": name, "event": "error", "error": f"{type(error).__name__}: {error}"}
        append(args.output, row)
        print(row, flush=True)
        return row


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, nargs="+", required=True, help="files to train on")
    add("--validation", type=Path, nargs="+", help="files to evaluate on; the last 5 %% of the tokens by default")
    add("--tokenizer", help="tokenizer.json, or a folder with one")
    add("--vocabulary", type=int, default=8192, help="of the tokenizer that is trained otherwise")
    add("--output", type=Path, default=RESULTS / "pretraining_quality.jsonl")
    add("--runs", nargs="+", default=RUNS, metavar="RUN")
    add("--parallel", type=int, default=4, help="runs at a time")
    add("--seconds", type=float, default=1e9, help="of all runs together")
    add("--steps", type=int, default=12_000)
    add("--eval-steps", type=int, default=500)
    add("--eval-rows", type=int, default=512)
    add("--batch", type=int, default=64)
    add("--context", type=int, default=256)
    add("--layers", type=int, default=6)
    add("--width", type=int, default=384)
    add("--heads", type=int, default=6)
    add("--dropout", type=float, default=0.1)
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=500, help="steps of the learning rate's warm-up")
    add("--seed", type=int, default=0)
    add("--targets", default="mlp", choices=list(TARGETS))
    add("--fixed-rank", type=int, default=128)
    add("--buffer", type=int, default=48)
    add("--max-rank", type=int, default=152, help="largest width with InRank; 40 %% of the default model's ranks")
    add("--growth-warmup", type=int, default=200)
    add("--check-interval", type=int, default=50)
    add("--growth-ratio", type=float, default=0.25)
    add("--rank-multiple", type=int, default=8)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    end = time.time() + args.seconds
    args.output.parent.mkdir(parents=True, exist_ok=True)
    append(args.output, {"environment": environment(), "arguments": json.loads(json.dumps(vars(args), default=str))})
    tokenizer = load_tokenizer(args)
    tokens = encode(tokenizer, args.text)
    cut = len(tokens) if args.validation else int(0.95 * len(tokens))
    validation = encode(tokenizer, args.validation) if args.validation else tokens[cut:]
    print(f"{cut:,} tokens to train on, {len(validation):,} to evaluate on", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "tokens.pt")
        content = {"train": tokens[:cut], "validation": validation, "vocabulary": tokenizer.get_vocab_size()}
        torch.save(content, data)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.parallel, mp_context=spawn) as pool:
            waiting = [pool.submit(train, name, data, args, end) for name in args.runs]
            for done in as_completed(waiting):
                print("done:", done.result()["run"], flush=True)


if __name__ == "__main__":
    main()
