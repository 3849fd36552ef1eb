# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""L2LRC's losses: distillation by autograd on the loss written out, compression and total variation by numpy."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_rank import L2LRCConfig
from runs import logits as outputs
from searches import optimizer, search, searched
from tiny_models import TINY_MODELS, TinyModel


def _gradients(model: PeftModel) -> list[torch.Tensor]:
    return [p.grad for p in model.base_model.mask_parameters("default")]


def _hidden(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Final hidden states, taken before the head."""
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss = model(**batch).loss
    handle.remove()
    return seen[0], loss


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bart"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5), (3.0, 0.0)])
def test_the_gradient_of_the_loss_written_out(name: str, weights: tuple[float, float]) -> None:
    tiny = TINY_MODELS[name]
    distillation, pretraining = weights
    settings = {"distillation_weight": distillation, "pretraining_weight": pretraining, "init_logits": (2.0, -1.0)}
    model = searched("l2lrc", tiny, **settings)
    batch = tiny.make_batch(4)
    plain = searched("l2lrc", tiny, **{**settings, "distillation_weight": 0.0, "pretraining_weight": 1.0})
    dense = tiny.make_model().eval()

    loss = model(**batch).loss
    hidden, expected = _hidden(plain, batch)
    assert torch.equal(loss, expected)  # what is reported is the model's
    with torch.no_grad():
        target, _ = _hidden(dense, batch)
    real = batch["labels"] != -100 if name == "bart" else batch["attention_mask"]
    relative = (hidden - target).square().sum(-1) / target.square().sum(-1)
    distance = (relative * real).sum() / real.sum()
    (pretraining * expected + distillation * distance).backward()
    loss.backward()
    for found, wanted in zip(_gradients(model), _gradients(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert model.base_model.rank_summary()["search/distillation"] == pytest.approx(float(distance.detach()), rel=1e-4)


@pytest.mark.parametrize("scale", [0.25, 1024.0])
def test_distillation_is_scaled_like_the_loss(scale: float, llama: TinyModel) -> None:
    """By fp16, by accumulation, by the number of processes."""
    one = searched("l2lrc", llama, init_logits=(2.0, -1.0))
    other = copy.deepcopy(one)
    one(**llama.make_batch(4)).loss.backward()
    (other(**llama.make_batch(4)).loss * scale).backward()
    for a, b in zip(_gradients(one), _gradients(other), strict=True):
        torch.testing.assert_close(a * scale, b, rtol=1e-4, atol=1e-7 * scale)


def test_micro_batches_of_different_length_weigh_their_tokens(llama: TinyModel) -> None:
    """With `num_items_in_batch`, as the Trainer passes it, halves of a batch sum up to the whole."""
    whole = searched("l2lrc", llama, init_logits=(2.0, -1.0))
    parts = copy.deepcopy(whole)
    batch = llama.make_batch(4)
    items = int((batch["labels"][:, 1:] != -100).sum())
    whole(**batch, num_items_in_batch=items).loss.backward()
    for rows in ([0], [1, 2, 3]):
        parts(**{k: v[rows] for k, v in batch.items()}, num_items_in_batch=items).loss.backward()
    for a, b in zip(_gradients(whole), _gradients(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_a_users_own_loss_is_distilled_too(llama: TinyModel) -> None:
    model = searched("l2lrc", llama, init_logits=(2.0, -1.0), pretraining_weight=0.0)
    batch = llama.make_batch(4)
    labels = batch.pop("labels")
    model(**batch).logits[labels != -100].square().mean().backward()
    assert all(float(gradient.abs().sum()) > 0 for gradient in _gradients(model))


def test_the_teacher_is_the_dense_model_without_dropout(llama: TinyModel) -> None:
    """At full rank, where mask noise hardly drops anything, the student is the teacher."""
    model = get_peft_model(llama.make_model(), L2LRCConfig(target_modules=["q_proj"], init_logits=(30.0, 30.0)))
    loss = model(**llama.make_batch(4)).loss
    distillation = model.base_model._distillation
    with torch.no_grad():
        dense, _ = _hidden(llama.make_model().eval(), llama.make_batch(4))
    torch.testing.assert_close(distillation.dense, dense, rtol=0, atol=1e-5)
    loss.backward()
    assert float(distillation.distance) < 1e-8
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["bert", "deberta-v3"])
def test_classifiers_are_distilled_before_their_poolers(name: str) -> None:
    tiny = TINY_MODELS[name]
    model = searched("l2lrc", tiny, init_logits=(2.0, -1.0))
    batch = tiny.make_batch(4)
    with torch.no_grad():
        backbone = tiny.make_model().eval().base_model
        dense = backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    model(**batch).loss.backward()
    torch.testing.assert_close(model.base_model._distillation.dense, dense, rtol=0, atol=1e-5)
    assert model.base_model.rank_summary()["search/distillation"] > 0
    losses = search(model, tiny, optimizer(model, "l2lrc"), 3)
    assert np.isfinite(losses).all()


def test_a_model_that_goes_around_its_head_says_so(llama: TinyModel) -> None:
    model = searched("l2lrc", llama)
    dense = model.get_base_model()
    dense.forward = lambda **batch: dense.model(batch["input_ids"])
    with pytest.raises(RuntimeError, match="does not use its head.*`distillation_weight=0`"):
        model(**llama.make_batch(2))


def test_no_second_forward_where_nothing_is_learned(llama: TinyModel) -> None:
    model = searched("l2lrc", llama)
    calls = []
    model.base_model.model.register_forward_hook(lambda *args: calls.append(1))
    outputs(model, llama)
    assert len(calls) == 1
    model.train()(**llama.make_batch(2))
    assert len(calls) == 3
    model.eval()
    model.generate(llama.make_batch(2)["input_ids"][:, :4], max_new_tokens=2)
    assert len(calls) == 5


def test_compression_and_total_variation(llama: TinyModel) -> None:
    model = searched("l2lrc", llama, compression_weight=5.0, total_variation_weight=2.0, anneal_steps=4)
    tuner = model.base_model
    state = tuner._states["default"]
    rng = np.random.default_rng(0)
    with torch.no_grad():
        (logits,) = tuner.mask_parameters("default")
        logits.copy_(torch.from_numpy(rng.normal(size=logits.shape)))
    for step, target in [(0, 1.0), (1, 0.925), (2, 0.85), (4, 0.7), (9, 0.7)]:
        state.step = step
        kept, dense, variation = 0.0, 0, 0.0
        layers = list(tuner.adapter_layers("default").values())
        rows = logits.detach().double().split([min(layer.shape) for layer in layers])
        for layer, row in zip(layers, rows, strict=True):
            m, n = layer.shape
            probability = 1 - np.exp(-np.exp(row.numpy()))
            kept, dense = kept + min(probability.sum() * (m + n), m * n), dense + m * n
            variation += np.abs(np.diff(probability)).sum() / 14
        padded = tuner.mask_logits("default")
        loss = tuner.regularizer("default", padded, tuner._draw("default", padded).hard)
        assert float(loss.detach()) == pytest.approx(5 * abs(kept / dense - target) + 2 * variation, rel=1e-4)


def test_the_fraction_of_a_training_needs_its_length(llama: TinyModel) -> None:
    model = searched("l2lrc", llama, anneal_steps=None)
    with pytest.raises(RuntimeError, match="`anneal_ratio=0.5`.*resolve_schedule"):
        search(model, llama, optimizer(model, "l2lrc"), 1)
    model.base_model.resolve_schedule(8)
    state = model.base_model._states["default"]
    state.step = 2
    assert model.base_model.annealed_target(model.peft_config["default"], state) == pytest.approx(0.85)


def test_logits_start_where_they_are_told(llama: TinyModel) -> None:
    model = searched("l2lrc", llama, init_logits=[5.0, 1.0])
    for row in model.base_model.mask_logits("default").detach().numpy():
        row = row[np.isfinite(row)]
        np.testing.assert_allclose(row, np.linspace(5, 1, len(row)), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_logits": 3.0}, "`init_logits=3.0` must be two numbers"),
        ({"keep": "some"}, "`keep='some'` must be 'any' or 'prefix'"),
        ({"anneal_ratio": 1.5}, r"`anneal_ratio=1.5` must be a number in \[0, 1\]"),
        ({"distillation_weight": 0.0, "pretraining_weight": 0.5}, "`pretraining_weight=0.5`.*Set it to 1"),
        ({"total_variation_weight": -0.1}, "`total_variation_weight=-0.1` must be a number of 0 or more"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L2LRCConfig(**settings)


def test_distillation_needs_a_model_with_a_backbone() -> None:
    with pytest.raises(
        ValueError,
        match="`distillation_weight=1.0` needs a transformers model, got Sequential.*`distillation_weight=0`",
    ):
        get_peft_model(nn.Sequential(nn.Linear(8, 8)), L2LRCConfig(target_modules=["0"]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_count_of_labels_does_not_weigh_the_distance(name: str, masked: bool) -> None:
    """Of a classifier there is one a text, of an instruction those of the answer: distances are means over tokens."""
    tiny = TINY_MODELS[name]
    one = searched("l2lrc", tiny, init_logits=(2.0, -1.0), pretraining_weight=0.0)
    other = copy.deepcopy(one)
    batch = tiny.make_batch(4)
    if masked and batch["labels"].dim() == 2:
        batch["labels"][:, :5] = -100
    one(**batch).loss.backward()
    other(**batch, num_items_in_batch=(batch["labels"] != -100).sum()).loss.backward()
    for a, b in zip(_gradients(one), _gradients(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_outputs_without_names_are_scaled_like_the_loss(llama: TinyModel) -> None:
    one = searched("l2lrc", llama, init_logits=(2.0, -1.0))
    other = copy.deepcopy(one)
    (one(**llama.make_batch(4)).loss * 64).backward()
    (other(**llama.make_batch(4), return_dict=False)[0] * 64).backward()
    for a, b in zip(_gradients(one), _gradients(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_users_own_loss_is_told_what_it_gets(llama: TinyModel) -> None:
    model = searched("l2lrc", llama)
    batch = llama.make_batch(2)
    labels = batch.pop("labels")
    with pytest.warns(UserWarning, match="not the model's own.*adds the whole distillation"):
        model(**batch).logits[labels != -100].mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**batch).logits[labels != -100].mean().backward()


def test_a_batch_that_fails_does_not_end_the_search(llama: TinyModel) -> None:
    """As when the Trainer looks for a batch that fits into memory."""
    model, other = searched("l2lrc", llama), searched("l2lrc", llama)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]), labels=torch.tensor([[0]]))
    steps = optimizer(model, "l2lrc"), optimizer(other, "l2lrc")
    assert search(model, llama, steps[0], 3) == search(other, llama, steps[1], 3)


def test_an_unloaded_model_keeps_nothing_of_the_search(llama: TinyModel) -> None:
    model = searched("l2lrc", llama)
    search(model, llama, optimizer(model, "l2lrc"), 2)
    factors = weakref.ref(next(iter(model.base_model.searching_layers("default").values())).factors)
    plain = model.unload()
    del model
    gc.collect()
    assert factors() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
