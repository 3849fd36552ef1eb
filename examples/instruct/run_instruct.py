# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.11"
# dependencies = ["peft_rank[examples,quantized]"]
# ///
"""
Tune a language model to follow instructions, with TRL's SFTTrainer and SalientLoRA, AdaLoRA, LoRA, rsLoRA or in full.

Settings from a YAML file; flags after it override them:

    python examples/instruct/run_instruct.py examples/instruct/configs/llama-2-7b.yaml --output_dir out/llama

On a base in 4 bits:

    python examples/instruct/run_instruct.py examples/instruct/configs/llama-2-7b-4bit.yaml --output_dir out/llama-4bit

A small model and local files:

    python examples/instruct/run_instruct.py examples/instruct/configs/smollm2-135m.yaml --output_dir out/small \
        --train_file train.jsonl --validation_file validation.jsonl

A smoke test of the whole way:

    python examples/instruct/run_instruct.py examples/instruct/configs/smollm2-135m.yaml --output_dir out/smoke \
        --max_steps 5 --allocation_warmup_steps 1 --allocation_steps 3 --max_train_samples 32 --max_eval_samples 8

`output_dir` then holds the adapter with its tokenizer and chat template, `ranks.jsonl` and `results.json`. Its answers to
MT-Bench's questions are written by `answer_mt_bench.py`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import DatasetDict
from peft import PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from peft_rank import export_lora


sys.path.append(str(Path(__file__).parents[1]))  # where `common` is

from common import runs
from common.methods import MethodArguments, adapter_config, add_allocation
from common.runs import RunArguments, run_seeds, write_results
from data import DataArguments, load_splits


# Every linear layer of the blocks, of LLaMA and those built like it.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class ModelArguments(RunArguments):
    """Which language model, how often, what to keep of it, and in how many bits it is held."""

    model_name_or_path: str = field(
        default="meta-llama/Llama-2-7b-hf", metadata={"help": "Language model to fine-tune."}
    )
    quantization: Literal["none", "4bit", "8bit"] = field(
        default="none", metadata={"help": "bitsandbytes type of the frozen weights; 4bit is nf4, quantized doubly."}
    )
    attention: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2 ... Default: the model's."})


Arguments = tuple[ModelArguments, DataArguments, MethodArguments, SFTConfig]


def parse(argv: list[str]) -> Arguments:
    """Flags, or a YAML file and flags that override it."""
    args = runs.parse(argv, (ModelArguments, DataArguments, MethodArguments, SFTConfig))
    model_args, _, method_args, training_args = args
    if model_args.quantization != "none" and method_args.method == "full":
        raise ValueError("quantization: quantized weights cannot be trained; leave it out with --method full.")
    template = training_args.chat_template_path
    if template is not None and not Path(template).exists():
        # as the files in configs/ name it
        training_args.chat_template_path = str(Path(__file__).parent / template)
    return args


def quantization_config(args: ModelArguments, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if args.quantization == "none":
        return None
    if args.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=compute_dtype,  # FSDP shards weights of a floating-point type only
    )


def load_base(args: ModelArguments, training_args: SFTConfig, trained: bool = False) -> PreTrainedModel:
    """The pretrained model: frozen, in bf16 where the training is; `trained` in full, in fp32."""
    dtype = torch.bfloat16 if training_args.bf16 and not trained else torch.float32
    quantized = args.quantization != "none"
    model = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path,
        revision=args.model_revision,
        dtype=dtype,
        attn_implementation=args.attention,
        quantization_config=quantization_config(args, dtype),
        device_map={"": training_args.device} if quantized else None,
    )
    model.config.use_cache = False
    if quantized:
        # norms in fp32, gradients through the embedding
        checkpointing = training_args.gradient_checkpointing
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    return model


def load_model(
    args: ModelArguments, method_args: MethodArguments, training_args: SFTConfig
) -> PreTrainedModel | PeftModel:
    """The pretrained model, and the adapter on it."""
    if method_args.method == "full":
        return load_base(args, training_args, trained=True)
    model = load_base(args, training_args)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if method_args.target_modules is None and not names.intersection(TARGETS):
        raise ValueError(f"{args.model_name_or_path} has no layers {', '.join(TARGETS)}: set --target_modules.")
    # ZeRO-3 gathers parameters of one type only; it trains fp32 copies of them
    plugin = training_args.deepspeed_plugin
    same_dtype = plugin is not None and plugin.zero_stage == 3 and args.quantization == "none"
    config = adapter_config(method_args, TaskType.CAUSAL_LM, TARGETS)
    return get_peft_model(model, config, autocast_adapter_dtype=not same_dtype)


def load_tokenizer(args: ModelArguments, training_args: SFTConfig) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, revision=args.model_revision)
    if tokenizer.chat_template is None and training_args.chat_template_path is None:
        raise ValueError(
            f"The tokenizer of {args.model_name_or_path} has no chat template: give one with --chat_template_path, such as "
            "templates/alpaca.jinja."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make_trainer(
    args: Arguments, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, data: DatasetDict
) -> SFTTrainer:
    """A trainer that learns the answers only, and allocates ranks."""
    model_args, _, method_args, training_args = args
    trainer = SFTTrainer(
        model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
    )
    if model_args.quantization != "none":
        # TRL casts adapters on quantized bases to bf16, in which the small steps late in a training vanish
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    add_allocation(trainer, method_args)
    return trainer


def run(args: Arguments) -> dict[str, Any]:
    """One training with one seed: everything that it writes is in `output_dir`, what it found is returned."""
    model_args, data_args, method_args, training_args = args
    set_seed(training_args.seed)  # the adapter is drawn before the trainer sets it
    tokenizer = load_tokenizer(model_args, training_args)
    with training_args.main_process_first(desc="preparing the data"):
        data = load_splits(data_args)
    model = load_model(model_args, method_args, training_args)
    trainer = make_trainer(args, model, tokenizer, data)
    report = runs.train(trainer, args)
    if model_args.export_lora is not None and trainer.is_world_process_zero():
        export_lora(model, model_args.export_lora)
    return report


def main(argv: list[str]) -> None:
    args = parse(argv)
    write_results(args, run_seeds(run, args))


if __name__ == "__main__":
    main(sys.argv[1:])
