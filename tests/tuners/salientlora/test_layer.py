# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The layer's arithmetic against autograd of the plain composition."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_rank import SalientLoRAConfig
from peft_rank.tuners.functional import compute_dtype
from peft_rank.tuners.salientlora.functional import (
    Factors,
    LinearWithUpdate,
    Pending,
    prepare_updates,
    with_pending,
)
from runs import assert_close


IN, OUT, R, SCALE = 7, 5, 3, 0.8
SHAPES = {"1d": (IN,), "2d": (4, IN), "3d": (2, 3, IN), "4d": (2, 1, 3, IN), "empty": (0, IN), "one-token": (1, 1, IN)}


def operands(shape=(2, 3, IN), dtype: torch.dtype = torch.float32, bias: bool = True):
    """x, W, b, A, E, B; all but W and b require a gradient."""
    generator = torch.Generator().manual_seed(0)
    x, W, A, E, B = (
        torch.randn(s, generator=generator, dtype=dtype) for s in (shape, (OUT, IN), (R, IN), R, (OUT, R))
    )
    b = torch.randn(OUT, generator=generator, dtype=dtype) if bias else None
    return [x.requires_grad_(), W, b, *(factor.requires_grad_() for factor in (A, E, B))]


def fused(x, W, b, A, E, B, scale: float = SCALE) -> torch.Tensor:
    (update,) = prepare_updates([Factors(A, E, B)], [scale], compute_dtype(x))
    return LinearWithUpdate.apply(x, W, b, *update)


def composed(x, W, b, A, E, B, scale: float = SCALE) -> torch.Tensor:
    return F.linear(x, W, b) + scale * (((x @ A.T) * E) @ B.T)


def gradients(function, tensors, seed: int = 1) -> list[torch.Tensor]:
    output = function(*tensors)
    generator = torch.Generator().manual_seed(seed)
    towards = torch.randn(output.shape, generator=generator).to(output.dtype)
    return list(torch.autograd.grad(output, [t for t in tensors if t is not None and t.requires_grad], towards))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_fused_equals_composed(shape: tuple[int, ...], bias: bool) -> None:
    tensors = operands(shape, torch.float64, bias)
    output = fused(*tensors)
    assert output.shape == (*shape[:-1], OUT)
    assert_close(output, composed(*tensors), 1e-12)
    assert_close(gradients(fused, tensors), gradients(composed, tensors), 1e-12)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_fused_passes_gradcheck(bias: bool) -> None:
    assert torch.autograd.gradcheck(fused, operands((2, 2, IN), torch.float64, bias))


@pytest.mark.parametrize("frozen", range(4), ids=["x", "A", "E", "B"])
def test_a_frozen_operand_gets_no_gradient_and_the_others_theirs(frozen: int) -> None:
    tensors = operands(dtype=torch.float64)
    tensors[[0, 3, 4, 5][frozen]].requires_grad_(False)
    assert_close(gradients(fused, tensors), gradients(composed, tensors), 1e-12)


def test_only_the_input_needs_a_gradient() -> None:
    tensors = [t if t is None else t.detach() for t in operands(dtype=torch.float64)]
    tensors[0].requires_grad_()
    assert_close(gradients(fused, tensors), gradients(composed, tensors), 1e-12)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(IN, 4, dtype=torch.float64).T,
        torch.randn(2, IN, 3, dtype=torch.float64).transpose(1, 2),
        torch.randn(1, 1, IN, dtype=torch.float64).expand(2, 3, IN),
        torch.randn(4, 2 * IN, dtype=torch.float64)[:, ::2],
    ],
    ids=["transposed", "transposed-3d", "expanded", "strided"],
)
def test_inputs_need_not_be_contiguous(x: torch.Tensor) -> None:
    assert not x.is_contiguous()
    tensors = [x.clone(memory_format=torch.preserve_format).requires_grad_(), *operands(dtype=torch.float64)[1:]]
    assert_close(fused(*tensors), composed(*tensors), 1e-12)
    assert_close(gradients(fused, tensors), gradients(composed, tensors), 1e-12)


def test_the_gradient_of_the_output_need_not_be_contiguous() -> None:
    tensors = operands((2, 3, IN), torch.float64)
    results = []
    for function in (fused, composed):
        total = function(*tensors).sum()  # an expanded scalar as gradient
        transposed = function(*tensors).transpose(0, 1) * torch.arange(3.0, dtype=torch.float64)[:, None, None]
        results.append(torch.autograd.grad(total + transposed.sum(), [t for t in tensors if t.requires_grad]))
    assert_close(*results, 1e-12)


