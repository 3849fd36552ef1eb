# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Validation loss of a small GPT-2 that is trained from scratch: full rank, fixed rank, InRank, in several precisions.

    python benchmarks/pretraining_quality.py --text train.jsonl.gz --validation validation.jsonl.gz
    python benchmarks/pretraining_quality.py --text /usr/lib/python3.12 --runs full-bf16 inrank0.9-bf16@lr=2e-3 --seconds 540

A run is named METHOD-PRECISION: `full`, `fixed` (a third of the ranks) or `inrank` and the ratio to explain; fp32, bf16 or
fp16 (autocast; fp16 with a loss scale). What follows an @ overrides an argument for that run alone: `@init_scale=2@seed=1`.
All runs see the same batches in the same order; --parallel of them share the GPUs, each in a process of its own.
Texts are plain or JSON lines with a field `text`, gzipped or not, or folders, which stand for all .py, .rst, .md and .txt
files in them but for installed packages. The tokenizer is --tokenizer, or a byte-level BPE that is trained on the text.

Every evaluation and every check of ranks is a line of --output, from which `benchmarks/tables.py` makes tables and a
picture. At --seconds every run says so and stops; the same command again goes on from what is kept in --work, as if
nothing had happened.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, environment, gpu_pool
from _pretraining import DEVICE, TARGETS, Shape, adamw, autocast, gpt2, with_factors
from tokenizers import ByteLevelBPETokenizer, Tokenizer


RUNS = [
    "full-bf16",
    "fixed-bf16",
    "inrank0.9-bf16",
    "inrank0.8-bf16",
    "inrank0.9-bf16@buffer=48",
    "inrank0.9-bf16@init_scale=1",
    "full-bf16@lr=2e-3",
    "inrank0.9-bf16@lr=2e-3",
]
ENDINGS = {".py", ".rst", ".md", ".txt"}
INSTALLED = {"site-packages", "dist-packages"}
HELD_OUT = 20  # without --validation, one text in so many is held out, or the last part of a single one
# arguments that may change from one command to the next, and those that all runs of a command share
OUTER = {"runs", "parallel", "seconds", "output", "work"}
DATA = {"text", "validation", "tokenizer", "vocabulary"}
KEPT = ("model", "optimizer", "step", "losses", "decisions")


def read_texts(path: Path) -> Iterator[str]:
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.suffix in ENDINGS and file.is_file()):
            # the folder of Python's own library may hold everything that is installed
            if not INSTALLED & set(file.relative_to(path).parts):
                yield file.read_text(encoding="utf-8", errors="ignore")
        return
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        if ".json" in path.name:
            yield from (json.loads(line)["text"] for line in file)
        else:
            yield file.read()


def split_texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """What to train on, and what to evaluate on."""
    texts = [text for path in args.text for text in read_texts(path)]
    if args.validation:
        return texts, [text for path in args.validation for text in read_texts(path)]
    if len(texts) < HELD_OUT:
        joined = "\n".join(texts)
        cut = len(joined) - len(joined) // HELD_OUT
        return [joined[:cut]], [joined[cut:]]
    held_out = texts[HELD_OUT - 1 :: HELD_OUT]
    del texts[HELD_OUT - 1 :: HELD_OUT]
    return texts, held_out


def load_tokenizer(args: argparse.Namespace, texts: list[str]) -> Tokenizer:
    if args.tokenizer:
        path = Path(args.tokenizer)
        return Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, args.vocabulary, min_frequency=2, special_tokens=["<|endoftext|>"])
    return bpe._tokenizer


def prepare(args: argparse.Namespace) -> Path:
    """The file that holds all tokens, one text after the other; made by the first command that needs it."""
    source = json.dumps({key: str(vars(args)[key]) for key in sorted(DATA)})
    file = args.work / f"tokens-{hashlib.sha256(source.encode()).hexdigest()[:12]}.pt"
    if not file.exists():
        train, validation = split_texts(args)
        tokenizer = load_tokenizer(args, train)
        content: dict[str, Any] = {"vocabulary": tokenizer.get_vocab_size()}
        for key, texts in (("train", train), ("validation", validation)):
            ids = (torch.tensor(encoded.ids, dtype=torch.int32) for encoded in tokenizer.encode_batch(texts))
            content[key] = torch.cat(list(ids))
            print(f"{key}: {len(texts):,} texts, {len(content[key]):,} tokens", flush=True)
        write(file, content)
    return file


def write(path: Path, content: Any) -> None:
    """A file that is complete or not there."""
    part = path.with_suffix(".part")
    torch.save(content, part)
    os.replace(part, path)


