# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Two processes under FSDP2, each with a part of every factor, train what one process trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from peft_rank import InRankConfig, RankAllocationCallback, SalientLoRAConfig, callbacks, get_rank_pattern
from peft_rank.tuners.sharding import gather, own_part, own_rows
from tiny_models import TinyModel, training_arguments


pytestmark = pytest.mark.distributed

SAVE = {"save_strategy": "steps", "save_steps": 6}
BEST = {**SAVE, "eval_strategy": "steps", "eval_steps": 6, "load_best_model_at_end": True}
RUNS = [
    {"name": "fsdp", "arguments": BEST},
    {"name": "accumulated-checkpointing", "accumulation": 2, "arguments": {"gradient_checkpointing": True}},
    {"name": "resumed-within", "resume": "fsdp/checkpoint-6", "seed": 1},
    {"name": "resumed-after", "resume": "fsdp/checkpoint-18", "seed": 1},
    {"name": "bf16", "arguments": {"bf16": True}},
]
SAME = ("fsdp", "accumulated-checkpointing", "resumed-within", "resumed-after")


@pytest.fixture(scope="module")
def double(launch: Callable) -> Callable:
    return launch("fsdp", RUNS, engine="fsdp")


@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_what_one_trains(single: Callable, double: Callable, name: str) -> None:
    """Ranks, weights, and thereby that the regularizer enters once in every optimizer step, each row in one place."""
    single("plain").check_same(double(name))


@pytest.mark.parametrize("name", [run["name"] for run in RUNS])
def test_every_factor_is_sharded_and_the_processes_agree(double: Callable, name: str) -> None:
    main, other = double(name).processes
    assert (main["engine"], main["processes"]) == ("FSDPPeftModelForCausalLM", 2)
    assert set(main["placeholders"]) == {True}
    assert main["pattern"] == other["pattern"]
    assert main["totals"] == other["totals"]
    for key, factor in main["factors"].items():
        torch.testing.assert_close(other["factors"][key], factor, rtol=0, atol=0)


def test_the_saved_adapter_is_compact_and_loads_in_one_process(double: Callable, llama: TinyModel) -> None:
    run = double("fsdp")
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert sum(len(factor) for key, factor in run.adapter.items() if key.endswith("_E")) == 14
    assert config["allocation_state"] is None
    model = PeftModel.from_pretrained(llama.make_model(), run.folder / "adapter").eval()
    with torch.no_grad():
        logits = model(**llama.make_batch(4, seed=7)).logits
    torch.testing.assert_close(logits, run.seen["logits"], rtol=0, atol=2e-5)


def test_a_checkpoint_within_the_allocation_loads_in_one_process(
    single: Callable, double: Callable, llama: TinyModel
) -> None:
    model = PeftModel.from_pretrained(llama.make_model(), double("fsdp").folder / "checkpoint-6")
    assert model.base_model.allocator("default").last_step == 6
    assert sum(get_rank_pattern(model).values()) == single("plain").seen["totals"][5]


def test_the_regularizer_acts_in_bf16(single: Callable, double: Callable) -> None:
    with_it, without = (single(run).seen["summary"]["orthogonality"] for run in ("plain", "unregularized"))
    assert double("bf16").seen["summary"]["orthogonality"] == pytest.approx(with_it, abs=(without - with_it) / 4)
    assert double("bf16").seen["totals"] == single("plain").seen["totals"]


def test_trainable_parameters_are_counted_whole(double: Callable, llama: TinyModel) -> None:
    """With the ranks that are masked until the adapter is saved."""
    config = SalientLoRAConfig(
        init_r=4, target_r=1, target_modules=list(llama.target_modules), task_type=llama.task_type
    )
    expected = get_peft_model(llama.make_model(), config).get_nb_trainable_parameters()[0]
    assert double("fsdp").seen["summary"]["parameters/trainable"] == expected


def test_a_part_is_not_saved(double: Callable) -> None:
    assert "sharded over processes. Save through the Trainer" in double("fsdp").seen["state_dict_error"]


# --- parts of tensors -------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_tensors_are_gathered_and_cut_again(alone) -> None:
    """With one process, whose part is all; the trainings above have two, of which one may have fewer rows."""
    full = [torch.randn(5, 3), torch.randn(2, 7).double(), torch.randn(4), torch.randn(5, 3)]
    parts = [full[0], *(distribute_tensor(tensor, alone, [Shard(0)]) for tensor in full[1:])]
    for expected, part, whole in zip(full, parts, gather(parts), strict=True):
        assert type(whole) is type(own_part(part)) is torch.Tensor
        torch.testing.assert_close(whole, expected, rtol=0, atol=0)
        torch.testing.assert_close(own_rows(expected, part), own_part(part), rtol=0, atol=0)


@pytest.mark.parametrize("placement", [Shard(1), Replicate()])
def test_other_layouts_are_refused(alone, placement) -> None:
    with pytest.raises(RuntimeError, match="A factor is distributed as .*not with tensor parallelism"):
        gather([distribute_tensor(torch.randn(5, 3), alone, [placement])])


# --- what is refused --------------------------------------------------------------------------------------------------


FULL = {"fsdp_version": 2, "state_dict_type": "StateDictType.FULL_STATE_DICT"}


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({**FULL, "fsdp_version": 1}, "under FSDP1.*fsdp_version: 2"),
        ({**FULL, "state_dict_type": "StateDictType.SHARDED_STATE_DICT"}, "Set `fsdp_state_dict_type: FULL"),
    ],
)
def test_other_forms_of_fsdp_are_refused(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: dict, message: str
) -> None:
    config = SalientLoRAConfig(init_r=4, target_r=1, target_modules=["q_proj"], task_type=llama.task_type)
    with pytest.raises(RuntimeError, match=message):
        start(get_peft_model(llama.make_model(), config), tmp_path, monkeypatch, plugin)


def test_modules_without_ranks_are_refused(llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch can neither split the gradient of an empty parameter nor gather one."""
    ranks = {"^model.layers.0.self_attn.q_proj": 0}
    config = SalientLoRAConfig(init_r=2, target_r=1, rank_pattern=ranks, target_modules=["q_proj"])
    with pytest.raises(RuntimeError, match="layers.0.self_attn.q_proj.*modules of rank 0.*DDP or DeepSpeed"):
        start(get_peft_model(llama.make_model(), config), tmp_path, monkeypatch, FULL)


def test_methods_that_need_whole_factors_refuse_fsdp(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = InRankConfig(init_r=2, buffer_r=2, max_r=8, target_modules=["q_proj"], task_type=llama.task_type)
    with pytest.raises(RuntimeError, match="not allocated under FSDP by InRankModel.*Train with DDP"):
        start(get_peft_model(llama.make_model(), config), tmp_path, monkeypatch, FULL)


def start(model: PeftModel, folder: Path, monkeypatch: pytest.MonkeyPatch, plugin: dict) -> None:
    sharded = SimpleNamespace(distributed_type=callbacks.DistributedType.FSDP, fsdp_plugin=SimpleNamespace(**plugin))
    monkeypatch.setattr(callbacks, "AcceleratorState", lambda: sharded)
    state = SimpleNamespace(max_steps=20, global_step=0, is_world_process_zero=True)
    RankAllocationCallback(log=False).on_train_begin(training_arguments(folder), state, None, model=model)
