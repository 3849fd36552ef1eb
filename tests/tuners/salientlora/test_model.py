# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The tuner as a PEFT method: which modules, several adapters, merging, checkpointing, compilation, copies."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from torch import nn

from peft_rank import RankAllocationCallback, SalientLoRAConfig, get_rank_pattern
from runs import adam, adapted, assert_close, config, logits, modules_of, steps_by_hand, train, weights
from tiny_models import TINY_MODELS, TinyModel


LLAMA = TINY_MODELS["llama"]
QV = ["q_proj", "v_proj"]


def names(model: nn.Module) -> set[str]:
    return set(get_rank_pattern(model))


def random_adapter(tiny: TinyModel = LLAMA, seed: int = 0, **overrides: Any) -> PeftModel:
    """An adapter that is not the identity."""
    return adapted(tiny, seed=seed, init_weights=False, **overrides)


# ---- which modules ----


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": QV}, {f"model.layers.{i}.self_attn.{m}" for i in (0, 1) for m in QV}),
        ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, {f"model.layers.1.mlp.{m}_proj" for m in ("up", "down")}),
        (
            {"target_modules": QV, "exclude_modules": r".*layers\.0\.self_attn\.v_proj"},
            {f"model.layers.{i}.self_attn.{m}" for i, m in ((0, "q_proj"), (1, "q_proj"), (1, "v_proj"))},
        ),
        (
            {"target_modules": QV, "exclude_modules": ["v_proj"]},
            {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)},
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1]},
            {"model.layers.1.self_attn.q_proj"},
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
            {"model.layers.0.self_attn.q_proj"},
        ),
    ],
    ids=["list", "regex", "exclude-regex", "exclude-list", "layers_to_transform", "layers_pattern"],
)
def test_target_modules(settings: dict[str, Any], expected: set[str]) -> None:
    assert names(adapted(LLAMA, **settings)) == expected


def test_all_linear_leaves_the_output_layer_out(tiny: TinyModel) -> None:
    found = names(adapted(tiny, target_modules="all-linear"))
    assert found and not {name for name in found if re.search("lm_head|classifier|score", name)}
    assert names(adapted(tiny)) <= found


def test_without_target_modules_those_of_lora_are_adapted() -> None:
    expected = get_peft_model(LLAMA.make_model(), LoraConfig(task_type="CAUSAL_LM")).targeted_module_names
    assert names(adapted(LLAMA, target_modules=None)) == set(expected)


@pytest.mark.parametrize("name", ["embed_tokens", "conv"])
def test_an_unsupported_module_is_named(name: str) -> None:
    model = LLAMA.make_model()
    model.model.conv = nn.Conv2d(3, 4, 1)
    with pytest.raises(TypeError, match=r"(Embedding|Conv2d)\(.*not supported.*exclude_modules"):
        get_peft_model(model, config(LLAMA, target_modules=["q_proj", name]))


def test_a_target_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        adapted(LLAMA, target_modules=["nowhere"])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({"q_proj": 7}, {"q_proj": 7}),
        ({r".*\.1\.self_attn\.q_proj": 6}, {"1.self_attn.q_proj": 6}),
        ({"^model.layers.0.self_attn.v_proj": 1, "v_proj": 3}, {"0.self_attn.v_proj": 1, "1.self_attn.v_proj": 3}),
        ({"v_proj": 0}, {"v_proj": 0}),
    ],
)
def test_a_rank_pattern_of_the_user(pattern: dict[str, int], expected: dict[str, int], tmp_path: Path) -> None:
    model = adapted(LLAMA, target_modules=QV, rank_pattern=pattern)
    ranks = get_rank_pattern(model)
    for name, rank in ranks.items():
        assert rank == next((r for end, r in expected.items() if name.endswith(end)), 4), name
    budget = min(2 * 4, sum(ranks.values()))
    train(model, LLAMA, tmp_path)
    assert sum(get_rank_pattern(model).values()) == budget
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path))
    assert get_rank_pattern(loaded) == get_rank_pattern(model)
    assert_close(logits(loaded, LLAMA), logits(model, LLAMA), 1e-6)


def test_the_scale_does_not_depend_on_the_rank() -> None:
    model = random_adapter(target_modules=["q_proj"], rank_pattern={"q_proj": 2}, lora_alpha=8)
    for name, layer in model.base_model.adapter_layers("default").items():
        A, E, B = (getattr(layer, f"salientlora_{f}")["default"] for f in "AEB")
        assert_close(layer.get_delta_weight("default"), 8 / 4 * B @ torch.diag(E) @ A, 1e-5)
        assert name


