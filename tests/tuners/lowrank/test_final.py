# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What is left of an adapter once its compression is final: its file, and nothing that takes memory."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from compressions import compressed, config
from peft_rank import calibrate
from runs import logits
from searches import after, both_methods
from tiny_models import TINY_MODELS, TinyModel


@pytest.mark.parametrize("bias", ["all", "lowrank_only"])
def test_biases_of_a_final_adapter_are_saved(bias: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS["gpt2"]
    model = compressed(tiny, bias=bias)
    for parameter in model.parameters():
        parameter.data += 0.01 * parameter.requires_grad
    expected = logits(model, tiny)
    model.base_model.finalize()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.make_model(), str(tmp_path)), tiny), expected)
    for parameter in model.parameters():
        parameter.data += parameter.requires_grad
    model.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(model, tiny), expected)


def test_what_a_final_adapter_cannot_save_is_told(llama: TinyModel, tmp_path: Path) -> None:
    model = compressed(llama, rank=4)
    model.add_adapter("other", config(llama, rank=5))
    model.base_model.finalize()
    assert set(model.peft_config) == {"default"}
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.warns(
        UserWarning, match=r"not hold 1 parameters that are trained, base_model\S+norm.weight.*save_compressed"
    ):
        model.save_pretrained(tmp_path)
    compressed(llama, rank=6).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lowrank_down is of shape \(6, 32\) in the file.*nothing was loaded"):
        model.load_adapter(str(tmp_path), "default")
    get_peft_model(model.get_base_model(), LoraConfig(target_modules=["down"]))
    with pytest.raises(RuntimeError, match=r"q_proj has no down.weight of its own.*Save the adapters"):
        model.save_pretrained(tmp_path)


def test_a_final_compression_lets_go_of_the_statistics(llama: TinyModel) -> None:
    made = config(llama, decomposition="activation")
    base = llama.make_model()
    made.statistics = calibrate(base, [llama.make_batch()], config=made, progress=False)
    model = get_peft_model(base, made)
    model.base_model.finalize()
    assert model.peft_config["default"].statistics is None
    assert made.statistics is not None, "the user's own configuration is for the next model, too"


@both_methods
def test_a_final_search_saves_what_was_trained_beside_it(method: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS["bert"]
    model = after(method, tiny, 2, task_type="SEQ_CLS", modules_to_save=["classifier"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the search was short
        model.base_model.finalize()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.make_model(), str(tmp_path))
    assert torch.equal(logits(loaded, tiny), logits(model, tiny))
    assert not torch.equal(loaded.get_base_model().classifier.weight, tiny.make_model().classifier.weight)
