# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""A compressed model beside the dense one: speed, memory, and the time to decompose it. LLaMA-7B shape, bfloat16.

    python benchmarks/compressed_speed.py                                       # everything
    python benchmarks/compressed_speed.py --parts speed --models dense 0.8/64   # the models named, ratio/rank multiple
    python benchmarks/compressed_speed.py --shape tiny --backend eager          # a look at the program on the CPU

Weights and factors are random; ranks are those that a budget over the decoder's linears gives every layer. Prefill is
8 x 512 tokens and the logits of the last, decoding one token after 512 in a static cache. Variants: "eager", the
transformers model as `generate` calls it; "CUDA graph", its layers in one graph; "compile", the same with every layer
through `torch.compile`, once for all layers. Decomposition is by whitening, module by module, as the tuner does it,
collecting the statistics left out. Needs one GPU of 100 GB, or of 80 GB with fewer models.

Rows that --output holds are not measured again: what --seconds cut off goes on by the same command.
"""

from __future__ import annotations

import gc
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from typing import Any

import torch
from _common import Deadline, Results, argument_parser, captured, synchronize
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from peft_rank.allocation.parameters import parameter_budget, uniform_ranks
from peft_rank.decomposition import decompose
from peft_rank.decomposition.parallel import WORKERS, in_parallel
from peft_rank.tuners.lowrank import LowRankLinear


SHAPES = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "tiny": {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 2, "vocab_size": 256},
}
KEY = ("part", "variant", "case", "model", "method", "workers")
MODELS = ["dense", "0.8/64", "0.8/128", "0.8/1", "0.5/64", "0.5/128"]
CASES = {"prefill 8 x 512": (8, 512), "decode 1": (1, 1), "decode 16": (16, 1)}
CONTEXT, LENGTH = 512, 576  # tokens in the cache, and its size
WARMUP, GROUPS, CALLS = 3, 6, 3  # every call of a decoding step is a token that the cache has to hold
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = 16_384  # that a Gram matrix sums over


# --- models ---


def linear_shapes(shape: str) -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's linears."""
    hidden, intermediate = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
    sides = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return {name: sides.get(name, (hidden, hidden)) for name in LINEARS}


def layer_ranks(name: str, shape: str) -> dict[str, int | None]:
    """Ranks of a layer, None for dense, the same in every layer: "0.8/64" is a ratio of 0.8 in multiples of 64."""
    shapes = list(linear_shapes(shape).values())
    if name == "dense":
        return dict.fromkeys(LINEARS)
    ratio, multiple = name.split("/")
    ranks = uniform_ranks(shapes, parameter_budget(shapes, float(ratio)), rank_multiple=int(multiple))
    return dict(zip(LINEARS, ranks, strict=True))


def build(name: str, args: Namespace) -> LlamaForCausalLM:
    """A model of random weights, built on the device."""
    ranks = layer_ranks(name, args.shape)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[args.shape], num_hidden_layers=args.layers))
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for child, linear in list(parent.named_children()):
                    if isinstance(linear, nn.Linear) and ranks[child] is not None:
                        factors = LowRankLinear(linear.in_features, linear.out_features, ranks[child], bias=False)
                        setattr(parent, child, factors)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def build_all(names: Iterable[str], args: Namespace, results: Results) -> dict[str, LlamaForCausalLM]:
    """The models, and a row of memory for each."""
    models = {}
    for name in names:
        before = torch.cuda.memory_allocated() if args.device == "cuda" else 0
        model = models[name] = build(name, args)
        after = torch.cuda.memory_allocated() if args.device == "cuda" else 0
        row = {"part": "memory", "model": name, "parameters": sum(p.numel() for p in model.parameters())}
        row |= {"mib": round((after - before) / 2**20, 1), "ranks": layer_ranks(name, args.shape)}
        results.add(row)
    return models


# --- forward passes ---


class Slot:
    """The static key and value cache of one layer, whose next token always has the same place: a step that can be
    replayed any number of times."""

    def __init__(self, config: LlamaConfig, batch: int, device: str) -> None:
        size = (batch, config.num_key_value_heads, LENGTH, config.hidden_size // config.num_attention_heads)
        self.keys, self.values = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2))
        self.place = torch.tensor([CONTEXT], device=device)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        return self.keys, self.values