def test_the_output_can_be_changed_in_place() -> None:
    tensors = operands(dtype=torch.float64)
    fused(*tensors).add_(1).relu_().sum().backward()
    expected = operands(dtype=torch.float64)
    composed(*expected).add_(1).relu_().sum().backward()
    assert_close(tensors[3].grad, expected[3].grad, 1e-12)


def test_inputs_are_not_changed() -> None:
    tensors = operands()
    copies = copy.deepcopy([t if t is None else t.detach() for t in tensors])
    fused(*tensors).sum().backward()
    assert_close([t.detach() for t in tensors], copies, 0)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32-base", "bf16-base"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["fp32-x", "bf16-x"])
def test_autocast(base: torch.dtype, x_dtype: torch.dtype) -> None:
    tensors = operands((16, IN))
    expected, exact = composed(*tensors), gradients(composed, tensors)
    mixed = [tensors[0].detach().to(x_dtype).requires_grad_(), tensors[1].to(base), tensors[2].to(base), *tensors[3:]]
    with torch.autocast("cpu", torch.bfloat16):
        output = fused(*mixed)
        assert output.dtype == F.linear(*mixed[:3]).dtype == torch.bfloat16
    assert (output.float() - expected).norm() < 0.02 * expected.norm()
    found = gradients(lambda *_: output, mixed)
    assert [g.dtype for g in found] == [x_dtype, torch.float32, torch.float32, torch.float32]
    for one, other in zip(found, exact, strict=True):
        assert (one.float() - other).norm() < 0.03 * other.norm()


def test_float32_factors_on_a_bfloat16_base() -> None:
    tensors = operands((16, IN))
    expected, exact = composed(*tensors), gradients(composed, tensors)
    x, W, b = (t.detach().bfloat16() for t in tensors[:3])
    mixed = [x.requires_grad_(), W, b, *tensors[3:]]
    output = fused(*mixed)
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() < 0.02 * expected.norm()
    found = gradients(fused, mixed)
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for one, other in zip(found, exact, strict=True):
        assert (one.float() - other).norm() < 0.03 * other.norm()


# ---- the layer ----