# ---- what is trained and saved ----


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_only_the_factors_are_trained(tiny: TinyModel) -> None:
    model = adapted(tiny)
    heads = {name for name in trained(model) if "modules_to_save" in name}  # PEFT adds the classifier by task type
    assert all(re.search(r"salientlora_[AEB]\.default$", name) for name in trained(model) - heads)
    assert len(trained(model) - heads) == 3 * modules_of(model)


@pytest.mark.parametrize("bias", ["all", "salientlora_only"])
def test_biases_are_trained_saved_and_loaded(bias: str, tmp_path: Path) -> None:
    qwen = TINY_MODELS["qwen2"]  # biases in q, k and v
    model = adapted(qwen, target_modules=["q_proj", "o_proj"], bias=bias)
    biases = {name for name in trained(model) if "salientlora" not in name}
    assert {name.split(".")[-3] for name in biases if "layers.0" in name} == (
        {"q_proj"} if bias == "salientlora_only" else {"q_proj", "self_attn"}
    )
    train(model, qwen, tmp_path)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(qwen.make_model(), str(tmp_path))
    assert_close(logits(loaded, qwen), logits(model, qwen), 1e-6)
    moved = [p for name, p in model.named_parameters() if name in biases]
    assert all(p.abs().max() > 1e-4 for p in moved)


def test_modules_to_save_are_trained_saved_and_loaded(deberta: TinyModel, tmp_path: Path) -> None:
    model = adapted(deberta, modules_to_save=["pooler", "classifier"])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "modules_to_save" in name}
    train(model, deberta, tmp_path)
    after = dict(model.named_parameters())
    assert before and all(not torch.equal(p, after[name]) for name, p in before.items())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(deberta.make_model(seed=0), str(tmp_path))
    restored = dict(loaded.named_parameters())
    assert all(torch.equal(restored[name], after[name]) for name in before)
    assert_close(logits(loaded, deberta), logits(model, deberta), 1e-6)
    other_head = PeftModel.from_pretrained(deberta.make_model(seed=0, num_labels=2), str(tmp_path))
    assert_close(logits(other_head.merge_and_unload(), deberta), logits(model, deberta), 1e-5)


def test_the_default_start_is_the_identity(tiny: TinyModel) -> None:
    for start in (True, "gaussian", "orthogonal", "lora"):
        assert_close(logits(adapted(tiny, init_weights=start), tiny), logits(tiny.make_model(), tiny), 1e-6)
    other = logits(adapted(tiny, init_weights=False), tiny)
    assert (other - logits(tiny.make_model(), tiny)).abs().max() > 1e-3


def test_initialisations() -> None:
    def factors(start: str | bool) -> tuple[torch.Tensor, ...]:
        model = adapted(LLAMA, init_weights=start, init_r=8)
        layer = next(iter(model.base_model.adapter_layers("default").values()))
        return tuple(getattr(layer, f"salientlora_{f}")["default"].detach() for f in "AEB")

    A, E, B = factors("orthogonal")
    assert_close(A @ A.T, torch.eye(8), 1e-5)
    assert_close(B.T @ B, torch.eye(8), 1e-5)
    assert not E.any()
    A, E, B = factors("gaussian")
    assert 0.015 < A.std() < 0.025 and 0.015 < B.std() < 0.025 and not E.any()
    for start in (True, "lora"):
        A, E, B = factors(start)
        assert (E == 1).all() and not B.any() and A.abs().max() <= 1 / 32**0.5


# ---- several adapters ----


@pytest.fixture
def two() -> PeftModel:
    model = random_adapter(target_modules=QV)
    torch.manual_seed(5)
    model.add_adapter("other", config(LLAMA, target_modules=["q_proj", "up_proj"], init_r=3, init_weights=False))
    return model.eval()


def single(two: PeftModel, name: str) -> torch.Tensor:
    two.set_adapter(name)
    return logits(two, LLAMA)


def test_switching_and_disabling(two: PeftModel) -> None:
    base = logits(LLAMA.make_model(), LLAMA)
    first, second = single(two, "default"), single(two, "other")
    assert (first - second).abs().max() > 1e-3 and (first - base).abs().max() > 1e-3
    with two.disable_adapter():
        assert_close(logits(two, LLAMA), base, 0)
    assert_close(logits(two, LLAMA), second, 0)
    assert_close(single(two, "default"), first, 0)
    assert get_rank_pattern(two, adapter_name="other").keys() != get_rank_pattern(two, adapter_name="default").keys()


