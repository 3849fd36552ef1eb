# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The fine-tuning methods that are compared: their settings, when ranks are allocated, and which ranks come out."""

from dataclasses import dataclass, field
from typing import Literal

from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, TaskType
from peft.tuners.lora import LoraLayer
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peft_rank import RankAllocationCallback, SalientLoRAConfig, get_rank_pattern


@dataclass
class MethodArguments:
    """How the model is fine-tuned."""

    method: Literal["salientlora", "adalora", "lora", "rslora", "full"] = field(
        default="salientlora", metadata={"help": "Adapter type; full trains every weight."}
    )
    r: int | None = field(default=None, metadata={"help": "Rank of lora and rslora. Default: target_r."})
    init_r: int = field(default=15, metadata={"help": "Rank of each module before the allocation."})
    target_r: int = field(default=2, metadata={"help": "Mean rank after the allocation."})
    lora_alpha: float = field(
        default=32.0,
        metadata={"help": "lora_alpha / init_r scales the update; lora gets the same scale whatever its rank."},
    )
    init_weights: Literal["lora", "gaussian", "orthogonal"] = field(
        default="lora", metadata={"help": "Start of SalientLoRA; gaussian is that of its authors' code."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' input."})
    allocation_warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps at the initial rank; below 1: share of the training steps."}
    )
    allocation_steps: float = field(
        default=0.5, metadata={"help": "Steps in which ranks are pruned; below 1: share of the training steps."}
    )
    initial_window: int = field(default=10, metadata={"help": "Steps in the first window of SalientLoRA."})
    final_window: int = field(default=200, metadata={"help": "Steps in the last window of SalientLoRA."})
    correlation_threshold: float = field(default=0.9, metadata={"help": "beta in the SalientLoRA paper."})
    slope_threshold: float = field(default=2.0, metadata={"help": "gamma in the SalientLoRA paper."})
    salience_lambda: float = field(default=0.7, metadata={"help": "Weight of magnitude against influence."})
    orth_reg_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the regularizer. Default: 0.01 with LoRA's start, else the config's."},
    )
    target_modules: list[str] | None = field(default=None, metadata={"help": "Default: all linear layers of a block."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole and saved. Default: new heads, if any."}
    )

    def __post_init__(self):
        if not 1 <= self.target_r <= self.init_r:
            raise ValueError(f"target_r must be between 1 and init_r={self.init_r}, but is {self.target_r}.")
        for name in ("allocation_warmup_steps", "allocation_steps"):
            value = getattr(self, name)
            if value < 0 or (value >= 1 and value != int(value)):
                raise ValueError(f"{name} must be a share below 1 or a whole number of steps, but is {value}.")


def steps_or_ratio(name: str, value: float) -> dict[str, float]:
    """`{name_steps: int}` or, below 1, `{name_ratio: float}`."""
    return {f"{name}_ratio": value} if value < 1 else {f"{name}_steps": int(value)}


def adapter_config(
    args: MethodArguments, task_type: TaskType, target_modules: list[str], modules_to_save: list[str] | None = None
) -> PeftConfig:
    """The PEFT config of the chosen method; the modules are those that the arguments name, if they do."""
    common = {
        "task_type": task_type,
        "target_modules": args.target_modules or target_modules,
        "modules_to_save": args.modules_to_save or modules_to_save,
        "lora_dropout": args.lora_dropout,
    }
    if args.method in ("lora", "rslora"):
        rank = args.r or args.target_r
        alpha = args.lora_alpha * rank / args.init_r
        return LoraConfig(r=rank, lora_alpha=alpha, use_rslora=args.method == "rslora", **common)
    common |= {"init_r": args.init_r, "target_r": args.target_r, "lora_alpha": args.lora_alpha}
    if args.orth_reg_weight is not None:
        common["orth_reg_weight"] = args.orth_reg_weight
    elif args.method == "salientlora" and args.init_weights == "lora":
        common["orth_reg_weight"] = 0.01
    if args.method == "adalora":
        # AdaLoraCallback sets the schedule when the number of steps is known; PEFT only wants one above 0 here.
        return AdaLoraConfig(total_step=1, **common)
    return SalientLoRAConfig(
        **steps_or_ratio("warmup", args.allocation_warmup_steps),
        **steps_or_ratio("allocation", args.allocation_steps),
        initial_window=args.initial_window,
        final_window=args.final_window,
        correlation_threshold=args.correlation_threshold,
        slope_threshold=args.slope_threshold,
        salience_lambda=args.salience_lambda,
        init_weights=args.init_weights,
        **common,
    )


def allocates(args: MethodArguments) -> bool:
    """Whether ranks change in training."""
    return args.method in ("salientlora", "adalora") and args.target_r < args.init_r


def allocation_span(args: MethodArguments, total_steps: int) -> tuple[int, int] | None:
    """Last step before the allocation and its own last step, once the number of training steps is known."""
    if not allocates(args):
        return None
    warmup, length = (
        max(round(value * total_steps), 1 if value > 0 else 0) if value < 1 else int(value)
        for value in (args.allocation_warmup_steps, args.allocation_steps)
    )
    return warmup, warmup + length


class AdaLoraCallback(TrainerCallback):
    """Lets PEFT's AdaLoRA allocate: neither PEFT nor the Trainer calls `update_and_allocate` by itself."""

    def __init__(self, args: MethodArguments):
        self.args = args

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PeftModel, **kwargs
    ):
        start, end = allocation_span(self.args, state.max_steps)
        if not start < end <= state.max_steps:
            raise ValueError(
                f"allocation_warmup_steps and allocation_steps: AdaLoRA would allocate from step {start} to {end}, but "
                f"training has {state.max_steps} steps."
            )
        config = model.base_model.rankallocator.peft_config
        config.total_step, config.tinit, config.tfinal = state.max_steps, start, state.max_steps - end
        # A decision every ten steps; short runs get ten decisions.
        config.deltaT = max(1, min(10, (end - start) // 10))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PeftModel, **kwargs
    ):
        # Gradients are still there, the weights are updated already, and this step is not yet counted.
        model.base_model.update_and_allocate(state.global_step + 1)


def add_allocation(trainer: Trainer, args: MethodArguments) -> None:
    """Give the trainer the callback by which the method allocates ranks, if it does."""
    if args.method == "adalora" and allocates(args):
        trainer.add_callback(AdaLoraCallback(args))
    if args.method == "salientlora":
        trainer.add_callback(RankAllocationCallback(log=trainer.log))


def final_ranks(args: MethodArguments, model: PreTrainedModel | PeftModel) -> dict[str, int]:
    """Module name -> rank of its adapter; nothing for full fine-tuning."""
    if args.method == "full":
        return {}
    if args.method == "salientlora":
        return get_rank_pattern(model)
    config = model.active_peft_config
    if config.rank_pattern:
        masks = {name.partition(".lora_E")[0]: mask for name, mask in config.rank_pattern.items()}
        return {name.removeprefix("base_model.model."): sum(mask) for name, mask in masks.items()}
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {name: layer.r[model.active_adapter] for name, layer in layers.items()}
