# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of one training step on a LLaMA-7B-shaped model, side by side with PEFT.

    python benchmarks/training_step.py                      # every section
    python benchmarks/training_step.py --sections methods   # one of: methods, modes, ranks, shrinking

Random weights in bfloat16, all seven linears of 32 layers adapted, fused AdamW. The floor is the frozen model's own
forward and backward through its activations. SalientLoRA runs with everything on: regularizer, recording, decisions.
Needs one GPU of 80 GB or more.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from _common import argument_parser, store
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_rank import SalientLoRAConfig


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {"4x512": (4, 512), "8x1024": (8, 1024)}
WARMUP, STEPS = 5, 15


def llama(layers: int = 32) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, use_cache=False
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.train()


def salient(r: int, target: int, allocation_steps: int = 10_000) -> SalientLoRAConfig:
    return SalientLoRAConfig(
        init_r=r, target_r=target, warmup_steps=1, allocation_steps=allocation_steps, target_modules=LINEARS
    )


def adalora(r: int, target: int) -> AdaLoraConfig:
    return AdaLoraConfig(
        init_r=r, target_r=target, tinit=1, tfinal=10, deltaT=1, total_step=10_000, target_modules=LINEARS
    )


class Step:
    """One optimizer step of one method, as its users write it."""

    def __init__(self, base: LlamaForCausalLM, config: PeftConfig | None, shape: str, **options: Any) -> None:
        autocast_adapter_dtype = options.pop("adapter_dtype", "float32") == "float32"
        self.compiled = options.pop("compile", False)
        self.checkpointing = options.pop("gradient_checkpointing", False)
        self.autocast = options.pop("autocast", False)
        if options:
            raise ValueError(f"unknown options {options}")
        self.base, self.config = base, config
        self.ids = torch.randint(0, 32_000, SHAPES[shape], device="cuda")
        self.count = 0
        if self.checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config is None:
            base.requires_grad_(False)
            base.enable_input_require_grads()
            self.model, self.optimizer = base, None
        else:
            self.model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.forward = torch.compile(self.model) if self.compiled else self.model

    def __call__(self) -> None:
        self.count += 1
        with torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext():
            loss = self.forward(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        if self.optimizer is None:
            return
        tuner = self.model.base_model
        ours = isinstance(self.config, SalientLoRAConfig)
        if ours:
            tuner.add_regularization_gradient()
        self.optimizer.step()
        if ours:
            tuner.update_and_allocate(self.count, self.optimizer, shrink="last" if self.compiled else "each")
        elif isinstance(self.config, AdaLoraConfig):
            tuner.update_and_allocate(self.count)
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        if self.config is None:
            self.base.disable_input_require_grads()
        else:
            self.model.unload()
        if self.checkpointing:
            self.base.gradient_checkpointing_disable()


def measure(step: Callable[[], None], steps: int = STEPS, warmup: int = WARMUP) -> dict[str, float]:
    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    spread = statistics.quantiles(times, n=4)
    return {
        "ms": round(statistics.median(times), 2),
        "ms_iqr": round(spread[2] - spread[0], 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def run(base: LlamaForCausalLM, name: str, config: PeftConfig | None, shape: str, **options: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "shape": shape, **options}
    steps = options.pop("steps", STEPS)
    try:
        step = Step(base, config, shape, **options)
        row |= measure(step, steps)
        step.close()
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
        step.close()
    del step
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    print(row, flush=True)
    return row


def methods(base: LlamaForCausalLM) -> list[tuple[str, Any, str, dict[str, Any]]]:
    plan = []
    for shape in SHAPES:
        plan += [
            ("floor", None, shape, {}),
            ("LoRA", LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS), shape, {}),
            ("LoRA", LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS), shape, {"adapter_dtype": "bfloat16"}),
            ("SalientLoRA", salient(16, 8), shape, {}),
            ("AdaLoRA", adalora(16, 8), shape, {"steps": 8}),
        ]
    return plan


def modes(base: LlamaForCausalLM) -> list[tuple[str, Any, str, dict[str, Any]]]:
    plan = []
    for mode in ({"gradient_checkpointing": True}, {"autocast": True}, {"compile": True}):
        plan += [
            ("floor", None, "4x512", mode),
            ("LoRA", LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS), "4x512", mode),
            ("SalientLoRA", salient(16, 8), "4x512", mode),
        ]
    return plan


def ranks(base: LlamaForCausalLM) -> list[tuple[str, Any, str, dict[str, Any]]]:
    plan = [("floor", None, "4x512", {})]
    for r, target in ((16, 8), (64, 16), (128, 32), (480, 64)):
        plan += [
            ("SalientLoRA", salient(r, target), "4x512", {"steps": 8}),
            ("LoRA", LoraConfig(r=r, lora_alpha=r, target_modules=LINEARS), "4x512", {"steps": 8}),
            ("AdaLoRA", adalora(r, target), "4x512", {"steps": 5}),
        ]
    return plan


def shrinking(base: LlamaForCausalLM) -> list[dict[str, Any]]:
    """One run from 64 ranks to 8: the step before the first and after the last decision."""
    step = Step(base, salient(64, 8, allocation_steps=60), "4x512")
    rows = []
    for phase, warmup in (("before", 1), ("after", 75)):
        timing = measure(step, steps=5, warmup=warmup)
        trained = [p for p in step.model.parameters() if p.requires_grad]
        moments = [v for state in step.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        row = {"method": "SalientLoRA", "shape": "4x512", "phase": phase, **timing}
        row["parameters"] = sum(p.numel() for p in trained)
        row["optimizer_mib"] = round(sum(v.numel() * v.element_size() for v in moments) / 2**20, 1)
        row["rank"] = step.model.base_model.rank_summary()["rank/total"]
        rows.append(row)
        print(row, flush=True)
    step.close()
    return rows


def no_synchronisation(base: LlamaForCausalLM) -> None:
    """Fails if the adapter, the regularizer or the recording waits for the device (transformers' own masks do)."""
    step = Step(base, salient(16, 8), "4x512")
    for _ in range(4):
        step()
    tuner = step.model.base_model
    layer = next(iter(tuner.adapter_layers("default").values()))
    x = torch.randn(4, 512, layer.in_features, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    layer(x).sum().backward()
    tuner.add_regularization_gradient()
    step.optimizer.step()
    tuner.update_and_allocate(step.count + 1, step.optimizer)
    torch.cuda.set_sync_debug_mode("default")
    step.close()


SECTIONS = {"methods": methods, "modes": modes, "ranks": ranks}


def main() -> None:
    parser = argument_parser(__doc__, "training_step")
    parser.add_argument("--sections", nargs="+", default=[*SECTIONS, "shrinking"], choices=[*SECTIONS, "shrinking"])
    parser.add_argument("--layers", type=int, default=32, help="fewer layers for a quick look")
    args = parser.parse_args()
    torch.manual_seed(0)
    base = llama(args.layers)
    rows: list[dict[str, Any]] = []
    no_synchronisation(base)
    for section in args.sections:
        if section == "shrinking":
            rows += [{"section": section, **row} for row in shrinking(base)]
        else:
            for name, config, shape, options in SECTIONS[section](base):
                rows.append({"section": section, **run(base, name, config, shape, **options)})
        store(args.output, rows, layers=args.layers, linears=LINEARS, steps=STEPS, no_synchronisation_per_step=True)


if __name__ == "__main__":
    main()