def test_two_active_adapters_add_up(two: PeftModel) -> None:
    two.base_model.set_adapter(["default", "other"])
    both = logits(two, LLAMA)
    layer = two.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    deltas = sum(layer.get_delta_weight(name) for name in ("default", "other"))
    assert_close(layer(x), layer.base_layer(x) + x @ deltas.T, 1e-4)
    merged = copy.deepcopy(two).merge_and_unload()
    assert_close(logits(merged, LLAMA), both, 1e-4)


def test_mixed_batch_equals_single_adapters(two: PeftModel) -> None:
    base = logits(LLAMA.make_model(), LLAMA)
    outputs = {"default": single(two, "default"), "other": single(two, "other"), "__base__": base}
    order = ["other", "__base__", "default", "other"]
    for active in ("default", "other"):
        two.set_adapter(active)
        mixed = logits(two, LLAMA, adapter_names=order)
        for row, name in enumerate(order):
            assert_close(mixed[row], outputs[name][row], 1e-5)
    assert_close(logits(two, LLAMA), outputs["other"], 0)  # the hooks are gone


def test_mixed_batch_is_refused_in_training_and_for_unknown_adapters(two: PeftModel) -> None:
    with pytest.raises(ValueError, match="nobody"):
        logits(two, LLAMA, adapter_names=["nobody"] * 4)
    with pytest.raises(ValueError, match="4"):
        logits(two, LLAMA, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="training"):
        two.train()(**LLAMA.make_batch(1), adapter_names=["default"])


def test_mixed_batch_generation_equals_single_adapters(two: PeftModel) -> None:
    batch = LLAMA.make_batch(2)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    inputs = {"input_ids": batch["input_ids"][:, :6], "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    expected = []
    for name in ("default", "other"):
        two.set_adapter(name)
        expected.append(two.generate(**inputs, **kwargs))
    mixed = two.generate(**inputs, **kwargs, adapter_names=["default", "other"])
    assert torch.equal(mixed[0], expected[0][0]) and torch.equal(mixed[1], expected[1][1])


def test_deleting_an_adapter(two: PeftModel) -> None:
    second = single(two, "other")
    two.delete_adapter("default")
    assert_close(logits(two, LLAMA), second, 0)
    assert not [name for name, _ in two.named_parameters() if "default" in name]
    with pytest.raises(TypeError, match="no adapter 'default'"):
        get_rank_pattern(two, adapter_name="default")


def test_an_adapter_deleted_and_added_again_is_allocated_afresh(tmp_path: Path) -> None:
    model = adapted(LLAMA, target_modules=QV)
    train(model, LLAMA, tmp_path)
    model.add_adapter("spare", config(LLAMA, target_modules=QV))
    model.delete_adapter("default")
    model.add_adapter("default", config(LLAMA, target_modules=QV))
    model.set_adapter("default")
    assert sum(get_rank_pattern(model).values()) == 16
    train(model, LLAMA, tmp_path)
    assert sum(get_rank_pattern(model).values()) == 8


def test_only_the_trained_adapter_is_allocated(tmp_path: Path) -> None:
    model = random_adapter(target_modules=QV)
    model.add_adapter("other", config(LLAMA, target_modules=QV, target_r=1))
    model.set_adapter("other")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".default" in name}
    train(model, LLAMA, tmp_path, callbacks=[RankAllocationCallback()])
    assert sum(get_rank_pattern(model, adapter_name="other").values()) == 4
    assert sum(get_rank_pattern(model, adapter_name="default").values()) == 16
    after = dict(model.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path / "other"))
    assert_close(logits(loaded, LLAMA), logits(model, LLAMA), 1e-6)


def test_a_second_adapter_is_trained_after_the_first(tmp_path: Path) -> None:
    model = adapted(LLAMA, target_modules=QV)
    train(model, LLAMA, tmp_path)
    first = logits(model, LLAMA)
    model.add_adapter("second", config(LLAMA, target_modules=["k_proj"]))
    model.set_adapter("second")
    train(model, LLAMA, tmp_path)
    assert sum(get_rank_pattern(model, adapter_name="second").values()) == 4
    model.set_adapter("default")
    assert_close(logits(model, LLAMA), first, 0)


