# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What users of adaptive ranks have complained about, one test a complaint."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback

from peft_rank import RankAllocationCallback, SalientLoRAConfig, get_rank_pattern
from runs import (
    Interrupted,
    StopAt,
    adam,
    adapted,
    assert_close,
    logits,
    make_trainer,
    modules_of,
    steps_by_hand,
    train,
    weights,
)
from tiny_models import TINY_MODELS, TinyModel, training_arguments


# ---- "The allocation silently never ran" ----


def test_training_without_the_callback_is_not_silent(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama)
    with pytest.warns(UserWarning, match="never ran.*Add `RankAllocationCallback"):
        train(model, llama, tmp_path, callbacks=[], max_steps=3, save_strategy="steps", save_steps=3)
    with pytest.warns(UserWarning, match="never ran"):
        model.merge_and_unload()


def test_a_loop_that_forgets_the_allocation_fails_at_its_end(llama: TinyModel) -> None:
    with pytest.raises(RuntimeError, match="never ran"):
        adapted(llama).base_model.finalize()


def test_a_training_that_ends_before_the_allocation_does_not_end_silently(llama: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="never ran"):
        train(adapted(llama), llama, tmp_path, callbacks=[RankAllocationCallback(log=False), StopAt(1, crash=False)])


# ---- "Resume and load_best_model_at_end crash with a size mismatch, or forget the scores" ----


def test_resume_after_pruning_has_no_size_mismatch(llama: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        callbacks = [RankAllocationCallback(log=False), StopAt(12)]
        train(adapted(llama), llama, tmp_path, callbacks=callbacks, save_strategy="steps", save_steps=12)
    config_file = json.loads((tmp_path / "checkpoint-12" / "adapter_config.json").read_text())
    assert config_file["rank_pattern"], "ranks were pruned before step 12"
    model, whole = adapted(llama), adapted(llama)
    train(model, llama, tmp_path, resume=str(tmp_path / "checkpoint-12"))
    train(whole, llama, tmp_path / "whole")
    assert_close(weights(model), weights(whole), 1e-6)


def test_load_best_model_after_pruning_has_no_size_mismatch(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama)
    every = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer = train(model, llama, tmp_path, load_best_model_at_end=True, **every)
    best = PeftModel.from_pretrained(llama.make_model(), trainer.state.best_model_checkpoint)
    assert_close(logits(model, llama), logits(best, llama), 1e-6)
    assert sum(get_rank_pattern(model).values()) == 2 * modules_of(model)


def test_the_rank_pattern_is_written(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama)
    train(model, llama, tmp_path)
    assert model.peft_config["default"].rank_pattern
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]


# ---- "Only plain LoRA can be served" ----


