# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""SalientLoRA on several GPUs of one host: the ranks of one process, tokens per second, memory, and what allocating costs.

    python benchmarks/multi_gpu.py                                       # 2 GPUs, every engine, LLaMA-1B shape
    python benchmarks/multi_gpu.py --engines single ddp --processes 4
    python benchmarks/multi_gpu.py --engines ddp zero2 --accumulation 4 --cost-only
    python benchmarks/multi_gpu.py --shape tiny --engines single ddp zero2 zero3    # two processes on a CPU

Every engine gets processes of its own and four trainings by the HF Trainer, with random weights and the same global batch:
- agreement: fp32, four blocks; the final ranks have to be those of one process (`single`, which must come first);
- allocation: bf16, the whole shape; time and memory while it allocates, and then, in other steps, what the regularizer's
  gradient takes, recording a step, and the longest decision, waiting for the device before and after each (upper bounds:
  they cannot overlap with anything then);
- fixed, before it and once more after it: the same steps without callback, all ranks kept and no regularizer. By how much
  these two differ says what a difference is worth.

An engine takes a minute or two. The result file is written after each, and engines that it holds are not measured again.
ZeRO needs `deepspeed`; FSDP2 needs GPUs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from _common import SHORT_SCHEDULE, Results, argument_parser, synchronize
from accelerate.state import PartialState
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainerControl, TrainingArguments

from peft_rank import RankAllocationCallback, SalientLoRAConfig, get_rank_pattern


ENGINES = {"single": None, "ddp": None, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp2": None}
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
}
# what `accelerate launch` makes of examples/common/configs/fsdp2.yaml
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
TRAININGS = ("agreement", "fixed", "allocation", "fixed again")
STEPS = 40  # of a training
# those that are timed, and those whose parts are: all of the third window, at whose end the budget is met
FREE, WATCHED = range(8, 15), range(15, 25)


class Texts(Dataset):
    """Random tokens that repeat themselves, so that there is something to learn."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        half = torch.randint(vocabulary, (rows, length // 2), generator=generator)
        self.rows = torch.cat([half, half], 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class Clock(TrainerCallback):
    """When each step ended; it ends the training when what is measured lies behind."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        synchronize()
        self.ends.append(time.perf_counter())
        control.should_training_stop |= len(self.ends) == self.steps

    def milliseconds(self) -> float:
        """Of a step."""
        return 1e3 * statistics.median(self.ends[i] - self.ends[i - 1] for i in FREE)


class TimedAllocation(RankAllocationCallback):
    """The callback, and what its parts take in the steps that are watched."""

    def __init__(self) -> None:
        super().__init__(log=False)
        self.taken: defaultdict[str, list[float]] = defaultdict(list)

    def _timed(self, part: str, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in WATCHED:
            getattr(super(), event)(args, state, control, **kwargs)
            return
        synchronize()
        start = time.perf_counter()
        getattr(super(), event)(args, state, control, **kwargs)
        synchronize()
        self.taken[part].append(1e3 * (time.perf_counter() - start))

    def milliseconds(self) -> dict[str, float]:
        if not self.taken:
            return {}
        parts = {
            # one of the two does nothing
            "regularizer_ms": sum(statistics.median(self.taken[part]) for part in ("before", "after")),
            "recording_ms": statistics.median(self.taken["allocation"]),
            "decision_ms": max(self.taken["allocation"]),
        }
        return {name: round(value, 2) for name, value in parts.items()}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._timed("before", "on_step_begin", *args, **kwargs)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._timed("after", "on_pre_optimizer_step", *args, **kwargs)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._timed("allocation", "on_optimizer_step", *args, **kwargs)


def deepspeed_config(stage: int) -> dict[str, Any]:
    optimizer = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": optimizer},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def make_model(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, blocks: int, allocate: bool
) -> PeftModel:
    shape = SHAPES[args.shape] | {"num_hidden_layers": blocks}
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        base = LlamaForCausalLM(LlamaConfig(vocab_size=args.vocabulary, use_cache=False, **shape))
    torch.set_default_dtype(torch.float32)
    config = SalientLoRAConfig(
        init_r=args.init_r,
        target_r=args.target_r if allocate else args.init_r,
        orth_reg_weight=0.1 if allocate else 0.0,
        init_weights=False,  # gradients everywhere from the first step
        **SHORT_SCHEDULE,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    # ZeRO-3 gathers parameters of one type only; it trains fp32 copies of them
    return get_peft_model(base, config, autocast_adapter_dtype=args.worker != "zero3")


def train(args: argparse.Namespace, folder: str, name: str) -> dict[str, Any]:
    """One training; what came of it, as this process sees it."""
    gc.collect()
    cuda = torch.cuda.is_available()
    held = torch.cuda.memory_allocated() if cuda else 0  # DeepSpeed lets go of an engine only with its process
    agreement, allocate = name == "agreement", not name.startswith("fixed")
    blocks = min(4, SHAPES[args.shape]["num_hidden_layers"]) if agreement else SHAPES[args.shape]["num_hidden_layers"]
    length = args.length // 4 if agreement else args.length
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    stage = ENGINES[args.worker]
    training_args = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=args.batch // processes,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=1e-3,
        max_grad_norm=0.0,  # engines clip at different places
        bf16=not agreement,
        use_cpu=not cuda,
        deepspeed=None if stage is None else deepspeed_config(stage),
        ddp_find_unused_parameters=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    dtype = torch.float32 if agreement else torch.bfloat16
    model = make_model(args, training_args.device, dtype, blocks, allocate)
    last = STEPS if agreement else (WATCHED if allocate and not args.cost_only else FREE).stop
    clock, allocation = Clock(last), TimedAllocation()
    callbacks = [clock, allocation] if allocate else [clock]
    data = Texts(args.batch * args.accumulation * STEPS, length, args.vocabulary)
    trainer = Trainer(model, training_args, train_dataset=data, callbacks=callbacks)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    milliseconds = clock.milliseconds()
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "processes": processes,
        "steps": len(clock.ends),
        "ranks": list(get_rank_pattern(model).values()),
        "milliseconds": round(milliseconds, 2),
        "tokens_per_second": round(1e3 * args.batch * args.accumulation * length / milliseconds),
        **allocation.milliseconds(),
        "peak_gib": round((torch.cuda.max_memory_allocated() - held) / 2**30, 3) if cuda else None,
    }


