# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Searches on models, by hand-written loops: what trains, what is evaluated, what they end with, what they save."""

from __future__ import annotations

import copy
import gc
import io
import math
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, BertModel

from peft_rank import (
    LowRankConfig,
    LowRankLinear,
    SalientLoRAConfig,
    calibrate,
    get_rank_pattern,
    save_compressed,
)
from peft_rank.decomposition import decompose
from peft_rank.tuners.search import factors, graph
from peft_rank.tuners.search.functional import needed_rows
from peft_rank.tuners.search.layer import SearchLayer
from runs import logits as outputs
from searches import METHODS, after, both_methods, config, every_method, masks, optimizer, search, searched
from tiny_models import TINY_MODELS, TinyModel


def spent(model: PeftModel, names: list[str]) -> int:
    """Parameters of the targeted modules without their biases, counted on the plain model."""
    modules = dict(model.get_base_model().named_modules())
    return sum(p.numel() for name in names for p in modules[name].parameters() if p.dim() == 2)


@both_methods
@pytest.mark.parametrize("loaded", [False, True])
def test_the_weights_that_factors_replace_are_freed(
    method: str, loaded: bool, llama: TinyModel, tmp_path: Path
) -> None:
    model = searched(method, llama, start="spectral")
    search(model, llama, optimizer(model, method), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few steps may not reach the target
        if loaded:
            model.base_model.finalize(compact=False)
            model.save_pretrained(tmp_path)
            model = PeftModel.from_pretrained(llama.make_model(), tmp_path)
        layers = dict(model.base_model.adapter_layers("default"))
        dense = {name: weakref.ref(layer.base_layer.weight) for name, layer in layers.items()}
        del layers
        model.base_model.finalize()
    gc.collect()
    compact = get_rank_pattern(model)
    assert compact and all(dense[name]() is None for name in compact)
    # nor what the steps of a search need
    assert not any(vars(model.base_model)[kept] for kept in ("_searching", "_armed", "_graphs", "_drawn", "_spectra"))


@both_methods
def test_the_whole_way_on_every_architecture(method: str, tiny: TinyModel) -> None:
    """Only masks train, the loss is the model's, what is evaluated is what comes out, and it meets the budget."""
    model = searched(method, tiny)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    dense = tiny.make_model().eval()
    names = list(model.base_model.adapter_layers("default"))
    shapes = [layer.shape for layer in model.base_model.adapter_layers("default").values()]
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(outputs(model, tiny), outputs(dense, tiny))

    search(model, tiny, optimizer(model, method), 5)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    prefix = model.base_model.prefix
    assert all(prefix in name for name in moved)

    evaluated, pattern = outputs(model, tiny), get_rank_pattern(model)
    assert 0 < len(pattern) <= len(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few steps may not reach the target
        model.base_model.finalize()
    assert torch.equal(outputs(model, tiny), evaluated)
    plain = model.get_base_model()
    assert torch.equal(outputs(plain, tiny), evaluated)
    assert get_rank_pattern(model) == pattern
    kinds = {name: type(module) for name, module in plain.named_modules() if name in names}
    assert {name for name, kind in kinds.items() if kind is LowRankLinear} == set(pattern)
    for name in set(names) - set(pattern):
        assert torch.equal(plain.get_submodule(name).weight, dense.get_submodule(name).weight)
    for name in pattern:
        bias = dense.get_submodule(name).bias
        assert (plain.get_submodule(name).bias is None) == (bias is None)
        assert bias is None or torch.equal(plain.get_submodule(name).bias, bias)

    biases = sum(m.bias.numel() for m in map(dense.get_submodule, names) if m.bias is not None)
    budget = math.floor(0.7 * (sum(map(math.prod, shapes)) + biases)) - biases
    assert budget - max(map(sum, shapes)) < spent(model, names) <= budget


@every_method
def test_factors_are_those_of_the_decomposition(method: str, llama: TinyModel) -> None:
    """The leading ranks, where the leading ones are kept, are those of `decompose`."""
    batches = [llama.make_batch(8, seed=9)]
    settings = config(method, llama, decomposition="whitening")
    settings.statistics = calibrate(llama.make_model(), batches, config=settings, progress=False)
    transformers.set_seed(0)
    model = get_peft_model(llama.make_model(), settings)
    search(model, llama, optimizer(model, method), 5)
    outputs(model, llama)
    dense = dict(llama.make_model().named_modules())
    checked = 0
    for name, layer in model.base_model.adapter_layers("default").items():
        linear = layer.selected()
        if linear is None:
            continue
        if method == "l2lrc":
            assert linear.rank <= min(layer.shape)
            continue
        up, down = decompose(
            dense[name].weight, linear.rank, "whitening", **settings.statistics.for_module(name, "whitening")
        )
        torch.testing.assert_close(linear.up.weight @ linear.down.weight, up @ down, rtol=0, atol=1e-5)
        checked += 1
    assert checked or method == "l2lrc"


@every_method
def test_one_seed_one_result_and_micro_batches_share_a_mask(method: str, llama: TinyModel) -> None:
    first, second = after(method, llama), after(method, llama)
    for name, value in masks(first).items():
        assert torch.equal(value, masks(second)[name])
    other = after(method, llama, seed=1)
    noise = {name: value for name, value in masks(other).items() if not torch.equal(value, masks(first)[name])}
    assert noise

    whole = searched(method, llama)
    parts = copy.deepcopy(whole)
    batch = {key: value[[0, 0, 1, 1]] for key, value in llama.make_batch(2).items()}
    halves = [{key: value[rows] for key, value in batch.items()} for rows in ([0, 2], [1, 3])]
    whole(**batch).loss.backward()
    for half in halves:
        (parts(**half).loss / 2).backward()
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7, msg=name)


@every_method
def test_a_search_resumes_exactly(method: str, llama: TinyModel, tmp_path: Path) -> None:
    whole, part = searched(method, llama), searched(method, llama)
    search(whole, llama, optimizer(whole, method), 8)
    moments = optimizer(part, method)
    search(part, llama, moments, 4)
    part.save_pretrained(tmp_path)

    fresh = PeftModel.from_pretrained(llama.make_model(), tmp_path, is_trainable=True)
    other = searched(method, llama, seed=3)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    for model in (fresh, other):
        assert torch.equal(outputs(model, llama), outputs(part, llama))
        resumed = optimizer(model, method)
        resumed.load_state_dict(copy.deepcopy(moments.state_dict()))
        search(model, llama, resumed, 4, first=5)
        for name, value in masks(whole).items():
            assert torch.equal(masks(model)[name], value), name
        model.base_model.finalize()
        assert get_rank_pattern(model) == get_rank_pattern(whole)


@both_methods
def test_checkpoints_without_factors_resume_where_the_weights_are_decomposed(
    method: str, llama: TinyModel, tmp_path: Path
) -> None:
    model = after(method, llama, 4, save_factors=False)
    model.save_pretrained(tmp_path / "small")
    model.peft_config["default"].save_factors = True
    model.save_pretrained(tmp_path / "whole")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("small", "whole")]
    assert sizes[0] + 4 * 14 * 2 * 32 * 32 < sizes[1]
    other = searched(method, llama, seed=3, save_factors=False)
    other.load_adapter(tmp_path / "small", "default", is_trainable=True)
    assert torch.equal(outputs(other, llama), outputs(model, llama))
    fresh = PeftModel.from_pretrained(llama.make_model(), tmp_path / "small")
    assert torch.equal(outputs(fresh, llama), outputs(model, llama))


