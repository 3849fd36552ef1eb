# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Calibration against sums over the recorded inputs of single, unpadded samples, and gradients of one sample after another."""

from __future__ import annotations

import gc
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peft_rank import CalibrationStatistics, calibrate
from tiny_models import TINY_MODELS, TinyModel


GOLDEN = Path(__file__).parents[1] / "golden" / "ars" / "llama_calibration.npz"
RELATIVE = "query_proj", "key_proj"  # get the position embeddings of DeBERTa too, once a forward

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than they have input features")


@dataclass
class Config(LoraConfig):
    """PEFT's own targets, with the one field that calibration needs: nothing here depends on a compression method."""

    decomposition: str = field(default="whitening")


def config(tiny: TinyModel, decomposition: str = "whitening", **fields: Any) -> Config:
    return Config(target_modules=list(tiny.target_modules), decomposition=decomposition, **fields)


def collect(model: nn.Module, batches: Any, config: Config, **kwargs: Any) -> CalibrationStatistics:
    return calibrate(model, batches, config=config, progress=False, **kwargs)


def rows(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {key: value[start:stop].clone() for key, value in batch.items()}


def unpadded(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Each sample alone and without padding."""
    for i in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][i].sum())
        sample = rows(batch, i, i + 1)
        yield {key: value[:, :length] if value.ndim == 2 else value for key, value in sample.items()}


def targets(model: nn.Module, tiny: TinyModel) -> dict[str, nn.Module]:
    """Independent of PEFT's helpers."""
    endings = tuple(f".{name}" for name in tiny.target_modules)
    return {name: module for name, module in model.named_modules() if name.endswith(endings)}


@torch.no_grad()
def recorded_inputs(model: nn.Module, modules: dict[str, nn.Module], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All rows that the modules saw, (tokens, in), float64."""
    seen = defaultdict(list)
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2).double()))
        for name, module in modules.items()
    ]
    for sample in unpadded(batch):
        model(**sample)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in seen.items()}


def squared_gradients(model: nn.Module, modules: dict[str, nn.Module], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean over samples of the squared gradients, (out, in), float64."""
    sums = defaultdict(float)
    samples = list(unpadded(batch))
    for sample in samples:
        model.zero_grad()
        model(**sample).loss.backward()
        for name, module in modules.items():
            gradient = module.weight.grad.double()
            sums[name] = sums[name] + (gradient.T if isinstance(module, Conv1D) else gradient).square()
    model.zero_grad()
    return {name: total / len(samples) for name, total in sums.items()}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Up to a share of the largest entry."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=tolerance * float(expected.abs().max())
    )


# --- values -----------------------------------------------------------------------------------------------------------


def test_inputs_of_padded_batches(tiny: TinyModel) -> None:
    model, batch = tiny.make_model().eval(), tiny.make_batch(5)
    expected = recorded_inputs(model, targets(model, tiny), batch)
    # position embeddings go through once a forward: as often as in the oracle only in batches of one
    batches = [rows(batch, 0, 3), rows(batch, 3, 5)]
    if tiny.name.startswith("deberta"):
        batches = [rows(batch, i, i + 1) for i in range(5)]
    scale = collect(model, batches, config(tiny, "activation"))
    gram = collect(model, batches, config(tiny, "whitening"))
    assert list(expected) and set(scale.names) == set(gram.names) == set(expected)
    for name, x in expected.items():
        assert scale.tokens[name] == gram.tokens[name] == len(x)
        assert_near(scale.for_module(name)["input_scale"], x.abs().mean(0))
        assert_near(gram.for_module(name)["input_gram"], x.T @ x / len(x))
    assert scale.samples == gram.samples == 5


def test_fisher_and_importance_of_padded_batches(tiny: TinyModel) -> None:
    model, batch = tiny.make_model().eval(), tiny.make_batch(5)
    modules = targets(model, tiny)
    expected = squared_gradients(model, modules, batch)
    batches = [rows(batch, 0, 3), rows(batch, 3, 5)]
    fisher = collect(model, batches, config(tiny, "em"))
    importance = collect(model, batches, config(tiny, "importance"))
    assert set(fisher.names) == set(expected)
    for name, module in modules.items():
        weight = module.weight.detach().double()
        weight = weight.T if isinstance(module, Conv1D) else weight
        assert_near(fisher.for_module(name)["weight_importance"], expected[name], 1e-4)
        assert_near(importance.for_module(name)["weight_importance"], expected[name] * weight**2, 1e-4)
    assert fisher.samples == 5


def _forwards(model: nn.Module) -> list[int]:
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(next(iter(kwargs.values())))), with_kwargs=True
    )
    return sizes


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_batches_of_equal_shares_take_one_forward(family: str) -> None:
    tiny = TINY_MODELS[family]
    model, batch = tiny.make_model().eval(), tiny.make_batch(6)
    if family == "llama":  # whole texts
        batch["input_ids"] = batch["input_ids"].clamp(min=4)
        batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    expected = squared_gradients(model, targets(model, tiny), batch)
    sizes = _forwards(model)
    statistics = collect(model, [batch], config(tiny, "fisher"))
    assert sizes == [6]
    for name, value in expected.items():
        assert_near(statistics.for_module(name)["weight_importance"], value, 1e-4)


