# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Saving, loading, resuming, merging: an adapter whose ranks grow is at any time an adapter like any other."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from peft_rank import (
    InRankConfig,
    LowRankLinear,
    RankAllocationCallback,
    get_rank_pattern,
    load_compressed,
    rank_table,
    save_compressed,
)
from runs import Interrupted, StopAt, assert_close
from runs_inrank import adam, adapted, config, factors, logits, steps_by_hand, widths
from tiny_models import TINY_MODELS, TinyModel, training_arguments


LLAMA, GPT2 = TINY_MODELS["llama"], TINY_MODELS["gpt2"]
FORMS = pytest.mark.parametrize("from_scratch", [False, True], ids=["added", "scratch"])


def other_base(tiny: TinyModel, from_scratch: bool) -> nn.Module:
    """The base model to load into: with `from_scratch` any will do."""
    return tiny.make_model(seed=5 if from_scratch else 0)


def grown(tiny: TinyModel, steps: int = 5, **overrides) -> tuple[PeftModel, torch.optim.Optimizer]:
    model = adapted(tiny, **overrides)
    optimizer = adam(model)
    steps_by_hand(model, tiny, 1, steps, optimizer)
    return model, optimizer


def trainer(model: PeftModel, folder: Path, *callbacks, tiny: TinyModel = LLAMA, **arguments) -> Trainer:
    args = training_arguments(folder, **{"max_steps": 20, **arguments})
    data = {"train_dataset": tiny.dataset(), "eval_dataset": tiny.dataset(16, seed=1)}
    callbacks = [RankAllocationCallback(log=False), *callbacks]
    return Trainer(model, args, callbacks=callbacks, **data)


# ---- files ----


@FORMS
def test_an_adapter_in_the_middle_of_its_growth_loads(tiny: TinyModel, tmp_path: Path, from_scratch: bool) -> None:
    model, _ = grown(tiny, from_scratch=from_scratch)
    expected = logits(model, tiny)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    shapes = {key: value.shape for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    for name, (_, width) in widths(model).items():
        assert saved["rank_pattern"]["^" + name.replace(".", r"\.")] == width
        assert shapes[f"base_model.model.{name}.inrank_A"][0] == width
    loaded = PeftModel.from_pretrained(other_base(tiny, from_scratch), tmp_path)
    assert widths(loaded) == widths(model)
    assert_close(logits(loaded, tiny), expected, 0)
    assert loaded.base_model.clock("default").last_step == 5


@FORMS
def test_a_finished_adapter_holds_its_ranks_and_nothing_else(
    tiny: TinyModel, tmp_path: Path, from_scratch: bool
) -> None:
    model, optimizer = grown(tiny, from_scratch=from_scratch)
    ranks = get_rank_pattern(model)
    model.base_model.finalize(optimizer)
    assert get_rank_pattern(model) == ranks
    expected = logits(model, tiny)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {
        key.removeprefix("base_model.model.").rpartition(".")[0]: len(v)
        for key, v in file.items()
        if key.endswith("_A")
    } == ranks
    assert not [key for key in file if "state" in key]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["allocation_state"] is None
    if not from_scratch:
        assert all(key.endswith(("_A", "_B")) or ".classifier." in key for key in file)
    loaded = PeftModel.from_pretrained(other_base(tiny, from_scratch), tmp_path)
    assert get_rank_pattern(loaded) == ranks
    assert set(widths(loaded).values()) == {(r, r) for r in ranks.values()}
    assert_close(logits(loaded, tiny), expected, 0)
    small = PeftModel.from_pretrained(other_base(tiny, from_scratch), tmp_path, low_cpu_mem_usage=True)
    assert_close(logits(small, tiny), expected, 0)


@FORMS
def test_growth_goes_on_from_a_saved_adapter(tmp_path: Path, from_scratch: bool) -> None:
    model, optimizer = grown(LLAMA, 5, from_scratch=from_scratch)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    losses = steps_by_hand(model, LLAMA, 6, 12, optimizer)
    loaded = PeftModel.from_pretrained(other_base(LLAMA, from_scratch), tmp_path, is_trainable=True)
    other = adam(loaded)
    other.load_state_dict(state)
    assert steps_by_hand(loaded, LLAMA, 6, 12, other) == losses
    assert widths(loaded) == widths(model)
    assert_close(factors(loaded), factors(model), 0)


def test_a_fresh_adapter_and_its_configuration_say_nothing_of_ranks(tmp_path: Path) -> None:
    model = adapted(LLAMA)
    with pytest.warns(UserWarning, match="never checked"):
        model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["rank_pattern"], saved["allocation_state"]) == ({}, None)
    loaded = PeftModel.from_pretrained(LLAMA.make_model(), tmp_path, is_trainable=True)
    assert widths(loaded) == widths(model)
    grown_model, _ = grown(LLAMA)
    grown_model.save_pretrained(tmp_path / "grown")
    again = get_peft_model(LLAMA.make_model(), grown_model.peft_config["default"])
    assert set(widths(again).values()) == {(1, 3)}