@both_methods
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_transformers_loads_an_unfinished_search(
    method: str, llama: TinyModel, tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    """Its own loader keeps the layers and throws the tuner away."""
    model = after(method, llama, 4)
    model.save_pretrained(tmp_path)
    loaded = llama.make_model()
    report = loaded.load_adapter(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not report.missing_keys and not report.unexpected_keys
    assert torch.equal(outputs(loaded, llama), outputs(model, llama))
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(llama.make_model(), tmp_path / "again", is_trainable=True)
    assert torch.equal(outputs(again, llama), outputs(model, llama))
    states = [each.base_model._states["default"].pack() for each in (model, again)]
    assert torch.equal(*states)
    assert not [name for name, _ in again.named_buffers() if "state" in name]


@both_methods
def test_a_search_that_transformers_added_cannot_run_and_loads_as_it_is(
    method: str, llama: TinyModel, tmp_path: Path
) -> None:
    model = llama.make_model()
    model.add_adapter(config(method, llama))
    with pytest.warns(UserWarning, match="cannot run.*without the tuner"):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama.make_model(), tmp_path)
    assert torch.equal(outputs(loaded, llama), outputs(model, llama))
    assert all(layer.searching for layer in loaded.modules() if isinstance(layer, SearchLayer))


@both_methods
def test_a_state_dict_is_injected_into_a_compiled_model(method: str, llama: TinyModel) -> None:
    entries = get_peft_model_state_dict(after(method, llama, 2))
    entries = {key.removeprefix("base_model.model."): value for key, value in entries.items()}
    compiled = torch.compile(llama.make_model())
    inject_adapter_in_model(config(method, llama), compiled, state_dict=entries)
    wrapped = [name for name, module in compiled.named_modules() if isinstance(module, SearchLayer)]
    assert len(wrapped) == 14


@both_methods
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_finished_adapter(method: str, llama: TinyModel, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = after(method, llama)
    evaluated = outputs(model, llama)
    model.base_model.finalize()
    model.save_pretrained(tmp_path / "finished")
    again = PeftModel.from_pretrained(llama.make_model(), tmp_path / "finished", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(outputs(again, llama), evaluated)
    assert torch.equal(outputs(again.train(), llama), evaluated)
    assert get_rank_pattern(again) == get_rank_pattern(model)
    assert not [name for name, p in again.named_parameters() if p.requires_grad]
    again.save_pretrained(tmp_path / "again")
    third = PeftModel.from_pretrained(llama.make_model(), tmp_path / "again")
    assert torch.equal(outputs(third, llama), evaluated)
    merged = copy.deepcopy(third).merge_and_unload()
    torch.testing.assert_close(outputs(merged, llama), evaluated, rtol=0, atol=1e-5)
    third.base_model.finalize()
    assert torch.equal(outputs(third.get_base_model(), llama), evaluated)
    assert torch.equal(outputs(again.unload(), llama), outputs(llama.make_model(), llama))

    # a search goes on from its end only as fine-tuning, whose result is saved too
    tuned = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()(**llama.make_batch(4)).loss.backward()
    tuned.step()
    healed = outputs(model, llama)
    assert not torch.equal(healed, evaluated)
    model.save_pretrained(tmp_path / "healed")
    assert torch.equal(outputs(PeftModel.from_pretrained(llama.make_model(), tmp_path / "healed"), llama), healed)


@both_methods
def test_after_the_search_it_is_a_model_like_any_other(method: str, llama: TinyModel, tmp_path: Path) -> None:
    model = after(method, llama)
    model.base_model.finalize()
    plain = model.get_base_model()
    evaluated = outputs(plain, llama)
    save_compressed(plain, tmp_path)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path), llama), evaluated)
    for adapter in (
        LoraConfig(r=2, target_modules=["down", "up"]),
        SalientLoRAConfig(init_r=2, target_r=1, target_modules=["down", "up"]),
    ):
        healing = get_peft_model(copy.deepcopy(plain), adapter)
        healing(**llama.make_batch(4)).loss.backward()
        assert sum(p.grad is not None for p in healing.parameters()) >= 4
    with pytest.raises(RuntimeError, match="search is over.*get_base_model"):
        model.merge_and_unload()