def test_labels_of_unequal_shares_are_run_one_by_one(llama: TinyModel) -> None:
    model = llama.make_model()
    sizes = _forwards(model)
    collect(model, [llama.make_batch(4)], config(llama, "fisher"))
    assert sizes == [1, 1, 1, 1]


def test_decoder_mask_is_taken_where_there_is_one() -> None:
    tiny = TINY_MODELS["bart"]
    model, batch = tiny.make_model(), tiny.make_batch(4)
    decoder = torch.ones_like(batch["labels"])
    decoder[:, 5:] = 0
    statistics = collect(model, [{**batch, "decoder_attention_mask": decoder}], config(tiny))
    encoder_tokens = int(batch["attention_mask"].sum())
    assert statistics.tokens["model.decoder.layers.0.fc1"] == int(decoder.sum()) == 20
    assert statistics.tokens["model.decoder.layers.0.encoder_attn.k_proj"] == encoder_tokens
    assert statistics.tokens["model.decoder.layers.0.encoder_attn.q_proj"] == 20
    assert statistics.tokens["model.encoder.layers.0.fc1"] == encoder_tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decomposition", ["activation", "whitening", "fisher"])
def test_half_precision(llama: TinyModel, dtype: torch.dtype, decomposition: str) -> None:
    model, batch = llama.make_model().to(dtype), llama.make_batch(4)
    found = collect(model, [batch], config(llama, decomposition))
    expected = collect(model.float(), [batch], config(llama, decomposition))
    for name in found.names:
        (actual,), (wanted,) = found.for_module(name).values(), expected.for_module(name).values()
        assert actual.dtype == torch.float32
        assert_near(actual, wanted, 0.1)
        assert bool((wanted > 0).any())


def test_float16_gradients_do_not_vanish(llama: TinyModel) -> None:
    # tokens that are predicted well have gradients below the range of float16
    model, batch = llama.make_model(), llama.make_batch(4)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
        model.model.norm.weight.mul_(1e-2)
    expected = collect(model, [batch], config(llama, "fisher"))
    found = collect(model.half(), [batch], config(llama, "fisher"))
    name = "model.layers.0.mlp.down_proj"
    wanted = expected.for_module(name)["weight_importance"]
    assert float(wanted.max()) ** 0.5 < 2e-5
    assert_near(found.for_module(name)["weight_importance"], wanted, 0.1)


def test_float64_models_are_summed_in_float64(llama: TinyModel) -> None:
    model, batch = llama.make_model().double().eval(), llama.make_batch(4)
    x = recorded_inputs(model, targets(model, llama), batch)
    statistics = collect(model, [batch], config(llama))
    for name in statistics.names:
        assert_near(statistics.for_module(name)["input_gram"], x[name].T @ x[name] / len(x[name]), 1e-13)


