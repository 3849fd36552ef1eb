# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Two processes under DeepSpeed train what one process trains, whatever is partitioned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_rank import SalientLoRAConfig, get_rank_pattern
from peft_rank.tuners.sharding import in_full_precision
from tiny_models import TinyModel


pytestmark = pytest.mark.distributed

SAVE = {"save_strategy": "steps", "save_steps": 6}
BEST = {**SAVE, "eval_strategy": "steps", "eval_steps": 6, "load_best_model_at_end": True}
RUNS = [
    {"name": "zero0", "stage": 0},
    {"name": "zero1", "stage": 1},
    {"name": "zero2", "stage": 2, "arguments": SAVE},
    {"name": "zero2-accumulated", "stage": 2, "accumulation": 2},
    {"name": "zero2-resumed-within", "stage": 2, "resume": "zero2/checkpoint-6", "seed": 1},
    {"name": "zero2-resumed-after", "stage": 2, "resume": "zero2/checkpoint-18", "seed": 1},
    {"name": "zero2-further", "stage": 2, "adapter": "zero2/adapter"},
    {"name": "zero2-offloaded", "stage": 2, "offload": True},
    {"name": "zero3", "stage": 3, "arguments": BEST},
    {
        "name": "zero3-accumulated-checkpointing",
        "stage": 3,
        "accumulation": 2,
        "arguments": {"gradient_checkpointing": True},
    },
    {"name": "zero3-resumed-within", "stage": 3, "resume": "zero3/checkpoint-6", "seed": 1},
    {"name": "zero3-offloaded", "stage": 3, "offload": True},
    {"name": "zero3-further", "stage": 3, "adapter": "zero3/adapter"},
    {"name": "fp16-zero0", "stage": 0, "arguments": {"fp16": True}},
    {"name": "fp16-zero2", "stage": 2, "arguments": {"fp16": True, **SAVE}},
    {"name": "fp16-zero3", "stage": 3, "arguments": {"fp16": True, **SAVE}},
]
STAGES = {run["name"]: run["stage"] for run in RUNS}
SAME = [name for name in STAGES if name.startswith("zero") and not name.endswith("further")]
OPTIMIZERS = {
    0: "DeepSpeedOptimizerWrapper(AdamW)",
    1: "DeepSpeedOptimizerWrapper(DeepSpeedZeroOptimizer)",
    2: "DeepSpeedOptimizerWrapper(DeepSpeedZeroOptimizer)",
    3: "DeepSpeedOptimizerWrapper(DeepSpeedZeroOptimizer_Stage3)",
}


@pytest.fixture(scope="module")
def double(launch: Callable) -> Callable:
    return launch("deepspeed", RUNS, engine="deepspeed")


@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_what_one_trains(single: Callable, double: Callable, name: str) -> None:
    """Ranks, weights, and thereby that the regularizer enters once in every optimizer step."""
    single("plain").check_same(double(name))


@pytest.mark.parametrize("name", SAME)
def test_deepspeed_is_what_runs(double: Callable, name: str) -> None:
    seen, stage = double(name).seen, STAGES[name]
    assert (seen["engine"], seen["processes"]) == ("DeepSpeedEngine", 2)
    assert seen["optimizers"] == {OPTIMIZERS[stage]}
    assert set(seen["placeholders"]) == {stage == 3}


