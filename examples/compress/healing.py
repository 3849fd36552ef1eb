# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""
What is trained after compression, and how it becomes part of the compressed model again.

| heal | what is trained |
|---|---|
| none | nothing |
| full | every weight |
| factors | the factors, and the head of a classifier |
| lora | a LoRA on both factors of every compressed module, merged into them at the end |
| salientlora | the same with ranks that are allocated while it trains |
"""

from dataclasses import dataclass, field
from typing import Literal

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer

from peft_rank import LowRankLinear, RankAllocationCallback, SalientLoRAConfig


@dataclass
class HealingArguments:
    """How the compressed model is trained again."""

    heal: Literal["none", "full", "factors", "lora", "salientlora"] = field(
        default="none", metadata={"help": "What is trained after compression."}
    )
    heal_r: int = field(default=8, metadata={"help": "Rank of lora; mean rank of salientlora after its allocation."})
    heal_init_r: int = field(default=12, metadata={"help": "Rank of salientlora before its allocation."})
    heal_alpha: float | None = field(default=None, metadata={"help": "lora_alpha. Default: 2 * heal_r for lora."})
    max_damage: float = field(
        default=100.0,
        metadata={
            "help": "Refuse to heal a language model whose perplexity grew by more than this factor: it has to be compressed "
            "less, or better."
        },
    )

    def __post_init__(self):
        if not 1 <= self.heal_r <= self.heal_init_r:
            raise ValueError(f"heal_r must be between 1 and heal_init_r={self.heal_init_r}, but is {self.heal_r}.")


def factor_names(model: nn.Module) -> list[str]:
    """Names of the two linears in every compressed module."""
    return [
        f"{name}.{factor}"
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
        for factor in ("down", "up")
    ]


def head_names(model: PreTrainedModel) -> list[str]:
    """What stands on top of the body and has weights of its own, unless it is tied to the embeddings."""
    if model.get_output_embeddings() is not None:
        return []
    return [
        name for name, child in model.named_children() if child is not model.base_model and list(child.parameters())
    ]


def prepare(model: PreTrainedModel, args: HealingArguments) -> PreTrainedModel | PeftModel:
    """The model with what is to be trained, and nothing else, trainable."""
    if args.heal in ("lora", "salientlora"):
        common = {"target_modules": factor_names(model), "modules_to_save": head_names(model) or None}
        if args.heal == "lora":
            config = LoraConfig(r=args.heal_r, lora_alpha=args.heal_alpha or 2 * args.heal_r, **common)
        else:
            config = SalientLoRAConfig(
                init_r=args.heal_init_r, target_r=args.heal_r, lora_alpha=args.heal_alpha, **common
            )
        return get_peft_model(model, config)
    trained = [*factor_names(model), *head_names(model)] if args.heal == "factors" else [""]
    model.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    return model


def add_allocation(trainer: Trainer, args: HealingArguments) -> None:
    """SalientLoRA has to be told of every optimizer step."""
    if args.heal == "salientlora":
        trainer.add_callback(RankAllocationCallback())


def finish(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Adapters merged into the factors: again a compressed model, of the same size."""
    model = model.merge_and_unload() if isinstance(model, PeftModel) else model
    return model.requires_grad_(True)
