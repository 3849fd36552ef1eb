# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.11"
# dependencies = ["peft_rank[examples]"]
# ///
"""
Ranks by module name: what a decoder says, and how large it is, before and after some of its linears are replaced by factors
of the ranks that you name. No data is needed.

    python examples/compress/by_name.py --model stabilityai/stablelm-3b-4e1t \
        --ranks q_proj=384 o_proj=384 gate_proj=512 --output_dir out/stablelm

A small model, on a laptop:

    python examples/compress/by_name.py --model HuggingFaceTB/SmolLM2-135M --ranks q_proj=192 o_proj=192 gate_proj=256
"""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peft_rank import LowRankConfig, save_compressed


PROMPTS = ["The capital of France is", "Once upon a time, there was a little girl who", "Water boils at"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("--model", default="stabilityai/stablelm-3b-4e1t", help="decoder, a folder or on the Hub")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--ranks", nargs="+", type=named_rank, required=True, metavar="NAME=RANK")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--max_new_tokens", type=int, default=40)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", help="write the compressed model here")
    return parser.parse_args(argv)


def named_rank(text: str) -> tuple[str, int]:
    name, _, rank = text.rpartition("=")
    return name, int(rank)


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[str]:
    """Greedy continuations."""
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    return texts


def main(argv: list[str] | None = None) -> dict[str, int]:
    args = parse(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
    model = AutoModelForCausalLM.from_pretrained(args.model, revision=args.revision, dtype=args.dtype).to(args.device)
    before, said = model.num_parameters(), generate(model, tokenizer, args.prompts, args.max_new_tokens)

    model = get_peft_model(model, LowRankConfig(rank_pattern=dict(args.ranks)))
    model.base_model.finalize()
    model = model.get_base_model()

    after = model.num_parameters()
    says = generate(model, tokenizer, args.prompts, args.max_new_tokens)
    for old, new in zip(said, says, strict=True):
        print(f"before: {old}\nafter:  {new}\n")
    print(f"{before:,} -> {after:,} parameters: {1 - after / before:.1%} fewer")
    if args.output_dir is not None:
        save_compressed(model, args.output_dir, tokenizer=tokenizer)
        print(f"saved in {args.output_dir}: load it with peft_rank.load_compressed")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
