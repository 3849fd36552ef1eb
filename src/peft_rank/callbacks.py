# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Forwards the events of the HF Trainer to an adaptive tuner. All decisions are the tuner's."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .ranks import get_rank_pattern
from .reporting.picture import PICTURE_FILE, RANKS_FILE, parse_line, plot_ranks, read_lines
from .tuners.adaptive import AdaptiveRankTuner, RankLayer
from .tuners.shrinking import forget_other_shapes


# which callback drives a tuner in which training, so that a second one stays idle
_drivers: WeakKeyDictionary[AdaptiveRankTuner, tuple[TrainerState, RankAllocationCallback]] = WeakKeyDictionary()


class RankAllocationCallback(TrainerCallback):
    """
    Allocates ranks while the HF Trainer (or `Seq2SeqTrainer`, or TRL's `SFTTrainer`) trains. One callback for every
    adaptive tuner.

    It resolves the schedule from the real number of steps and prints the plan, adds the regularizer's gradient, records
    every optimizer step that was not skipped, has ranks pruned when a decision is due, and finalizes the adapter at the
    end of the training. Gradient accumulation, label smoothing, DDP, DeepSpeed ZeRO-1/2/3, FSDP2 and fp16 are taken care
    of.

    Args:
        log (`bool` or `Callable[[dict], None]`): True prints the plan and writes `ranks.jsonl`: a line at the start, at
            every logging step, at every decision (with the rank of every module) and at the end; and its picture,
            `ranks.png`, at the end, where matplotlib is installed. Both are copied beside the adapter when it is saved
            after that. A callable gets the scalars `rank/total`, `rank/mean`, `rank/budget`, `orthogonality`,
            `allocation/window` and `parameters/trainable` besides: with
            `trainer.add_callback(RankAllocationCallback(log=trainer.log))` they reach TensorBoard, W&B and trackio.
            False is silent.
        output_dir (`str`, *optional*): Folder of `ranks.jsonl`, by default the Trainer's.

    Raises:
        RuntimeError: When the training starts, if the model has no tuner that allocates, if the engine is not supported,
            or if it resumes from a checkpoint that holds no state of the allocation; when it ends, if no step of a
            configured allocation was ever recorded.
        ValueError: When the training starts, if the schedule does not fit into it.
    """

    def __init__(self, log: bool | Callable[[dict[str, Any]], None] = True, output_dir: str | None = None):
        self.log = log
        self.output_dir = output_dir
        self._tuner: AdaptiveRankTuner | None = None
        self._decided = False
        self._compiled = False
        self._answered: dict[str, int] = {}
        self._living: dict[str, list[int]] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        tuner = _find_tuner(model)
        driver = _drivers.get(tuner)
        if driver is not None and driver[0] is state:
            # added twice: another callback stays idle, this one is asked a second time
            self._tuner = tuner if driver[1] is self else None
            return
        _refuse_fsdp(tuner)
        _drivers[tuner] = (state, self)
        self._tuner = tuner
        self._answered.clear()
        # as a whole by the Trainer, or block by block before
        self._compiled = args.torch_compile or any(m._compiled_call_impl is not None for m in model.modules())
        if state.global_step == 0:
            tuner.restart_allocation()
            if optimizer is not None and not _shards():
                # a second `train()`: the first may have ended with a best model of other widths
                forget_other_shapes(optimizer)
        plan = tuner.resolve_schedule(state.max_steps)
        if state.global_step > 0:
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            tuner.check_resumed(state.global_step, checkpoint if _shards() else None)
        if not self.log:
            return
        self._living = tuner.living_ranks()
        scalars = tuner.rank_summary()  # on every process: sharded factors are gathered together
        if state.is_world_process_zero:
            print(plan)
            self._start_file(args, state)
            line = {"step": state.global_step, "event": "start", "plan": plan, **scalars}
            self._write(args, {**line, "ranks": get_rank_pattern(model)})

    def on_step_begin(self, *args: Any, optimizer: Optimizer, **kwargs: Any) -> None:
        if self._tuner is not None and _uses_deepspeed():
            self._tuner.arm_regularization(_deepspeed_loss_scale(optimizer))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        if self._is_asked_first("gradient", state) and not _uses_deepspeed():
            _unscale(optimizer)
            self._tuner.add_regularization_gradient()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        if not self._is_asked_first("step", state):
            return
        # the Trainer counts the step only afterwards
        step = state.global_step + 1
        if optimizer.step_was_skipped:
            self._tuner.skip_step(step)
            return
        self._decided = self._tuner.update_and_allocate(
            step,
            None if _shards() else optimizer,
            shrink="last" if self._compiled else "each",
        )
        if self._decided and self._tuner.allocation_finished:
            # a model from before the end of the allocation has more ranks than the budget: it does not compete
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self._tuner is not None and self._tuner.should_stop:
            control.should_training_stop = True
        if not self._is_asked_first("log", state) or not self.log or not (self._decided or control.should_log):
            return
        event = "decision" if self._decided else "log"
        self._decided = False
        self._report(args, state, control, model, event)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        # `logging_strategy="epoch"` asks for its log here
        if self._is_asked_first("epoch", state) and self.log and control.should_log:
            self._report(args, state, control, model, "log")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        # the Trainer's last log: when `on_train_end` comes to us, trackers have closed their runs
        if self._tuner is None or not callable(self.log) or "train_runtime" not in (logs or {}):
            return
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            self._finalize(args, optimizer)
        self._tell(control, self._tuner.rank_summary())

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        if self._tuner is None:
            return
        self._finalize(args, optimizer)
        if self.log:
            self._record(args, state, model, "end")
            if state.is_world_process_zero:
                self._draw(args)
            self._tuner.record_folder = self._path(args).parent
        _drivers.pop(self._tuner, None)
        self._tuner = None

    def _is_asked_first(self, event: str, state: TrainerState) -> bool:
        """Whether this callback drives the training and has not answered this event of this step before."""
        if self._tuner is None or self._answered.get(event) == state.global_step:
            return False
        self._answered[event] = state.global_step
        return True

    def _finalize(self, args: TrainingArguments, optimizer: Optimizer | None) -> None:
        # An engine that shards parameters cannot have others, and DDP, which a second `train()` goes on with, would not
        # average the gradients of others. Saving cuts the pruned ranks off all the same.
        sharded = _shards()
        self._tuner.finalize(None if sharded else optimizer, compact=not sharded and args.world_size == 1)

    def _report(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, event: str
    ) -> None:
        self._tell(control, self._record(args, state, model, event))

    def _record(self, args: TrainingArguments, state: TrainerState, model: nn.Module, event: str) -> dict[str, Any]:
        """Write a line of `ranks.jsonl`, and return its scalars."""
        # on every process: sharded factors are gathered together
        scalars = self._tuner.rank_summary()
        if state.is_world_process_zero:
            ranks = {} if event == "log" else {"ranks": get_rank_pattern(model), **self._pruned()}
            self._write(args, {"step": state.global_step, "event": event, **scalars, **ranks})
        return scalars

    def _tell(self, control: TrainerControl, scalars: dict[str, Any]) -> None:
        if callable(self.log):
            # the Trainer's log clears the flag that its own log of this step waits for
            should_log = control.should_log
            self.log(scalars)
            control.should_log = should_log

    def _pruned(self) -> dict[str, dict[str, list[int]]]:
        """The ranks that are gone since the last line that told of it, by module."""
        before, self._living = self._living, self._tuner.living_ranks()
        gone = {name: sorted(set(before.get(name, ())) - set(left)) for name, left in self._living.items()}
        gone = {name: numbers for name, numbers in gone.items() if numbers}
        return {"pruned": gone} if gone else {}

    def _draw(self, args: TrainingArguments) -> None:
        path = self._path(args)
        try:
            plot_ranks(path, path.with_name(PICTURE_FILE))
        except ImportError:
            # pictures are an extra
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the trained adapter is still to be saved
            warnings.warn(f"There is no picture of the ranks: {type(error).__name__}: {error}", stacklevel=2)

    def _path(self, args: TrainingArguments) -> Path:
        return Path(self.output_dir or args.output_dir, RANKS_FILE)

    def _start_file(self, args: TrainingArguments, state: TrainerState) -> None:
        """Keep the lines up to the step that is resumed from; none at a fresh start."""
        path = self._path(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_until(state.global_step, path) if path.exists() and state.global_step else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        path.with_name(PICTURE_FILE).unlink(missing_ok=True)

    def _write(self, args: TrainingArguments, line: dict[str, Any]) -> None:
        with self._path(args).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _lines_until(step: int, path: Path) -> list[str]:
    """The lines of a record up to a step. Damaged ones are left out: no log decides whether a training resumes."""
    kept, lines = [], read_lines(path)
    damaged = 0
    for line in lines:
        try:
            if parse_line(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            damaged += 1
    if damaged:
        warnings.warn(
            f"{damaged} of the {len(lines)} lines in {path} are damaged and left out. The training is not affected.",
            stacklevel=2,
        )
    return kept


def _find_tuner(model: nn.Module) -> AdaptiveRankTuner:
    tuner = next((module for module in model.modules() if isinstance(module, AdaptiveRankTuner)), None)
    if tuner is not None:
        return tuner
    if any(isinstance(module, RankLayer) for module in model.modules()):
        raise RuntimeError(
            "The model holds the layers of the adapter without its tuner, so that its ranks cannot be allocated: it was "
            "added with `model.add_adapter` or `inject_adapter_in_model`, or it is a `PeftMixedModel`. Use `get_peft_model(model, config)`, or train without RankAllocationCallback."
        )
    raise RuntimeError(
        "RankAllocationCallback found no tuner that allocates ranks. Wrap the model first: "
        "`get_peft_model(model, SalientLoRAConfig(...))`."
    )


def _refuse_fsdp(tuner: AdaptiveRankTuner) -> None:
    """Raise where the engine is FSDP in a form in which this tuner's ranks cannot be allocated."""
    state = AcceleratorState()
    if state.distributed_type != DistributedType.FSDP:
        return
    if not tuner.allocates_under_fsdp:
        raise RuntimeError(
            f"Ranks are not allocated under FSDP by {type(tuner).__name__}: it needs the whole factors, of which FSDP leaves "
            "every process a part. Train with DDP."
        )
    if state.fsdp_plugin.fsdp_version != 2:
        raise RuntimeError(
            "Ranks are not allocated under FSDP1, which flattens the factors into one vector. Set `fsdp_version: 2` in "
            "accelerate's configuration (`version` in `fsdp_config`), or train with DDP or DeepSpeed ZeRO."
        )
    if "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type):
        raise RuntimeError(
            f"FSDP is set to save {state.fsdp_plugin.state_dict_type}, from which no adapter is written. Set "
            "`fsdp_state_dict_type: FULL_STATE_DICT` in accelerate's configuration (`state_dict_type` in `fsdp_config`): it "
            "gathers weights when they are saved."
        )
    empty = [name for name, parameter in tuner.named_parameters() if parameter.requires_grad and not parameter.numel()]
    if empty:
        raise RuntimeError(
            f"FSDP cannot gather parameters without elements, such as {empty[0]}: the adapter has modules of rank 0. Train it "
            "further with DDP or DeepSpeed ZeRO, or allocate with `min_r=1` in the first place."
        )


def _shards() -> bool:
    """Whether the engine holds the parameters, which then keep their shapes until the end."""
    return AcceleratorState().distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def _uses_deepspeed() -> bool:
    return AcceleratorState().distributed_type == DistributedType.DEEPSPEED


def _deepspeed_loss_scale(optimizer: AcceleratedOptimizer) -> float:
    """The factor that DeepSpeed multiplies the loss by: its ZeRO optimizers do so in fp16, and nothing else does."""
    plugin = AcceleratorState().deepspeed_plugin
    scaled = plugin.zero_stage > 0 and plugin.hf_ds_config.is_true("fp16.enabled")
    return float(optimizer.optimizer.loss_scale) if scaled else 1.0


def _unscale(optimizer: Optimizer) -> None:
    """Take the fp16 loss scale out of the gradients; the scaler remembers, and looks for overflow, before our part."""
    scaler = optimizer.scaler if isinstance(optimizer, AcceleratedOptimizer) else None
    if scaler is None:
        return
    try:
        scaler.unscale_(optimizer.optimizer)
    except RuntimeError as error:
        # raised where gradient clipping has unscaled them already, which the scaler does not tell beforehand
        if "already been called" not in str(error):
            raise
