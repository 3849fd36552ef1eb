# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of a step of a search for ranks, LLaMA-7B shape, beside the matrix products that it cannot do without.

    python benchmarks/search_step.py                    # 32 layers in bfloat16: one GPU of 80 GB

Weights and factors are random: a step takes as long as with real ones. The bound is the same model with every linear as
two frozen products of full rank, forward and backward; its steps and those of a search take turns. A search is measured
at its start, where all ranks are in the mask, and late, with `--late` of the ranks likely and the others hopeless, and
with every block of the decoder compiled, beside the products compiled likewise. L2LRC is measured without and with
distillation, whose dense model runs forward besides.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from _common import argument_parser, compile_blocks, store, time_steps, uncompile_blocks
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_rank import AdaptiveRankSVDConfig, L2LRCConfig
from peft_rank.tuners.lowrank import LowRankLinear
from peft_rank.tuners.search import model as search_model
from peft_rank.tuners.search.factors import Spectrum


WARMUP = 3
SEARCHES: dict[str, Callable[..., Any]] = {
    "ars": AdaptiveRankSVDConfig,
    "l2lrc": lambda **kwargs: L2LRCConfig(distillation_weight=0.0, anneal_steps=1, **kwargs),
    "l2lrc, distilled": lambda **kwargs: L2LRCConfig(anneal_steps=1, **kwargs),
}


def random_spectrum(weight: torch.Tensor, *args: Any) -> Spectrum:
    k, scale = min(weight.shape), weight.shape[1] ** -0.5
    down, up = torch.randn_like(weight[:k, :1].expand(k, weight.shape[1])), torch.randn_like(weight.T[:k])
    values = torch.linspace(1, 0.01, k, device=weight.device)
    return Spectrum(down.contiguous() * scale, up.contiguous() * k**-0.5, values)


def llama(args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128 or 1, use_cache=False, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False).train()


def bound(model: nn.Module) -> nn.Module:
    """Every linear of the decoder as two products of full rank."""
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            spectrum = random_spectrum(linear.weight)
            factors = LowRankLinear(
                linear.in_features, linear.out_features, len(spectrum.values), False, device="meta"
            )
            factors.down.weight = nn.Parameter(spectrum.down, requires_grad=False)
            factors.up.weight = nn.Parameter(spectrum.up.T.contiguous(), requires_grad=False)
            model.model.set_submodule(name, factors)
    # or there would be no backward
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


@torch.no_grad()
def make_late(tuner: Any, part: float) -> None:
    """Masks as they are late in a search: the leading ranks likely, the others hopeless."""
    parameters = list(tuner.mask_parameters("default"))
    for parameter in parameters:
        parameter.zero_()
    ranks = [torch.arange(min(layer.shape)) for layer in tuner.adapter_layers("default").values()]
    late = [torch.where(rank < part * len(rank), 6.0, -12.0) for rank in ranks]
    tuner._set_logits("default", [logits.to(parameters[0].device) for logits in late])


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(0, 32_000, (args.batch, args.tokens), device=device)

    dense = bound(llama(args))
    held = sum(p.numel() * p.element_size() for p in dense.parameters()) / 2**30

    def both() -> None:
        dense(input_ids=ids, labels=ids).loss.backward()

    def row(name: str, step: Callable[[], None], products: dict[str, Any] | None) -> dict[str, Any]:
        told: dict[str, Any] = {
            "step": name,
            **time_steps(step, args.repeats, WARMUP, None if products is None else both),
        }
        if products is not None:
            told["of the products"] = round(told["ms"] / told["beside_ms"], 3)
            if "kernels_ms" in told:
                told["of their kernels"] = round(told["kernels_ms"] / products["kernels_ms"], 3)
                # the products' own model is no part of a search
                told["peak_gib"] = round(told["peak_gib"] - held, 2)
        return told

    products = row("two products, full rank", both, None)
    yield products
    compile_blocks(dense, args.backend)
    compiled = row("two products, compiled", both, None)
    yield compiled
    uncompile_blocks(dense)
    for name in args.searches:
        model = llama(args)
        with mock.patch.object(search_model, "decompose_weight", random_spectrum):
            config = SEARCHES[name](target_ratio=0.8, exclude_modules=["lm_head"], target_modules="all-linear")
            model = get_peft_model(model, config).train()
        tuner = model.base_model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9, fused=True)
        done = 0

        def step(model: nn.Module = model, tuner: Any = tuner, optimizer: Any = optimizer) -> None:
            nonlocal done
            model(input_ids=ids, labels=ids).loss.backward()
            tuner.add_regularization_gradient()
            optimizer.step()
            done += 1
            tuner.update_and_allocate(done, optimizer)
            optimizer.zero_grad()

        yield row(f"{name}, start", step, products)
        compile_blocks(dense, args.backend)
        compile_blocks(model.get_base_model(), args.backend)
        yield row(f"{name}, compiled", step, compiled)
        uncompile_blocks(dense)
        uncompile_blocks(model.get_base_model())
        make_late(tuner, args.late)
        yield row(f"{name}, {args.late:.0%} of the ranks", step, products)
        del model, tuner, optimizer, step
        gc.collect()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "search_step")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11_008)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--late", type=float, default=0.4, help="part of the ranks that are left late in a search")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    rows: list[dict[str, Any]] = []
    for row in measure(args):
        rows.append(row)
        print(row, flush=True)
        store(args.output, rows, **settings)


if __name__ == "__main__":
    main()
