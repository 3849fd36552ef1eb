# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Trains tiny LLaMAs through the HF Trainer, on one or several processes, and writes down what came out.

    python worker.py FOLDER RUNS                              one process
    torchrun --nproc_per_node 2 worker.py FOLDER RUNS         several, by DDP, DeepSpeed or FSDP2

RUNS is a JSON list of the keyword arguments of `train`. Every run gets its folder in FOLDER: the saved adapter, the
checkpoints, and `process-0.pt`, `process-1.pt` with what each process saw. The tests compare these.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import Trainer, TrainerCallback

from peft_rank import InRankConfig, RankAllocationCallback, SalientLoRAConfig, export_lora, get_rank_pattern
from peft_rank.tuners.sharding import gather, in_full_precision, is_sharded
from tiny_models import TINY_MODELS, training_arguments


torch.set_num_threads(1)

LLAMA = TINY_MODELS["llama"]
GLOBAL_BATCH = 4
STEPS = 20
HELD_OUT = {"n": 4, "seed": 7}


class Watch(TrainerCallback):
    """Looks at what the engine does, from within the training."""

    def __init__(self) -> None:
        self.optimizers: set[str] = set()
        self.placeholders: list[bool] = []
        self.totals: list[int] = []

    def on_step_begin(self, *args: Any, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        self.optimizers.add(f"{type(optimizer).__name__}({type(optimizer.optimizer).__name__})")
        # outside of forward, ZeRO-3 leaves an empty vector of a parameter, FSDP2 a part
        self.placeholders += [p.shape == (0,) or is_sharded(p) for p in model.parameters() if p.requires_grad]

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.totals.append(sum(get_rank_pattern(model).values()))


def make_model(seed: int, **config: Any) -> PeftModel:
    torch.manual_seed(seed)
    settings = {
        "init_r": 4,
        "target_r": 1,
        "lora_alpha": 8.0,
        # every factor has a gradient from the first step
        "init_weights": False,
        # decisions after steps 4, 9 and 16, to 35, 18 and 14 ranks
        "warmup_steps": 2,
        "allocation_steps": 14,
        "initial_window": 2,
        "final_window": 10,
        "orth_reg_weight": 0.5,
        "target_modules": list(LLAMA.target_modules),
        "task_type": LLAMA.task_type,
        **config,
    }
    model = get_peft_model(LLAMA.make_model(use_cache=False), SalientLoRAConfig(**settings))
    with torch.no_grad():
        # the first module is worth nothing: it loses all its ranks
        next(iter(model.base_model.adapter_layers("default").values())).salientlora_E["default"].mul_(1e-3)
    return model


def make_inrank(seed: int, **config: Any) -> PeftModel:
    """Ranks that grow until step 12 of 20, then are cut."""
    torch.manual_seed(seed)
    settings = {
        "init_r": 1,
        "buffer_r": 1,
        "max_r": 12,
        "explained_ratio": 0.999,
        "warmup_steps": 2,
        "check_interval": 3,
        "growth_steps": 12,
        "init_weights": False,
        "target_modules": list(LLAMA.target_modules),
        "task_type": LLAMA.task_type,
        **config,
    }
    # a base that is replaced may start anywhere
    base = LLAMA.make_model(seed=seed if settings.get("from_scratch") else 0, use_cache=False)
    return get_peft_model(base, InRankConfig(**settings))


def prepare_deepspeed() -> None:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # or it compiles its communication through shared memory, for a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch computes in fp16 on any CPU, though slowly on those without instructions for it
    get_accelerator().is_fp16_supported = lambda: True


def prepare_fsdp() -> None:
    """Let accelerate shard on the CPU, too: it does so on accelerators only."""
    started = AcceleratorState.__init__

    def start(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        started(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or vars(self).get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = start


def deepspeed_config(stage: int, offload: bool = False) -> dict[str, Any]:
    optimizer = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    parts = ("optimizer", "param") if stage == 3 else ("optimizer",)
    return {
        # DeepSpeed's own optimizer for the CPU is compiled, for a minute
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            **({f"offload_{part}": {"device": "cpu"} for part in parts} if offload else {}),
            # everything is partitioned, however small
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "fp16": {"enabled": "auto", "initial_scale_power": 10},
        "optimizer": {"type": "AdamW", "params": optimizer},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def train(
    folder: Path,
    name: str,
    stage: int | None = None,
    offload: bool = False,
    accumulation: int = 1,
    resume: str | None = None,
    adapter: str | None = None,
    seed: int = 0,
    times: int = 1,
    arguments: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    method: str = "salientlora",
) -> None:
    """
    One training.

    Args:
        folder: Where all runs are.
        name: Folder of this run in it.
        stage: ZeRO stage; plain DDP (or one process) if not given.
        offload: Keep what ZeRO partitions in the memory of the CPU.
        accumulation: Micro-batches of an optimizer step; the examples of a step stay the same.
        resume: Checkpoint of another run, relative to `folder`, to resume from.
        adapter: Saved adapter of another run, relative to `folder`, to train further.
        seed: Of the adapter's initial weights.
        times: How often to call `train()`.
        arguments: Further fields of `TrainingArguments`.
        config: Further fields of the configuration.
        method: `"salientlora"` or `"inrank"`.
    """
    output, processes = folder / name, int(os.environ.get("WORLD_SIZE", "1"))
    args = training_arguments(
        output,
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": GLOBAL_BATCH // processes // accumulation,
            "gradient_accumulation_steps": accumulation,
            # DDP and DeepSpeed clip at different places
            "max_grad_norm": 0.0,
            "learning_rate": 1e-2,
            "deepspeed": None if stage is None else deepspeed_config(stage, offload),
            **(arguments or {}),
        },
    )
    if adapter is None:
        model = (make_inrank if method == "inrank" else make_model)(seed, **(config or {}))
    else:
        model = PeftModel.from_pretrained(LLAMA.make_model(use_cache=False), folder / adapter, is_trainable=True)
    checkpoint = None
    if resume is not None:
        checkpoint = str(output / Path(resume).name)
        if args.process_index == 0:
            shutil.copytree(folder / resume, checkpoint)
        PartialState().wait_for_everyone()
    watch = Watch()
    data = {"train_dataset": LLAMA.dataset(), "eval_dataset": LLAMA.dataset(**HELD_OUT)}
    trainer = Trainer(model, args, callbacks=[watch, RankAllocationCallback()], **data)
    for _ in range(times):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(output / "adapter"))
    torch.save(report(trainer, watch, output), output / f"process-{args.process_index}.pt")
    PartialState().wait_for_everyone()


def masters(tuner: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of every E the parameter, what is recorded of it, and what DeepSpeed's own function says."""
    from deepspeed.utils import safe_get_full_fp32_param

    stored = [layer.stored("default").E for layer in tuner.adapter_layers("default").values()]
    copies = [safe_get_full_fp32_param(parameter) for parameter in stored]
    seen = zip(gather(stored), in_full_precision(stored), strict=True)
    return [(*(one.detach().clone() for one in both), copy) for both, copy in zip(seen, copies, strict=True)]


def gathered(tuner: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every factor, by our messages and by DeepSpeed's own."""
    stored = [factor for layer in tuner.adapter_layers("default").values() for factor in layer.stored("default")]
    ours = gather(stored)
    with mock.patch("peft_rank.tuners.sharding._is_at_hand", return_value=False):
        pairs = zip(ours, gather(stored), strict=True)
    return [tuple(one.detach().clone() for one in pair) for pair in pairs]


def report(trainer: Trainer, watch: Watch, output: Path) -> dict[str, Any]:
    model, engine, refusal = trainer.model, trainer.model_wrapped, None
    try:
        get_peft_model_state_dict(model)
    except RuntimeError as error:
        refusal = str(error)
    tuner = model.base_model
    salient = tuner.prefix == "salientlora_"
    if salient and refusal is None and trainer.is_world_process_zero():
        export_lora(model, output / "lora")
    engine.eval()
    batch = LLAMA.make_batch(**HELD_OUT)
    with torch.no_grad():
        logits = engine(**batch).logits
    factors = {
        f"{name}.{attribute}": gather([getattr(layer, attribute)["default"]])[0].detach().clone()
        for name, layer in tuner.adapter_layers("default").items()
        for attribute in layer.adapter_layer_names
    }
    return {
        "engine": type(engine).__name__,
        "processes": trainer.accelerator.num_processes,
        "optimizers": watch.optimizers,
        "placeholders": watch.placeholders,
        "totals": watch.totals,
        "state_dict_error": refusal,
        "logits": logits,
        "generated": model.generate(batch["input_ids"][:, :4], max_new_tokens=4, do_sample=False),
        "eval_loss": trainer.evaluate()["eval_loss"],
        "factors": factors,
        "pattern": get_rank_pattern(model),
        "summary": tuner.rank_summary(),
        "masters": masters(tuner) if trainer.args.fp16 and trainer.is_deepspeed_enabled else [],
        "gathered": gathered(tuner) if trainer.is_deepspeed_enabled else [],
        # modules that ZeRO-3 gathers other modules' parameters for
        "gathering": {type(m).__name__ for m in model.modules() if vars(m).get("_external_params")},
    }


if __name__ == "__main__":
    if os.environ["ACCELERATE_USE_DEEPSPEED"] == "true":
        prepare_deepspeed()
    if os.environ["ACCELERATE_USE_FSDP"] == "true":
        prepare_fsdp()
    for run in json.loads(sys.argv[2]):
        train(Path(sys.argv[1]), **run)
