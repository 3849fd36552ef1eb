# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""A compressed model as an adapter, on every architecture: what it computes, and that nothing is lost on any trip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from compressions import compressed, matrix, targets, truncate
from peft_rank import LowRankConfig, LowRankLinear, get_rank_pattern, rank_table
from peft_rank.tuners.lowrank import plan
from runs import assert_close, logits
from test_architectures import AUTO_CLASSES
from tiny_models import TINY_MODELS, TinyModel


@dataclass
class Run:
    """One compression and the file that it was saved in."""

    tiny: TinyModel
    model: PeftModel
    base: Path
    adapter: Path
    logits: torch.Tensor

    def load(self, **kwargs: object) -> PeftModel:
        return PeftModel.from_pretrained(self.tiny.make_model(), str(self.adapter), **kwargs)


@pytest.fixture(scope="module", params=TINY_MODELS.values(), ids=TINY_MODELS.keys())
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    tiny, folder = request.param, tmp_path_factory.mktemp("run")
    tiny.make_model().save_pretrained(folder / "base")
    heads = ["pooler", "classifier"] if "deberta" in tiny.name else None
    model = compressed(tiny, modules_to_save=heads)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    yield Run(tiny, model, folder / "base", folder / "adapter", logits(model, tiny))


def test_the_factors_are_the_best_of_their_rank(run: Run) -> None:
    dense = run.tiny.make_model()
    ranks = get_rank_pattern(run.model)
    modules = targets(dense, run.tiny)
    assert set(ranks) <= set(modules)
    assert 0 < len(ranks) < len(modules), "some are dense, some are not"
    for name, rank in ranks.items():
        truncate(modules[name], rank)
    assert_close(logits(dense, run.tiny), run.logits, 1e-4)
    assert str(sum(ranks.values())) in rank_table(run.model).summary


def test_the_ratio_holds_in_the_model_that_is_left(run: Run) -> None:
    model = compressed(run.tiny)
    dense = targets(run.tiny.make_model(), run.tiny)
    before = sum(p.numel() for module in dense.values() for p in module.parameters())
    model.base_model.finalize()
    after = sum(p.numel() for module in targets(model, run.tiny).values() for p in module.parameters())
    longest = max(4 * sum(matrix(module).shape) for module in dense.values())
    assert 0.7 * before - longest < after <= 0.7 * before


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["plain", "low_cpu_mem_usage"])
def test_peft_loads_the_same_model_without_decomposing(
    run: Run, low_cpu_mem_usage: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(plan, "decompose", None)
    loaded = run.load(low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, run.tiny), run.logits)
    assert get_rank_pattern(loaded) == get_rank_pattern(run.model)
    assert not [str(w.message) for w in recwarn if "adapter" in str(w.message) or "rank_pattern" in str(w.message)]


def test_a_second_trip_changes_nothing(run: Run, tmp_path: Path) -> None:
    run.load().save_pretrained(tmp_path)
    first, second = (load_file(path / "adapter_model.safetensors") for path in (run.adapter, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    again = PeftModel.from_pretrained(run.tiny.make_model(), str(tmp_path), is_trainable=True)
    assert torch.equal(logits(again, run.tiny), run.logits)
    assert again.peft_config["default"].rank_pattern == run.model.peft_config["default"].rank_pattern


def test_transformers_loads_the_same_model(run: Run) -> None:
    loaded = run.tiny.model_class.from_pretrained(run.base)
    info = loaded.load_adapter(str(run.adapter))
    assert not info.missing_keys
    assert torch.equal(logits(loaded, run.tiny), run.logits)


def test_auto_peft_model_loads_the_same_model(run: Run) -> None:
    loaded = AUTO_CLASSES[run.tiny.task_type].from_pretrained(str(run.adapter))
    assert torch.equal(logits(loaded, run.tiny), run.logits)


def test_disabled_is_the_dense_model(run: Run) -> None:
    dense = logits(run.tiny.make_model(), run.tiny)
    assert not torch.equal(run.logits, dense)
    with run.model.disable_adapter():
        assert torch.equal(logits(run.model, run.tiny), dense)
    assert torch.equal(logits(run.model, run.tiny), run.logits)


@pytest.mark.parametrize("safe_merge", [False, True], ids=["merge", "safe_merge"])
def test_merged_is_the_dense_form_of_the_compressed_model(run: Run, safe_merge: bool) -> None:
    merged = run.load().merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is run.tiny.model_class
    assert merged.state_dict().keys() == run.tiny.make_model().state_dict().keys()
    assert_close(logits(merged, run.tiny), run.logits, 1e-4)
    modules = targets(merged, run.tiny)
    for name, rank in get_rank_pattern(run.model).items():
        assert int(torch.linalg.matrix_rank(matrix(modules[name]), rtol=1e-4)) == rank


def test_unmerged_is_exactly_what_it_was(run: Run) -> None:
    model, dense = run.load(), run.tiny.make_model()
    model.merge_adapter()
    assert_close(logits(model, run.tiny), run.logits, 1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model, run.tiny), run.logits)
    with model.disable_adapter():
        assert torch.equal(logits(model, run.tiny), logits(dense, run.tiny))


def test_unloaded_is_the_original(run: Run) -> None:
    plain, dense = run.load().unload(), run.tiny.make_model()
    assert type(plain) is run.tiny.model_class
    state = plain.state_dict()
    assert state.keys() == dense.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in dense.state_dict().items())