class Two(nn.Module):
    """A linear layer and a `Conv1D`, one after the other; the first is used twice."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=bias)
        self.second = Conv1D(4, 6)
        nn.init.normal_(self.second.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    settings = SalientLoRAConfig(
        init_r=3, target_r=2, lora_alpha=16, target_modules=["first", "second"], init_weights=False
    )
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        return get_peft_model(Two(), settings)


def layers(model) -> list:
    return list(model.base_model.adapter_layers("default").values())


def watched(model) -> torch.Tensor:
    stored = [layer.stored("default").E for layer in layers(model)]
    return model.base_model._gradient_of_E("default", stored, stored)


def allocate(model) -> None:
    """Let the next step be one of the allocation."""
    model.base_model.resolve_schedule(100)
    model.base_model.skip_step(20)


def effective(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """W + scale * B diag(E) A by hand, (out, in), and the bias."""
    A, E, B = (getattr(layer, f"salientlora_{name}")["default"] for name in "AEB")
    mask = layer.salientlora_mask.get("default", torch.ones(len(E)))
    base = layer.base_layer
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    return weight + 16.0 / 3 * B @ torch.diag(E * mask) @ A, base.bias


def by_hand(model, x: torch.Tensor) -> torch.Tensor:
    first, second = (effective(layer) for layer in layers(model))
    return F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x, *first)), *first)), *second)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("context", ["train", "eval", "no_grad", "inference_mode"])
def test_forward_is_the_formula(model, masked: bool, context: str) -> None:
    if masked:
        layers(model)[0].set_mask("default", torch.tensor([True, False, True]))
        layers(model)[1].set_mask("default", torch.tensor([False, False, False]))
    x = torch.randn(5, 6)
    model.train(context == "train")
    guard = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(context, torch.enable_grad)
    with guard():
        assert_close(model(x), by_hand(model, x), 1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_backward_is_the_formula(model, masked: bool) -> None:
    if masked:
        layers(model)[0].set_mask("default", torch.tensor([True, False, True]))
    x, parameters = torch.randn(5, 6), [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(by_hand(model, x).square().sum(), parameters)
    actual = torch.autograd.grad(model(x).square().sum(), parameters)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_masked_rank_gets_no_gradient_of_the_loss(model) -> None:
    layer = layers(model)[0]
    layer.set_mask("default", torch.tensor([True, False, True]))
    model(torch.randn(5, 6)).square().sum().backward()
    for name in "AE":
        gradient = getattr(layer, f"salientlora_{name}")["default"].grad
        assert not gradient[1].any() and gradient[0].any() and gradient[2].any()
    gradient = layer.salientlora_B["default"].grad
    assert not gradient[:, 1].any() and gradient[:, 0].any()


def test_new_masks_and_parameter_values_count_from_the_next_forward(model) -> None:
    x = torch.randn(5, 6)
    outputs = []
    for mask in ([True, True, True], [True, False, True], [False, False, True]):
        layers(model)[0].set_mask("default", torch.tensor(mask))
        outputs.append(model(x))
        assert_close(outputs[-1], by_hand(model, x), 1e-5)
        with torch.no_grad():
            layers(model)[0].salientlora_E["default"] *= 1.5
        assert_close(model(x), by_hand(model, x), 1e-5)
    assert not torch.allclose(outputs[0], outputs[1])


def test_a_module_without_any_rank_is_its_base_module(model) -> None:
    layers(model)[0].narrow("default", torch.tensor([False, False, False]))
    layers(model)[1].narrow("default", torch.tensor([True, False, False]))
    x = torch.randn(5, 6)
    assert_close(model(x), by_hand(model, x), 1e-5)
    model(x).sum().backward()
    assert layers(model)[1].salientlora_E["default"].grad.shape == (1,)


def test_dropout_acts_on_the_adapter_only_and_only_in_training() -> None:
    torch.manual_seed(0)
    settings = SalientLoRAConfig(
        init_r=3, target_r=2, lora_alpha=16, target_modules=["first"], init_weights=False, lora_dropout=0.5
    )
    model, x = get_peft_model(Two(), settings), torch.randn(64, 6)
    layer = layers(model)[0]
    base = layer.base_layer(x)
    torch.manual_seed(1)
    updates = layer.train()(x) - base
    torch.manual_seed(1)
    kept = F.dropout(x, 0.5)
    A, E, B = (getattr(layer, f"salientlora_{name}")["default"] for name in "AEB")
    assert_close(updates, 16 / 3 * ((kept @ A.T) * E) @ B.T, 1e-4)
    assert_close(layer.eval()(x) - base, 16 / 3 * ((x @ A.T) * E) @ B.T, 1e-4)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_of_the_base_layer_still_run(model, kind: str) -> None:
    calls = []
    base = layers(model)[0].base_layer
    getattr(base, f"register_{kind}_hook")(lambda *args: calls.append(1))
    x = torch.randn(5, 6, requires_grad=True)
    output = model(x)
    assert_close(output, by_hand(model, x), 1e-5)
    output.sum().backward()
    assert len(calls) == 2


def test_a_base_weight_that_is_trained_gets_its_gradient(model) -> None:
    base, x = layers(model)[0].base_layer, torch.randn(5, 6)
    base.weight.requires_grad_()
    base.bias.requires_grad_()
    expected = torch.autograd.grad(by_hand(model, x).square().sum(), [base.weight, base.bias])
    actual = torch.autograd.grad(model(x).square().sum(), [base.weight, base.bias])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_exception_in_forward_leaves_nothing_behind(model) -> None:
    x = torch.randn(5, 6)
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 9))
    with torch.no_grad():
        layers(model)[0].salientlora_E["default"] *= 2
    assert_close(model(x), by_hand(model, x), 1e-5)
    assert_close(model.base_model.model(x), by_hand(model, x), 1e-5)


def test_double_precision() -> None:
    torch.manual_seed(0)
    settings = SalientLoRAConfig(init_r=3, target_r=2, lora_alpha=16, target_modules=["first"], init_weights=False)
    model, x = get_peft_model(Two(), settings).double(), torch.randn(5, 6, dtype=torch.float64)
    first, second = effective(layers(model)[0]), model.base_model.model.second
    expected = second(torch.tanh(F.linear(torch.tanh(F.linear(x, *first)), *first)))
    assert_close(model(x), expected, 1e-12)


def test_the_model_can_be_cast_with_masks(model) -> None:
    layers(model)[0].set_mask("default", torch.tensor([True, False, True]))
    model.double()
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_close(model(x), by_hand(model, x), 1e-6)
    assert model(x).dtype == torch.float64


# ---- the regularizer inside of backward ----


def test_an_armed_gradient_is_added_once_over_micro_batches_and_uses(model) -> None:
    """The first layer is used twice in each of three micro-batches."""
    allocate(model)
    batches = [torch.randn(5, 6) for _ in range(3)]
    for batch in batches:
        model(batch).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.base_model.add_regularization_gradient()
    for name, p in model.named_parameters():
        if p.grad is not None:
            expected[name] += p.grad
    model.zero_grad()
    model.base_model.arm_regularization()
    for batch in batches:
        model(batch).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-5)
    _check_watched(model)


def _check_watched(model) -> None:
    """What was seen of the gradient of E, for engines that take it away, is what parameters have got; only once."""
    expected = torch.cat([p.grad for name, p in model.named_parameters() if "salientlora_E" in name])
    torch.testing.assert_close(watched(model), expected)
    assert expected.any() and not any(layer._watched for layer in layers(model))


def test_arming_scales_with_the_loss(model) -> None:
    allocate(model)
    x, seen = torch.randn(5, 6), []
    for scale in (1.0, 1024.0):
        model.zero_grad()
        model.base_model.arm_regularization(scale)
        (scale * model(x).square().sum()).backward()
        seen.append({n: p.grad / scale for n, p in model.named_parameters() if p.requires_grad})
        seen[-1]["watched"] = watched(model)
    for name in seen[0]:
        torch.testing.assert_close(seen[0][name], seen[1][name], rtol=1e-5, atol=1e-5)


def test_arming_again_replaces_what_was_not_used(model) -> None:
    model.base_model.arm_regularization()
    model.base_model.arm_regularization()
    with torch.no_grad():
        model(torch.randn(5, 6))  # an evaluation consumes nothing
    (0.0 * model(torch.randn(5, 6)).sum()).backward()
    armed = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.base_model.add_regularization_gradient()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(armed[name], p.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_armed_gradient_survives_recomputation(model, use_reentrant: bool) -> None:
    allocate(model)
    x = torch.randn(5, 6, requires_grad=True)
    results = []
    for run in (model, lambda y: torch.utils.checkpoint.checkpoint(model, y, use_reentrant=use_reentrant)):
        model.zero_grad()
        model.base_model.arm_regularization()
        run(x).square().sum().backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        _check_watched(model)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-5)


def test_a_watched_gradient_is_summed_in_float32() -> None:
    E, watched = torch.ones(3, dtype=torch.float16, requires_grad=True), {"a": None}
    A, B = torch.zeros(3, 2), torch.zeros(4, 3)

    def seen(watched: dict) -> torch.Tensor:
        (found,) = with_pending("a", [Factors(A, E, B)], [Pending({}, watched, None)])
        return found.E

    for _ in range(2):
        (seen(watched) * torch.tensor([4e4, 1.0, -1.0]).half()).sum().backward()
        E.grad = None
    torch.testing.assert_close(watched["a"], torch.tensor([8e4, 2.0, -2.0]), rtol=1e-3, atol=0)
    seen({}).sum().backward()  # no longer watched
    assert torch.equal(E.grad, torch.ones(3).half())


def test_pending_gradients_of_modules_that_are_not_used_stay_pending() -> None:
    factors = [Factors(*(torch.randn(*size, requires_grad=True) for size in ((3, 4), (3,), (5, 3)))) for _ in range(2)]
    additions = [[torch.ones(3, 4), torch.ones(5, 3)] for _ in factors]
    mask = torch.tensor([1.0, 0.0, 1.0])
    pending = [Pending({"a": addition}, {"a": None}, mask) for addition in additions]
    used = with_pending("a", factors, pending)[1]
    assert_close(used.E, factors[1].E * mask, 0)
    for _ in range(2):
        (used.A.sum() + used.E.sum() + used.B.sum()).backward(retain_graph=True)
    assert additions == [[*additions[0]], [None, None]] and additions[0][0] is not None
    assert_close(factors[1].A.grad, torch.full((3, 4), 3.0), 0)
    assert_close(factors[1].B.grad, torch.full((5, 3), 3.0), 0)
    assert_close(factors[1].E.grad, 2 * mask, 0)
    assert_close(pending[1].watched["a"], torch.full((3,), 2.0), 0)
    assert factors[0].A.grad is None and pending[0].watched["a"] is None
