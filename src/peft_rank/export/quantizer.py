# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The plug-in by which `from_pretrained` builds a compressed model: an `HfQuantizer` that quantizes nothing.

transformers lets a quantizer change a model between building it (without memory) and loading its weights, and asks
whichever one `config.json` names in `quantization_config`. Once the weights are loaded, nothing is left of it but that
entry: the model is an ordinary one that a Trainer trains.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_rank.tuners.lowrank import LowRankLinear
from peft_rank.tuners.lowrank.entry import QUANT_METHOD, read_entry, record_ranks


# A file that no directory has. Readers that do not know the entry look for it and say that they miss it, instead of
# filling the modules that they find no weights for with random numbers.
ABSENT_WEIGHTS = "import_peft_rank_before_loading.safetensors"


class LowRankQuantizationConfig(QuantizationConfigMixin):
    """
    The entry of `config.json`.

    Args:
        ranks (`dict[str, int]`): Module name -> rank, of the modules that are a `LowRankLinear`.
        quant_method (`str`): `"low_rank"`.
        facts (*optional*): Whatever else was recorded; kept.

    Raises:
        ValueError: If `ranks` is no such mapping.
    """

    def __init__(self, ranks: Mapping[str, int] | None = None, quant_method: str = QUANT_METHOD, **facts: Any) -> None:
        if not isinstance(ranks, Mapping) or not ranks:
            raise ValueError(
                f"`quantization_config.ranks` must map module names to ranks, got {ranks!r}. `config.json` is damaged, or "
                "another program wrote it."
            )
        wrong = {name: rank for name, rank in ranks.items() if type(rank) is not int or rank < 1}
        if wrong:
            raise ValueError(f"`quantization_config.ranks` must hold integers of at least 1, got {wrong}.")
        self.quant_method = quant_method
        self.ranks = dict(ranks)
        vars(self).update(facts)


class LowRankQuantizer(HfQuantizer):
    """Puts a `LowRankLinear` wherever the entry has a rank, and refuses a checkpoint that has no weights for it."""

    # there is no compressing on the fly
    requires_calibration = True
    quantization_config: LowRankQuantizationConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """The first hook that sees the model's configuration: from here on the weights are where they always are."""
        if vars(config).get("transformers_weights") == ABSENT_WEIGHTS:
            del config.transformers_weights
        return config

    # the name of the first hook up to transformers 5.17
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        ranks = _locate(model, self.quantization_config.ranks)
        replace_by_low_rank(model, ranks)
        _check_on_tying(model, ranks)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if "tie_weights" in vars(model):
            # not tied after loading in this version of transformers, hence not checked yet
            model.tie_weights(missing_keys=set())
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        record_ranks(model)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def replace_by_low_rank(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """
    Put an empty `LowRankLinear`, on the meta device, in the place of dense linears.

    Args:
        model (`torch.nn.Module`): Changed in place.
        ranks (`dict[str, int]`): Module name -> rank.

    Raises:
        TypeError: If a module is no linear.
    """
    for name, rank in ranks.items():
        module = model.get_submodule(name)
        shape = linear_shape(module)
        if shape is None:
            raise TypeError(
                f"{name} is to be a linear of rank {rank}, but {type(model).__name__} has a {type(module).__name__} there. "
                "Only `torch.nn.Linear` and `Conv1D` can be of limited rank."
            )
        in_features, out_features, bias = shape
        factors = LowRankLinear(in_features, out_features, rank, bias, device="meta", dtype=module.weight.dtype)
        model.set_submodule(name, factors)


def linear_shape(module: nn.Module | None) -> tuple[int, int, bool] | None:
    """Sizes of input and output of a linear, dense or of limited rank, and whether it has a bias."""
    if isinstance(module, nn.Linear | LowRankLinear):
        return module.in_features, module.out_features, module.bias is not None
    if isinstance(module, Conv1D):
        return (*module.weight.shape, True)
    return None


def _locate(model: PreTrainedModel, ranks: Mapping[str, int]) -> dict[str, int]:
    """
    The ranks under the names that the modules have in this model: a head puts its base model one level deeper.

    Raises:
        ValueError: If a model of the class that was saved, or of any class none of it, has the modules.
    """
    prefix = f"{model.base_model_prefix}."
    modules = {name for name, _ in model.named_modules()}
    found, absent = {}, []
    for name, rank in ranks.items():
        names = [n for n in (name, prefix + name, name.removeprefix(prefix)) if n in modules]
        if names:
            found[names[0]] = rank
        else:
            absent.append(name)
    # other classes may lack a head or a pooler, as they do for dense weights
    if absent and (not found or type(model).__name__ in (model.config.architectures or [])):
        raise ValueError(
            f"{type(model).__name__} has no module {', '.join(absent)}, for which `quantization_config.ranks` in "
            "`config.json` has a rank. The configuration is that of another model, or it was changed after saving."
        )
    return found


def _check_on_tying(model: PreTrainedModel, ranks: Mapping[str, int]) -> None:
    """
    Let the model refuse weights that did not come from the checkpoint.

    transformers would initialize them and mention it in a table. It ties the weights after loading and before it spreads
    the model over devices: the only moment at which a loaded weight can be told from an initialized one.
    """

    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}

    def tie_weights(missing_keys: set[str] | None = None, **kwargs: Any) -> Any:
        if missing_keys is not None:
            del model.tie_weights
            _refuse_unloaded(model, ranks, shapes)
        return type(model).tie_weights(model, missing_keys=missing_keys, **kwargs)

    model.tie_weights = tie_weights