def test_released_values() -> None:
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN).items()}
    settings = {"vocab_size": 40, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**settings, num_attention_heads=4))
    model.load_state_dict({k[7:].replace("__", "."): v for k, v in golden.items() if k.startswith("state__")})
    # all linears and the head
    wanted = {"target_modules": r".*(_proj|lm_head)"}
    ids = [golden[f"calib_ids{i}"] for i in range(3)]

    # mean absolute inputs are summed over batches there
    scales = [collect(model, [{"input_ids": i}], Config(decomposition="activation", **wanted)) for i in ids]
    # their labels are shifted once more than the model does by itself; roots of means over rows
    shifted = [torch.cat([i[:, 1:], torch.full((1, 1), -100)], dim=1) for i in ids]
    batches = [{"input_ids": i, "labels": labels} for i, labels in zip(ids, shifted, strict=True)]
    fisher = collect(model, batches, Config(decomposition="fisher", **wanted))
    assert len(fisher.names) == 15
    for name in fisher.names:
        key = name.replace(".", "__")
        total = sum(scale.for_module(name)["input_scale"] for scale in scales)
        torch.testing.assert_close(total, golden[f"abs_mean__{key}"], rtol=1e-5, atol=1e-6)
        found = fisher.for_module(name)["weight_importance"].mean(0).sqrt()
        torch.testing.assert_close(found, golden[f"fisher__{key}"], rtol=1e-5, atol=0)

    first = "model.layers.0.self_attn.q_proj"
    plain = collect(
        model, [{"input_ids": i, "labels": i} for i in ids], Config(decomposition="fisher", target_modules=["q_proj"])
    )
    found = plain.for_module(first)["weight_importance"].mean(0).sqrt()
    torch.testing.assert_close(found, golden["fisher_singleshift__q0"], rtol=1e-5, atol=0)
    # two samples of one batch stand there beside each other
    both = collect(model, [{"input_ids": golden["calib_b2_ids"]}], Config(decomposition="activation", **wanted))
    expected = golden["abs_mean_b2__q0"].view(2, 48).mean(0)
    torch.testing.assert_close(both.for_module(first)["input_scale"], expected, rtol=1e-5, atol=1e-6)


# --- what is collected, and for which modules -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decomposition", "statistic"),
    {
        "svd": None,
        "activation": "input_scale",
        "whitening": "input_gram",
        "fisher": "weight_importance",
        "fisher_two_sided": "weight_importance",
        "importance": "weight_importance",
        "em": "weight_importance",
        "nesterov": "weight_importance",
        "anderson": "weight_importance",
    }.items(),
)
def test_what_is_collected(llama: TinyModel, decomposition: str, statistic: str | None) -> None:
    model, batches = llama.make_model(), [llama.make_batch(2)]
    statistics = collect(model, batches, config(llama, decomposition))
    for name in targets(model, llama):
        found = statistics.for_module(name)
        assert list(found) == ([] if statistic is None else [statistic])
        assert list(statistics.for_module(name, decomposition)) == list(found)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": ["q_proj", "mlp.up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": r".*layers\.0\..*proj", "exclude_modules": r".*k_proj"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_targets_are_those_of_peft(llama: TinyModel, fields: dict[str, Any]) -> None:
    wanted = Config(**fields, decomposition="activation", task_type="CAUSAL_LM")
    before = dict(vars(wanted))
    found = collect(llama.make_model(), [llama.make_batch(2)], wanted).names
    assert vars(wanted) == before
    tuner = get_peft_model(llama.make_model(), LoraConfig(**fields, task_type="CAUSAL_LM")).base_model
    assert sorted(found) == sorted(tuner.targeted_module_names)


def test_all_linear_leaves_the_classifier_out() -> None:
    tiny = TINY_MODELS["bert"]
    wanted = Config(target_modules="all-linear", task_type="SEQ_CLS", decomposition="fisher")
    model, batch = tiny.make_model().eval(), tiny.make_batch(4)
    statistics = collect(model, [batch], wanted)
    assert "classifier" not in statistics.names
    # one row a sample: no token of it is padding
    assert statistics.tokens["bert.pooler.dense"] == 4
    expected = squared_gradients(model, {"bert.pooler.dense": model.bert.pooler.dense}, batch)["bert.pooler.dense"]
    assert_near(statistics.for_module("bert.pooler.dense")["weight_importance"], expected, 1e-4)


def test_names_are_plain_inside_of_peft_and_compilers(llama: TinyModel) -> None:
    batches = [llama.make_batch(2)]
    expected = collect(llama.make_model(), batches, config(llama, "activation"))
    adapted = get_peft_model(llama.make_model(), LoraConfig(target_modules=["q_proj"]))
    for model in (adapted, torch.compile(llama.make_model())):
        found = collect(model, batches, config(llama, "activation"))
        assert found.names == expected.names
        for name in found.names:
            torch.testing.assert_close(found.for_module(name), expected.for_module(name))
        expected.check(model)


# --- sharing ----------------------------------------------------------------------------------------------------------


def _distinct(statistics: CalibrationStatistics, kind: str) -> set[tuple[str, ...]]:
    by_tensor = defaultdict(list)
    for name, tensor in statistics.tensors[kind].items():
        by_tensor[id(tensor)].append(name.rpartition(".")[2])
    return {tuple(names) for names in by_tensor.values()}


