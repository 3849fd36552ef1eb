# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.11"
# dependencies = ["peft_rank[examples,quantized]"]
# ///
"""
Answer MT-Bench's 80 questions of two turns each, in the form in which FastChat's judge reads answers.

    python examples/instruct/answer_mt_bench.py --model out/llama --model_id llama-salientlora \
        --answers FastChat/fastchat/llm_judge/data/mt_bench/model_answer

`--model` is a folder with an adapter or a model, or a name on the Hub. The answers are in `<answers>/<model_id>.jsonl`, sorted
by question; questions that are answered there already are left out, so that an interrupted run goes on.
"""

import argparse
import json
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import AutoPeftModelForCausalLM
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

import peft_rank  # noqa: F401 - registers the adapter types


sys.path.append(str(Path(__file__).parents[1]))  # where `common` is

from common.files import read_file


# As the benchmark prescribes; other categories at 0.7.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="adapter or model: a folder, or a name on the Hub")
    parser.add_argument("--model_id", required=True, help="name of the model in the answers")
    parser.add_argument("--answers", type=Path, required=True, help="folder to write to")
    parser.add_argument("--questions", help="local file with the questions; otherwise they come from the Hub")
    parser.add_argument("--tokenizer", help="folder or name, if it is not with the model")
    parser.add_argument("--max_questions", type=int, help="answer the first so many questions only")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="length of an answer at most")
    parser.add_argument("--batch_size", type=int, default=8, help="questions that are answered together")
    parser.add_argument("--dtype", default="auto", help="dtype of the model, such as bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def load_questions(file: str | None) -> list[dict[str, Any]]:
    """`question_id`, `category` and `turns` of every question, whatever their source calls them."""
    if file is None:
        data: Dataset = load_dataset("HuggingFaceH4/mt_bench_prompts", split="train")
    else:
        data = read_file(file)
    names = {
        "question_id": next((name for name in ("question_id", "prompt_id", "id") if name in data.column_names), None),
        "turns": next((name for name in ("turns", "prompt") if name in data.column_names), None),
        "category": "category" if "category" in data.column_names else None,
    }
    missing = [wanted for wanted, name in names.items() if name is None]
    if missing:
        raise ValueError(f"The questions have the columns {data.column_names}, and none for {', '.join(missing)}.")
    return [{wanted: row[name] for wanted, name in names.items()} for row in data]


def load_model(name: str, dtype: str) -> PreTrainedModel:
    is_adapter = Path(name, "adapter_config.json").exists() or not Path(name).exists() and _is_adapter_on_hub(name)
    loader = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return loader.from_pretrained(name, dtype=dtype).to(device).eval()


def _is_adapter_on_hub(name: str) -> bool:
    from transformers.utils import find_adapter_config_file

    return find_adapter_config_file(name) is not None


def batches(questions: list[dict[str, Any]], size: int) -> Iterator[tuple[float, list[dict[str, Any]]]]:
    """Temperature and questions of each batch; all questions of a batch have the same."""
    by_temperature: dict[float, list] = {}
    for question in questions:
        by_temperature.setdefault(TEMPERATURES.get(question["category"], 0.7), []).append(question)
    for temperature, group in by_temperature.items():
        for start in range(0, len(group), size):
            yield temperature, group[start : start + size]


@torch.inference_mode()
def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict[str, str]]],
    temperature: float,
    max_new_tokens: int,
) -> list[str]:
    """The model's next message in every conversation; the most probable tokens at temperature 0."""
    inputs = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    generated = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict[str, Any]],
    temperature: float,
    max_new_tokens: int,
) -> list[list[str]]:
    """The answers to all turns of the questions, each turn after what was said before."""
    conversations: list[list[dict[str, str]]] = [[] for _ in questions]
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question["turns"]) for question in questions)):
        asked = [i for i, question in enumerate(questions) if turn < len(question["turns"])]
        for i in asked:
            conversations[i].append({"role": "user", "content": questions[i]["turns"][turn]})
        texts = reply(model, tokenizer, [conversations[i] for i in asked], temperature, max_new_tokens)
        for i, text in zip(asked, texts, strict=True):
            conversations[i].append({"role": "assistant", "content": text})
            answers[i].append(text)
    return answers


def record(question: dict[str, Any], turns: list[str], model_id: str) -> dict[str, Any]:
    """A line of FastChat's answer files."""
    return {
        "question_id": question["question_id"],
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
    }


def read_answers(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def write_answers(file: Path, answers: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(answers, key=lambda line: line["question_id"])
    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in ordered), encoding="utf-8")
    partial.replace(file)


def main(argv: list[str]) -> None:
    args = parse(argv)
    file = args.answers / f"{args.model_id}.jsonl"
    done = read_answers(file)
    answered = {line["question_id"] for line in done}
    questions = [q for q in load_questions(args.questions)[: args.max_questions] if q["question_id"] not in answered]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load_model(args.model, args.dtype)
    set_seed(args.seed)
    with tqdm(total=len(questions), desc="Answering", unit="question") as progress:
        for temperature, batch in batches(questions, args.batch_size):
            for question, turns in zip(
                batch, answer(model, tokenizer, batch, temperature, args.max_new_tokens), strict=True
            ):
                done.append(record(question, turns, args.model_id))
            write_answers(file, done)
            progress.update(len(batch))
    print(f"{len(done)} answers in {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