@both_methods
def test_several_ratios_from_one_search(method: str, llama: TinyModel, tmp_path: Path) -> None:
    model = after(method, llama, 30, target_ratio=[0.9, 0.5, 0.75], tolerance=0.02, snapshot_dir=str(tmp_path))
    state = model.base_model._states["default"]
    assert list(state.snapshots)[:2] == [0.9, 0.75]
    names = list(model.base_model.adapter_layers("default"))
    ranks = {}
    for ratio in (0.9, 0.75):
        model.base_model.save_snapshot(ratio, tmp_path / "again")
        for folder in (tmp_path / f"ratio-{ratio}", tmp_path / "again"):
            snapshot = PeftModel.from_pretrained(llama.make_model(), folder)
            snapshot.base_model.finalize()
            assert ratio * 18432 - 96 < spent(snapshot, names) <= ratio * 18432
            ranks[ratio] = get_rank_pattern(snapshot)
    assert ranks[0.9] != ranks[0.75]
    with pytest.raises(ValueError, match=r"`ratio=0.6` was not reached"):
        model.base_model.finalize(ratio=0.6)
    model.base_model.finalize(ratio=0.9)
    assert get_rank_pattern(model) == ranks[0.9]


@pytest.mark.parametrize("decomposition", ["whitening", "fisher_two_sided"])
@both_methods
def test_a_spectral_start_is_the_spectral_allocation(method: str, decomposition: str, llama: TinyModel) -> None:
    """Before the first step, from which the search goes on at its target."""
    common = {"decomposition": decomposition, "target_modules": list(llama.target_modules), "rank_multiple": 1}
    batches = [llama.make_batch(8, seed=9)]
    settings = LowRankConfig(ratio=0.7, allocation="spectral", **common)
    settings.statistics = calibrate(llama.make_model(), batches, config=settings, progress=False)
    fixed = get_peft_model(llama.make_model(), settings)
    model = searched(method, llama, decomposition=decomposition, statistics=settings.statistics, start="spectral")
    if method == "ars":  # whose features add a little
        nn.init.zeros_(next(model.base_model._networks("default")).layer_norm.weight)
        nn.init.zeros_(next(model.base_model._networks("default")).layer_norm.bias)
    assert get_rank_pattern(model) == get_rank_pattern(fixed)
    torch.testing.assert_close(outputs(model, llama), outputs(fixed, llama), rtol=0, atol=1e-4)
    search(model, llama, optimizer(model, method), 2)
    assert model.base_model.rank_summary()["search/expected_ratio"] < 0.9