def test_shared_inputs_are_summed_once(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_rank.calibration.collectors import InputCollector

    summed = []
    added = InputCollector._added
    monkeypatch.setattr(InputCollector, "_added", lambda self, rows: summed.append(len(rows)) or added(self, rows))
    statistics = collect(llama.make_model(), [llama.make_batch(2)], config(llama))
    expected = {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
    assert _distinct(statistics, "input_gram") == expected
    assert len(summed) == 4 * 2


class Sometimes(nn.Module):
    """Two linears that share their input in every other forward only; where not, the second's is the first's, changed in
    place, or a new tensor in the memory of the old one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.how, self.forwards = how, 0
        self.seen: dict[str, list[Tensor]] = defaultdict(list)

    def _call(self, name: str, x: Tensor) -> Tensor:
        self.seen[name].append(x.detach().clone().flatten(0, -2))
        return getattr(self, name)(x)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x = x + 1
        y = self._call("first", x)
        if self.forwards % 2:
            if self.how == "in place":
                x *= 2
            elif self.how == "memory":
                shape = x.shape
                del x
                gc.collect()
                x = torch.full(shape, 3.0)
            elif self.how == "later":
                self._call("third", y)
                self._call("third", y * 2)
        y = y + self._call("second", x)
        return self._call("third", y)


@pytest.mark.parametrize("how", ["in place", "memory", "later"])
def test_inputs_shared_at_times(how: str) -> None:
    model = Sometimes(how)
    batches = [{"x": torch.randn(2, 5, 6)} for _ in range(4)]
    statistics = collect(model, batches, Config(target_modules=["first", "second", "third"]))
    for name, inputs in model.seen.items():
        x = torch.cat(inputs).double()
        assert statistics.tokens[name] == len(x)
        assert_near(statistics.for_module(name)["input_gram"], x.T @ x / len(x))


def test_one_module_called_twice_with_one_tensor() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (self.first(x) * self.first(x) + self.second(x)).square().mean()

    model, x = Twice(), torch.randn(1, 7, 4)
    statistics = collect(model, [{"x": x}], Config(target_modules=["first", "second"]))
    assert statistics.tokens == {"first": 14, "second": 7}
    assert_near(statistics.for_module("first")["input_gram"], x[0].T @ x[0] / 7)
    # and the gradient of a shared weight is the sum over its calls
    fisher = collect(model, [{"x": x}], Config(target_modules=["first", "second"], decomposition="fisher"))
    gradient = torch.autograd.grad(model(x), model.first.weight)[0]
    assert_near(fisher.for_module("first")["weight_importance"], gradient**2)


class Mixing(nn.Module):
    """One loss a sample, but a module that is called twice, and one whose input is the same for all samples."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.positions = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("table", torch.randn(1, 8, 4))
        self.how = how

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.first(x).tanh() + self.positions(self.table if self.how == "table" else x)
        if self.how == "twice":
            y = self.first(y)
        return {"loss": (y.square().mean((1, 2)) - labels).square().mean()}


@pytest.mark.parametrize(("how", "sizes"), [("table", [4, 1, 1, 1, 1]), ("twice", [4, 1, 1, 1, 1]), ("neither", [4])])
def test_modules_that_mix_samples_are_run_one_by_one(how: str, sizes: list[int]) -> None:
    model, batch = Mixing(how), {"x": torch.randn(4, 8, 4), "labels": torch.randn(4)}
    expected = {name: torch.zeros(4, 4) for name in ("first", "positions")}
    for i in range(4):
        model.zero_grad()
        model(**rows(batch, i, i + 1))["loss"].backward()
        for name, total in expected.items():
            total += model.get_submodule(name).weight.grad.square() / 4
    seen = _forwards(model)
    statistics = collect(model, [batch], Config(target_modules=["first", "positions"], decomposition="fisher"))
    assert seen == sizes
    assert statistics.samples == 4
    for name, total in expected.items():
        assert_near(statistics.for_module(name)["weight_importance"], total)


# --- memory, devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decomposition", "limit"), [("whitening", 3 * 4 * 32 * 32), ("fisher", 3 * 4 * 32 * 64)])
def test_groups_of_modules(llama: TinyModel, decomposition: str, limit: int) -> None:
    model, batches = llama.make_model(), [llama.make_batch(3, seed) for seed in range(2)]
    expected = collect(model, batches, config(llama, decomposition))
    sizes = _forwards(model)
    found = collect(model, batches, config(llama, decomposition), max_bytes=limit)
    runs = sum(sizes) // 6
    assert runs >= 4
    assert found.samples == expected.samples == 6
    assert found.tokens == expected.tokens
    for name in expected.names:
        torch.testing.assert_close(found.for_module(name), expected.for_module(name), rtol=0, atol=0)
    if decomposition == "whitening":  # those that share stay together
        assert _distinct(found, "input_gram") == _distinct(expected, "input_gram")
    # enough for all: one run
    sizes.clear()
    collect(model, iter(batches), config(llama, decomposition), max_bytes=10**9)
    assert sum(sizes) == 6


def test_a_generator_cannot_be_read_twice(llama: TinyModel) -> None:
    with pytest.raises(ValueError, match="generator"):
        collect(llama.make_model(), iter([llama.make_batch(2)]), config(llama), max_bytes=1)
    with pytest.raises(ValueError, match="`max_bytes` must be at least 1"):
        collect(llama.make_model(), [llama.make_batch(2)], config(llama), max_bytes=0)


@pytest.mark.parametrize("decomposition", ["whitening", "importance"])
def test_offloaded_models(llama: TinyModel, decomposition: str, tmp_path: Path) -> None:
    batches = [llama.make_batch(2)]
    expected = collect(llama.make_model(), batches, config(llama, decomposition))
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    model = dispatch_model(llama.make_model(), device_map, main_device="cpu", offload_dir=str(tmp_path))
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    found = collect(model, batches, config(llama, decomposition))
    for name in expected.names:
        torch.testing.assert_close(found.for_module(name), expected.for_module(name))
    expected.check(model)
    with pytest.raises(ValueError, match="another model"):
        collect(llama.make_model(seed=1), batches, config(llama, decomposition)).check(model)


# --- nothing is left behind -------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        "training": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


@pytest.mark.parametrize("decomposition", ["whitening", "fisher"])
@pytest.mark.parametrize("fails", [False, True])
def test_model_and_batches_are_as_before(decomposition: str, fails: bool) -> None:
    tiny = TINY_MODELS["bart"]
    model, batch = tiny.make_model(dropout=0.1), tiny.make_batch(4)
    model.model.encoder.eval()
    model.model.shared.weight.requires_grad_(False)
    model.model.encoder.layers[0].fc1.weight.grad = torch.ones_like(model.model.encoder.layers[0].fc1.weight)
    if fails:
        with torch.no_grad():
            model.model.decoder.layers[1].fc1.weight[0, 0] = float("nan")
    before, values = _state(model), {key: value.clone() for key, value in batch.items()}
    try:
        first = collect(model, [batch], config(tiny, decomposition))
        assert not fails
        again = collect(model, [batch], config(tiny, decomposition))  # dropout is off
        for name in first.names:
            torch.testing.assert_close(again.for_module(name), first.for_module(name), rtol=0, atol=0)
    except ValueError as error:
        assert fails and "NaN" in str(error)
    torch.testing.assert_close(_state(model), before, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(batch, values, rtol=0, atol=0)


@pytest.mark.parametrize("decomposition", ["activation", "fisher"])
def test_inside_of_contexts_without_gradients(llama: TinyModel, decomposition: str) -> None:
    model, batches = llama.make_model(), [llama.make_batch(2)]
    expected = collect(model, batches, config(llama, decomposition))
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            found = collect(model, batches, config(llama, decomposition))
        for name in expected.names:
            torch.testing.assert_close(found.for_module(name), expected.for_module(name))


def test_loaders_and_progress(llama: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = llama.make_model(), llama.make_batch(5)
    samples = [{key: value[i] for key, value in batch.items()} for i in range(5)]
    found = calibrate(model, DataLoader(samples, batch_size=2), config=config(llama))
    expected = collect(model, [batch], config(llama))
    assert found.tokens == expected.tokens
    for name in expected.names:
        torch.testing.assert_close(found.for_module(name), expected.for_module(name), rtol=1e-4, atol=1e-5)
    assert "Calibrating: 100%" in capsys.readouterr().err


# --- errors and warnings ----------------------------------------------------------------------------------------------


def test_no_data(llama: TinyModel) -> None:
    for decomposition in ("whitening", "fisher"):
        with pytest.raises(ValueError, match="`batches` is empty"):
            collect(llama.make_model(), [], config(llama, decomposition))
    batch = llama.make_batch(2)
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(ValueError, match="No targeted module saw a token"):
        collect(llama.make_model(), [batch], config(llama))


def test_no_loss(llama: TinyModel) -> None:
    batch = llama.make_batch(2)
    del batch["labels"]
    with pytest.raises(ValueError, match="Put `labels` into every batch"):
        collect(llama.make_model(), [batch], config(llama, "fisher"))
    collect(llama.make_model(), [batch], config(llama))


@pytest.mark.parametrize("decomposition", ["activation", "whitening", "fisher"])
def test_nan_names_the_module(llama: TinyModel, decomposition: str) -> None:
    model = llama.make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity") as error:
        collect(model, [llama.make_batch(2)], config(llama, decomposition))
    if decomposition != "fisher":  # the first that sees it; backward meets all at once
        assert "model.layers.0.mlp.down_proj" in str(error.value)


def test_what_cannot_be_calibrated(llama: TinyModel) -> None:
    model, batches = llama.make_model(), [llama.make_batch(2)]
    with pytest.raises(TypeError, match=r"must yield dictionaries.*got list"):
        collect(model, [[1, 2, 3]], config(llama))
    with pytest.raises(ValueError, match="No module of the model is targeted by `target_modules`"):
        collect(model, batches, Config(target_modules=["query"]))
    with pytest.raises(
        TypeError, match=r"model.embed_tokens is a Embedding, which is not supported.*`exclude_modules`"
    ):
        collect(model, batches, Config(target_modules=["embed_tokens"]))
    with pytest.raises(TypeError, match=r"field `decomposition`.*got LoraConfig"):
        collect(model, batches, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`decomposition` must be one of svd.*got 'qr'"):
        collect(model, batches, config(llama, "qr"))


def test_too_short_data_names_the_modules(llama: TinyModel) -> None:
    batch = llama.make_batch(2)  # fewer than 32 tokens
    with pytest.warns(UserWarning, match=r"14 modules saw fewer tokens.*q_proj.*and 6 more"):
        collect(llama.make_model(), [batch], config(llama))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(llama.make_model(), [llama.make_batch(16)], config(llama))
        collect(llama.make_model(), [batch], config(llama, "activation"))


class Experts(nn.Module):
    """Tokens go to one of two experts, never to the third; the head takes all."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        tokens = x.flatten(0, 1)
        first = tokens[:, 0] > 0
        y = torch.empty_like(tokens)
        y[first], y[~first] = self.experts[0](tokens[first]), self.experts[1](tokens[~first])
        return {"loss": self.head(y.view_as(x)).square().mean()}


@pytest.mark.parametrize("decomposition", ["activation", "whitening", "fisher"])
def test_unused_experts(decomposition: str) -> None:
    model, x = Experts(), torch.randn(3, 20, 4)
    wanted = Config(target_modules=["experts.0", "experts.1", "experts.2", "head"], decomposition=decomposition)
    with pytest.warns(UserWarning, match=r"1 modules saw no token: experts\.2\..*`exclude_modules`"):
        statistics = collect(model, [{"x": x}], wanted)
    first = int((x[..., 0] > 0).sum())
    assert statistics.tokens == {"experts.0": first, "experts.1": 60 - first, "experts.2": 0, "head": 60}
    (unused,) = statistics.for_module("experts.2").values()
    assert not unused.any()
    # gradients of samples that a module mixes are still those of single samples
    if decomposition == "fisher":
        gradients = [torch.autograd.grad(model(one[None])["loss"], model.experts[0].weight)[0] for one in x]
        assert_near(
            statistics.for_module("experts.0")["weight_importance"], torch.stack(gradients).square().mean(0), 1e-5
        )


@pytest.mark.filterwarnings("ignore:1 modules saw no token")
def test_padding_that_cannot_be_told_apart() -> None:
    mask = torch.ones(3, 20)
    mask[0, 10:] = 0
    wanted = Config(target_modules=["experts.0", "experts.1", "experts.2", "head"])
    with pytest.warns(UserWarning, match=r"Padding could not be told.*experts\.0, experts\.1"):
        statistics = collect(Experts(), [{"x": torch.randn(3, 20, 4), "attention_mask": mask}], wanted)
    assert statistics.tokens["head"] == 50


def test_modules_without_gradient_are_named(llama: TinyModel) -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.aside = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return self.used(x).mean()

    with pytest.warns(UserWarning, match="The loss does not depend on 1 modules: aside"):
        statistics = collect(
            Aside(), [{"x": torch.randn(1, 3, 4)}], Config(target_modules=["used", "aside"], decomposition="fisher")
        )
    assert not statistics.for_module("aside")["weight_importance"].any()