def run_layer(
    layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, slot: Slot | None
) -> Tensor:
    return layer(hidden, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=slot)


def token_ids(model: LlamaForCausalLM, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (batch, CONTEXT), generator=generator).to(model.device)


def eager(model: LlamaForCausalLM, case: str, cache: StaticCache | None = None) -> Callable[[], Tensor]:
    """The model as `generate` calls it; `cache`, for decoding, is empty."""
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    batch, tokens = CASES[case]
    ids = token_ids(model, batch)
    if tokens > 1:
        return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    if cache is None:
        cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return lambda: model(input_ids=ids[:, :1], past_key_values=cache).logits


def static(
    model: LlamaForCausalLM, case: str, run: Callable[..., Tensor] = run_layer, slots: list[Slot | None] | None = None
) -> Callable[[], Tensor]:
    """The same layers on tensors of fixed address, without what prepares a call in Python."""
    decoder, (batch, tokens) = model.model, CASES[case]
    for layer in decoder.layers:
        layer.self_attn.layer_idx = 0  # a compiled layer serves the others only if they do not differ, even in this
    ids = token_ids(model, batch)[:, :tokens].contiguous()
    mask, start = None, 0
    if tokens == 1:
        mask, start = (torch.arange(LENGTH, device=model.device) <= CONTEXT)[None, None, None], CONTEXT
        slots = slots or [Slot(model.config, batch, model.device) for _ in decoder.layers]
    slots = slots or [None] * len(decoder.layers)
    positions = torch.arange(start, start + tokens, device=model.device)[None]
    cos, sin = decoder.rotary_emb(decoder.embed_tokens(ids[:1]), positions)

    def call() -> Tensor:
        hidden = decoder.embed_tokens(ids)
        for layer, slot in zip(decoder.layers, slots, strict=True):
            hidden = run(layer, hidden, cos, sin, mask, slot)
        return model.lm_head(decoder.norm(hidden[:, -1:]))

    return call


def compiled(model: LlamaForCausalLM, case: str, backend: str) -> tuple[Callable[[], Tensor], float]:
    """`static` with compiled layers, and the seconds that this took."""
    torch._dynamo.reset()
    call = static(model, case, torch.compile(run_layer, fullgraph=True, dynamic=False, backend=backend))
    start = time.perf_counter()
    call()
    synchronize()
    return call, round(time.perf_counter() - start, 1)


# --- measuring ---


def release(device: str) -> None:
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def timing(call: Callable[[], Any]) -> dict[str, float]:
    """Median and interquartile range, over groups of calls one after the other, of the ms of a call."""
    for _ in range(WARMUP):
        call()
    times = []
    for _ in range(GROUPS):
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start) / CALLS)
    spread = statistics.quantiles(times, n=4)
    return {"ms": round(spread[1], 3), "ms_iqr": round(spread[2] - spread[0], 3)}


@torch.no_grad()
def speed(args: Namespace, results: Results) -> None:
    cells = [
        {"part": "speed", "variant": variant, "case": case, "model": name}
        for variant in args.variants
        for case in CASES
        for name in (args.models if variant != "compile" else args.compiled)
    ]
    todo, deadline = [row for row in cells if results.find(row) is None], Deadline(args.seconds)
    models = build_all(dict.fromkeys(row["model"] for row in todo), args, results)
    for done, row in enumerate(todo):
        if deadline.left() <= 0:
            print(f"Out of time: {len(todo) - done} of {len(cells)} rows are left. The same command goes on.")
            break
        release(args.device)  # caches of the case before
        results.add(row | speed_of(models[row["model"]], row["variant"], row["case"], args))
        print(f"{done + 1} of {len(todo)} rows in {args.seconds - deadline.left():.0f} s", flush=True)


def speed_of(model: LlamaForCausalLM, variant: str, case: str, args: Namespace) -> dict[str, Any]:
    try:
        if variant == "eager":
            return timing(eager(model, case))
        call, seconds = compiled(model, case, args.backend) if variant == "compile" else (static(model, case), None)
        extra = {} if seconds is None else {"compile_seconds": seconds}
        return timing(captured(call) if args.device == "cuda" else call) | extra
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # must not cost the other variants
        return {"error": f"{type(error).__name__}: {error}"[:300]}