@both_methods
def test_the_ratio_of_the_whole_model(method: str, llama: TinyModel) -> None:
    total = sum(p.numel() for p in llama.make_model().parameters())
    model = after(method, llama, target_ratio=0.9, ratio_scope="model")
    model.base_model.finalize()
    assert 0.9 * total - 96 < sum(p.numel() for p in model.get_base_model().parameters()) <= 0.9 * total


@both_methods
def test_ranks_that_are_given_are_kept_and_the_others_share_the_rest(method: str, llama: TinyModel) -> None:
    model = after(method, llama, rank_pattern={"q_proj": 8, "layers.0.mlp.up_proj": 5})
    names = list(model.base_model.adapter_layers("default"))
    model.base_model.finalize()
    pattern = get_rank_pattern(model)
    assert [rank for name, rank in pattern.items() if "q_proj" in name] == [8, 8]
    assert pattern["model.layers.0.mlp.up_proj"] == 5
    assert 0.7 * 18432 - 96 < spent(model, names) <= 0.7 * 18432


@both_methods
def test_a_classifiers_head_stays_as_it_is(method: str, tmp_path: Path) -> None:
    """Though PEFT adds it to what is trained where a task type is given."""
    bert = TINY_MODELS["bert"]
    model = after(method, bert, task_type="SEQ_CLS", target_modules="all-linear")
    assert all(model.base_model.prefix in name for name in masks(model))
    assert "classifier" not in model.base_model.adapter_layers("default")
    evaluated = outputs(model, bert)
    model.save_pretrained(tmp_path / "search")
    model.base_model.finalize()
    model.save_pretrained(tmp_path / "finished")
    for folder in ("search", "finished"):
        assert torch.equal(outputs(PeftModel.from_pretrained(bert.make_model(), tmp_path / folder), bert), evaluated)
    plain = model.get_base_model()
    assert type(plain.classifier) is nn.Linear
    assert torch.equal(plain.classifier.weight, bert.make_model().classifier.weight)

    asked = searched(method, bert, task_type="SEQ_CLS", modules_to_save=["classifier"])
    assert any("classifier" in name for name in masks(asked))