@pytest.mark.parametrize("first", ["lora", "salientlora"])
def test_mixed_model_with_lora(first: str) -> None:
    lora = LoraConfig(r=3, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    salient = config(LLAMA, target_modules=QV, init_weights=False, task_type=None)
    configs = {"lora": lora, "salientlora": salient}
    second = next(name for name in configs if name != first)
    torch.manual_seed(0)
    model = get_peft_model(LLAMA.make_model(), configs[first], adapter_name=first, mixed=True)
    model.add_adapter(second, configs[second])
    assert isinstance(model, PeftMixedModel)
    outputs = {}
    for active in (["lora"], ["salientlora"], ["lora", "salientlora"]):
        model.set_adapter(active)
        outputs["+".join(active)] = logits(model, LLAMA)
    assert len({round(float(o.sum()), 4) for o in outputs.values()}) == 3
    merged = model.merge_and_unload()
    assert_close(logits(merged, LLAMA), outputs["lora+salientlora"], 1e-4)


def test_injected_without_a_peft_model() -> None:
    torch.manual_seed(0)
    model = inject_adapter_in_model(config(LLAMA, target_modules=QV, init_weights=False), LLAMA.make_model())
    assert (logits(model, LLAMA) - logits(LLAMA.make_model(), LLAMA)).abs().max() > 1e-3
    assert sum(get_rank_pattern(model).values()) == 16
    state = get_peft_model_state_dict(model)
    assert len(state) == 12 and not [key for key in state if "state" in key]


# ---- merging ----


def test_merge_unmerge_and_safe_merge(tiny: TinyModel) -> None:
    model = random_adapter(tiny)
    expected = logits(model, tiny)
    scale = expected.abs().max()
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert (logits(model, tiny) - expected).abs().max() < 1e-5 * scale
        model.unmerge_adapter()
        assert (logits(model, tiny) - expected).abs().max() < 1e-5 * scale


CHANGES = {
    "mask": lambda model, optimizer, folder: model.base_model.update_and_allocate(15),
    "narrow": lambda model, optimizer, folder: model.base_model.update_and_allocate(15, optimizer),
    "finalize": lambda model, optimizer, folder: model.base_model.finalize(optimizer),
    "load": lambda model, optimizer, folder: model.load_adapter(str(folder), "default", is_trainable=True),
}


@pytest.mark.filterwarnings("ignore:The allocation of adapter 'default' was cut short")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("masked", [False, True])
def test_an_update_that_changes_while_merged_leaves_the_base_as_it_was(
    tmp_path: Path, masked: bool, change: Callable
) -> None:
    """Also where ranks that were pruned before are still there, behind a mask."""
    other = adapted(LLAMA, seed=1)
    steps_by_hand(other, LLAMA, 1, 6, adam(other))
    other.save_pretrained(tmp_path)
    models = [adapted(LLAMA), adapted(LLAMA)]
    for model, merge in zip(models, (False, True), strict=True):
        optimizer = adam(model)
        steps_by_hand(model, LLAMA, 1, 12 if masked else 4, optimizer, shrink=False)
        if merge:
            model.merge_adapter()
        change(model, optimizer, tmp_path)
    expected, model = models
    assert get_rank_pattern(model) == get_rank_pattern(expected)
    assert_close(logits(model, LLAMA), logits(expected, LLAMA), 1e-5)
    with model.disable_adapter():
        assert_close(logits(model, LLAMA), logits(LLAMA.make_model(), LLAMA), 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite(value: float) -> None:
    model = random_adapter()
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.down_proj.salientlora_E["default"][0] = value
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "layers.1.mlp.down_proj.base" in n}
    with pytest.raises(ValueError, match="NaNs detected.*default"):
        model.merge_adapter(safe_merge=True)
    after = dict(model.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in before.items())


def test_merging_a_model_with_masked_ranks(tmp_path: Path) -> None:
    """In the middle of an allocation, with an optimizer that keeps the pruned ranks."""
    model = adapted(LLAMA)
    model.base_model.resolve_schedule(20)
    steps_by_hand(model, LLAMA, 1, 11, adam(model), shrink=False)
    layer_masks = [
        m for layer in model.base_model.adapter_layers("default").values() for m in layer.salientlora_mask.values()
    ]
    assert layer_masks
    expected = logits(model, LLAMA)
    with pytest.warns(UserWarning, match="has not finished"):
        merged = copy.deepcopy(model).merge_and_unload()
    assert_close(logits(merged, LLAMA), expected, 1e-5)
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path)), LLAMA), expected, 1e-6)


def test_unload_restores_the_base_model(tiny: TinyModel) -> None:
    plain = random_adapter(tiny).unload()
    assert type(plain) is tiny.model_class
    assert_close(logits(plain, tiny), logits(tiny.make_model(), tiny), 0)


# ---- memory and speed features of the stack ----