def test_transformers_loads_it(tmp_path: Path) -> None:
    model, optimizer = grown(LLAMA)
    for folder in ("growing", "finished"):
        model.save_pretrained(tmp_path / folder)
        plain = LLAMA.make_model()
        info = plain.load_adapter(str(tmp_path / folder))
        assert not info.missing_keys
        assert not info.unexpected_keys
        assert_close(logits(plain, LLAMA), logits(model, LLAMA), 1e-6)
        assert get_rank_pattern(plain) == get_rank_pattern(model)
        model.base_model.finalize(optimizer)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop(next(key for key in w if key.endswith("_B"))), "shapes .*None.* for"),
        (
            lambda w: w.update({next(key for key in w if key.endswith("_A")): torch.ones(2, 7)}),
            "belongs to another model",
        ),
        (lambda w: [w.pop(key) for key in list(w)], "none of the InRank factors"),
    ],
)
def test_damaged_files(damage: Callable, message: str) -> None:
    from peft import set_peft_model_state_dict

    model, _ = grown(LLAMA)
    before, entries = factors(model), get_peft_model_state_dict(model)
    entries = {key: value for key, value in entries.items() if "state" not in key}
    damage(entries)
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, entries)
    assert_close(factors(model), before, 0)


@pytest.mark.parametrize(
    ("ending", "shape"), [("embed_tokens.weight", (64, 7)), ("norm.weight", (1,)), ("_state", (3,))]
)
def test_files_of_other_models_change_nothing(tmp_path: Path, ending: str, shape: tuple[int, ...]) -> None:
    """Of the factors' shapes, but not of those of the rest."""
    model, optimizer = grown(LLAMA, 3, from_scratch=True)
    model.save_pretrained(tmp_path)
    entries = load_file(tmp_path / "adapter_model.safetensors")
    damaged = next(key for key in entries if key.endswith(ending))
    save_file(
        {**entries, damaged: torch.ones(shape, dtype=entries[damaged].dtype)}, tmp_path / "adapter_model.safetensors"
    )
    steps_by_hand(model, LLAMA, 4, 5, optimizer)
    model.merge_adapter()
    before, clock = copy.deepcopy(model.state_dict()), copy.copy(model.base_model.clock("default"))
    message = rf"{re.escape(damaged)} is of shape {re.escape(str(shape))} in the checkpoint.*nothing was loaded"
    with pytest.raises(ValueError, match=message):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert_close(model.state_dict(), before, 0)
    assert model.base_model.clock("default") == clock


def test_models_can_be_copied_and_pickled() -> None:
    model, _ = grown(LLAMA)
    expected = logits(model, LLAMA)
    assert_close(logits(copy.deepcopy(model), LLAMA), expected, 0)
    assert_close(logits(pickle.loads(pickle.dumps(model)), LLAMA), expected, 0)


# ---- the Trainer ----


