# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The one table of tiny architectures that the tests run over: random weights, built in memory, offline, repeatable.

A test that should hold for every family takes the `tiny` fixture of `conftest.py`, or parametrizes over `TINY_MODELS`
itself. A new family is one new row. Nothing here knows of `peft_rank`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)


VOCAB, HIDDEN, LAYERS, HEADS, FFN = 64, 32, 2, 4, 64
PAD, BOS, EOS, FIRST_WORD = 0, 1, 2, 4
SEQUENCE = 12
CYCLE = 16  # language-model sequences count through this many words and start over


class TinyDataset(Dataset):
    """A batch seen as a dataset of dicts, ready for a `Trainer` with the default collator."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.batch.items()}


@dataclass(frozen=True)
class TinyModel:
    """One row of the table: an architecture small enough for every test and the task it can learn.

    Args:
        name: The key in `TINY_MODELS`, and the id of the parametrized tests.
        model_class: The transformers class, head included.
        config_class: Its configuration.
        task_type: PEFT's task type.
        target_modules: The linears that the papers adapt in this family.
        config: What the configuration needs beyond the common ids.
        dropouts: The configuration's dropout fields, all 0 unless `make_model(dropout=...)` says otherwise.
        conv1d: Whether the targets are transformers' `Conv1D`, whose weight is (in, out).
    """

    name: str
    model_class: type[PreTrainedModel]
    config_class: type
    task_type: str
    target_modules: tuple[str, ...]
    config: dict[str, Any]
    dropouts: tuple[str, ...]
    conv1d: bool = False

    def make_model(self, dropout: float = 0.0, seed: int = 0, **config: Any) -> PreTrainedModel:
        """A freshly initialised model in training mode; the same weights for the same seed, the global RNG untouched."""
        settings = {
            "vocab_size": VOCAB,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            **self.config,
            **dict.fromkeys(self.dropouts, dropout),
            **config,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model_class(self.config_class(**settings)).train()

    def make_batch(self, n: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
        """`n` right-padded examples of different lengths, with labels."""
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(SEQUENCE // 2, SEQUENCE + 1, (n, 1), generator=generator)
        attention_mask = (torch.arange(SEQUENCE) < lengths).long()  # (n, sequence)
        if self.task_type == "SEQ_CLS":
            input_ids, labels = _two_vocabularies(n, generator)
        else:
            input_ids = _counting(n, generator)
            labels = input_ids.masked_fill(attention_mask == 0, -100)
        input_ids = input_ids.masked_fill(attention_mask == 0, PAD)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def dataset(self, n: int = 64, seed: int = 0) -> TinyDataset:
        """A task that a few dozen `Trainer` steps visibly learn."""
        return TinyDataset(self.make_batch(n, seed))


def _two_vocabularies(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sentences of class 0 draw their words from the lower half of the vocabulary, those of class 1 from the upper."""
    half = (VOCAB - FIRST_WORD) // 2
    labels = torch.arange(n) % 2
    words = torch.randint(FIRST_WORD, FIRST_WORD + half, (n, SEQUENCE), generator=generator) + half * labels[:, None]
    words[:, 0] = BOS
    return words, labels


def _counting(n: int, generator: torch.Generator) -> torch.Tensor:
    """Sentences that count up, word by word, from a random start."""
    start = torch.randint(CYCLE, (n, 1), generator=generator)
    return FIRST_WORD + (start + torch.arange(SEQUENCE)) % CYCLE


# Wider than the usual 0.02: at width 32 it keeps the layers' outputs, and therefore every comparison, well above rounding.
ENCODER = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "initializer_range": 0.15,
    "num_labels": 2,
}
DEBERTA = {
    **ENCODER,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "layer_norm_eps": 1e-7,
    "pooler_hidden_size": HIDDEN,
}
DECODER = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
GROUPED = {**DECODER, "num_key_value_heads": 2, "intermediate_size": FFN}  # two query heads share a key and value head

DEBERTA_TARGETS = ("query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ENCODER_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
DEBERTA_DROPOUTS = (*ENCODER_DROPOUTS, "pooler_dropout", "cls_dropout")

_ROWS = [
    TinyModel(
        "deberta-v2",
        DebertaV2ForSequenceClassification,
        DebertaV2Config,
        "SEQ_CLS",
        DEBERTA_TARGETS,
        # The convolution beside the first layer and the separate position projections are what v3 has not.
        {**DEBERTA, "position_biased_input": True, "share_att_key": False, "conv_kernel_size": 3, "conv_act": "gelu"},
        DEBERTA_DROPOUTS,
    ),
    TinyModel(
        "deberta-v3",
        DebertaV2ForSequenceClassification,
        DebertaV2Config,
        "SEQ_CLS",
        DEBERTA_TARGETS,
        {**DEBERTA, "position_biased_input": False, "share_att_key": True},
        DEBERTA_DROPOUTS,
    ),
    TinyModel(
        "bert",
        BertForSequenceClassification,
        BertConfig,
        "SEQ_CLS",
        ("query", "key", "value", "intermediate.dense", "output.dense"),
        ENCODER,
        (*ENCODER_DROPOUTS, "classifier_dropout"),
    ),
    TinyModel(
        "bart",
        BartForConditionalGeneration,
        BartConfig,
        "SEQ_2_SEQ_LM",
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        {
            "d_model": HIDDEN,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": FFN,
            "decoder_ffn_dim": FFN,
            "max_position_embeddings": 32,
            "init_std": 0.15,
            "decoder_start_token_id": EOS,
            "forced_eos_token_id": EOS,
        },
        ("dropout", "attention_dropout", "activation_dropout"),
    ),
    TinyModel(
        "t5",
        T5ForConditionalGeneration,
        T5Config,
        "SEQ_2_SEQ_LM",
        ("q", "k", "v", "o", "wi", "wo"),
        {
            "d_model": HIDDEN,
            "d_kv": HIDDEN // HEADS,
            "d_ff": FFN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "relative_attention_num_buckets": 8,
            "decoder_start_token_id": PAD,
        },
        ("dropout_rate",),
    ),
    TinyModel("llama", LlamaForCausalLM, LlamaConfig, "CAUSAL_LM", LLAMA_TARGETS, GROUPED, ("attention_dropout",)),
    TinyModel(
        "mistral", MistralForCausalLM, MistralConfig, "CAUSAL_LM", LLAMA_TARGETS, GROUPED, ("attention_dropout",)
    ),
    TinyModel("qwen2", Qwen2ForCausalLM, Qwen2Config, "CAUSAL_LM", LLAMA_TARGETS, GROUPED, ("attention_dropout",)),
    TinyModel(
        "gpt2",
        GPT2LMHeadModel,
        GPT2Config,
        "CAUSAL_LM",
        ("c_attn", "c_proj", "c_fc"),
        {
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": FFN,
            "n_positions": 32,
            "initializer_range": 0.15,
        },
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        conv1d=True,
    ),
    TinyModel(
        "opt",
        OPTForCausalLM,
        OPTConfig,
        "CAUSAL_LM",
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        {**DECODER, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN, "init_std": 0.15},
        ("dropout", "attention_dropout"),
    ),
]
TINY_MODELS: dict[str, TinyModel] = {row.name: row for row in _ROWS}


def training_arguments(
    output_dir: str | Path, arguments_class: type[TrainingArguments] = TrainingArguments, **overrides: Any
) -> TrainingArguments:
    """Quiet, seeded CPU training arguments that write nothing unless asked to. Any field can be overridden."""
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
        **overrides,
    }
    return arguments_class(**settings)