def test_conversion_to_lora_is_not_refused(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama, target_r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "salientlora_E" in name:
                parameter.normal_()
    lora, state = convert_to_lora(model, rank=8)
    assert lora.peft_type == "LORA" and state


# ---- "I cannot register my own method" ----


def test_every_entrance_of_peft_knows_the_method(llama: TinyModel, tmp_path: Path) -> None:
    llama.make_model().save_pretrained(tmp_path / "base")
    model = adapted(llama, target_r=4, init_weights=False)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_close(logits(loaded, llama), logits(model, llama), 1e-6)


# ---- "total_step has to be guessed; the warm-up crashes" ----


def test_nobody_has_to_count_steps(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama, warmup_steps=None, allocation_steps=None)
    train(model, llama, tmp_path, max_steps=-1, num_train_epochs=2)
    assert sum(get_rank_pattern(model).values()) == 2 * modules_of(model)


def test_an_impossible_schedule_names_the_field_and_the_remedy(llama: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`total_steps`.*Train longer, or lower warmup_steps"):
        train(adapted(llama, warmup_steps=100), llama, tmp_path)


# ---- "Pruned ranks still cost memory and disk" ----


def test_memory_and_file_shrink_with_the_ranks(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama, init_r=8)
    with pytest.warns(UserWarning, match="never ran"):
        model.save_pretrained(tmp_path / "before")
    trainer = train(model, llama, tmp_path)
    model.save_pretrained(tmp_path / "after")
    sizes = [
        sum(t.numel() for t in load_file(tmp_path / n / "adapter_model.safetensors").values())
        for n in ("before", "after")
    ]
    assert sizes[1] < 0.4 * sizes[0]  # 2 of 8 ranks, of modules of different width
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sizes[1]
    moments = trainer.optimizer.state.values()
    assert sum(v.numel() for state in moments for v in state.values() if v.dim() > 0) == 2 * trainable


# ---- "The regularizer pollutes the loss" ----


def test_the_evaluation_loss_is_the_models(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama, orth_reg_weight=100.0)
    trainer = train(model, llama, tmp_path)
    evaluated = trainer.evaluate()["eval_loss"]
    model.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(llama.make_model(), str(tmp_path)).merge_and_unload()
    plain = Trainer(merged, training_arguments(tmp_path), eval_dataset=llama.dataset(16, seed=1))
    assert evaluated == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5)


def test_inference_with_labels_after_loading(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama, target_r=4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama.make_model(), str(tmp_path)).eval()
    assert_close(loaded(**llama.make_batch()).loss, llama.make_model()(**llama.make_batch()).loss, 1e-6)


# ---- "Which hook? The saved model is not the one that was trained" ----


def test_the_saved_model_is_the_trained_one_at_every_step(llama: TinyModel, tmp_path: Path) -> None:
    """Masks that the optimizer step undoes would show in the checkpoints right after decisions."""
    outputs = {}

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs) -> None:
            outputs[state.global_step] = logits(model, llama)
            model.train()

    callbacks = [RankAllocationCallback(log=False), Watch()]
    train(adapted(llama), llama, tmp_path, callbacks=callbacks, save_strategy="steps", save_steps=1)
    for step in (4, 5, 6, 10, 15, 20):
        loaded = PeftModel.from_pretrained(llama.make_model(), str(tmp_path / f"checkpoint-{step}"))
        assert_close(logits(loaded, llama), outputs[step], 1e-6)