def work(args: argparse.Namespace) -> None:
    """The trainings of one engine, in each of its processes; the first one writes what it found, after every training."""
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.worker.startswith("zero") and not torch.cuda.is_available():
        import deepspeed

        # or it compiles its communication through shared memory, for a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in TRAININGS[args.cost_only :]:
            found[name] = train(args, folder, name)
            if int(os.environ.get("RANK", "0")) == 0:
                args.result.write_text(json.dumps(found), encoding="utf-8")
            PartialState().wait_for_everyone()


def run_engine(args: argparse.Namespace, engine: str) -> dict[str, Any]:
    """All trainings of an engine, in new processes; with `error` where they did not come to an end."""
    processes = 1 if engine == "single" else args.processes
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        settings = [f"--{name}={getattr(args, name)}" for name in SETTINGS]
        command = [sys.executable, *(launcher if processes > 1 else []), __file__, *settings]
        command += ["--cost-only"] * args.cost_only
        environment = {
            **os.environ,
            **(FSDP2 if engine == "fsdp2" else {}),
            "ACCELERATE_USE_DEEPSPEED": str(engine.startswith("zero")).lower(),
            # the Trainer spreads a batch over all GPUs that it sees
            **({"CUDA_VISIBLE_DEVICES": visible.split(",")[0]} if engine == "single" else {}),
        }
        started = time.perf_counter()
        error = _run([*command, "--worker", engine, "--result", str(result)], environment, args.seconds)
        row: dict[str, Any] = {"engine": engine, "seconds": round(time.perf_counter() - started, 1)}
        if result.exists():
            row |= json.loads(result.read_text(encoding="utf-8"))
    return row if error is None else {**row, "error": error}


def _run(command: list[str], environment: dict[str, str], seconds: float) -> str | None:
    """What a command printed last, if it failed or took too long."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **output) as process:
        try:
            text, _ = process.communicate(timeout=seconds)
            return None if process.returncode == 0 else text[-3000:]
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers then; killed, it would leave them on the GPUs
            text, _ = process.communicate()
            return f"not done after {seconds:g} s: {text[-3000:]}"


def compare(row: dict[str, Any], single: dict[str, Any] | None) -> None:
    """Note in the row how many ranks are elsewhere than with one process, and what allocating costs."""
    for name in ("agreement", "allocation"):
        if single is not None and name in row and name in single:
            pairs = zip(row[name]["ranks"], single[name]["ranks"], strict=True)
            row[name]["ranks_elsewhere"] = sum(abs(ours - theirs) for ours, theirs in pairs) // 2
    for name in TRAININGS:
        if name in row:
            ranks = row[name].pop("ranks") if name.startswith("fixed") else row[name]["ranks"]
            row[name]["total_rank"] = sum(ranks)
    if "fixed again" in row:
        allocation, *fixed = (row[name]["milliseconds"] for name in ("allocation", "fixed", "fixed again"))
        row["slower_than_fixed"] = round(allocation / statistics.mean(fixed) - 1, 4)
        row["fixed_differ"] = round(max(fixed) / min(fixed) - 1, 4)


SETTINGS = ("shape", "vocabulary", "batch", "accumulation", "length", "init_r", "target_r")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "multi_gpu")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=32, help="rows of all processes together")
    parser.add_argument("--accumulation", type=int, default=1, help="such batches of a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--init_r", type=int, default=16)
    parser.add_argument("--target_r", type=int, default=8)
    parser.add_argument("--cost-only", action="store_true", help="no agreement, and no parts of allocating")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of one engine")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.worker is not None:
        work(args)
        return
    settings = {name: getattr(args, name) for name in (*SETTINGS, "processes")}
    results = Results(args.output, ("engine",), **settings, steps=STEPS)
    for engine in args.engines:
        if results.find({"engine": engine}):
            continue
        if engine == "fsdp2" and not torch.cuda.is_available():
            row = {"engine": engine, "error": "not run: accelerate shards on accelerators only"}
        else:
            row = run_engine(args, engine)
            compare(row, row if engine == "single" else results.find({"engine": "single"}))
        results.add(row)


if __name__ == "__main__":
    main()
