# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Quality at equal budget on a decoder: instruction tuning, validation loss of the answers.

    python benchmarks/instruct_quality.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data DIR   # DIR/<split>.jsonl[.gz]

Rows have `instruction`, `input` and `output`, as in Alpaca. Targets are all linears of the decoder; the base model is in
bfloat16, the factors in float32. The protocol is that of `glue_quality.py`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from pathlib import Path
from typing import Any

import torch
from _trainings import Spec, StackTrainer, Study, study_parser
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer


def read(folder: Path, split: str) -> list[dict[str, str]]:
    path = next(path for path in (folder / f"{split}.jsonl.gz", folder / f"{split}.jsonl") if path.exists())
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def encode(rows: list[dict[str, str]], tokenizer: Any, length: int, device: str) -> dict[str, Tensor]:
    """Token ids of fixed length, prompt and padding without label; rows whose answer does not fit are cut."""
    ids = torch.full((len(rows), length), tokenizer.eos_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        question = "\n".join(filter(None, [row["instruction"], row["input"]]))
        prompt = f"Instruction: {question}\nAnswer: "
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids[: length // 2]
        answer_ids = tokenizer(row["output"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        tokens = torch.tensor((prompt_ids + answer_ids)[:length])
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i, len(prompt_ids) : len(tokens)] = tokens[len(prompt_ids) :]
    return {
        key: value.to(device) for key, value in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()
    }


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(K, batch, length, vocabulary) and (K, batch, length) to (K,): mean over the tokens that have a label."""
    targets = labels[..., 1:].flatten(1)
    values = [
        functional.cross_entropy(each[:, :-1].flatten(0, 1).float(), target)
        for each, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(values)


class Trainer(StackTrainer):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args, losses, target_modules="all-linear", task_type="CAUSAL_LM")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.train = encode(read(args.data, "train")[: args.rows], tokenizer, args.length, self.device)
        self.validation = encode(read(args.data, "validation"), tokenizer, args.length, self.device)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(self.device)
        self.model.config.use_cache = False

    def base(self, spec: Spec) -> nn.Module:
        return self.model

    def rows(self, task: str) -> tuple[dict[str, Tensor], int, int]:
        return self.train, self.args.batch, self.args.epochs

    def evaluate(self, model: PeftModel, task: str) -> dict[str, float]:
        total, count = 0.0, 0
        for start in range(0, len(self.validation["labels"]), 25):
            batch = {key: value[start : start + 25] for key, value in self.validation.items()}
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).loss) * tokens
            count += tokens
        return {"metric": round(total / count, 5), "perplexity": round(math.exp(total / count), 4)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__, "instruct_quality")
    parser.add_argument("--data", type=Path, required=True, help="folder of train and validation, .jsonl or .jsonl.gz")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=192, help="tokens of a row")
    parser.add_argument("--rows", type=int, help="training rows at most")
    parser.set_defaults(ranks=[4, 16], lrs=[3e-4, 1e-3, 3e-3], together=6)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    Study(args, Trainer, sign=-1).run(["instructions"], [])


if __name__ == "__main__":
    main()