@FORMS
@pytest.mark.parametrize("crash", [5, 10, 15], ids=["growing", "at-the-end-of-growth", "fixed"])
def test_interrupt_and_resume_equals_uninterrupted(tmp_path: Path, from_scratch: bool, crash: int) -> None:
    whole = trainer(adapted(LLAMA, from_scratch=from_scratch), tmp_path / "whole")
    whole.train()
    arguments = {"save_strategy": "steps", "save_steps": 5}
    with pytest.raises(Interrupted):
        trainer(adapted(LLAMA, from_scratch=from_scratch), tmp_path / "b", StopAt(crash), **arguments).train()
    resumed = trainer(adapted(LLAMA, seed=9, from_scratch=from_scratch), tmp_path / "b", **arguments)
    if not from_scratch:
        resumed.model.load_state_dict(
            {key: value for key, value in whole.model.state_dict().items() if "inrank" not in key}, strict=False
        )
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{crash}"))
    assert get_rank_pattern(resumed.model) == get_rank_pattern(whole.model)
    assert_close(logits(resumed.model, LLAMA), logits(whole.model, LLAMA), 2e-6)
    assert resumed.state.log_history[-2]["loss"] == pytest.approx(whole.state.log_history[-2]["loss"], abs=1e-6)


@FORMS
def test_the_best_model_is_kept(tmp_path: Path, from_scratch: bool) -> None:
    """The evaluation after the end of the growth; earlier ones do not compete."""
    run = trainer(
        adapted(LLAMA, from_scratch=from_scratch),
        tmp_path,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith(("checkpoint-10", "checkpoint-15", "checkpoint-20"))
    best = PeftModel.from_pretrained(other_base(LLAMA, from_scratch), run.state.best_model_checkpoint)
    assert_close(logits(run.model, LLAMA), logits(best, LLAMA), 1e-6)
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-5)


def test_telemetry(tmp_path: Path) -> None:
    model = adapted(LLAMA)
    args = training_arguments(tmp_path, max_steps=20, logging_steps=5)
    seen = []
    Trainer(model, args, train_dataset=LLAMA.dataset(), callbacks=[RankAllocationCallback(log=seen.append)]).train()
    lines = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "decision"] == [2, 4, 6, 8, 10]
    totals = [line["rank/total"] for line in lines]
    assert totals == sorted(totals)
    assert lines[-1]["event"] == "end"
    assert lines[-1]["ranks"] == get_rank_pattern(model)
    assert lines[-1]["rank/width"] == lines[-1]["rank/total"] < lines[1]["rank/width"]
    assert "rank/explained" in seen[-1]
    assert "default" not in str(rank_table(model))