@both_methods
def test_a_bfloat16_model_keeps_its_dtype_and_float32_masks(method: str, llama: TinyModel) -> None:
    model = get_peft_model(llama.make_model().bfloat16(), config(method, llama))
    search(model, llama, optimizer(model, method), 3)
    for layer in model.base_model.adapter_layers("default").values():
        assert layer.factors.down.dtype == layer.factors.up.dtype == torch.bfloat16
        assert layer._step["now"].mask.dtype == torch.bfloat16
        assert set(layer._step["now"].mask.tolist()) <= {0.0, 1.0}
    drawn = model.base_model._draw("default", model.base_model.mask_logits("default"))
    assert {mask.dtype for mask in (drawn.soft, drawn.hard)} == {torch.float32}
    assert {value.dtype for value in masks(model).values()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.base_model.mask_logits("default").dtype == torch.float32
    evaluated = outputs(model, llama)
    model.base_model.finalize()
    assert torch.equal(outputs(model, llama), evaluated)
    assert {p.dtype for p in model.get_base_model().parameters()} == {torch.bfloat16}


@every_method
def test_the_regularizer_can_be_armed(method: str, llama: TinyModel) -> None:
    """The two ways to the same gradient, of which an engine takes one; the second micro-batch adds it no more."""
    by_hand = after(method, llama, 2)
    armed = copy.deepcopy(by_hand)
    for _ in range(2):
        by_hand.train()(**llama.make_batch(4)).loss.backward()
    by_hand.base_model.add_regularization_gradient()
    armed.base_model.arm_regularization(loss_scale=1.0)
    for _ in range(2):
        armed.train()(**llama.make_batch(4)).loss.backward()
    changed = 0
    for (name, a), b in zip(by_hand.named_parameters(), armed.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
            changed += float(a.grad.abs().sum())
    assert changed > 0


@both_methods
def test_the_masks_of_a_step_are_drawn_once_as_the_last_step_ends(
    method: str, llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, waits, drawn = after(method, llama, 2, start="spectral"), [], []
    monkeypatch.setattr(graph, "needed_rows", lambda *args: waits.append(1) or needed_rows(*args))

    def forward() -> None:
        model.train()(**llama.make_batch(4)).loss.backward()
        layers = model.base_model.adapter_layers("default").values()
        drawn.append(torch.cat([layer._step["now"].mask for layer in layers]))

    for _ in range(3):
        forward()
    assert not waits
    model.base_model.update_and_allocate(3)
    forward()
    assert len(waits) == 1
    model.base_model.skip_step(4)  # other noise
    forward()
    assert len(waits) == 2
    first, second, third, fourth, fifth = drawn
    assert torch.equal(first, second) and torch.equal(first, third)
    assert not torch.equal(first, fourth) and not torch.equal(fourth, fifth)


@every_method
def test_a_model_in_mid_search_is_saved_as_a_whole(method: str, llama: TinyModel) -> None:
    """By `torch.save`, also after an evaluation, and without what steps keep for each other."""
    model = after(method, llama, 2)
    outputs(model, llama)
    file = io.BytesIO()
    torch.save(model, file)
    entries = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert len(file.getvalue()) < entries + 150_000


@every_method
def test_a_search_begins_after_an_evaluation_in_inference_mode(method: str, llama: TinyModel) -> None:
    plain, model = searched(method, llama), searched(method, llama)
    with torch.inference_mode():
        model.eval()(**llama.make_batch(4))
    losses = [search(each, llama, optimizer(each, method), 2) for each in (plain, model)]
    assert losses[0] == losses[1]


@every_method
def test_a_gradient_that_was_armed_in_vain_is_forgotten(method: str, llama: TinyModel) -> None:
    plain, model = after(method, llama, 2), after(method, llama, 2)
    model.base_model.arm_regularization()
    for each in (plain, model):
        each.base_model.update_and_allocate(3)
        each.train()(**llama.make_batch(4)).loss.backward()
    for a, b in zip(
        plain.base_model.mask_parameters("default"), model.base_model.mask_parameters("default"), strict=True
    ):
        assert torch.equal(a.grad, b.grad)


@every_method
def test_masks_are_where_the_model_is_and_no_more_than_ranks(method: str, llama: TinyModel) -> None:
    model = get_peft_model(llama.make_model().to("meta"), config(method, llama))
    assert {value.device.type for value in (*model.parameters(), *model.buffers())} == {"meta"}
    # DDP sends buffers around in every forward pass
    assert all(name.endswith(".z") for name, _ in model.named_buffers() if model.base_model.prefix in name)
    if method.startswith("l2lrc"):
        layers = model.base_model.adapter_layers("default").values()
        assert model.get_nb_trainable_parameters()[0] == sum(min(layer.shape) for layer in layers)


@both_methods
def test_gradient_checkpointing_changes_nothing(method: str, llama: TinyModel) -> None:
    plain = after(method, llama, 2)
    checkpointed = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers 5.23 has another name for it
        checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, checkpointed):
        model.train()(**llama.make_batch(4), use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8, msg=name)


@both_methods
def test_reentrant_checkpointing_is_refused(method: str, llama: TinyModel) -> None:
    """It goes backward once for every block, and the masks of a step, which the blocks share, only once."""
    model = searched(method, llama)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers 5.23 has other names for it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(RuntimeError, match=r"gradient_checkpointing_kwargs=\{'use_reentrant': False\}"):
            model.train()(**llama.make_batch(4))
        model.eval()(**llama.make_batch(4))
        model.gradient_checkpointing_disable()
    model.train()(**llama.make_batch(4)).loss.backward()


def test_decompositions_are_cached(llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = searched("l2lrc", llama, factor_cache=str(tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) == 14
    monkeypatch.setattr(factors, "weighted_svd", None)
    second = searched("ars", llama, factor_cache=str(tmp_path), target_ratio=0.5)
    for a, b in zip(*(m.base_model.adapter_layers("default").values() for m in (first, second)), strict=True):
        assert torch.equal(a.factors.down, b.factors.down)
        assert torch.equal(a.factors.up, b.factors.up)
        assert torch.equal(a.factors.values, b.factors.values)
    with pytest.raises(TypeError):  # another weight is not in the cache
        get_peft_model(llama.make_model(seed=1), config("ars", llama, factor_cache=str(tmp_path)))


def test_the_fit_of_all_ranks_is_the_weight(llama: TinyModel) -> None:
    model = searched("l2lrc", llama)
    for layer in model.base_model.adapter_layers("default").values():
        product = layer.factors.up.T @ layer.factors.down
        torch.testing.assert_close(product, layer.base_layer.weight.detach(), rtol=0, atol=1e-5)
        values = torch.linalg.svdvals(layer.base_layer.weight.detach())
        torch.testing.assert_close(layer.factors.values, values, rtol=1e-4, atol=1e-5)


# --- misuse -----------------------------------------------------------------------------------------------------------


@both_methods
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_ratio": 0.01}, r"`target_ratio=0.01` must be in \[0\.0\d+, 1\]"),
        ({"target_ratio": 1.2}, r"`target_ratio=1.2` must be a number in \(0, 1\]"),
        ({"target_ratio": [0.9, 0.9]}, "list of different numbers"),
        ({"decomposition": "em"}, "`decomposition='em'` has no singular values"),
        ({"decomposition": "whitening"}, "`statistics` is None"),
        ({"start": "uniform"}, "`start='uniform'` must be 'full' or 'spectral'"),
        ({"start": "spectral", "target_ratio": [0.9, 0.7]}, "would be reached before anything is learned"),
        ({"tau": 0.0}, "`tau=0.0` must be a number above 0"),
        ({"patience": 0}, "`patience=0` must be an integer of 1 or more"),
        ({"offload_dense": True}, "`offload_dense=True` is for fixed ranks"),
        ({"rank_pattern": {".*": 4}}, "none is left to search"),
    ],
)
def test_wrong_settings(method: str, settings: dict, message: str, llama: TinyModel) -> None:
    model = llama.make_model()
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(method, llama, **settings))
    assert {name: type(module) for name, module in model.named_modules()} == kinds


@both_methods
def test_tied_weights_are_refused(method: str, llama: TinyModel) -> None:
    model = llama.make_model(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="weight of lm_head is shared.*exclude_modules"):
        get_peft_model(model, config(method, llama, target_modules=["q_proj", "lm_head"]))


@both_methods
def test_quantized_weights_are_refused(method: str, llama: TinyModel) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = llama.make_model()
    model.model.layers[0].self_attn.q_proj = bitsandbytes.nn.Linear8bitLt(32, 32, bias=False)
    with pytest.raises(TypeError, match="q_proj is quantized.*Load the model without quantization"):
        get_peft_model(model, config(method, llama))


@both_methods
def test_modules_that_the_loss_does_not_reach_are_named(method: str) -> None:
    class WithoutPooler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
            self.bert = BertModel(transformers.BertConfig(vocab_size=64, **settings))

        def forward(self, **batch: torch.Tensor) -> torch.Tensor:
            return self.bert(**batch).last_hidden_state.square().mean()

    config_class, settings, _ = METHODS[method]
    without = {"distillation_weight": 0.0} if method == "l2lrc" else {}
    model = get_peft_model(
        WithoutPooler(), config_class(target_modules=["query", "pooler.dense"], **settings, **without)
    )
    model.train()(input_ids=torch.ones(1, 4, dtype=torch.long)).backward()
    with pytest.raises(RuntimeError, match=r"no gradient for the masks of bert\.pooler\.dense.*exclude_modules"):
        model.base_model.add_regularization_gradient()


@both_methods
def test_a_search_that_never_ran_says_so(method: str, llama: TinyModel, tmp_path: Path) -> None:
    model = searched(method, llama)
    with pytest.raises(RuntimeError, match="never ran.*RankAllocationCallback"):
        model.base_model.finalize()
    with pytest.warns(UserWarning, match="never ran"):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="never ran"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="one adapter at a time"):
        model.add_adapter("second", config(method, llama))


