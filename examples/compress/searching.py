# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Ranks that are learned, instead of following from a ratio: by ARS or L2LRC, on the training data, before any healing."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

from peft_rank import AdaptiveRankSVDConfig, L2LRCConfig, RankAllocationCallback


METHODS = {"ars": (AdaptiveRankSVDConfig, 1e-3), "l2lrc": (L2LRCConfig, 5e-2)}


@dataclass
class SearchArguments:
    """Whether ranks are learned, and how."""

    search: Literal["none", "ars", "l2lrc"] = field(
        default="none", metadata={"help": "Learn the ranks; `allocation` and `rank` then mean nothing."}
    )
    search_steps: int = field(default=1000, metadata={"help": "Optimizer steps of the search."})
    search_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the masks' parameters. Default: 1e-3 for ars, 5e-2 for l2lrc."}
    )
    search_batch_size: int = field(default=8, metadata={"help": "Samples in a step."})
    search_accumulation: int = field(default=1, metadata={"help": "Parts that a step is cut into, to save memory."})
    search_settings: str | None = field(
        default=None,
        metadata={"help": 'Further fields of the config, as JSON: \'{"compression_weight": 8, "patience": 100}\'.'},
    )

    def search_config(self, **common: Any) -> AdaptiveRankSVDConfig | L2LRCConfig:
        return METHODS[self.search][0](**common, **json.loads(self.search_settings or "{}"))


def search(
    model: PreTrainedModel,
    config: AdaptiveRankSVDConfig | L2LRCConfig,
    arguments: SearchArguments,
    training: TrainingArguments,
    train_set: torch.utils.data.Dataset,
    collator: Any,
) -> PreTrainedModel:
    """The plain compressed model; `ranks.jsonl` in the output folder tells how the search went."""
    rate = arguments.search_learning_rate or METHODS[arguments.search][1]
    settings = TrainingArguments(
        output_dir=str(Path(training.output_dir, "search")),
        max_steps=arguments.search_steps,
        per_device_train_batch_size=arguments.search_batch_size // arguments.search_accumulation,
        gradient_accumulation_steps=arguments.search_accumulation,
        learning_rate=rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        bf16=training.bf16,
        seed=training.seed,
        use_cpu=training.use_cpu,
        disable_tqdm=training.disable_tqdm,
        logging_steps=max(1, arguments.search_steps // 20),
        save_strategy="no",
        report_to="none",
    )
    searched = get_peft_model(model, config)
    callback = RankAllocationCallback()
    Trainer(searched, settings, train_dataset=train_set, data_collator=collator, callbacks=[callback]).train()
    return searched.get_base_model()