@pytest.mark.parametrize("name", STAGES)
def test_the_processes_agree_bit_for_bit(double: Callable, name: str) -> None:
    main, other = double(name).processes
    assert main["pattern"] == other["pattern"]
    assert main["totals"] == other["totals"]
    for key, factor in main["factors"].items():
        torch.testing.assert_close(other["factors"][key], factor, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_the_saved_adapter_is_compact_and_loads_in_one_process(double: Callable, llama: TinyModel, name: str) -> None:
    run = double(name)
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert sum(len(factor) for key, factor in run.adapter.items() if key.endswith("_E")) == 14
    assert sorted(config["rank_pattern"].values()) == sorted(r for r in run.seen["pattern"].values() if r != 4)
    assert config["allocation_state"] is None
    held_out = llama.make_batch(4, seed=7)
    model = PeftModel.from_pretrained(llama.make_model(), run.folder / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**held_out).logits, run.seen["logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_checkpoint_within_the_allocation_loads_in_one_process(
    single: Callable, double: Callable, llama: TinyModel, name: str
) -> None:
    model = PeftModel.from_pretrained(llama.make_model(), double(name).folder / "checkpoint-6")
    assert model.base_model.allocator("default").last_step == 6
    assert sum(get_rank_pattern(model).values()) == single("plain").seen["totals"][5]


@pytest.mark.parametrize("name", ["zero2-further", "zero3-further"])
def test_a_finished_adapter_trains_further(single: Callable, double: Callable, name: str) -> None:
    """With modules whose factors are empty, which ZeRO-3 cannot gather."""
    one, two = single("further"), double(name)
    assert set(two.seen["totals"]) == {14}
    assert 0 in two.seen["pattern"].values()
    assert one.distance(two) < 1e-5


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_generation_works_after_training(single: Callable, double: Callable, name: str) -> None:
    torch.testing.assert_close(double(name).seen["generated"], single("plain").seen["generated"])


@pytest.mark.parametrize("name", ["zero3", "zero3-accumulated-checkpointing", "zero3-further"])
def test_no_module_gathers_the_base_model(double: Callable, name: str) -> None:
    """The layers gather their own factors, which are parameters of their submodules, and nobody gathers anything else."""
    assert double(name).seen["gathering"] == {"SalientLoRALinear"}


def test_trainable_parameters_are_counted_whole(double: Callable) -> None:
    trainable = double("zero3").seen["summary"]["parameters/trainable"]
    assert trainable == double("zero2").seen["summary"]["parameters/trainable"] > 4000


def test_resuming_from_a_missing_checkpoint_names_it(llama: TinyModel, tmp_path: Path) -> None:
    """DeepSpeed restores weights by itself, from anywhere; a callback only knows of `output_dir`."""
    config = SalientLoRAConfig(init_r=4, target_r=1, target_modules=["q_proj"], task_type=llama.task_type)
    tuner = get_peft_model(llama.make_model(), config).base_model
    tuner.resolve_schedule(100)
    tuner.check_resumed(10, tmp_path / "checkpoint-10")  # the allocation starts after step 10
    with pytest.raises(RuntimeError, match="resumes at step 11.*read from .*checkpoint-11.*`output_dir`"):
        tuner.check_resumed(11, tmp_path / "checkpoint-11")


def test_what_deepspeed_does_not_train_is_read_as_it_is() -> None:
    """It keeps copies of what is in half precision and trained, and nothing of the rest."""
    frozen, single = torch.nn.Parameter(torch.ones(2).half(), requires_grad=False), torch.nn.Parameter(torch.ones(3))
    frozen._hp_mapping = single._hp_mapping = None
    other = torch.nn.Parameter(torch.ones(2).half())  # in no group of the optimizer
    found = in_full_precision([frozen, single, other])
    assert all(one is two for one, two in zip(found, [frozen, single, other], strict=True))


@pytest.mark.parametrize("name", ["fp16-zero2", "fp16-zero3"])
def test_values_are_recorded_in_full_precision(double: Callable, name: str) -> None:
    """Those of the float32 copies that DeepSpeed trains, in one message."""
    found = double(name).seen["masters"]
    assert len(found) == 14
    for parameter, recorded, copy in found:
        torch.testing.assert_close(recorded, copy, rtol=0, atol=0)
        torch.testing.assert_close(recorded.half(), parameter)
    assert any(not torch.equal(recorded, parameter.float()) for parameter, recorded, _ in found)


@pytest.mark.parametrize("name", ["zero3", "fp16-zero3"])
def test_factors_are_gathered_as_deepspeed_gathers_them(double: Callable, name: str) -> None:
    """In one message, where it sends one for each, and hangs hooks on them."""
    found = double(name).seen["gathered"]
    assert len(found) == 3 * 14
    for ours, theirs in found:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (
        sum(whole.numel() for whole, _ in found) == sum(f.numel() for f in double(name).seen["factors"].values()) > 0
    )


def test_a_placeholder_is_not_saved(double: Callable) -> None:
    assert double("zero2").seen["state_dict_error"] is None
    assert "sharded over processes. Save through the Trainer" in double("zero3").seen["state_dict_error"]


@pytest.mark.parametrize("name", ["fp16-zero0", "fp16-zero2", "fp16-zero3"])
def test_the_regularizer_has_the_scale_of_the_loss_in_fp16(single: Callable, double: Callable, name: str) -> None:
    """Scaled by 1024 too often or too rarely, it would rule the training or vanish from it."""
    with_it, without = (single(run).seen["summary"]["orthogonality"] for run in ("plain", "unregularized"))
    assert double(name).seen["summary"]["orthogonality"] == pytest.approx(with_it, abs=(without - with_it) / 4)


@pytest.mark.parametrize("name", ["fp16-zero2", "fp16-zero3"])
def test_what_is_recorded_is_not_rounded_to_fp16(double: Callable, llama: TinyModel, name: str) -> None:
    """The optimizer trains float32 copies of the model's parameters; small steps are seen in them only."""
    model = PeftModel.from_pretrained(llama.make_model(), double(name).folder / "checkpoint-6")
    values = load_file(double(name).folder / "checkpoint-6" / "adapter_model.safetensors")
    assert {value.dtype for key, value in values.items() if key.endswith("_E")} == {torch.float16}
    window = model.base_model.allocator("default")._window
    assert len(window) == 2  # steps 5 and 6
    assert (window != window.half().float()).any()
