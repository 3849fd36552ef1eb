# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""`get_rank_pattern`: what a model's ranks are, and the same for a plain `LoraConfig`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from peft_rank import get_rank_pattern
from runs import adam, adapted, config, steps_by_hand, train
from tiny_models import TINY_MODELS, TinyModel


LLAMA = TINY_MODELS["llama"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    """Pruned so far that some modules have no rank left."""
    model = adapted(LLAMA, init_r=4, target_r=1)
    train(model, LLAMA, tmp_path_factory.mktemp("pruned"))
    assert 0 in get_rank_pattern(model).values()
    return model


def test_keys_are_names_in_the_base_model(tiny: TinyModel) -> None:
    linear = dict(tiny.make_model().named_modules())
    ranks = get_rank_pattern(adapted(tiny))
    assert set(ranks) <= set(linear) and set(ranks.values()) == {4}
    assert all(name.endswith(tiny.target_modules) for name in ranks)


def test_modules_without_a_rank_are_listed_with_zero(pruned: PeftModel) -> None:
    ranks = get_rank_pattern(pruned)
    assert len(ranks) == 14 and sum(ranks.values()) == 14 and max(ranks.values()) > 1
    assert all(isinstance(rank, int) for rank in ranks.values())


def test_masked_ranks_do_not_count() -> None:
    model = adapted(LLAMA)
    steps_by_hand(model, LLAMA, 1, 15, adam(model), shrink=False)
    assert sum(get_rank_pattern(model).values()) == 28


def test_it_is_the_same_after_loading(pruned: PeftModel, tmp_path: Path) -> None:
    pruned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.make_model(), str(tmp_path))
    assert get_rank_pattern(loaded) == get_rank_pattern(pruned)
    plain = LLAMA.make_model()
    plain.load_adapter(str(tmp_path))
    assert get_rank_pattern(plain) == get_rank_pattern(pruned)


def test_it_can_be_pasted_into_a_lora_config(pruned: PeftModel) -> None:
    rank_pattern, exclude_modules = get_rank_pattern(pruned, for_lora=True)
    lora = LoraConfig(
        rank_pattern=rank_pattern, exclude_modules=exclude_modules, target_modules=list(LLAMA.target_modules)
    )
    model = get_peft_model(LLAMA.make_model(), lora)
    found = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    ranks = get_rank_pattern(pruned)
    assert {name: layer.r["default"] for name, layer in found.items()} == {n: r for n, r in ranks.items() if r}


def test_keys_are_the_same_whatever_wraps_the_model(tmp_path: Path) -> None:
    model = adapted(LLAMA)
    ranks = get_rank_pattern(model)
    for outer in (model.base_model, torch.compile(model), torch.compile(model.base_model), torch.nn.Sequential(model)):
        assert get_rank_pattern(outer) == ranks
    with pytest.warns(UserWarning, match="never ran"):
        model.save_pretrained(tmp_path)
    plain = LLAMA.make_model()
    plain.load_adapter(str(tmp_path))
    assert get_rank_pattern(torch.compile(plain)) == ranks


def test_a_name_does_not_match_longer_paths() -> None:
    """`^` matters: a module called `0` is also the end of the path `block.0`."""
    inner = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), inner, torch.nn.Linear(4, 4))
    settings = config(LLAMA, target_modules=["0"], task_type=None, rank_pattern={"^0": 1, r"1\.0": 3})
    ranks = get_rank_pattern(get_peft_model(model, settings))
    assert ranks == {"0": 1, "1.0": 3}


def test_excluded_names_do_not_match_longer_paths() -> None:
    def make_model() -> torch.nn.Module:
        inner = torch.nn.ModuleDict({"lin": torch.nn.Linear(4, 4)})
        return torch.nn.ModuleDict({"lin": torch.nn.Linear(4, 4), "sub": inner})

    settings = config(LLAMA, target_modules=["lin"], task_type=None, rank_pattern={"^lin": 0, r"^sub\.lin": 4})
    searched = get_peft_model(make_model(), settings)
    assert get_rank_pattern(searched) == {"lin": 0, "sub.lin": 4}
    rank_pattern, exclude_modules = get_rank_pattern(searched, for_lora=True)
    lora = LoraConfig(rank_pattern=rank_pattern, exclude_modules=exclude_modules, target_modules=["lin"])
    model = get_peft_model(make_model(), lora)
    found = {name: module.r for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert found == {"base_model.model.sub.lin": {"default": 4}}


def test_the_adapter_can_be_chosen() -> None:
    model = adapted(LLAMA, target_modules=["q_proj"])
    model.add_adapter("wide", config(LLAMA, target_modules=["v_proj"], init_r=7))
    assert set(get_rank_pattern(model, adapter_name="wide").values()) == {7}
    assert set(get_rank_pattern(model).values()) == {4}
    model.set_adapter("wide")
    assert set(get_rank_pattern(model).values()) == {7}


def test_what_has_no_ranks_is_refused() -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM.*get_peft_model"):
        get_rank_pattern(LLAMA.make_model())
    with pytest.raises(TypeError, match="'nobody'.*default"):
        get_rank_pattern(adapted(LLAMA), adapter_name="nobody")
