# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Directories of compressed models: exact round trips in fresh processes, healing, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D

from cards import run, snippets
from compressed_models import compress_module, compressed, edit_weights
from peft_rank import (
    InRankConfig,
    L2LRCConfig,
    SalientLoRAConfig,
    densify,
    export_lora,
    get_rank_pattern,
    load_compressed,
    save_compressed,
)
from peft_rank.export.card import END, MODEL_HERE, START
from peft_rank.export.directory import is_compressed, read_compressed
from peft_rank.export.verify import compare
from peft_rank.tuners.lowrank import LowRankConfig, LowRankLinear
from peft_rank.tuners.lowrank.entry import low_rank_modules, record_ranks
from runs import adam, logits, steps_by_hand
from tiny_models import TINY_MODELS, TinyModel, training_arguments


# ---- round trips, each architecture, in a process that has never seen the model ----


def _run(mode: str, folder: Path) -> None:
    script = Path(__file__).with_name("fresh_process.py")
    done = subprocess.run(
        [sys.executable, str(script), mode, str(folder)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """A folder an architecture, and the outputs of what was saved there."""
    root = tmp_path_factory.mktemp("compressed")
    outputs = {}
    for tiny in TINY_MODELS.values():
        folder = root / tiny.name
        model, half = compressed(tiny), compressed(tiny, torch.bfloat16)
        save_compressed(model, folder / "saved")
        save_compressed(model, folder / "sharded", max_shard_size="20KB")
        save_compressed(half, folder / "half")
        outputs[tiny.name] = {"saved": logits(model, tiny), "half": logits(half, tiny)}
        densify(model).save_pretrained(folder / "dense")
        outputs[tiny.name]["dense"] = logits(model, tiny)
    return root, outputs


@pytest.fixture(scope="module")
def loaded_with_us(directories: tuple) -> Path:
    _run("with", directories[0])
    return directories[0]


@pytest.fixture(scope="module")
def loaded_without_us(loaded_with_us: Path) -> Path:
    _run("without", loaded_with_us)
    return loaded_with_us


def test_round_trips_are_exact(tiny: TinyModel, directories: tuple, loaded_with_us: Path) -> None:
    expected = directories[1][tiny.name]
    found = load_file(loaded_with_us / tiny.name / "with.safetensors")
    for way in ("saved", "second", "third", "sharded", "device_map"):
        assert torch.equal(found[way], expected["saved"]), way
    assert torch.equal(found["half"], expected["half"])
    assert len(list((loaded_with_us / tiny.name / "sharded").glob("model-*.safetensors"))) > 1


def test_a_dense_export_needs_nothing_of_ours(tiny: TinyModel, directories: tuple, loaded_without_us: Path) -> None:
    folder, expected = loaded_without_us / tiny.name, directories[1][tiny.name]
    found = load_file(folder / "without.safetensors")["dense"]
    assert torch.equal(found, expected["dense"])
    torch.testing.assert_close(found, expected["saved"], atol=1e-5, rtol=1e-5)
    config = json.loads((folder / "dense" / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & set(config)
    original = tiny.make_model().state_dict()
    dense = tiny.model_class.from_pretrained(folder / "dense").state_dict()
    assert {key: value.shape for key, value in dense.items()} == {key: v.shape for key, v in original.items()}


def test_without_the_import_transformers_refuses_the_directory(tiny: TinyModel, loaded_without_us: Path) -> None:
    told = json.loads((loaded_without_us / tiny.name / "told.json").read_text())
    assert all("import_peft_rank_before_loading" in message for message in told.values()), told


def test_weights_on_disk(directories: tuple, tiny: TinyModel) -> None:
    """The names and sizes that the model has in memory, so that Trainer and accelerate find them, too."""
    state = load_file(directories[0] / tiny.name / "saved" / "model.safetensors")
    expected = dict(compressed(tiny).named_parameters())
    factors = {key for key in expected if key.rpartition(".")[0].endswith((".down", ".up"))}
    assert factors
    for key in factors:
        assert torch.equal(state[key], expected[key])


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 64, "num_key_value_heads": 2}


def _mixtral() -> PreTrainedModel:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=4))


def _llava() -> PreTrainedModel:
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("make_model", [_mixtral, _llava])
def test_files_that_transformers_writes_in_other_terms(
    make_model: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    """Experts that are one tensor in memory and many on the disk; a language model under another name."""
    model = make_model().eval()
    for name in [name for name, _ in model.named_modules() if name.endswith(("q_proj", "o_proj"))]:
        compress_module(model, name, 4)
    ids = torch.arange(4, 12)[None]
    expected = model(input_ids=ids).logits
    save_compressed(model, tmp_path / "first")
    loaded = load_compressed(tmp_path / "first")
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    loaded.save_pretrained(tmp_path / "second", max_shard_size="20KB")
    assert torch.equal(load_compressed(tmp_path / "second")(input_ids=ids).logits, expected)
    densify(loaded).save_pretrained(tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(dense(input_ids=ids).logits, expected, atol=1e-6, rtol=0)


def test_experts_that_are_no_linears(tmp_path: Path) -> None:
    model = _mixtral()
    compress_module(model, "model.layers.0.self_attn.q_proj", 4)
    save_compressed(model, tmp_path)
    _config(lambda config: config["quantization_config"]["ranks"].update({"model.layers.0.mlp.experts": 4}))(tmp_path)
    with pytest.raises(TypeError, match=r"model\.layers\.0\.mlp\.experts is to be a linear of rank 4"):
        load_compressed(tmp_path)


# ---- what the configuration tells ----


def test_the_entry_and_its_summary(llama: TinyModel, tmp_path: Path) -> None:
    model = compressed(llama)
    dense = llama.make_model().num_parameters()
    save_compressed(model, tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    ranks = {name: module.rank for name, module in low_rank_modules(model).items()}
    assert entry["quant_method"] == "low_rank"
    assert entry["ranks"] == ranks
    assert "model.layers.0.self_attn.q_proj" not in ranks  # it is dense
    summary = read_compressed(tmp_path)
    assert summary.ranks == ranks
    assert summary.parameters == model.num_parameters()
    assert summary.dense_parameters == dense
    assert summary.ratio == pytest.approx(model.num_parameters() / dense)
    assert summary.bytes == pytest.approx(4 * model.num_parameters(), rel=0.2)
    assert summary.architecture == "LlamaForCausalLM"


def test_facts_and_the_dense_model_survive_saving_again(llama: TinyModel, tmp_path: Path) -> None:
    model = compressed(llama)
    model.config._name_or_path = model.name_or_path = "somebody/tiny-model"
    record_ranks(model, method="whitening")
    save_compressed(model, tmp_path / "first")
    save_compressed(load_compressed(tmp_path / "first"), tmp_path / "second")
    summary = read_compressed(tmp_path / "second")
    assert summary.facts["method"] == "whitening"
    assert summary.base_model == "somebody/tiny-model"


def test_a_plain_save_after_recording_is_complete(llama: TinyModel, tmp_path: Path) -> None:
    """What tuners do when they have finished: the directory loads, whichever way it is written."""
    model = compressed(llama)
    record_ranks(model)
    model.save_pretrained(tmp_path)
    assert is_compressed(tmp_path)
    assert torch.equal(logits(load_compressed(tmp_path), llama), logits(model, llama))


def test_changed_ranks_are_recorded(llama: TinyModel, tmp_path: Path) -> None:
    save_compressed(compressed(llama), tmp_path / "first")
    model = load_compressed(tmp_path / "first")
    name = next(iter(low_rank_modules(model)))
    model.set_submodule(name, model.get_submodule(name).dense())
    save_compressed(model, tmp_path / "second")
    assert name not in read_compressed(tmp_path / "second").ranks
    assert torch.equal(logits(load_compressed(tmp_path / "second"), llama), logits(model, llama))


# ---- the directory ----


def test_saving_over_other_files(llama: TinyModel, tmp_path: Path) -> None:
    """Weights of an earlier model go, whether it was in one file or in shards; all else stays."""
    model = compressed(llama)
    directory = tmp_path / "model"
    llama.make_model().save_pretrained(directory)
    (directory / "notes.txt").write_text("mine")
    for size in ("20KB", "1GB", "20KB", "30KB"):
        save_compressed(model, directory, max_shard_size=size)
        assert torch.equal(logits(load_compressed(directory), llama), logits(model, llama))
        assert (directory / "model.safetensors").exists() == (size == "1GB")
    assert (directory / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_leaves_what_was_there(llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "model"
    model = compressed(llama)
    save_compressed(model, directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    class Tokenizer:
        def save_pretrained(self, path: Any) -> None:
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_compressed(load_compressed(directory), directory, tokenizer=Tokenizer())
    with pytest.raises(OSError, match="No space left"):
        save_compressed(model, tmp_path / "new", tokenizer=Tokenizer())
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_is_no_directory(llama: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_compressed(compressed(llama), tmp_path / "file")


# ---- what is refused ----


def test_what_cannot_be_saved(llama: TinyModel, tmp_path: Path) -> None:
    target = tmp_path / "never"
    with pytest.raises(ValueError, match="no `LowRankLinear`"):
        save_compressed(llama.make_model(), target)
    with pytest.raises(TypeError, match="Sequential is no transformers model"):
        save_compressed(nn.Sequential(LowRankLinear(4, 4, 1)), target)
    with pytest.raises(ValueError, match=r"model\.push_to_hub"):
        save_compressed(compressed(llama), target, push_to_hub=True)
    assert not target.exists()


def test_modules_that_loading_could_not_build(llama: TinyModel, tmp_path: Path) -> None:
    model = compressed(llama)
    model.model.extra = LowRankLinear(4, 4, 2)
    model.model.layers[0].mlp.up_proj = LowRankLinear(32, 64, 2, bias=True)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj, model\.extra: a LlamaForCausalLM"):
        save_compressed(model, tmp_path)


def test_tied_weights(llama: TinyModel, tmp_path: Path) -> None:
    tied = compressed(llama, tie_word_embeddings=True)
    save_compressed(tied, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    loaded = load_compressed(tmp_path / "tied")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded, llama), logits(tied, llama))
    compress_module(tied, "lm_head", 4)
    with pytest.raises(ValueError, match="lm_head: the weight is tied"):
        save_compressed(tied, tmp_path / "head")
    untied = compressed(llama, tie_word_embeddings=False)
    compress_module(untied, "lm_head", 4)
    save_compressed(untied, tmp_path / "untied")
    assert torch.equal(logits(load_compressed(tmp_path / "untied"), llama), logits(untied, llama))


def test_adapters_have_to_be_merged_first(llama: TinyModel, tmp_path: Path) -> None:
    model = get_peft_model(compressed(llama), LoraConfig(target_modules=["down"]))
    for function in (densify, lambda model: save_compressed(model, tmp_path)):
        with pytest.raises(RuntimeError, match=r"merge_and_unload\(\)"):
            function(model)
    native = compressed(llama)
    native.add_adapter(LoraConfig(target_modules=["down"]))
    with pytest.raises(RuntimeError, match=r"merge_and_unload\(\)"):
        save_compressed(native, tmp_path)


def test_what_a_tuner_leaves(tiny: TinyModel, tmp_path: Path) -> None:
    settings = LowRankConfig(
        rank=5, rank_multiple=1, target_modules=list(tiny.target_modules), task_type=tiny.task_type
    )
    model = get_peft_model(tiny.make_model().eval(), settings)
    for function in (densify, lambda model: save_compressed(model, tmp_path / "early")):
        with pytest.raises(RuntimeError, match=r"base_model\.finalize\(\)"):
            function(model)
    assert not (tmp_path / "early").exists()
    model.base_model.finalize()
    expected = logits(model, tiny)
    save_compressed(model, tmp_path / "wrapped")
    model.get_base_model().save_pretrained(tmp_path / "plain")
    for name in ("wrapped", "plain"):
        loaded = load_compressed(tmp_path / name)
        assert set(get_rank_pattern(loaded).values()) == {5}
        assert torch.equal(logits(loaded, tiny), expected)
        facts = read_compressed(tmp_path / name).facts
        assert (facts["method"], facts["decomposition"]) == ("LOWRANK", "svd")
    assert densify(model) is model.get_base_model()
    torch.testing.assert_close(logits(model, tiny), expected, atol=1e-5, rtol=1e-5)


SEARCHES = [
    L2LRCConfig(target_ratio=0.7, rank_multiple=1, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    InRankConfig(
        from_scratch=True,
        init_r=2,
        buffer_r=2,
        target_modules=["q_proj", "up_proj"],
        task_type="CAUSAL_LM",
        warmup_steps=0,
        check_interval=1,
    ),
]


@pytest.mark.filterwarnings("ignore:The (search|growth) of adapter")  # it is a short one
@pytest.mark.parametrize("settings", SEARCHES, ids=lambda settings: settings.peft_type.value)
def test_what_a_search_leaves(settings: PeftConfig, llama: TinyModel, tmp_path: Path) -> None:
    model = get_peft_model(llama.make_model(), copy.deepcopy(settings))
    with pytest.raises(RuntimeError, match=r"base_model\.finalize\(\)"):
        save_compressed(model, tmp_path / "early")
    model.base_model.resolve_schedule(4)
    optimizer = adam(model)
    steps_by_hand(model, llama, 1, 4, optimizer)
    model.base_model.finalize(optimizer)
    plain = model.get_base_model()
    assert low_rank_modules(plain)
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(load_compressed(tmp_path), llama), logits(model, llama))
    assert read_compressed(tmp_path).facts["method"] == settings.peft_type.value


def test_quantized_factors(llama: TinyModel, tmp_path: Path) -> None:
    model = compressed(llama)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="quantized, too"):
        save_compressed(model, tmp_path)


# ---- damaged directories ----


def _without_down(directory: Path) -> None:
    edit_weights(directory / "model.safetensors", **{"model.layers.1.mlp.up_proj.down.weight": None})


def _without_embeddings(directory: Path) -> None:
    edit_weights(directory / "model.safetensors", **{"model.embed_tokens.weight": None})


def _of_another_rank(directory: Path) -> None:
    edit_weights(directory / "model.safetensors", **{"model.layers.1.mlp.up_proj.down.weight": torch.zeros(2, 32)})


def _with_more(directory: Path) -> None:
    edit_weights(directory / "model.safetensors", **{"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 32)})


def _truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _no_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\x00" * 4000)


def _empty(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def _no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return edit


def _cut_config(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text()[:-40])


DAMAGE = {
    "missing factor": (_without_down, RuntimeError, "up_proj.down.weight"),
    "missing embeddings": (_without_embeddings, RuntimeError, "embed_tokens"),
    "another rank": (_of_another_rank, RuntimeError, "report|up_proj.down.weight"),
    "another vocabulary": (
        _config(lambda config: config.update(vocab_size=65)),
        RuntimeError,
        "report|embed_tokens.weight",
    ),
    "left over": (_with_more, RuntimeError, r"unexpected keys: model\.layers\.7"),
    "truncated": (_truncated, ValueError, "model.safetensors is damaged"),
    "no header": (_no_header, ValueError, "model.safetensors is damaged"),
    "empty": (_empty, ValueError, "model.safetensors is damaged"),
    "no weights": (_no_weights, ValueError, "has no weights"),
    "cut config": (_cut_config, ValueError, "not valid JSON"),
    "no config": (lambda directory: (directory / "config.json").unlink(), ValueError, "no config.json"),
    "no entry": (_config(lambda config: config.pop("quantization_config")), ValueError, "is missing"),
    "other entry": (
        _config(lambda config: config.update(quantization_config={"quant_method": "gptq"})),
        ValueError,
        "'gptq'",
    ),
    "no ranks": (
        _config(lambda config: config["quantization_config"].pop("ranks")),
        ValueError,
        "must map module names",
    ),
    "odd ranks": (
        _config(lambda config: config["quantization_config"]["ranks"].update({"model.layers.0.mlp.up_proj": "4"})),
        ValueError,
        "integers of at least 1",
    ),
    "unknown module": (
        _config(lambda config: config["quantization_config"]["ranks"].update({"model.layers.9.mlp.up_proj": 4})),
        ValueError,
        r"LlamaForCausalLM has no module model\.layers\.9\.mlp\.up_proj",
    ),
    "no linear": (
        _config(lambda config: config["quantization_config"]["ranks"].update({"model.embed_tokens": 4})),
        TypeError,
        "has a Embedding there",
    ),
    "one rank less": (
        _config(lambda config: config["quantization_config"]["ranks"].pop("model.layers.1.mlp.up_proj")),
        RuntimeError,
        "up_proj",
    ),
    "fewer layers": (
        _config(lambda config: config.update(num_hidden_layers=1)),
        ValueError,
        r"no module model\.layers\.1",
    ),
    "other class": (_config(lambda config: config.update(architectures=["Foreign"])), ValueError, "names Foreign"),
}


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_compressed(compressed(TINY_MODELS["llama"]), tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_directories_are_never_loaded(kind: str, saved_llama: Path, tmp_path: Path) -> None:
    damage, error, message = DAMAGE[kind]
    directory = Path(shutil.copytree(saved_llama, tmp_path / "model"))
    damage(directory)
    with pytest.raises(error, match=message):
        load_compressed(directory)


def test_a_missing_shard(llama: TinyModel, tmp_path: Path) -> None:
    save_compressed(compressed(llama), tmp_path, max_shard_size="20KB")
    next(iter(tmp_path.glob("model-00002*"))).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-\d+\.safetensors is missing"):
        load_compressed(tmp_path)


def test_mismatches_are_never_ignored(saved_llama: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved_llama, tmp_path / "model"))
    _of_another_rank(directory)
    with pytest.raises(RuntimeError, match=r"up_proj\.down\.weight"):
        load_compressed(directory, ignore_mismatched_sizes=True)


def test_loading_info(saved_llama: Path) -> None:
    model, info = load_compressed(saved_llama, output_loading_info=True)
    assert isinstance(model, PreTrainedModel)
    assert not any(info.values())


# ---- back to dense ----


def test_densify_restores_the_original_modules(tiny: TinyModel) -> None:
    model = compressed(tiny)
    expected = logits(model, tiny)
    assert densify(model) is model
    torch.testing.assert_close(logits(model, tiny), expected, atol=1e-5, rtol=1e-5)
    original = {name: type(module) for name, module in tiny.make_model().named_modules()}
    assert {name: type(module) for name, module in model.named_modules()} == original
    assert densify(model) is model  # nothing is left to do


def test_densify_keeps_dtype_and_mode(llama: TinyModel) -> None:
    gpt2 = TINY_MODELS["gpt2"]
    model = densify(compressed(gpt2, torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    conv = model.transformer.h[0].mlp.c_fc
    assert isinstance(conv, Conv1D)
    assert not conv.training
    assert all(parameter.requires_grad for parameter in conv.parameters())
    without_bias = densify(compressed(llama)).model.layers[0].mlp.up_proj
    assert without_bias.bias is None


def test_densify_of_offloaded_weights(saved_llama: Path) -> None:
    model = load_compressed(saved_llama)
    model.model.layers[0].mlp.to("meta")
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp\.gate_proj.* offloaded"):
        densify(model)


def test_building_the_skeleton_draws_no_random_numbers(llama: TinyModel, tmp_path: Path) -> None:
    model = compressed(llama)
    before = torch.get_rng_state()
    save_compressed(model, tmp_path)
    densify(model)
    assert torch.equal(torch.get_rng_state(), before)


# ---- healing ----


def test_a_plain_trainer_trains_the_factors(saved_llama: Path, llama: TinyModel, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(saved_llama)
    factors = {
        key: value.clone() for key, value in model.named_parameters() if key.endswith((".down.weight", ".up.weight"))
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in factors)
    arguments = training_arguments(tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2)
    trainer = Trainer(model, arguments, train_dataset=llama.dataset())
    trainer.train()
    for key, before in factors.items():
        assert not torch.equal(model.get_parameter(key), before), f"{key} has not changed"
    trainer.save_model(str(tmp_path / "healed"))
    expected = logits(model, llama)
    assert torch.equal(logits(load_compressed(tmp_path / "healed"), llama), expected)
    save_compressed(model, tmp_path / "again")
    again = load_compressed(tmp_path / "again")
    assert torch.equal(logits(again, llama), expected)
    # the interrupted training ends where the other did
    resumed = Trainer(load_compressed(saved_llama), arguments, train_dataset=llama.dataset())
    for name, parameter in resumed.model.named_parameters():
        parameter.requires_grad_(name in factors)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed.model, llama), expected, atol=1e-6, rtol=0)


def _lora(llama: TinyModel, model: PreTrainedModel) -> PeftModel:
    settings = LoraConfig(r=2, target_modules=["down", "up"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def _salientlora(llama: TinyModel, model: PreTrainedModel) -> PeftModel:
    schedule = {"warmup_steps": 2, "allocation_steps": 6, "initial_window": 3, "final_window": 3, "total_steps": 10}
    settings = SalientLoRAConfig(
        init_r=4, target_r=2, target_modules=["down", "up"], task_type="CAUSAL_LM", init_weights=False, **schedule
    )
    model = get_peft_model(model, settings)
    model.base_model.resolve_schedule(10)
    optimizer = adam(model)
    steps_by_hand(model, llama, 1, 10, optimizer)
    model.base_model.finalize(optimizer)
    return model


@pytest.mark.parametrize("adapt", [_lora, _salientlora])
def test_adapters_on_the_factors(
    adapt: Callable[[TinyModel, PreTrainedModel], PeftModel], saved_llama: Path, llama: TinyModel, tmp_path: Path
) -> None:
    model = adapt(llama, transformers.AutoModelForCausalLM.from_pretrained(saved_llama))
    expected = logits(model, llama)
    assert (expected - logits(load_compressed(saved_llama), llama)).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(saved_llama)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), llama), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), llama), expected)
    if adapt is _salientlora:
        export_lora(model, tmp_path / "lora")
        plain = PeftModel.from_pretrained(load_compressed(saved_llama), tmp_path / "lora")
        torch.testing.assert_close(logits(plain, llama), expected, atol=1e-5, rtol=0)
    merged = model.merge_and_unload()
    assert low_rank_modules(merged)
    torch.testing.assert_close(logits(merged, llama), expected, atol=1e-4, rtol=0)
    save_compressed(merged, tmp_path / "merged")
    assert torch.equal(logits(load_compressed(tmp_path / "merged"), llama), logits(merged, llama))


# ---- cards ----


def test_the_card_tells_how_to_load(tiny: TinyModel, tmp_path: Path) -> None:
    model = compressed(tiny)
    model.config._name_or_path = model.name_or_path = "somebody/tiny-model"
    record_ranks(model, method="whitening")
    directory = save_compressed(model, tmp_path / "model")
    card = ModelCard.load(directory / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "somebody/tiny-model"
    assert {"peft_rank", "low-rank"} <= set(card.data.tags)
    dense = tiny.make_model().num_parameters()
    for fact in ("whitening", f"{model.num_parameters():,}", f"{dense:,}", f"{model.num_parameters() / dense:.1%}"):
        assert fact in card.text
    by_load, by_class, to_dense = (part.replace(MODEL_HERE, str(directory)) for part in snippets(card))
    assert "load_compressed" in by_load
    for snippet in (by_load, by_class):
        names: dict[str, Any] = {}
        run(snippet, names)
        assert torch.equal(logits(names["model"], tiny), logits(model, tiny))
    run(to_dense.replace('"dense"', f'"{tmp_path / "dense"}"'), names)
    assert not is_compressed(tmp_path / "dense")


def test_a_card_that_is_there_keeps_its_words(llama: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n\n# My model\n\nMy own words.\n")
    save_compressed(compressed(llama), tmp_path)
    once = (tmp_path / "README.md").read_text()
    save_compressed(load_compressed(tmp_path), tmp_path)
    card = ModelCard((tmp_path / "README.md").read_text())
    assert card.data.license == "mit"
    assert "mine" in card.data.tags
    assert "My own words." in card.text
    assert card.text.count(START) == card.text.count(END) == 1
    assert "load_compressed" in once


def test_a_card_that_fails_does_not_lose_the_model(llama: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    with pytest.warns(UserWarning, match="no model card"):
        save_compressed(compressed(llama), tmp_path)
    assert isinstance(load_compressed(tmp_path), PreTrainedModel)


def test_a_tokenizer_is_saved_beside(llama: TinyModel, tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, path: Any) -> None:
            Path(path, "tokenizer.json").write_text("{}")
            Path(path, "templates").mkdir()
            Path(path, "templates", "chat.jinja").write_text("")

    for _ in range(2):
        save_compressed(compressed(llama), tmp_path, tokenizer=Tokenizer())
        assert (tmp_path / "tokenizer.json").is_file()
        assert (tmp_path / "templates" / "chat.jinja").is_file()


# ---- verify ----


def test_compare_reads_compressed_directories(saved_llama: Path, llama: TinyModel, tmp_path: Path) -> None:
    densify(load_compressed(saved_llama)).save_pretrained(tmp_path / "dense")
    assert compare(saved_llama, saved_llama).largest == 0
    assert 0 < compare(saved_llama, tmp_path / "dense").largest < 1e-5
    llama.make_model().save_pretrained(tmp_path / "original")
    assert not compare(saved_llama, tmp_path / "original").within(1e-2)