@both_methods
def test_a_search_that_was_cut_short_says_so(method: str, llama: TinyModel) -> None:
    model = after(method, llama, 1)
    with pytest.warns(UserWarning, match=r"ended at a ratio of 1.000, before it reached 0.7"):
        model.base_model.finalize()


@both_methods
def test_what_is_evaluated_is_what_finalize_leaves_at_the_smallest_ratio(method: str, llama: TinyModel) -> None:
    model = searched(method, llama, target_ratio=[0.9, 0.8, 0.4])
    search(model, llama, optimizer(model, method), 1)
    evaluated = outputs(model, llama)
    with pytest.warns(UserWarning, match="before it reached 0.4"):
        model.base_model.finalize()
    torch.testing.assert_close(outputs(model, llama), evaluated, rtol=0, atol=1e-6)


@both_methods
def test_a_model_that_is_cast_between_steps_goes_on(method: str, llama: TinyModel) -> None:
    model = searched(method, llama)
    steps = optimizer(model, method)
    search(model, llama, steps, 2)
    model.double().float()
    search(model, llama, steps, 2, first=3)
    assert model.base_model._states["default"].recorded == 4


@pytest.mark.parametrize("method", ["ars", "ars-per-layer", "l2lrc"])
def test_a_half_precision_search_loads_from_the_meta_device(method: str, llama: TinyModel, tmp_path: Path) -> None:
    model = get_peft_model(llama.make_model().bfloat16(), config(method, llama))
    search(model, llama, optimizer(model, method), 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        llama.make_model().bfloat16(), tmp_path, is_trainable=True, low_cpu_mem_usage=True
    )
    search(loaded, llama, optimizer(loaded, method), 1, first=3)
    assert loaded.base_model._states["default"].step == 3


