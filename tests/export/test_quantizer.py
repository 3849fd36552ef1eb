# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The plug-in of `from_pretrained`: every way to load, and models that are ordinary afterwards."""

from __future__ import annotations

import copy
import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.trainer_utils import validate_quantization_for_training

from cards import Hub
from compressed_models import AUTO_CLASSES, compress_module, compressed, edit_weights
from peft_rank import LowRankConfig, densify, load_compressed, save_compressed
from peft_rank.export import quantizer
from peft_rank.tuners.lowrank.entry import low_rank_modules, read_entry
from runs import logits
from tiny_models import SEQUENCE, TINY_MODELS, VOCAB, TinyModel


FACTOR = "model.layers.1.mlp.up_proj.down.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_compressed(compressed(TINY_MODELS["llama"]), tmp_path_factory.mktemp("llama") / "model")


# ---- registration ----


def test_registering_again_changes_nothing() -> None:
    before = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    quantizer.register_low_rank()
    assert (dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)) == before
    assert "peft_rank" not in PreTrainedConfig._peft_rank_own_to_json_file.__module__
    assert AUTO_QUANTIZER_MAPPING["low_rank"] is quantizer.LowRankQuantizer


def test_a_reloaded_module_takes_over(saved: Path, llama: TinyModel) -> None:
    expected = logits(load_compressed(saved), llama)
    reloaded = importlib.reload(quantizer)
    reloaded.register_low_rank()
    assert AUTO_QUANTIZER_MAPPING["low_rank"] is reloaded.LowRankQuantizer
    assert torch.equal(logits(load_compressed(saved), llama), expected)


def test_a_foreign_owner_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign:
        pass

    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "low_rank", Foreign)
    with pytest.raises(RuntimeError, match="belongs to .*Foreign"):
        quantizer.register_low_rank()
    assert AUTO_QUANTIZER_MAPPING["low_rank"] is quantizer.LowRankQuantizer


# ---- an ordinary model afterwards ----


def test_nothing_but_the_entry_is_left(saved: Path, llama: TinyModel, tmp_path: Path) -> None:
    llama.make_model().save_pretrained(tmp_path)
    model, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (saved, tmp_path))
    validate_quantization_for_training(model)
    assert set(vars(model)) ^ set(vars(dense)) == {"is_quantized"}
    assert model.is_quantized is False
    assert set(vars(model.config)) ^ set(vars(dense.config)) == {"quantization_config"}
    assert read_entry(model.config)["ranks"] == {name: m.rank for name, m in low_rank_modules(model).items()}
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    # not on the meta device, and each of its own
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    copy.deepcopy(model)


