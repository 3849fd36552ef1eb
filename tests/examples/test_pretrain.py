# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""`examples/pretrain`: settings, text, and the script from end to end on a tiny model without the Hub."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from peft_rank import LowRankLinear


EXAMPLE = Path(__file__).parents[2] / "examples" / "pretrain"
CONFIGS = EXAMPLE / "configs"
TINY = {
    "vocab_size": 300,
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "n_positions": 16,
    "fixed_r": 8,
    "buffer_r": 4,
    "growth_warmup_steps": 2,
    "check_interval": 2,
    "growth_ratio": 0.5,
    "rank_multiple": 2,
    "max_steps": 12,
    "warmup_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "eval_steps": 6,
    "save_steps": 6,
    "use_cpu": "true",
    "report_to": "none",
}
# blocks, width, heads, learning rate, sequences of a step on 8 devices
PAPER = {
    "gpt2": (12, 768, 12, 6e-4, 512),
    "gpt2-medium": (24, 1024, 16, 1.5e-4, 512),
    "gpt2-large": (36, 1280, 20, 1.5e-4, 512),
}


@pytest.fixture(scope="module")
def pretrain():
    """The example's modules. Their names are common, so they are forgotten afterwards."""
    names = ("data", "run_pretrain")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.jsonl.gz"
    lines = [f"The {n}th line says that {n} and {n + 1} are {2 * n + 1}.\n" for n in range(400)]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": line}) + "\n" for line in lines)
    return path


def arguments(folder: Path, text: Path, *more: str, **overrides) -> list[str]:
    settings = {**TINY, "output_dir": folder, "train_files": text, **overrides}
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return [str(CONFIGS / "small.yaml"), *flags, *more]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(pretrain, name: str, tmp_path: Path) -> None:
    layers, width, heads, rate, batch = PAPER[name]
    model, data, method, training = pretrain.run_pretrain.parse(
        [str(CONFIGS / f"{name}.yaml"), "--output_dir", str(tmp_path), "--fp16", "false", "--use_cpu", "true"]
    )
    assert (model.n_layer, model.n_embd, model.n_head, model.n_positions) == (layers, width, heads, 1024)
    assert (training.learning_rate, training.num_train_epochs, training.weight_decay) == (rate, 100, 0.1)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == batch
    assert (data.dataset_config, data.tokenizer_name) == ("wikitext-103-raw-v1", "gpt2")
    config = pretrain.run_pretrain.adapter_config(method)
    assert (config.init_r, config.buffer_r, config.explained_ratio, config.reference) == (2, 100, 0.9, True)
    accumulation = training.gradient_accumulation_steps
    assert config.warmup_steps == 200 // accumulation
    assert config.check_interval == round(25 / accumulation)
    with torch.device("meta"):
        dense = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=width, n_head=heads))
    names = [n for n, m in dense.named_modules() if type(m).__name__ == "Conv1D"]
    targeted = [n for n in names if re.fullmatch(config.target_modules, n)]
    assert targeted == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    everything = pretrain.run_pretrain.TARGETS["all"]
    assert all(re.fullmatch(everything, n) for n in names)


@pytest.mark.parametrize("method", ["fixed", "inrank"])
def test_the_start_of_products(pretrain, tmp_path: Path, text: Path, method: str) -> None:
    _, _, asked, _ = pretrain.run_pretrain.parse(arguments(tmp_path, text, method=method, init_scale=2.5))
    assert pretrain.run_pretrain.adapter_config(asked).init_scale == 2.5


def test_engine_configurations() -> None:
    assert json.loads((CONFIGS / "deepspeed_zero2.json").read_text())["zero_optimization"]["stage"] == 2
    assert yaml.safe_load((CONFIGS / "accelerate_ddp.yaml").read_text())["distributed_type"] == "MULTI_GPU"


def test_unknown_settings_and_engines_are_refused(pretrain, tmp_path: Path, text: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("n_layers: 6\n")
    with pytest.raises(ValueError, match="unknown settings.*n_layers"):
        pretrain.run_pretrain.parse([str(wrong), "--output_dir", str(tmp_path)])
    engine = ["--deepspeed", str(CONFIGS / "deepspeed_zero2.json")]
    with pytest.raises(ValueError, match="cannot grow under DeepSpeed.*--method fixed"):
        pretrain.run_pretrain.parse(arguments(tmp_path, text, *engine))


def test_text_becomes_blocks(pretrain, tmp_path: Path, text: Path) -> None:
    data = pretrain.data
    plain = tmp_path / "more.txt"
    plain.write_text("one two three\n" * 50)
    args = data.DataArguments(train_files=[str(text), str(plain)], vocab_size=300)
    texts = data.load_texts(args, "train")
    assert len(texts) == 401
    tokenizer = data.load_tokenizer(args, texts)
    assert len(tokenizer) == 300
    train, validation = data.load_blocks(args, tokenizer, texts, 16)
    together = torch.cat([train.tokens, validation.tokens])
    assert len(validation) == len(together) // 20
    assert tokenizer.decode(together.flatten()[:40]).startswith(texts[0].rstrip())
    assert torch.equal(train[0]["input_ids"], train[0]["labels"])
    args.validation_files = [str(plain)]
    assert tokenizer.decode(data.load_blocks(args, tokenizer, texts, 16)[1][0]["input_ids"]).startswith("one two")
    with pytest.raises(ValueError, match="less than one block of 100000"):
        data.to_blocks(texts, tokenizer, 100_000)
    with pytest.raises(ValueError, match="Give tokenizer_name"):
        data.load_tokenizer(data.DataArguments(), [])


@pytest.mark.parametrize("method", ["full", "fixed", "inrank"])
def test_from_text_to_a_model(pretrain, tmp_path: Path, text: Path, method: str) -> None:
    pretrain.run_pretrain.main(arguments(tmp_path, text, method=method))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["method"] == method
    assert results["steps"] == 12
    assert results["history"][-1]["loss"] < results["history"][0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model(**tokenizer("The 3th line", return_tensors="pt")).logits.shape[-1] == len(tokenizer) == 300
    ranks = {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert ranks == results["ranks"]
    assert len(ranks) == (0 if method == "full" else 4)
    if method == "fixed":
        assert set(ranks.values()) == {8}
    if method == "inrank":
        lines = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
        totals = [line["rank/total"] for line in lines]
        assert [line["step"] for line in lines if line["event"] == "decision"] == [4, 6]
        assert all(after >= before for before, after in pairwise(totals))
        assert lines[-1]["ranks"] == ranks


@pytest.mark.slow
def test_the_command_and_resuming(tmp_path: Path, text: Path) -> None:
    script = [sys.executable, str(EXAMPLE / "run_pretrain.py")]
    run = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONWARNINGS": "ignore"}}
    whole = subprocess.run([*script, *arguments(tmp_path / "run", text)], check=True, **run)
    assert "inrank: perplexity" in whole.stdout
    expected = json.loads((tmp_path / "run" / "results.json").read_text())
    checkpoint = str(tmp_path / "run" / "checkpoint-6")
    again = arguments(tmp_path / "run", text, "--resume_from_checkpoint", checkpoint)
    subprocess.run([*script, *again], check=True, **run)
    resumed = json.loads((tmp_path / "run" / "results.json").read_text())
    assert resumed["ranks"] == expected["ranks"]
    assert resumed["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-4)
