# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""One layer with factors: dtypes, devices, several adapters, biases; and the end of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from compressions import compressed, config, targets
from peft_rank import LowRankConfig, LowRankLinear, get_rank_pattern
from peft_rank.decomposition import decompose
from peft_rank.tuners.lowrank import FactorizedLinear
from runs import assert_close, logits
from tiny_models import TINY_MODELS, TinyModel


class Block(nn.Module):
    """A linear and a `Conv1D` of the same map, 24 -> 40."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv = nn.Linear(24, 40, bias=bias), Conv1D(40, 24)
        self.conv.weight.data = self.linear.weight.data.T.contiguous()
        if bias:
            self.conv.bias.data = self.linear.bias.data.clone()
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.linear(x), self.conv(x)], -1)


def block(
    rank: int = 5, dtype: torch.dtype = torch.float32, autocast_adapter_dtype: bool = True, **fields
) -> PeftModel:
    made = LowRankConfig(rank=rank, target_modules=["linear", "conv"], **fields)
    return get_peft_model(Block(dtype=dtype), made, autocast_adapter_dtype=autocast_adapter_dtype)


def layer(model: PeftModel) -> FactorizedLinear:
    return model.base_model.model.linear


X = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1))


def product(rank: int) -> torch.Tensor:
    up, down = decompose(Block().linear.weight.detach(), rank)
    return up @ down


# --- what is computed -------------------------------------------------------------------------------------------------


def test_linear_and_conv1d_are_the_same_map() -> None:
    out = block()(X)
    expected = F.linear(X, product(5), Block().linear.bias)
    assert out.shape == (3, 7, 80)
    assert_close(out[..., :40], expected, 1e-5)
    assert_close(out[..., 40:], expected, 1e-5)


def test_without_a_bias() -> None:
    model = get_peft_model(Block(bias=False), LowRankConfig(rank=5, target_modules=["linear"]))
    assert_close(model(X)[..., :40], F.linear(X, product(5)), 1e-5)
    model.base_model.finalize()
    assert model.base_model.model.linear.bias is None


def test_several_adapters_take_turns_and_add_up() -> None:
    model = block(rank=5)
    model.add_adapter("thin", LowRankConfig(rank=2, target_modules=["linear"]))
    assert_close(model(X)[..., :40], F.linear(X, product(5), Block().linear.bias), 1e-5)
    model.set_adapter("thin")
    assert_close(model(X)[..., :40], F.linear(X, product(2), Block().linear.bias), 1e-5)
    assert torch.equal(model(X)[..., 40:], Block()(X)[..., 40:]), "this adapter leaves the other module dense"
    assert (get_rank_pattern(model, adapter_name="default"), get_rank_pattern(model, adapter_name="thin")) == (
        {"linear": 5, "conv": 5},
        {"linear": 2},
    )
    model.base_model.set_adapter(["default", "thin"])
    both = product(5) + product(2) - Block().linear.weight
    assert_close(model(X)[..., :40], F.linear(X, both, Block().linear.bias), 1e-5)
    expected = model(X)
    model.merge_adapter(["default"])
    model.merge_adapter(["thin"])
    assert_close(model(X), expected, 1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer(model).base_layer.weight, Block().linear.weight)
    model.delete_adapter("default")
    assert_close(model(X)[..., :40], F.linear(X, product(2), Block().linear.bias), 1e-5)


def test_an_adapter_added_over_a_merged_one_comes_from_the_original_weight() -> None:
    model = block(rank=2)
    model.merge_adapter()
    model.add_adapter("second", LowRankConfig(rank=5, target_modules=["linear", "conv"]))
    assert_close(layer(model).product("second"), product(5), 1e-6)


def test_a_broken_factor_is_not_merged_safely() -> None:
    model = block()
    layer(model).lowrank_up["default"].data[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer(model).base_layer.weight, Block().linear.weight)


def test_biases_can_be_trained() -> None:
    model = block(bias="lowrank_only")
    assert layer(model).base_layer.bias.requires_grad
    model(X).sum().backward()
    assert layer(model).base_layer.bias.grad is not None
    model.base_model.finalize()
    assert model.base_model.model.linear.up.bias.requires_grad


def test_a_copy_is_independent() -> None:
    model = block()
    other = copy.deepcopy(model)
    layer(other).lowrank_up["default"].data.zero_()
    assert not torch.equal(other(X), model(X))


# --- dtypes and devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "autocast", "expected"),
    [
        ({}, True, torch.float32),
        ({}, False, torch.bfloat16),
        ({"train_factors": False}, True, torch.bfloat16),
    ],
    ids=["trained", "trained in half precision", "frozen"],
)
def test_dtype_of_the_factors(fields: dict, autocast: bool, expected: torch.dtype, tmp_path: Path) -> None:
    model = block(dtype=torch.bfloat16, autocast_adapter_dtype=autocast, **fields)
    assert {p.dtype for n, p in model.named_parameters() if "lowrank" in n} == {expected}
    assert {p.requires_grad for n, p in model.named_parameters() if "lowrank" in n} == {not fields}
    out = model(X.bfloat16())
    assert out.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Block(dtype=torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast)
    assert torch.equal(loaded(X.bfloat16()), out)
    model.base_model.finalize()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(X.bfloat16()), out)


def test_frozen_factors_stay_frozen() -> None:
    model = block(train_factors=False)
    model.add_adapter("trained", LowRankConfig(rank=3, target_modules=["linear"]))
    for _ in range(2):
        model.set_adapter("trained")
        assert layer(model).lowrank_up["trained"].requires_grad
        model.set_adapter("default")
        assert not any(p.requires_grad for p in model.parameters())


def test_autocast_runs_the_factors_in_half_precision() -> None:
    model = block()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.base_model.model.linear(X)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), model.base_model.model.linear(X), 0.05)


def test_offloaded_weights_come_back_when_they_are_needed() -> None:
    """On one device nothing moves, but every path has to work."""
    model, plain = block(offload_dense=True), block()
    assert torch.equal(model(X), plain(X))
    with model.disable_adapter():
        assert torch.equal(model(X), Block()(X))
    model.to(torch.float64)
    assert layer(model).base_layer.weight.dtype == torch.float64
    model.to(torch.float32)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(layer(model).base_layer.weight, Block().linear.weight)
    assert torch.equal(model.unload()(X), Block()(X))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_weights_stay_on_the_cpu() -> None:
    made = LowRankConfig(rank=5, target_modules=["linear", "conv"], offload_dense=True)
    model, dense = get_peft_model(Block().cuda(), made), Block().cuda()
    x = X.cuda()
    for _ in range(2):
        assert layer(model).base_layer.weight.device.type == "cpu"
        assert layer(model).lowrank_up["default"].is_cuda
        assert_close(model(x)[..., :40], F.linear(x, product(5).cuda(), dense.linear.bias), 1e-4)
        with model.disable_adapter():
            assert_close(model(x), dense(x), 1e-4)
        model.cuda()
    model.add_adapter("second", made)
    assert layer(model).lowrank_up["second"].is_cuda
    model.merge_adapter()
    assert_close(model(x)[..., :40], F.linear(x, product(5).cuda(), dense.linear.bias), 1e-4)
    model.unmerge_adapter()
    plain = model.unload()
    assert torch.equal(plain(x), dense(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_the_cpu_is_decomposed_by_the_device_and_stays_there() -> None:
    model = block()
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert_close(layer(model).product("default"), product(5), 1e-4)


def test_a_model_without_memory_gets_factors_without_memory() -> None:
    with torch.device("meta"):
        base = Block()
    model = get_peft_model(base, LowRankConfig(ratio=0.6, target_modules=["linear", "conv"]))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert set(get_rank_pattern(model).values()) == {8}


# the former name is the only one that all supported versions have
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing(llama: TinyModel) -> None:
    model = compressed(llama, rank=4).train()
    batch = llama.make_batch(4)
    model(**batch).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, plain, 1e-5)


# --- the end ----------------------------------------------------------------------------------------------------------


def test_nothing_comes_back_once_the_weights_are_freed(llama: TinyModel) -> None:
    model = compressed(llama, rank=4)
    before = logits(model, llama)
    model.base_model.finalize()
    model.base_model.finalize()
    for step in (
        model.unload,
        model.merge_and_unload,
        model.merge_adapter,
        model.base_model.disable_adapter_layers,
        lambda: model.add_adapter("second", config(llama, rank=4)),
    ):
        with pytest.raises(RuntimeError, match=r"The compression is final.*`model\.get_base_model\(\)`"):
            step()
    assert torch.equal(logits(model, llama), before)
    dense = sum(p.numel() for module in targets(llama.make_model(), llama).values() for p in module.parameters())
    assert (
        sum(p.numel() for p in model.parameters())
        < sum(p.numel() for p in llama.make_model().parameters()) - dense / 4
    )


def test_the_active_adapter_is_the_one_that_stays() -> None:
    model = block(rank=5)
    model.add_adapter("thin", LowRankConfig(rank=2, target_modules=["linear"]))
    model.base_model.set_adapter(["default", "thin"])
    with pytest.raises(ValueError, match="adapters default, thin are active together; only one can stay"):
        model.base_model.finalize()
    assert isinstance(layer(model), FactorizedLinear)
    model.set_adapter("thin")
    out = model(X)
    model.base_model.finalize()
    assert torch.equal(model(X), out)
    assert get_rank_pattern(model) == {"linear": 2}
    assert type(model.base_model.model.conv) is Conv1D


def test_merged_adapters_are_taken_out_before_the_end() -> None:
    model = block()
    out = model(X)
    model.merge_adapter()
    model.base_model.finalize()
    assert torch.equal(model(X), out)


def test_a_final_model_can_be_adapted_and_trained(llama: TinyModel) -> None:
    """Healing: plain training of the factors, or LoRA on them."""
    model = compressed(llama, rank=4)
    model.base_model.finalize()
    plain = model.get_base_model().train()
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = plain(**llama.make_batch(8)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted = get_peft_model(
        plain, LoraConfig(r=2, target_modules=r".*mlp\.up_proj\.(up|down)", task_type="CAUSAL_LM")
    )
    assert_close(logits(adapted, llama), logits(plain, llama), 1e-6)
    adapted(**llama.make_batch(4)).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert len(trained) == 2 * 2 * 2
    merged = adapted.merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.up_proj, LowRankLinear)


def test_seq2seq_models_generate_when_final() -> None:
    tiny = TINY_MODELS["t5"]
    model = compressed(tiny, rank=6).eval()
    batch = {key: value for key, value in tiny.make_batch(2).items() if key != "labels"}
    expected = model.generate(**batch, max_new_tokens=5, do_sample=False)
    model.base_model.finalize()
    assert torch.equal(model.get_base_model().generate(**batch, max_new_tokens=5, do_sample=False), expected)