@both_methods
def test_an_encoder_called_by_itself_follows_a_loaded_search(method: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS["bart"]
    model = searched(method, tiny)
    search(model, tiny, optimizer(model, method), 6)
    model.save_pretrained(tmp_path)
    other = searched(method, tiny)
    search(other, tiny, optimizer(other, method), 1)
    outputs(other, tiny)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    ids = tiny.make_batch(2)["input_ids"]
    model.eval(), other.eval()
    with torch.no_grad():
        outputs(model, tiny)
        expected = model.get_base_model().get_encoder()(ids).last_hidden_state
        found = other.get_base_model().get_encoder()(ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@both_methods
def test_foreign_checkpoints_are_refused(method: str, llama: TinyModel, tmp_path: Path) -> None:
    model = after(method, llama, 2)
    model.save_pretrained(tmp_path)
    other = get_peft_model(llama.make_model(intermediate_size=48), config(method, llama))
    with pytest.raises(ValueError, match="damaged or belongs to another model or method; nothing was loaded"):
        other.load_adapter(tmp_path, "default")
    model.base_model.finalize()
    with pytest.raises(ValueError, match="search is over"):
        model.load_adapter(tmp_path, "default")


def _lora(tiny: TinyModel, directory: Path) -> None:
    get_peft_model(tiny.make_model(), LoraConfig(target_modules=list(tiny.target_modules))).save_pretrained(directory)


def _search_of(method: str, ended: bool = False, **sizes: int) -> Callable[[TinyModel, Path], None]:
    def save(tiny: TinyModel, directory: Path) -> None:
        model = get_peft_model(tiny.make_model(**sizes), config(method, tiny))
        search(model, tiny, optimizer(model, method), 4)
        if ended:
            model.base_model.finalize(compact=False)
        model.save_pretrained(directory)

    return save


@pytest.mark.filterwarnings("ignore:The search of adapter")
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("method", "save"),
    [
        ("ars", _lora),
        ("l2lrc", _lora),
        ("ars", _search_of("l2lrc")),
        ("l2lrc", _search_of("ars")),
        ("l2lrc", _search_of("l2lrc", intermediate_size=48)),
        ("ars", _search_of("ars", ended=True, intermediate_size=48)),
    ],
    ids=["lora-ars", "lora-l2lrc", "l2lrc-ars", "ars-l2lrc", "other sizes", "other sizes, finished"],
)
def test_a_refused_checkpoint_leaves_the_search_as_it_is(
    method: str, save: Callable[[TinyModel, Path], None], finished: bool, llama: TinyModel, tmp_path: Path
) -> None:
    save(llama, tmp_path)
    model = searched(method, llama)
    steps = optimizer(model, method)
    search(model, llama, steps, 2)
    if finished:
        model.base_model.finalize(compact=False)
    batch = llama.make_batch(2)
    before, pattern = model.eval()(**batch).logits, get_rank_pattern(model)
    with pytest.raises(ValueError, match="nothing was loaded|of an unfinished search"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(model.eval()(**batch).logits, before, rtol=0, atol=0)
    assert get_rank_pattern(model) == pattern
    if not finished:
        assert model.base_model._states["default"].step == 2
        search(model, llama, steps, 1, first=3)
        assert model.base_model._states["default"].recorded == 3


def test_the_uniform_budget_is_counted_alike(llama: TinyModel) -> None:
    """Or a comparison of learned ranks with fixed ones would compare two budgets."""
    targets = {"target_modules": list(llama.target_modules), "rank_multiple": 1}
    fixed = get_peft_model(llama.make_model(), LowRankConfig(ratio=0.7, **targets))
    names = [name for name, _ in fixed.base_model.factorized_layers().items()]
    fixed.base_model.finalize()
    model = after("ars", llama)
    model.base_model.finalize()
    every = [name for name, module in llama.make_model().named_modules() if name.endswith(llama.target_modules)]
    assert abs(spent(fixed, every) - spent(model, every)) < 96
    assert names
