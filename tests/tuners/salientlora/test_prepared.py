# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The factors of all layers are cast at once before a forward pass, however the model is called."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_rank import SalientLoRAConfig
from peft_rank.tuners.salientlora import layer as layer_module
from peft_rank.tuners.salientlora.functional import Factors, LinearWithUpdate, prepare_updates
from runs import assert_close
from tiny_models import TINY_MODELS, TinyModel


def model_of(tiny: TinyModel, task_type: str | None, **settings: object) -> PeftModel:
    settings = {"init_r": 3, "target_r": 2, "target_modules": "all-linear", "init_weights": False} | settings
    return get_peft_model(tiny.make_model(), SalientLoRAConfig(task_type=task_type, **settings))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_no_layer_casts_for_itself(task_type: str | None, llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a layer casts its own factors")

    model = model_of(llama, task_type)
    monkeypatch.setattr(layer_module, "prepare_updates", refuse)
    model(**llama.make_batch(2)).loss.backward()
    model.base_model(**llama.make_batch(2))
    ids = llama.make_batch(1)["input_ids"]
    model.base_model.model.generate(input_ids=ids, max_new_tokens=2)
    with pytest.raises(AssertionError, match="casts its own"):
        # a part of the model that is called alone was not prepared
        model.base_model.model.model.layers[0].mlp.up_proj(torch.zeros(1, 32))


def test_nothing_prepared_is_left_behind(llama: TinyModel) -> None:
    model = model_of(llama, None)
    layers = list(model.base_model.adapter_layers("default").values())
    model(**llama.make_batch(2))
    assert not any(layer._prepared for layer in layers)
    with pytest.raises(RuntimeError):
        model(input_ids=torch.zeros(2, 3), attention_mask=torch.zeros(5, 7))
    assert not any(layer._prepared for layer in layers)


def test_unloading_removes_the_hooks(tiny: TinyModel) -> None:
    base = model_of(tiny, None).unload()
    assert not base._forward_pre_hooks
    assert not base._forward_hooks


def test_modules_of_different_ranks_and_sizes_share_kernels_exactly() -> None:
    """Against each module alone, in float64, and what a module that is not used gets."""
    torch.manual_seed(0)
    shapes = [(5, 7, 3), (5, 7, 1), (4, 7, 2), (5, 6, 3)]  # out, in, rank
    factors = [
        Factors(*(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((r, n), r, (m, r))))
        for m, n, r in shapes
    ]
    weights = [torch.randn(m, n, dtype=torch.float64) for m, n, _ in shapes]
    inputs = [torch.randn(2, n, dtype=torch.float64) for _, n, _ in shapes]
    updates = prepare_updates(factors, [0.5, 2.0, 0.5, 0.5], torch.float64)
    used = [0, 1, 3]
    outputs = [LinearWithUpdate.apply(inputs[i], weights[i], None, *updates[i]) for i in used]
    sum(output.square().sum() for output in outputs).backward()
    for i, output in zip(used, outputs, strict=True):
        A, E, B = (factor.detach().requires_grad_() for factor in factors[i])
        scale = [0.5, 2.0, 0.5, 0.5][i]
        expected = inputs[i] @ (weights[i] + scale * (B * E) @ A).T
        assert_close(output, expected, 1e-12)
        expected.square().sum().backward()
        assert_close([f.grad for f in factors[i]], [A.grad, E.grad, B.grad], 1e-12)
    assert all(factor.grad is None for factor in factors[2])


def test_gradients_of_half_precision_products_are_float32_of_the_factors_shape() -> None:
    tiny = TINY_MODELS["llama"]
    model = model_of(tiny, None, init_r=3)
    model.base_model.model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "salientlora_" in name:
            parameter.data = parameter.data.float()
    model(**tiny.make_batch(2)).loss.backward()
    for layer in model.base_model.adapter_layers("default").values():
        for factor in layer.stored("default"):
            assert factor.grad.shape == factor.shape
            assert factor.grad.dtype == torch.float32
            assert factor.grad.is_contiguous()
            assert factor.grad.any()


def test_a_module_that_another_adapter_serves_is_not_prepared(llama: TinyModel) -> None:
    """transformers switches adapters on the layers alone."""
    model = model_of(llama, None)
    model.add_adapter(
        "other", SalientLoRAConfig(init_r=2, target_r=2, target_modules="all-linear", init_weights=False)
    )
    for layer in model.base_model.adapter_layers("default").values():
        layer.set_adapter("other")
    batch = llama.make_batch(2)
    switched = model(**batch).logits
    model.set_adapter("other")
    assert_close(switched, model(**batch).logits, 1e-6)


def test_a_plain_model_can_be_adapted() -> None:
    """Without transformers, without a task type."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    adapted = get_peft_model(model, SalientLoRAConfig(init_r=2, target_r=1, target_modules=["0", "2"]))
    x = torch.randn(3, 4)
    assert_close(adapted(x), model(x), 1e-6)