def test_the_callback_needs_no_gradients(llama: TinyModel) -> None:
    """Scores are read off the singular values, so that hooks after `zero_grad` are not too late."""
    model = adapted(llama)
    optimizer = adam(model)
    for step in range(1, 16):
        model(**llama.make_batch(8, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step, optimizer)
    assert sum(get_rank_pattern(model).values()) == 28


# ---- "Mixed ranks are read with the wrong scale" ----


def test_the_scale_survives_pruning_saving_and_loading(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama, lora_alpha=6.0)
    train(model, llama, tmp_path)
    model.save_pretrained(tmp_path)
    tensors, base = load_file(tmp_path / "adapter_model.safetensors"), dict(llama.make_model().named_modules())
    for name, layer in model.base_model.adapter_layers("default").items():
        A, E, B = (tensors[f"base_model.model.{name}.salientlora_{factor}"] for factor in "AEB")
        x = torch.randn(3, layer.in_features)
        assert_close(layer.eval()(x), base[name](x) + 6.0 / 4 * ((x @ A.T) * E) @ B.T, 1e-5)


# ---- "It breaks on quantized bases" ----


class ReadOnlyLinear(nn.Linear):
    """Stands in for a quantized layer: its forward works, its weight means nothing."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.true_weight = weight
        self.weight = nn.Parameter(torch.full_like(weight, float("nan")), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.true_weight)


def test_forward_and_backward_never_read_a_base_weight_that_is_not_plain() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 6)
    model = nn.Sequential(ReadOnlyLinear(weight))
    settings = {"target_modules": ["0"], "init_r": 3, "target_r": 2, "init_weights": False}
    tuned = get_peft_model(model, SalientLoRAConfig(**settings))
    x = torch.randn(4, 6, requires_grad=True)
    output = tuned(x)
    layer = tuned.base_model.adapter_layers("default")["0"]
    assert_close(output, x @ (weight + layer.get_delta_weight("default")).T, 1e-4)
    output.sum().backward()
    assert torch.isfinite(x.grad).all()


# ---- "The pooler is random, frozen, and not saved" ----


@pytest.mark.parametrize("name", ["deberta-v2", "deberta-v3"])
def test_heads_are_trained_and_saved_exactly(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    model = adapted(tiny, modules_to_save=["pooler", "classifier"])
    train(model, tiny, tmp_path)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    heads = {key: value for key, value in file.items() if "salientlora" not in key}
    assert {key.split(".")[2] for key in heads} == {"pooler", "classifier"} and len(heads) == 4
    # other random heads: everything has to come from the file
    base = tiny.make_model()
    for module in (base.pooler, base.classifier):
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert_close(logits(loaded, tiny), logits(model, tiny), 1e-6)


def test_broad_targets_do_not_swallow_the_head(deberta: TinyModel) -> None:
    assert not [
        name for name in get_rank_pattern(adapted(deberta, target_modules="all-linear")) if "classifier" in name
    ]


# ---- "I cannot watch the ranks" ----


def test_scalars_reach_the_history_of_the_trainer(llama: TinyModel, tmp_path: Path) -> None:
    trainer = make_trainer(adapted(llama), llama, tmp_path, callbacks=[])
    trainer.add_callback(RankAllocationCallback(log=trainer.log))
    trainer.train()
    totals = [entry["rank/total"] for entry in trainer.state.log_history if "rank/total" in entry]
    assert totals[0] == 56 and totals[-1] == 28 and totals == sorted(totals, reverse=True)


# ---- "Just give me a rank_pattern for LoRA" ----


def test_ranks_found_here_can_be_trained_with_lora(llama: TinyModel, tmp_path: Path) -> None:
    searched = adapted(llama, target_r=1)
    train(searched, llama, tmp_path)
    rank_pattern, exclude_modules = get_rank_pattern(searched, for_lora=True)
    lora = LoraConfig(
        rank_pattern=rank_pattern,
        exclude_modules=exclude_modules,
        target_modules=list(llama.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(llama.make_model(), lora)
    train(model, llama, tmp_path, callbacks=[], max_steps=2)
    ranks = [m.r["default"] for m in model.modules() if hasattr(m, "lora_A") and m.lora_A]
    assert sum(ranks) == sum(get_rank_pattern(searched).values()) == 14


# ---- "Is it merged? Is it right?" ----


def test_merged_saved_and_loaded_as_a_plain_model(tiny: TinyModel, tmp_path: Path) -> None:
    model = adapted(tiny)
    optimizer = adam(model)
    steps_by_hand(model, tiny, 1, 16, optimizer)
    model.base_model.finalize(optimizer)
    expected = logits(model, tiny)
    model.merge_and_unload().save_pretrained(tmp_path)
    plain = tiny.model_class.from_pretrained(tmp_path)
    assert_close(logits(plain, tiny), expected, 1e-5)


# ---- "Unexpected keyword; custom code; unknown versions" ----


def test_a_configuration_of_a_later_version_loads_with_a_warning(llama: TinyModel, tmp_path: Path) -> None:
    adapted(llama, target_r=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_tomorrow": True}))
    with pytest.warns(UserWarning, match="of_tomorrow"):
        PeftModel.from_pretrained(llama.make_model(), str(tmp_path))


def test_an_ordinary_run_has_no_warning_of_ours(llama: TinyModel, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model = adapted(llama)
        train(model, llama, tmp_path, save_strategy="steps", save_steps=5)
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(llama.make_model(), str(tmp_path)).merge_and_unload()
    ours = Path(inspect.getfile(RankAllocationCallback)).parent
    assert not [w for w in record if "alloc" in str(w.message) or ours in Path(w.filename).parents]