@pytest.mark.parametrize("shrink", [True, False], ids=["shrunk", "masked"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool, shrink: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = adapted(LLAMA)
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.base_model.resolve_schedule(20)
        optimizer = adam(model)
        steps_by_hand(model, LLAMA, 1, 20, optimizer, shrink=shrink)
        model.base_model.finalize(optimizer)
        results.append(weights(model))
    assert_close(results[1], results[0], 1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_with_the_regularizer_inside_of_backward(use_reentrant: bool) -> None:
    seen = []
    for checkpointing in (False, True):
        model = random_adapter()
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.base_model.arm_regularization()
        for seed in (0, 1):
            model.train()(**LLAMA.make_batch(seed=seed)).loss.backward()
        seen.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_close(seen[1], seen[0], 1e-4)


def test_trainer_with_gradient_checkpointing(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama)
    train(model, llama, tmp_path, activation_checkpointing=True)
    plain = adapted(llama)
    train(plain, llama, tmp_path)
    assert_close(weights(model), weights(plain), 1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's own, about the compiler
def test_compiled_forward_and_backward_equal_eager() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    settings = SalientLoRAConfig(init_r=3, target_r=2, target_modules=["0", "2"], init_weights=False)
    model, x = get_peft_model(mlp, settings), torch.randn(7, 6)
    layer = model.base_model.adapter_layers("default")["0"]
    layer.set_mask("default", torch.tensor([True, True, True]))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mask in ([True, True, True], [False, True, True]):
        layer.set_mask("default", torch.tensor(mask))
        gradients = []
        for function in (model, compiled):
            model.zero_grad()
            output = function(x)
            output.square().sum().backward()
            gradients.append([output.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_bfloat16_base_keeps_float32_factors(tiny: TinyModel) -> None:
    model = get_peft_model(tiny.make_model().bfloat16(), config(tiny, init_weights=False, lora_alpha=1))
    factors = {name: p for name, p in model.named_parameters() if "salientlora" in name}
    assert all(p.dtype == torch.float32 for p in factors.values())
    output = logits(model, tiny)
    assert output.dtype == torch.bfloat16
    model.train()(**tiny.make_batch()).loss.backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in factors.values())
    exact = get_peft_model(tiny.make_model(), config(tiny, init_weights=False, lora_alpha=1))
    exact.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    expected = logits(exact, tiny)
    assert (output.float() - expected).norm() < 0.1 * expected.norm()


def test_factors_in_the_base_dtype_when_asked() -> None:
    model = get_peft_model(LLAMA.make_model().bfloat16(), config(LLAMA), autocast_adapter_dtype=False)
    assert {p.dtype for name, p in model.named_parameters() if "salientlora" in name} == {torch.bfloat16}
    model.base_model.resolve_schedule(20)
    optimizer = adam(model)
    steps_by_hand(model, LLAMA, 1, 20, optimizer)
    model.base_model.finalize(optimizer)
    assert sum(get_rank_pattern(model).values()) == 28


def test_autocast_forward_and_training(tiny: TinyModel) -> None:
    model = random_adapter(tiny, lora_alpha=1)
    expected = logits(model, tiny)
    with torch.autocast("cpu", torch.bfloat16):
        output = logits(model, tiny)
        plain = logits(tiny.make_model(), tiny)
        model.train()(**tiny.make_batch()).loss.backward()
    assert output.dtype == plain.dtype
    assert (output.float() - expected).norm() < 0.1 * expected.norm()
    for name, p in model.named_parameters():
        if "salientlora" in name:
            assert p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all(), name


def test_trainer_in_bfloat16(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama)
    trainer = train(model, llama, tmp_path, bf16=True)
    assert sum(get_rank_pattern(model).values()) == 28
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]


# ---- copies ----


@pytest.mark.parametrize("shrink", [True, False], ids=["shrunk", "masked"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_in_mid_allocation_goes_on_like_the_original(duplicate: Any, shrink: bool) -> None:
    model = adapted(LLAMA)
    model.base_model.resolve_schedule(20)
    steps_by_hand(
        model, LLAMA, 1, 8, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3), shrink
    )
    results = []
    for each in (duplicate(model), model):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.3)
        steps_by_hand(each, LLAMA, 9, 20, optimizer, shrink)
        each.base_model.finalize(optimizer)
        results.append(weights(each))
    assert_close(results[0], results[1], 0)


def test_a_copy_shares_nothing() -> None:
    model = random_adapter()
    other = copy.deepcopy(model)
    before = logits(model, LLAMA)
    other.base_model.resolve_schedule(20)
    steps_by_hand(other.train(), LLAMA, 1, 15, adam(other))
    assert_close(logits(model, LLAMA), before, 0)
    assert sum(get_rank_pattern(model).values()) == 56


def test_repr_names_the_layer() -> None:
    assert "salientlora.SalientLoRALinear" in repr(adapted(LLAMA))