# --- decomposition ---


def input_grams(args: Namespace) -> dict[str, Tensor]:
    """Gram matrices of random inputs of unequal size for every linear of a layer, shared where the inputs are."""
    shapes = linear_shapes(args.shape)
    grams = {}
    for source, names in {
        "q_proj": ["k_proj", "v_proj"],
        "o_proj": [],
        "gate_proj": ["up_proj"],
        "down_proj": [],
    }.items():
        features = shapes[source][1]
        inputs = torch.randn(min(TOKENS, 4 * features), features, device=args.device)
        inputs *= torch.logspace(0, -2, features, device=args.device)
        inputs[:, :4] *= 100  # as a few channels of transformers are
        grams |= dict.fromkeys([source, *names], (inputs.T @ inputs).cpu())  # where `calibrate` leaves them
    return grams


def decomposition(args: Namespace, results: Results) -> None:
    """Some layers one weight after the other, by plain SVD and by whitening, then whitening of the whole model as the tuner
    does it, several weights at a time."""
    grams, shapes = input_grams(args), linear_shapes(args.shape)
    ranks = layer_ranks(args.ranks, args.shape)
    warm = [torch.randn(shape, device=args.device) for shape in ((96, 160), (160, 96)) for _ in range(8)]
    list(in_parallel(lambda w: decompose(w, 8, "whitening", input_gram=torch.eye(w.shape[1])), warm, WORKERS))

    def work(item: tuple[str, Tensor, str]) -> tuple[str, float]:
        name, weight, method = item
        start = time.perf_counter()
        decompose(weight, ranks[name] or min(weight.shape), method, input_gram=grams[name])
        if args.device == "cuda":
            torch.cuda.current_stream().synchronize()
        return name, time.perf_counter() - start

    deadline = Deadline(args.seconds)
    parts = ("svd", 1, 1), ("whitening", 1, min(2, args.layers)), ("whitening", WORKERS, args.layers)
    for method, workers, layers in parts:
        row = {"part": "decomposition", "method": method, "workers": workers, "model": args.ranks, "layers": 0}
        row |= {"seconds": 0.0, "seconds_by_linear": dict.fromkeys(LINEARS, 0.0)}
        if (results.find(row) or row)["layers"] >= layers:
            continue
        while row["layers"] < layers and deadline.left() > 0:
            group = min(layers - row["layers"], 8) if workers > 1 else 1
            items = [
                (name, torch.randn(shape, device=args.device, dtype=torch.bfloat16) / shape[1] ** 0.5, method)
                for _ in range(group)
                for name, shape in shapes.items()
            ]
            synchronize()
            start = time.perf_counter()
            try:
                found = list(in_parallel(work, items, workers))
            except RuntimeError as error:  # the others may do
                row["error"] = str(error)[:300]
                break
            for name, seconds in found:
                row["seconds_by_linear"][name] = round(row["seconds_by_linear"][name] + seconds, 4)
            synchronize()
            row["seconds"] = round(row["seconds"] + time.perf_counter() - start, 3)
            row["layers"] += group
        results.add(row)


PARTS = {"speed": speed, "decomposition": decomposition}


def parse(argv: list[str] | None = None) -> Namespace:
    parser: ArgumentParser = argument_parser(__doc__, "compressed_speed")
    variants = ["eager", "CUDA graph", "compile"]
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--shape", default="llama-7b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--models", nargs="+", default=MODELS, help="'dense' or ratio/rank multiple")
    parser.add_argument("--variants", nargs="+", default=variants, choices=variants)
    parser.add_argument("--compiled", nargs="+", default=["dense", "0.8/64", "0.5/64"], help="models to compile")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--ranks", default="0.8/64", help="model whose ranks the decomposition has")
    parser.add_argument("--seconds", type=float, default=240, help="limit of a part; no row is begun after that")
    args = parser.parse_args(argv)
    args.compiled = [name for name in args.compiled if name in args.models]
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(0)
    results = Results(args.output, KEY, shape=args.shape, layers=args.layers)
    for part in args.parts:
        PARTS[part](args, results)
        release(args.device)


if __name__ == "__main__":
    main()