def test_final_is_a_plain_model_that_computes_the_same(run: Run) -> None:
    model, ranks = run.load(is_trainable=True), get_rank_pattern(run.model)
    model.base_model.finalize()
    plain = model.get_base_model()
    assert type(plain) is run.tiny.model_class
    assert not [module for module in plain.modules() if type(module).__module__.startswith("peft.")]
    found = {name: module for name, module in plain.named_modules() if isinstance(module, LowRankLinear)}
    assert {name: module.rank for name, module in found.items()} == ranks == get_rank_pattern(plain)
    assert get_rank_pattern(model) == ranks
    assert torch.equal(logits(model, run.tiny), run.logits)
    assert torch.equal(logits(plain, run.tiny), run.logits)
    assert "peft_config" not in vars(plain)
    trained = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    heads = {name for name in trained if name.startswith(("pooler.", "classifier."))}
    assert trained - heads == {f"{name}.{factor}.weight" for name in ranks for factor in ("down", "up")}
    assert bool(heads) == (run.tiny.task_type == "SEQ_CLS")
    for name, module in targets(plain, run.tiny).items():
        if name not in ranks:
            assert torch.equal(module.weight, run.tiny.make_model().get_submodule(name).weight)


def test_a_final_adapter_is_saved_and_loaded_as_before(run: Run, tmp_path: Path) -> None:
    model = run.load(is_trainable=True)
    model.base_model.finalize()
    model.save_pretrained(tmp_path)
    first, second = (load_file(path / "adapter_model.safetensors") for path in (run.adapter, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    loaded = PeftModel.from_pretrained(run.tiny.make_model(), str(tmp_path))
    assert torch.equal(logits(loaded, run.tiny), run.logits)
    for parameter in model.parameters():
        parameter.data += parameter.requires_grad
    model.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(model, run.tiny), run.logits)


def test_factors_are_trained(run: Run) -> None:
    model = run.load(is_trainable=True).train()
    factors = {n: p for n, p in model.named_parameters() if ".lowrank_" in n}
    before = {name: parameter.detach().clone() for name, parameter in factors.items()}
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= set(factors)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(**run.tiny.make_batch(8)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in factors.items():
        assert not torch.equal(parameter, before[name]), f"{name} has not changed"
    with model.disable_adapter():
        assert torch.equal(logits(model, run.tiny), logits(run.tiny.make_model(), run.tiny))


# --- files that do not fit --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(llama: TinyModel, tmp_path: Path) -> Path:
    compressed(llama, rank=4).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_damaged_file_is_refused(llama: TinyModel, saved: Path, damage: str) -> None:
    path = saved / "adapter_model.safetensors"
    state = load_file(path)
    key = "base_model.model.model.layers.1.mlp.up_proj.lowrank_up"
    if damage == "missing":
        del state[key]
    else:
        state[key] = state[key][:, :3].contiguous()
    save_file(state, path)
    what = "is missing in the file" if damage == "missing" else r"is of shape \(64, 3\) in the file"
    with pytest.raises(ValueError, match=rf"up_proj.lowrank_up {what}.*has \(64, 4\) here.*nothing was loaded"):
        PeftModel.from_pretrained(llama.make_model(), str(saved))


def test_a_saved_configuration_alone_is_no_model(llama: TinyModel, saved: Path) -> None:
    read = LowRankConfig.from_pretrained(saved)
    model = get_peft_model(llama.make_model(), read)
    with pytest.raises(RuntimeError, match=r"'default' were never loaded.*PeftModel.from_pretrained.*factors_saved"):
        logits(model, llama)
    with pytest.raises(RuntimeError, match="were never loaded"):
        model.base_model.finalize()
    with pytest.raises(RuntimeError, match="were never loaded"):
        model.merge_adapter()
    read.factors_saved = False
    model = get_peft_model(llama.make_model(), read)
    assert torch.equal(logits(model, llama), logits(compressed(llama, rank=4), llama))


def test_names_that_contain_one_another_are_told_apart(llama: TinyModel, tmp_path: Path) -> None:
    """`layers.1` is also the end of `layers.11`: the saved pattern selects exactly what was factorized."""
    model = compressed(llama, rank_pattern={r"model\.layers\.1\..*": 4}, target_modules=list(llama.target_modules))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama.make_model(num_hidden_layers=12), str(tmp_path))
    assert set(get_rank_pattern(loaded)) == set(get_rank_pattern(model))
    assert all(name.startswith("model.layers.1.") for name in get_rank_pattern(loaded))