def test_the_configuration_of_a_loaded_model_loads_again(saved: Path, llama: TinyModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    for config in (model.config, transformers.AutoConfig.from_pretrained(saved)):
        again = AutoModelForCausalLM.from_pretrained(saved, config=config)
        assert torch.equal(logits(again, llama), logits(model, llama))
        assert torch.equal(logits(load_compressed(saved, config=config), llama), logits(model, llama))


def test_compressing_on_the_fly_is_refused(llama: TinyModel, tmp_path: Path) -> None:
    llama.make_model().save_pretrained(tmp_path)
    settings = quantizer.LowRankQuantizationConfig({"model.layers.0.mlp.up_proj": 4})
    with pytest.raises(ValueError, match="low_rank does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)


# ---- ways to load ----


def test_other_classes_find_the_modules(tiny: TinyModel, tmp_path: Path) -> None:
    """A head more or less moves every name by one level."""
    model = compressed(tiny)
    save_compressed(model, tmp_path / "head")
    bare = transformers.AutoModel.from_pretrained(tmp_path / "head")
    expected = {name.removeprefix(f"{model.base_model_prefix}.") for name in low_rank_modules(model)}
    assert set(low_rank_modules(bare)) == expected
    own = dict(model.base_model.named_parameters())
    for key, parameter in bare.named_parameters():
        if key in own:
            assert torch.equal(parameter, own[key]), key
    bare.save_pretrained(tmp_path / "bare")
    again = type(bare).from_pretrained(tmp_path / "bare")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in bare.state_dict().items())
    with_head = AUTO_CLASSES[tiny.task_type].from_pretrained(tmp_path / "bare")
    assert low_rank_modules(with_head).keys() == low_rank_modules(model).keys()


def test_a_class_that_lacks_one_of_the_modules(tmp_path: Path) -> None:
    tiny = TINY_MODELS["bert"]
    model = compressed(tiny)
    compress_module(model, "bert.pooler.dense", 4)
    save_compressed(model, tmp_path)
    assert torch.equal(logits(load_compressed(tmp_path), tiny), logits(model, tiny))
    tokens = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert len(low_rank_modules(tokens)) == len(low_rank_modules(model)) - 1
    with pytest.raises(ValueError, match="LlamaForCausalLM has no module bert"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=_llama_with(tmp_path))


def _llama_with(directory: Path) -> transformers.PreTrainedConfig:
    config = TINY_MODELS["llama"].make_model().config
    config.quantization_config = transformers.AutoConfig.from_pretrained(directory).quantization_config
    return config


@pytest.mark.parametrize(
    "device_map", ["auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "disk"}, "layers on disk"]
)
def test_device_maps(device_map: Any, saved: Path, llama: TinyModel, tmp_path: Path) -> None:
    if device_map == "layers on disk":
        places = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
        device_map = {**dict.fromkeys(places, "cpu"), "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model, llama), logits(load_compressed(saved), llama))


def test_a_small_max_memory_spreads_the_model(llama: TinyModel, tmp_path: Path) -> None:
    model = compressed(llama, num_hidden_layers=4)
    save_compressed(model, tmp_path / "model", max_shard_size="20KB")
    settings = {"device_map": "auto", "max_memory": {"cpu": "60KB"}, "offload_folder": tmp_path / "offload"}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **settings)
    assert "disk" in spread.hf_device_map.values()
    assert any(parameter.is_meta for parameter in spread.parameters())
    assert torch.equal(logits(spread, llama), logits(model, llama))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"])
def test_dtypes(dtype: Any, tiny: TinyModel, tmp_path: Path) -> None:
    save_compressed(compressed(tiny), tmp_path)
    model = tiny.model_class.from_pretrained(tmp_path, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else dtype
    for name, parameter in model.named_parameters():
        # T5 keeps the second linear of its feed-forward layers in float32, and reads `wo.weight.dtype` to find out
        kept = tiny.name == "t5" and dtype == torch.float16 and ".wo." in name
        assert parameter.dtype == (torch.float32 if kept else expected), name
    assert torch.isfinite(logits(model, tiny)).all()


def test_no_dense_weight_is_ever_allocated(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense modules exist on the meta device only, and so do the factors before they are loaded."""
    devices = []
    own = quantizer.replace_by_low_rank

    def record(model: torch.nn.Module, ranks: dict[str, int]) -> None:
        devices.extend(parameter.device.type for parameter in model.parameters())
        own(model, ranks)
        devices.extend(parameter.device.type for parameter in model.parameters())

    monkeypatch.setattr(quantizer, "replace_by_low_rank", record)
    AutoModelForCausalLM.from_pretrained(saved)
    assert set(devices) == {"meta"}


# ---- use ----


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def test_pipeline_and_generate(llama: TinyModel, tmp_path: Path) -> None:
    model = compressed(llama)
    directory = save_compressed(model, tmp_path / "model", tokenizer=_tokenizer())
    ids = torch.tensor([[4, 5, 6, 7]])
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(load_compressed(directory).generate(ids, **settings), expected)
    generator = pipeline("text-generation", str(directory), device="cpu")
    (answer,) = generator("w4 w5 w6 w7", return_tensors=True, **settings)
    assert answer["generated_token_ids"] == expected[0].tolist()


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2"])
def test_generate_of_other_families(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    model = compressed(tiny)
    save_compressed(model, tmp_path)
    ids = tiny.make_batch(2)["input_ids"][:, : SEQUENCE // 2]
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(load_compressed(tmp_path).generate(ids, **settings), model.generate(ids, **settings))


# ---- damage ----


def test_a_missing_factor_is_an_error_not_a_warning(tiny: TinyModel, tmp_path: Path) -> None:
    model = compressed(tiny)
    save_compressed(model, tmp_path)
    name = list(low_rank_modules(model))[-1]
    edit_weights(tmp_path / "model.safetensors", **{f"{name}.up.weight": None})
    for auto_class in (AUTO_CLASSES[tiny.task_type], transformers.AutoModel):
        with pytest.raises(RuntimeError, match=r"does not hold the weights of .*up\.weight"):
            auto_class.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "settings", [{}, {"device_map": "auto"}, {"ignore_mismatched_sizes": True}, {"dtype": "auto"}]
)
def test_half_broken_directories(settings: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    for number, change in enumerate((None, torch.zeros(2, 32))):
        if change is not None and not settings.get("ignore_mismatched_sizes"):
            continue  # transformers raises itself
        directory = Path(shutil.copytree(saved, tmp_path / str(number)))
        edit_weights(directory / "model.safetensors", **{FACTOR: change})
        with pytest.raises(RuntimeError, match=FACTOR.replace(".", r"\.")):
            AutoModelForCausalLM.from_pretrained(directory, **settings)


def test_a_missing_factor_under_offloading(saved: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "model"))
    edit_weights(directory / "model.safetensors", **{FACTOR: None})
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(RuntimeError, match=r"up_proj\.down\.weight"):
        AutoModelForCausalLM.from_pretrained(directory, device_map=device_map, offload_folder=tmp_path / "offload")


def test_a_transformers_that_never_ties(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check comes late then, but it comes."""
    own = quantizer._check_on_tying

    def late(model: torch.nn.Module, ranks: dict[str, int]) -> None:
        own(model, ranks)
        check, calls = model.tie_weights, []

        def never(missing_keys: set[str] | None = None, **kwargs: Any) -> Any:
            calls.append(missing_keys)
            return check(missing_keys=None if len(calls) == 1 else missing_keys, **kwargs)

        model.tie_weights = never

    monkeypatch.setattr(quantizer, "_check_on_tying", late)
    directory = Path(shutil.copytree(saved, tmp_path / "model"))
    edit_weights(directory / "model.safetensors", **{FACTOR: None})
    with pytest.raises(RuntimeError, match=r"up_proj\.down\.weight"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_truncated_weights(saved: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "model"))
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match="(?i)incomplete|deserializ"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_without_us_transformers_refuses_every_saved_directory(
    saved: Path, llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would say in its log that it does not know the entry, and fill the modules with random numbers."""
    model = load_compressed(saved)
    model.save_pretrained(tmp_path / "again")
    tuned = get_peft_model(llama.make_model(), LowRankConfig(rank=4, target_modules=["up_proj"]))
    tuned.base_model.finalize()
    tuned.get_base_model().save_pretrained(tmp_path / "tuned")
    assert "transformers_weights" not in vars(model.config)
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "low_rank")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "low_rank")
    for directory in (saved, tmp_path / "again", tmp_path / "tuned"):
        with pytest.raises(OSError, match="import_peft_rank_before_loading"):
            AutoModelForCausalLM.from_pretrained(directory)


# ---- the Hub ----


def test_push_to_hub(hub: Hub, saved: Path, llama: TinyModel, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.push_to_hub("me/my-model", tags=["mine"], max_shard_size="20KB")
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits(load_compressed(tmp_path), llama), logits(model, llama))
    card = ModelCard(hub.files["README.md"].decode())
    assert 'peft_rank.load_compressed("me/my-model")' in card.text
    assert {"mine", "peft_rank"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    assert b"import_peft_rank_before_loading" in hub.files["config.json"]


def test_dense_models_are_pushed_as_ever(hub: Hub, saved: Path, llama: TinyModel) -> None:
    densify(load_compressed(saved)).push_to_hub("me/dense")
    assert b"peft_rank" not in hub.files["README.md"] + hub.files["config.json"]
    hub.files.clear()
    llama.make_model().push_to_hub("me/original")
    assert b"peft_rank" not in hub.files["README.md"] + hub.files["config.json"]