def _refuse_unloaded(model: PreTrainedModel, ranks: Mapping[str, int], shapes: Mapping[str, torch.Size]) -> None:
    """
    Raises:
        RuntimeError: If a factor was not in the checkpoint, or any weight had another shape there.
    """
    unloaded = [
        f"{name}.{key}"
        for name in ranks
        for key, parameter in model.get_submodule(name).named_parameters()
        # on the meta device are weights that stay on the disk
        if not parameter.is_meta and not vars(parameter).get("_is_hf_initialized", False)
    ]
    # up to 5.17, transformers leaves them to quantizers
    unloaded += [key for key, parameter in model.named_parameters() if parameter.shape != shapes[key]]
    if unloaded:
        raise RuntimeError(
            f"{model.name_or_path} does not hold the weights of {', '.join(unloaded)} in the shapes that `config.json` tells. "
            "The directory is damaged or incomplete: save the compressed model again."
        )


def _guard(path: Path) -> None:
    """Have a `config.json` send readers that do not know of limited ranks to a file that does not exist."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["transformers_weights"] = ABSENT_WEIGHTS
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _guard_saved_configs() -> None:
    """Whatever saves a compressed model saves its configuration by this method, which keeps no `transformers_weights`."""
    own = vars(PreTrainedConfig).get("_peft_rank_own_to_json_file")
    if own is None:
        own = PreTrainedConfig._peft_rank_own_to_json_file = PreTrainedConfig.to_json_file

    @wraps(own)
    def to_json_file(
        self: PreTrainedConfig, json_file_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        own(self, json_file_path, *args, **kwargs)
        if read_entry(self) is not None:
            _guard(Path(json_file_path))

    PreTrainedConfig.to_json_file = to_json_file


def register_low_rank() -> None:
    """
    Let transformers load compressed models, and save them so that it refuses them without us. Repeating it changes nothing.

    Raises:
        RuntimeError: If the name belongs to another package. Nothing is changed in that case.
    """
    places = (
        (AUTO_QUANTIZER_MAPPING, register_quantizer, LowRankQuantizer),
        (AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config, LowRankQuantizationConfig),
    )
    for mapping, _, own in places:
        owner = mapping.get(QUANT_METHOD)
        if owner is not None and (owner.__module__, owner.__qualname__) != (own.__module__, own.__qualname__):
            raise RuntimeError(
                f"The quantization method {QUANT_METHOD!r} belongs to {owner.__module__}.{owner.__qualname__}. Uninstall "
                "one of the two packages, or use a release of peft_rank for your version of transformers."
            )
    for mapping, register, own in places:
        # a reloaded module brings new classes, which transformers does not register twice
        mapping.pop(QUANT_METHOD, None)
        register(QUANT_METHOD)(own)
    _guard_saved_configs()
