# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Classification models under the compared methods: what is adapted, and what is trained whole."""

from typing import NamedTuple

from common import methods
from common.methods import MethodArguments
from peft import PeftConfig, PeftModel, TaskType
from peft.utils import ModulesToSaveWrapper
from transformers import PretrainedConfig, PreTrainedModel


class Family(NamedTuple):
    """The linear layers of an encoder's blocks, and what its config calls the dropout before the classifier."""

    target_modules: list[str]
    dropout: str


# "output.dense" matches the attention's output and the feed-forward's; no name here matches a pooler or classifier.
_BERT = Family(["query", "key", "value", "intermediate.dense", "output.dense"], "classifier_dropout")
FAMILIES = {
    "deberta-v2": Family(
        ["query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"], "cls_dropout"
    ),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": Family(["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"], "seq_classif_dropout"),
    "modernbert": Family(["Wqkv", "Wi", "Wo"], "classifier_dropout"),
}


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of what stands on top of the encoder: everything beside it that has weights, and the encoder's own pooler."""
    body = model.base_model
    beside = [name for name, child in model.named_children() if child is not body and list(child.parameters())]
    return beside + [f"{model.base_model_prefix}.{name}" for name, _ in body.named_children() if name == "pooler"]


def check_new_weights_are_kept(model: PeftModel, new_weights: list[str]) -> None:
    """Refuse a model with weights that the checkpoint did not hold, and that would be neither trained nor saved."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    kept = tuple(name.removeprefix("base_model.model.") + "." for name in wrapped)
    lost = [name for name in new_weights if not name.startswith(kept)]
    if lost:
        raise ValueError(
            f"The checkpoint has no weights for {lost}: they are random, and would be neither trained nor saved. "
            "Name their modules in --modules_to_save."
        )


def family_of(config: PretrainedConfig) -> Family:
    """What is known of the model's family."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"No defaults for the {config.model_type!r} family: set --target_modules, and leave out --classifier_dropout."
        )
    return FAMILIES[config.model_type]


def adapter_config(args: MethodArguments, model: PreTrainedModel) -> PeftConfig:
    """The PEFT config of the chosen method: the blocks' linear layers are adapted, the head is trained whole."""
    targets = args.target_modules or family_of(model.config).target_modules
    return methods.adapter_config(args, TaskType.SEQ_CLS, targets, head_modules(model))
