# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""`examples/instruct`: conversations, what is learned of them, settings, quantized bases, and answers to MT-Bench, on a tiny
LLaMA without the Hub."""

import gzip
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_rank import get_rank_pattern


# TRL still sets what transformers renames
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

EXAMPLE = Path(__file__).parents[2] / "examples" / "instruct"
MODULES = 14  # linear layers in the two blocks of the tiny LLaMA
WORDS = ["name", "a", "river", "the", "rhine", "is", "long", "what", "colour", "has", "it", "grey", "why"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """The example's modules. Their names are common, so they are forgotten afterwards."""
    names = ("data", "run_instruct", "answer_mt_bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE.parent)
        patch.syspath_prepend(EXAMPLE)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in [*names, *(name for name in sys.modules if name.partition(".")[0] == "common")]:
        del sys.modules[name]


def make_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {word: i for i, word in enumerate(specials + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """A folder with a tiny LLaMA and a tokenizer of a few words that has a chat template."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = make_tokenizer(pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=3, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """Alpaca's columns in gzipped json lines, and questions as the benchmark's authors keep them."""
    folder = tmp_path_factory.mktemp("files")
    rows = [
        {"instruction": "name a river", "input": "", "output": "the rhine is long"},
        {"instruction": "what colour has it", "input": "the rhine", "output": "it is grey"},
    ] * 12
    for name, part in {"train": rows[:16], "validation": rows[16:]}.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
    questions = [
        {"question_id": 83, "category": "math", "turns": ["what is more", "why"]},
        {"question_id": 81, "category": "writing", "turns": ["name a river", "again"]},
        {"question_id": 82, "category": "coding", "turns": ["what colour has it", "why is it grey"]},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return SimpleNamespace(
        train=str(folder / "train.jsonl.gz"),
        validation=str(folder / "validation.jsonl.gz"),
        questions=str(folder / "questions.jsonl"),
    )


def flags(llama: str, files: SimpleNamespace, output: Path, **more) -> list[str]:
    """A small run on the CPU; `more` are further flags."""
    settings = {
        "model_name_or_path": llama,
        "train_file": files.train,
        "validation_file": files.validation,
        "output_dir": output,
        "init_r": 4,
        "target_r": 2,
        "lora_alpha": 16,
        "allocation_warmup_steps": 2,
        "allocation_steps": 10,
        "initial_window": 3,
        "final_window": 3,
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.03,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        **more,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


# --- data -------------------------------------------------------------------------------------------------------------


def test_rows_of_every_form_become_conversations(instruct):
    user, answer = {"role": "user", "content": "name a river"}, {"role": "assistant", "content": "the rhine"}
    expected = {"prompt": [user], "completion": [answer]}
    alpaca = {"instruction": "name a river", "input": "", "output": "the rhine", "idx": 7}
    for row in (alpaca, {"messages": [user, answer]}, expected):
        assert instruct.data.to_conversations(Dataset.from_list([row])).to_list() == [expected]
    with_input = instruct.data.from_instruction({"instruction": "what is", "input": "it", "output": "grey"})
    assert with_input["prompt"][0]["content"] == "what is\n\nit"


def test_other_rows_are_refused(instruct):
    with pytest.raises(ValueError, match=r"columns \['text'\]: expected instruction"):
        instruct.data.to_conversations(Dataset.from_list([{"text": "the rhine"}]))
    with pytest.raises(ValueError, match="must end with an answer of the assistant"):
        instruct.data.from_messages({"messages": [{"role": "user", "content": "why"}]})


def test_the_last_examples_are_for_evaluation_if_nothing_else_is(instruct, files):
    args = instruct.data.DataArguments(train_file=files.train, validation_examples=5, max_train_samples=4)
    splits = instruct.data.load_splits(args)
    assert {name: len(data) for name, data in splits.items()} == {"train": 4, "validation": 5}
    args = instruct.data.DataArguments(train_file=files.train, validation_examples=16)
    with pytest.raises(ValueError, match="validation_examples=16 of 16 examples leave none"):
        instruct.data.load_splits(args)


def test_alpaca_template():
    """Literally, over two turns, and each prompt is the beginning of what follows."""
    tokenizer = make_tokenizer(pad_token="<pad>")
    tokenizer.chat_template = (EXAMPLE / "templates" / "alpaca.jinja").read_text()
    said = [
        {"role": "user", "content": "name a river"},
        {"role": "assistant", "content": "the rhine"},
        {"role": "user", "content": "why"},
    ]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    first = "<s>### Instruction:\nname a river\n\n### Response:\n"
    assert text == first + "the rhine</s>\n\n### Instruction:\nwhy\n\n### Response:\n"
    assert tokenizer.apply_chat_template(said[:1], tokenize=False, add_generation_prompt=True) == first


# --- training ---------------------------------------------------------------------------------------------------------


def prepare(instruct, argv: list[str]):
    """The trainer of a run, before the training."""
    args = instruct.run_instruct.parse(argv)
    model_args, data_args, method_args, training_args = args
    tokenizer = instruct.run_instruct.load_tokenizer(model_args, training_args)
    data = instruct.data.load_splits(data_args)
    model = instruct.run_instruct.load_model(model_args, method_args, training_args)
    return instruct.run_instruct.make_trainer(args, model, tokenizer, data)


def test_only_answers_are_learned(instruct, llama, files, tmp_path):
    trainer = prepare(instruct, flags(llama, files, tmp_path))
    batch = next(iter(trainer.get_train_dataloader()))
    learned = {trainer.processing_class.decode(row[row >= 0]) for row in batch["labels"]}
    assert learned == {"the rhine is long </s>", "it is grey </s>"}


def test_packed_examples_share_rows(instruct, llama, files, tmp_path):
    trainer = prepare(instruct, flags(llama, files, tmp_path, packing=True, max_length=40))
    assert len(trainer.train_dataset) < 8
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["position_ids"] == 0).sum() > len(batch["input_ids"])  # texts start anew, and do not see each other
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))


@pytest.mark.parametrize("method", ["salientlora", "lora", "adalora"])
def test_script_trains_saves_and_reloads(instruct, llama, files, tmp_path, method):
    more = {"export_lora": tmp_path / "lora"} if method == "salientlora" else {}
    instruct.run_instruct.main(flags(llama, files, tmp_path / "out", method=method, **more))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    run = results["runs"][0]
    assert results["method"] == method
    assert run["steps"] == 20
    assert len(run["ranks"]) == MODULES
    assert run["total_rank"] == 2 * MODULES
    start, end = run["trainable_parameters"].values()
    assert end < start if method == "salientlora" else end == start
    assert run["metrics"]["loss"] < 2.9  # 3.12 before the training
    if method == "salientlora":
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
        exported = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
        assert get_rank_pattern(model) == run["ranks"]
        ids = torch.tensor([[4, 7, 8, 9, 3, 5]])
        with torch.no_grad():
            torch.testing.assert_close(exported(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_bases(instruct, llama, files, tmp_path, quantization):
    argv = flags(llama, files, tmp_path, quantization=quantization)
    trainer = prepare(instruct, argv)
    layer = trainer.model.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer.get_base_layer()).__name__ == {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantization]
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert sum(get_rank_pattern(trainer.model).values()) == 2 * MODULES


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-7b", "llama-2-7b"])
def test_yaml_has_the_settings_of_the_paper(instruct, name, tmp_path):
    file = str(EXAMPLE / "configs" / f"{name}.yaml")
    _, data, method, training = instruct.run_instruct.parse(
        [file, "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    )
    assert (method.init_r, method.target_r, method.orth_reg_weight) == (480, 64, 0.1)
    assert (method.allocation_warmup_steps, method.allocation_steps) == (6000, 25000)
    assert (method.correlation_threshold, method.slope_threshold, method.salience_lambda) == (0.8, 2.0, 0.7)
    assert (training.learning_rate, training.per_device_train_batch_size, training.num_train_epochs) == (5e-4, 8, 25)
    assert method.target_modules == instruct.run_instruct.TARGETS
    assert data.dataset_name == "tatsu-lab/alpaca"
    assert Path(training.chat_template_path).is_file()


@pytest.mark.parametrize("file", sorted((EXAMPLE / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_yaml_is_read(instruct, file, tmp_path):
    instruct.run_instruct.parse([str(file), "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"])


def test_bad_settings_are_refused(instruct, llama, files, tmp_path):
    argv = flags(llama, files, tmp_path, method="full", quantization="4bit")
    with pytest.raises(ValueError, match="quantized weights cannot be trained"):
        instruct.run_instruct.parse(argv)
    silent = tmp_path / "silent"
    make_tokenizer().save_pretrained(silent)
    model_args, _, _, training_args = instruct.run_instruct.parse(flags(str(silent), files, tmp_path))
    with pytest.raises(ValueError, match="has no chat template: give one with --chat_template_path"):
        instruct.run_instruct.load_tokenizer(model_args, training_args)


def test_an_export_of_parts_is_refused(instruct, llama, files, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    argv = flags(llama, files, tmp_path / "out", export_lora=tmp_path / "lora")
    with pytest.raises(ValueError, match=f"peft-rank export {tmp_path}/out {tmp_path}/lora"):
        instruct.run_instruct.parse(argv)


# --- MT-Bench ---------------------------------------------------------------------------------------------------------


def test_answers_are_in_the_form_of_the_judge(instruct, llama, files, tmp_path, monkeypatch):
    asked, reply = [], instruct.answer_mt_bench.reply

    def watched(model, tokenizer, conversations, temperature, max_new_tokens):
        asked.append((temperature, json.loads(json.dumps(conversations))))
        return reply(model, tokenizer, conversations, temperature, max_new_tokens)

    monkeypatch.setattr(instruct.answer_mt_bench, "reply", watched)
    argv = ["--model", llama, "--model_id", "tiny", "--answers", str(tmp_path), "--questions", files.questions]
    argv += ["--max_new_tokens", "4"]
    instruct.answer_mt_bench.main(argv)

    lines = [json.loads(line) for line in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [81, 82, 83]
    for line in lines:
        assert set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert line["model_id"] == "tiny"
        (choice,) = line["choices"]
        assert choice["index"] == 0
        assert len(choice["turns"]) == 2
    assert len({line["answer_id"] for line in lines}) == 3
    # 82 and 83 together and greedily, 81 by sampling; second turns after the first answers
    assert [(temperature, len(batch)) for temperature, batch in asked] == [(0.0, 2), (0.0, 2), (0.7, 1), (0.7, 1)]
    first, second = asked[0][1][1], asked[1][1][1]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[0] == first[0] == {"role": "user", "content": "what colour has it"}
    assert second[1]["content"] == lines[1]["choices"][0]["turns"][0]
    assert second[2]["content"] == "why is it grey"


def test_batches_and_padding_do_not_change_greedy_answers(instruct, llama, files):
    """Texts of different lengths, answered together and one at a time, and by a literal loop over tokens."""
    tokenizer = make_tokenizer(pad_token="<pad>", padding_side="left")
    tokenizer.chat_template = TEMPLATE
    model = instruct.answer_mt_bench.load_model(llama, "float32")
    said = [[{"role": "user", "content": text}] for text in ("why", "what colour has it", "name a river again")]
    together = instruct.answer_mt_bench.reply(model, tokenizer, said, 0.0, 5)
    assert together == [instruct.answer_mt_bench.reply(model, tokenizer, [one], 0.0, 5)[0] for one in said]
    for one, text in zip(said, together, strict=True):
        ids = tokenizer(tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True)).input_ids
        start = len(ids)
        while len(ids) < start + 5 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert tokenizer.decode(ids[start:], skip_special_tokens=True).strip() == text


def test_an_interrupted_run_goes_on(instruct, llama, files, tmp_path):
    argv = ["--model", llama, "--model_id", "tiny", "--answers", str(tmp_path), "--questions", files.questions]
    argv += ["--max_new_tokens", "2", "--batch_size", "1"]
    instruct.answer_mt_bench.main([*argv, "--max_questions", "1"])
    (before,) = (tmp_path / "tiny.jsonl").read_text().splitlines()
    instruct.answer_mt_bench.main(argv)
    after = (tmp_path / "tiny.jsonl").read_text().splitlines()
    assert len(after) == 3
    assert before in after


def test_other_names_of_the_columns_are_understood(instruct, tmp_path):
    hub = {"prompt": ["why"], "category": "math", "prompt_id": 5, "reference": []}
    (tmp_path / "hub.jsonl").write_text(json.dumps(hub) + "\n")
    assert instruct.answer_mt_bench.load_questions(str(tmp_path / "hub.jsonl")) == [
        {"question_id": 5, "turns": ["why"], "category": "math"}
    ]
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "why"}) + "\n")
    with pytest.raises(ValueError, match="none for question_id, turns, category"):
        instruct.answer_mt_bench.load_questions(str(tmp_path / "other.jsonl"))
