# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of one training step on a LLaMA-7B-shaped model, side by side with PEFT.

    python benchmarks/training_step.py                      # every section
    python benchmarks/training_step.py --sections methods   # one of: methods, compiled, modes, ranks, shrinking

Random weights in bfloat16, all seven linears of 32 layers adapted, fused AdamW. The floor is the frozen model's own
forward and backward through its activations. SalientLoRA runs with everything on: regularizer, recording, decisions.
Beside the time of a step stand that of its kernels alone, and what the host takes to launch them: a step takes the longer
of the two, and a little more. Written after every row; the same command does anew what sections are not complete, as rows
of one section are only comparable if they come from one run. Needs one GPU of 80 GB or more.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import torch
from _common import (
    STEP_OPTIONS,
    Deadline,
    Results,
    argument_parser,
    compile_blocks,
    time_steps,
    uncompile_blocks,
)
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_rank import SalientLoRAConfig


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {"4x512": (4, 512), "8x1024": (8, 1024)}
WARMUP, STEPS = 5, 15
BLOCKS = "compiled blocks"  # each block of the decoder by itself, which compiles once for all of them
Plan = list[tuple[str, Any, str, dict[str, Any]]]
"""Name, configuration, shape and options of the rows of a section."""
KEY = ("section", "method", "shape", "rank", "phase", *STEP_OPTIONS)


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
        self.forward = torch.compile(self.model) if self.compiled is True else self.model
        if self.compiled == BLOCKS:
            compile_blocks(base)

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
        uncompile_blocks(self.base)


def run(base: LlamaForCausalLM, config: PeftConfig | None, shape: str, steps: int, **options: Any) -> dict[str, Any]:
    step = Step(base, config, shape, **options)
    try:
        return time_steps(step, steps, WARMUP)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        step.close()
        del step
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def methods() -> Plan:
    plan = []
    for shape in SHAPES:
        plan += [
            ("floor", None, shape, {}),
            ("LoRA", LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS), shape, {}),
            ("LoRA", LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS), shape, {"adapter_dtype": "bfloat16"}),
            ("SalientLoRA", salient(16, 8), shape, {}),
            ("AdaLoRA", adalora(16, 8), shape, {}),
        ]
    return plan


def compiled() -> Plan:
    mode = {"compile": BLOCKS}
    return [
        ("floor", None, "4x512", mode),
        ("LoRA", LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS), "4x512", mode),
        ("SalientLoRA", salient(16, 8), "4x512", mode),
    ]


def modes() -> Plan:
    plan = []
    for mode in ({"gradient_checkpointing": True}, {"autocast": True}, {"compile": True}):
        plan += [
            ("floor", None, "4x512", mode),
            ("LoRA", LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS), "4x512", mode),
            ("SalientLoRA", salient(16, 8), "4x512", mode),
        ]
    return plan


def ranks() -> Plan:
    plan = [("floor", None, "4x512", {})]
    for r, target in ((16, 8), (64, 16), (128, 32), (480, 64)):
        plan += [
            ("SalientLoRA", salient(r, target), "4x512", {"rank": r}),
            ("LoRA", LoraConfig(r=r, lora_alpha=r, target_modules=LINEARS), "4x512", {"rank": r}),
            ("AdaLoRA", adalora(r, target), "4x512", {"rank": r}),
        ]
    return plan


def shrinking(base: LlamaForCausalLM, results: Results) -> None:
    """One run from 64 ranks to 8: the step before the first and after the last decision."""
    step = Step(base, salient(64, 8, allocation_steps=60), "4x512")
    for phase, warmup in (("before", 1), ("after", 75)):
        timing = time_steps(step, 5, warmup)
        trained = [p for p in step.model.parameters() if p.requires_grad]
        moments = [v for state in step.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        row = {"section": "shrinking", "method": "SalientLoRA", "shape": "4x512", "phase": phase, **timing}
        row["parameters"] = sum(p.numel() for p in trained)
        row["optimizer_mib"] = round(sum(v.numel() * v.element_size() for v in moments) / 2**20, 1)
        row["total_rank"] = step.model.base_model.rank_summary()["rank/total"]
        results.add(row)
    step.close()


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


SECTIONS = {"methods": methods, "compiled": compiled, "modes": modes, "ranks": ranks}


def main() -> None:
    parser = argument_parser(__doc__, "training_step")
    parser.add_argument("--sections", nargs="+", default=[*SECTIONS, "shrinking"], choices=[*SECTIONS, "shrinking"])
    parser.add_argument("--layers", type=int, default=32, help="fewer layers for a quick look")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after that")
    args = parser.parse_args()
    torch.manual_seed(0)
    base, deadline = llama(args.layers), Deadline(args.seconds)
    no_synchronisation(base)
    settings = {"layers": args.layers, "linears": LINEARS, "steps": STEPS, "no_synchronisation_per_step": True}
    results = Results(args.output, KEY, **settings)
    for section in args.sections:
        if section == "shrinking":
            held = results.find({"section": section, "method": "SalientLoRA", "shape": "4x512", "phase": "after"})
            if not held and deadline.left() > 0:
                shrinking(base, results)
            continue
        plan = [
            ({"section": section, "method": name, "shape": shape, **options}, config)
            for name, config, shape, options in SECTIONS[section]()
        ]
        if all(results.find(row) for row, _ in plan):
            continue
        for row, config in plan:
            if deadline.left() > 0:
                options = {name: row[name] for name in STEP_OPTIONS if name in row}
                steps = STEPS if row["method"] != "AdaLoRA" else 8
                results.add(row | run(base, config, row["shape"], steps, **options))


if __name__ == "__main__":
    main()