class Training:
    """One run. Knows of nothing but its own name, the tokens and the arguments."""

    def __init__(self, name: str, data: Path, args: argparse.Namespace) -> None:
        self.name, self.args, self.file = name, args, args.work / f"{name}.pt"
        self.started, self.step, self.seconds = time.perf_counter(), 0, 0.0
        self.method, _, self.precision = name.partition("@")[0].partition("-")
        tokens = torch.load(data, weights_only=True)
        self.train, self.validation = (tokens[key].to(DEVICE, torch.long) for key in ("train", "validation"))
        # the same batches for all runs, whatever draws random numbers in between
        self.generator = torch.Generator().manual_seed(args.seed)
        self.scaler = torch.amp.GradScaler(DEVICE, enabled=self.precision == "fp16" and DEVICE == "cuda")
        self.losses: list[torch.Tensor] = []
        self.decisions: list[dict[str, Any]] = []
        if self.file.exists():
            self.restore()
        else:
            self.model = self.make_model(tokens["vocabulary"])
            self.optimizer = adamw(self.model, args.lr)
        self.tuner = None if self.method == "full" else self.model.base_model

    def make_model(self, vocabulary: int) -> torch.nn.Module:
        args = self.args
        model = gpt2(Shape(args.layers, args.width, args.heads, args.context, vocabulary), args.dropout, args.seed)
        if self.method == "full":
            for name, weight in model.named_parameters():
                if re.fullmatch(TARGETS[args.targets] + r"\.weight", name):
                    weight.data.mul_(args.init_scale)
            return model
        if self.method == "fixed":
            return with_factors(model, args.targets, init_r=args.fixed_rank, buffer_r=0, init_scale=args.init_scale)
        model = with_factors(
            model,
            args.targets,
            explained_ratio=float(self.method.removeprefix("inrank")),
            buffer_r=args.buffer,
            max_r=args.max_rank,
            warmup_steps=args.growth_warmup,
            check_interval=args.check_interval,
            growth_ratio=args.growth_ratio,
            rank_multiple=args.rank_multiple,
            init_scale=args.init_scale,
        )
        print(f"{self.name}: {model.base_model.resolve_schedule(args.steps)}", flush=True)
        return model

    # ---- what outlives a command ----

    def save(self) -> None:
        state = {name: vars(self)[name] for name in KEPT}
        state["arguments"] = inner(self.args)
        state["seconds"] = self.seconds + time.perf_counter() - self.started
        state["scaler"], state["generator"] = self.scaler.state_dict(), self.generator.get_state()
        state["random"] = torch.get_rng_state(), torch.cuda.get_rng_state() if DEVICE == "cuda" else None
        write(self.file, state)

    def restore(self) -> None:
        # our own file, objects and all: the parameters that the optimizer holds have to be those of the model
        state = torch.load(self.file, weights_only=False, map_location=DEVICE)
        changed = [key for key, value in inner(self.args).items() if state["arguments"].get(key) != value]
        if changed:
            raise ValueError(
                f"{self.file} was made with other arguments: {', '.join(changed)}. Delete it, or change --work."
            )
        vars(self).update({name: state[name] for name in (*KEPT, "seconds")})
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"].cpu())
        cpu, cuda = state["random"]
        torch.set_rng_state(cpu.cpu())
        if cuda is not None:
            torch.cuda.set_rng_state(cuda.cpu())

    # ---- steps ----

    def batch(self) -> torch.Tensor:
        length = self.args.context + 1
        starts = torch.randint(len(self.train) - length, (self.args.batch, 1), generator=self.generator)
        # a few bytes, so that the host need not wait
        return self.train[starts.to(DEVICE) + torch.arange(length, device=DEVICE)]

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
                ranks = {name: layer.rank("default") for name, layer in self.layers().items()}
                summary = self.tuner.rank_summary()
                decision = {"run": self.name, "event": "decision", "step": self.step, **summary, "ranks": ranks}
                self.decisions.append(decision)
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        with autocast(self.precision):
            logits = self.model(input_ids=tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    @torch.no_grad()
    def validation_loss(self) -> float:
        self.model.eval()
        length = self.args.context + 1
        rows = self.validation[: len(self.validation) // length * length].view(-1, length)
        # from everywhere in the text, not its first part
        rows = rows[:: max(1, len(rows) // self.args.eval_rows)][: self.args.eval_rows]
        total = sum(float(self.loss(part)) * len(part) for part in rows.split(self.args.batch))
        self.model.train()
        return total / len(rows)

    def layers(self) -> dict[str, Any]:
        return self.tuner.adapter_layers("default")

    def evaluate(self, event: str) -> dict[str, Any]:
        """Append a line of results, and keep the run."""
        loss = self.validation_loss()
        recent = float(torch.stack(self.losses).mean()) if self.losses else None
        row = {
            "run": self.name,
            "event": event,
            "step": self.step,
            "validation_loss": round(loss, 4),
            "perplexity": round(math.exp(min(loss, 30)), 3),
            "train_loss": None if recent is None else round(recent, 4),
            "seconds": round(self.seconds + time.perf_counter() - self.started, 1),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **({} if self.tuner is None else self.tuner.rank_summary()),
        }
        if self.tuner is not None:
            sides = [min(layer.in_features, layer.out_features) for layer in self.layers().values()]
            row["rank_share"] = round(row["rank/total"] / sum(sides), 4)
        rows = [*self.decisions, row]
        self.decisions, self.losses = [], []
        self.save()
        append(self.args.output, *rows)
        print(row, flush=True)
        return row

    def run(self, end: float) -> dict[str, Any]:
        """To the last step, or until `end` (of `time.time`)."""
        if self.step == self.args.steps:
            return {"run": self.name, "event": "was complete before"}
        first, began = self.step, time.perf_counter()
        while self.step < self.args.steps and time.time() < end:
            self.advance()
            if self.step % self.args.eval_steps == 0 and self.step < self.args.steps:
                self.evaluate("evaluation")
            if self.step == first + 100:
                each = (time.perf_counter() - began) / 100
                left = each * (self.args.steps - self.step)
                print(f"{self.name}: {1e3 * each:.1f} ms a step, {left:.0f} s to go", flush=True)
        if self.step == self.args.steps:
            return self.evaluate("end")
        self.save()
        return {"run": self.name, "event": f"out of time at step {self.step} of {self.args.steps}"}


def inner(args: argparse.Namespace) -> dict[str, str]:
    """The arguments that a run's result depends on."""
    return {key: str(value) for key, value in vars(args).items() if key not in OUTER}


def append(path: Path, *rows: dict[str, Any]) -> None:
    """In one piece, since all runs write to one file."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def train(name: str, data: Path, args: argparse.Namespace, end: float) -> dict[str, Any]:
    """One run in a process of its own."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.parallel))
    torch.set_float32_matmul_precision("highest" if "-fp32" in name else "high")
    try:
        row = Training(name, data, args).run(end)
    except Exception as error:  # noqa: BLE001 - the other runs go on, and the file says why this one did not
        row = {"run": name, "event": "error", "error": f"{type(error).__name__}: {error}"}
        append(args.output, row)
    print(row, flush=True)
    return row


def arguments_of(name: str, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of a run, with what its name overrides."""
    known, changed = vars(args), {}
    for part in name.split("@")[1:]:
        key, _, value = part.partition("=")
        if key in OUTER | DATA or known.get(key) is None:
            raise SystemExit(f"{name}: {key!r} is no argument that a run can override.")
        changed[key] = type(known[key])(value)
    return argparse.Namespace(**{**known, **changed})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, nargs="+", required=True, help="files, or folders of them, to train on")
    add("--validation", type=Path, nargs="+", help="files to evaluate on; by default one text in 20 is held out")
    add("--tokenizer", help="tokenizer.json, or a folder with one")
    add("--vocabulary", type=int, default=8192, help="of the tokenizer that is trained otherwise")
    add("--output", type=Path, default=RESULTS / "pretraining_quality.jsonl")
    add("--work", type=Path, default=RESULTS.parents[1] / "outputs" / "pretraining", help="kept between commands")
    add("--runs", nargs="+", default=RUNS, metavar="RUN")
    add("--parallel", type=int, default=8, help="runs at a time")
    add("--seconds", type=float, default=1e9, help="of this command, tokenizing included")
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
    add("--init-scale", type=float, default=2.0, help="start of the targeted weights, as multiples of GPT-2's")
    add("--fixed-rank", type=int, default=128)
    add("--buffer", type=int, default=128)
    add("--max-rank", type=int, default=152, help="largest width with InRank; 40 %% of the default model's ranks")
    add("--growth-warmup", type=int, default=200)
    add("--check-interval", type=int, default=50)
    add("--growth-ratio", type=float, default=0.25)
    add("--rank-multiple", type=int, default=8)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    end = time.time() + args.seconds
    trainings = {name: arguments_of(name, args) for name in args.runs}
    for folder in (args.output.parent, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    append(args.output, {"environment": environment(), "arguments": json.loads(json.dumps(vars(args), default=str))})
    data = prepare(args)
    with gpu_pool(args.parallel) as pool:
        waiting = [pool.submit(train, name, data, changed, end) for name, changed in trainings.items()]
        for done in as_completed(waiting):
            print("done:", done.result(), flush=True)


if __name__ == "__main__":
    main()