def test_resuming_without_the_state_is_noticed(tmp_path: Path) -> None:
    args = training_arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    Trainer(adapted(LLAMA), args, train_dataset=LLAMA.dataset()).train()
    with pytest.raises(RuntimeError, match="knows only its first 0 steps"):
        trainer(adapted(LLAMA), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_training_further_with_fixed_ranks(tmp_path: Path) -> None:
    first = trainer(adapted(LLAMA), tmp_path)
    first.train()
    ranks = get_rank_pattern(first.model)
    first.train()
    assert get_rank_pattern(first.model) == ranks


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_and_accumulation(tmp_path: Path, checkpointing: bool) -> None:
    runs = []
    for accumulate in (1, 2):
        model = adapted(LLAMA, from_scratch=True)
        run = trainer(
            model,
            tmp_path,
            gradient_accumulation_steps=accumulate,
            per_device_train_batch_size=8 // accumulate,
            max_steps=12,
            activation_checkpointing=checkpointing,
        )
        run.train()
        runs.append((get_rank_pattern(model), logits(model, LLAMA)))
    assert runs[0][0] == runs[1][0]
    assert_close(runs[0][1], runs[1][1], 1e-3)


# ---- the weight is the product ----


def test_factors_start_orthogonal_with_the_variance_of_the_weight(tiny: TinyModel) -> None:
    base = {
        name: module.weight.detach().clone()
        for name, module in tiny.make_model().named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    scale = 4.0 if tiny.conv1d else 1.0
    model = adapted(tiny, from_scratch=True, init_r=12, init_scale=scale)
    for name, layer in model.base_model.adapter_layers("default").items():
        A, B = layer.inrank_A["default"].detach(), layer.inrank_B["default"].detach()
        product, width = B @ A, len(A)
        assert product.square().mean().sqrt() == pytest.approx((scale * base[name].std()).item(), rel=1e-4)
        sigma = product.norm() / width**0.5
        assert_close(A @ A.T, sigma * torch.eye(width), 1e-5)
        assert_close(B.T @ B, sigma * torch.eye(width), 1e-5)


def test_everything_else_is_trained_and_dense_weights_are_gone() -> None:
    model = adapted(GPT2, from_scratch=True)
    optimizer = adam(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps_by_hand(model, GPT2, 1, 1, optimizer)
    for name, parameter in model.named_parameters():
        if name.endswith("base_layer.weight"):
            assert parameter.numel() == 0
        else:
            assert not torch.equal(parameter, before[name]), f"{name} has not changed"


def test_a_frozen_base_stays_frozen_and_a_trained_one_is_saved(tmp_path: Path) -> None:
    frozen, trained = adapted(LLAMA), adapted(LLAMA, train_base=True)
    for model, moved in ((frozen, False), (trained, True)):
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        steps_by_hand(model, LLAMA, 1, 3, adam(model))
        after = dict(model.named_parameters())
        for name, value in start.items():
            if "inrank" not in name:
                assert torch.equal(after[name], value) != (moved and name.endswith("proj.base_layer.weight")), name
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.make_model(), tmp_path)
    assert_close(logits(loaded, LLAMA), logits(trained, LLAMA), 0)
    assert not any(p.requires_grad for p in loaded.parameters())


@FORMS
def test_merging(tiny: TinyModel, from_scratch: bool) -> None:
    model, _ = grown(tiny, from_scratch=from_scratch)
    expected = logits(model, tiny)
    model.merge_adapter()
    assert_close(logits(model, tiny), expected, 2e-5)
    model.unmerge_adapter()
    assert_close(logits(model, tiny), expected, 2e-5)
    dense = model.merge_and_unload()
    assert_close(logits(dense, tiny), expected, 2e-5)
    assert {name: p.shape for name, p in dense.named_parameters()} == {
        n: p.shape for n, p in tiny.make_model().named_parameters()
    }


CHANGES = {
    "widen": lambda model, optimizer, folder: model.base_model.update_and_allocate(6, optimizer),
    "end": lambda model, optimizer, folder: model.base_model.update_and_allocate(10, optimizer),
    "finalize": lambda model, optimizer, folder: model.base_model.finalize(optimizer),
    "load": lambda model, optimizer, folder: model.load_adapter(str(folder), "default", is_trainable=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@FORMS
def test_factors_that_change_while_merged_leave_the_base_as_it_was(
    tmp_path: Path, from_scratch: bool, change: Callable
) -> None:
    grown(LLAMA, 3, seed=1, from_scratch=from_scratch)[0].save_pretrained(tmp_path / "other")
    models = [grown(LLAMA, from_scratch=from_scratch, growth_steps=10) for _ in range(2)]
    for (model, optimizer), merge in zip(models, (False, True), strict=True):
        if merge:
            model.merge_adapter()
        change(model, optimizer, tmp_path / "other")
    (expected, _), (model, _) = models
    assert widths(model) == widths(expected)
    assert_close(logits(model, LLAMA), logits(expected, LLAMA), 1e-5)
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(other_base(LLAMA, from_scratch), tmp_path / "saved")
    assert_close(logits(loaded, LLAMA), logits(expected, LLAMA), 1e-5)
    if not from_scratch:
        with model.disable_adapter():
            assert_close(logits(model, LLAMA), logits(LLAMA.make_model(), LLAMA), 1e-5)


def test_a_trained_base_is_saved_without_what_was_merged_into_it(tmp_path: Path) -> None:
    model, _ = grown(LLAMA, train_base=True)
    expected = logits(model, LLAMA)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(LLAMA.make_model(), tmp_path), LLAMA), expected, 1e-5)
    assert_close(logits(model, LLAMA), expected, 1e-5)


def test_disabling() -> None:
    model, _ = grown(LLAMA)
    with model.disable_adapter():
        assert_close(logits(model, LLAMA), logits(LLAMA.make_model(), LLAMA), 0)
    scratch, _ = grown(LLAMA, from_scratch=True)
    with scratch.disable_adapter(), pytest.raises(RuntimeError, match="cannot be disabled.*from_scratch"):
        logits(scratch, LLAMA)
    for call in (scratch.unload, lambda: scratch.delete_adapter("default")):
        with pytest.raises(RuntimeError, match="no other weight"):
            call()


def test_finalized_factors_are_a_compressed_model(tiny: TinyModel, tmp_path: Path) -> None:
    model, optimizer = grown(tiny, from_scratch=True)
    ranks = get_rank_pattern(model)
    model.base_model.finalize(optimizer)
    plain = model.get_base_model()
    found = {name: module.rank for name, module in plain.named_modules() if isinstance(module, LowRankLinear)}
    assert found == ranks
    expected = logits(model, tiny)
    assert_close(logits(plain, tiny), expected, 0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in plain.parameters() if p.requires_grad}
    assert steps_by_hand(model, tiny, 6, 8, optimizer)
    save_compressed(model, tmp_path)
    loaded = load_compressed(tmp_path)
    assert_close(logits(loaded, tiny), logits(model, tiny), 1e-6)


def test_factors_have_the_dtype_of_the_weights_that_they_replace(tmp_path: Path) -> None:
    """Or the model that is left would multiply one dtype by another."""
    model = get_peft_model(GPT2.make_model().bfloat16(), config(GPT2, from_scratch=True, growth_steps=4))
    optimizer = adam(model)
    steps_by_hand(model, GPT2, 1, 6, optimizer)
    expected = logits(model, GPT2)
    model.base_model.finalize(optimizer)
    assert {p.dtype for p in model.get_base_model().parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model.get_base_model(), GPT2), expected)
    save_compressed(model, tmp_path)
    assert torch.equal(logits(load_compressed(tmp_path), GPT2), expected)


def test_a_loaded_model_can_be_finalized(tmp_path: Path) -> None:
    model, optimizer = grown(GPT2, from_scratch=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(other_base(GPT2, True), tmp_path)
    loaded.base_model.finalize()
    model.base_model.finalize(optimizer)
    assert get_rank_pattern(loaded) == get_rank_pattern(model)
    assert_close(logits(loaded, GPT2), logits(model, GPT2), 1e-5)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model, _ = grown(GPT2, from_scratch=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(other_base(GPT2, True), tmp_path, low_cpu_mem_usage=True).get_base_model()
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert_close(logits(loaded, GPT2), logits(model, GPT2), 0)


# ---- what is refused ----


def test_unsupported_modules() -> None:
    with pytest.raises(TypeError, match="Conv2d.* is not supported"):
        get_peft_model(nn.Sequential(nn.Conv2d(2, 2, 1)), InRankConfig(from_scratch=True, target_modules=["0"]))
    with pytest.raises(ValueError, match="there can be no other"):
        adapted(LLAMA, from_scratch=True).add_adapter("second", config(LLAMA))
    with pytest.raises(ValueError, match="there can be no other"):
        adapted(LLAMA).add_adapter("second", config(LLAMA, from_scratch=True))


def with_shared_module() -> nn.Module:
    model = GPT2.make_model()
    model.transformer.h[1].mlp.c_fc = model.transformer.h[0].mlp.c_fc
    return model


def with_shared_weight() -> nn.Module:
    model = GPT2.make_model()
    model.transformer.h[1].mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
    return model


def with_adapter() -> nn.Module:
    """In its last linear only."""
    model = get_peft_model(GPT2.make_model(), LoraConfig(target_modules=["h.1.mlp.c_proj"])).base_model.model
    del model.peft_config
    return model


REFUSED = {
    "tied": (GPT2.make_model, ["c_attn", "lm_head"], ValueError, "lm_head is shared with another module of the model"),
    "weight": (with_shared_weight, ["c_attn", "c_fc"], ValueError, r"h\.0\.mlp\.c_fc, .*h\.1\.mlp\.c_fc is shared"),
    "module": (with_shared_module, ["c_attn", "c_fc"], ValueError, r"h\.0\.mlp\.c_fc is shared with another module"),
    "type": (GPT2.make_model, ["c_attn", "ln_f"], TypeError, "LayerNorm.* is not supported"),
    "adapter": (with_adapter, ["c_attn", "c_proj"], ValueError, r"h\.1\.mlp\.c_proj has an adapter"),
}


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
@pytest.mark.parametrize(("make", "targets", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_is_refused_before_a_weight_is_given_up(
    make: Callable, targets: list[str], error: type[Exception], message: str, mixed: bool
) -> None:
    model = make()
    kinds, weights = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        get_peft_model(model, config(GPT2, from_scratch=True, target_modules=targets), mixed=mixed)
    assert [type(module) for module in model.modules()] == kinds
    assert trained == {name: p.requires_grad for name, p in model.named_parameters()}
    assert_close(model.state_dict(), weights, 0)
    assert not isinstance(vars(model).get("peft_config"), dict)


def test_quantized_bases() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False))
    with pytest.raises(TypeError, match="quantized.*Linear8bitLt.*from_scratch=False"):
        get_peft_model(model, InRankConfig(from_scratch=True, target_modules=["0"]))
    assert get_peft_model(model, InRankConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_r": 0}, "`init_r=0` must be an integer of 1"),
        ({"buffer_r": -1}, "`buffer_r=-1` must be an integer of 0"),
        ({"max_r": 1}, "`max_r=1` must be at least `init_r=2`"),
        ({"explained_ratio": 1.5}, r"`explained_ratio=1.5` must be a number in \(0, 1\]"),
        ({"criterion": "entropy"}, "`criterion='entropy'` must be 'energy' or 'variance'"),
        ({"warmup_steps": -1}, "`warmup_steps=-1`"),
        ({"check_interval": 0}, "`check_interval=0`"),
        ({"growth_steps": 3, "growth_ratio": 0.5}, "say the same thing twice"),
        (
            {"growth_steps": 120},
            "No check fits in between `warmup_steps=100` and the end of the growth after 120 steps",
        ),
        ({"growth_ratio": 0.0}, "`growth_ratio=0.0`"),
        ({"rank_multiple": 0}, "`rank_multiple=0`"),
        ({"lora_dropout": 1.0}, "`lora_dropout=1.0`"),
        ({"from_scratch": True, "init_scale": 0.0}, "`init_scale=0.0` must be a number above 0"),
        ({"init_scale": 2.0}, "`init_scale=2.0` is for `from_scratch=True`"),
        ({"from_scratch": True, "lora_alpha": 5}, "`lora_alpha=5` is for a product that is added"),
        ({"from_scratch": True, "lora_dropout": 0.1}, "`lora_dropout=0.1` is for a product"),
        ({"from_scratch": True, "bias": "all"}, "`bias='all'` is for a product"),
        ({"bias": "salientlora_only"}, "'inrank_only'"),
    ],
)
def test_configurations(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InRankConfig(**fields)


def test_defaults() -> None:
    added, scratch = InRankConfig(), InRankConfig(from_scratch=True)
    assert (added.buffer_r, scratch.buffer_r, added.scaling) == (8, 100, 1.0)
    assert (added.init_r, added.explained_ratio, added.criterion) == (2, 0.9, "energy")
    assert InRankConfig(init_r=8, lora_alpha=16).scaling == 2.0
