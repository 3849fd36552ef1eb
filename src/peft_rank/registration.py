# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Makes PEFT know tuner types that live outside of it.

PEFT keeps its methods in a closed enum (`PeftType`) and four dictionaries. This module adds a member to the enum and
then calls PEFT's own `register_peft_method`. It knows nothing of any particular method. Everything is idempotent and
safe to repeat on a module reload; a name that belongs to somebody else is refused and nothing is overwritten.
"""

from __future__ import annotations

import threading
from typing import Any, Union

import peft.tuners.mixed
import peft.tuners.mixed.model
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method


_LOCK = threading.RLock()


class PeftTypeConflictError(RuntimeError):
    """The name of a PEFT type is owned by another package (a newer PEFT, or somebody else's extension)."""


def add_peft_type(name: str) -> PeftType:
    """Return `PeftType[name]`, creating the member if PEFT does not have it.

    An enum is closed for subclassing and for assignment, but its lookups read a handful of plain containers; a member
    that stands in all of them behaves like any other (iteration, call, `in`, copies, JSON).

    Raises:
        RuntimeError: If this Python keeps its enum members elsewhere, so that the new member would be half known.
    """
    with _LOCK:
        if name in PeftType.__members__:
            return PeftType[name]
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType._member_names_)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        # Python 3.12 and later answer `in` for hashable values from a list of its own
        hashable_values = vars(PeftType).get("_hashable_values_")
        if hashable_values is not None and name not in hashable_values:
            hashable_values.append(name)
        # the metaclass forbids to bind member names, its base does not
        type.__setattr__(PeftType, name, member)

        if not (PeftType(name) is PeftType[name] is getattr(PeftType, name) is member and member in list(PeftType)):
            raise RuntimeError(
                f"`PeftType` could not be extended by {name!r} on this Python version. Please report it together with "
                "the output of `python --version`."
            )
        return member


def register_tuner_type(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> PeftType:
    """Register a tuner type with PEFT.

    Args:
        name (`str`): Lower-case name of the method, e.g. `"salientlora"`. The enum member is the upper-case name.
        config_cls (`type[PeftConfig]`): The configuration class.
        model_cls (`type[BaseTuner]`): The tuner; its `prefix` must be `name + "_"`.

    Returns:
        `PeftType`: The enum member.

    Raises:
        PeftTypeConflictError: If another class owns the name. Nothing is changed in that case.
    """
    key = name.upper()
    with _LOCK:
        owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(key)
        if owner is None:
            member = add_peft_type(key)
            register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, is_mixed_compatible=True)
        elif (owner.__module__, owner.__qualname__) == (config_cls.__module__, config_cls.__qualname__):
            # a reloaded module: same class, new object
            member = PeftType[key]
            PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
            PEFT_TYPE_TO_TUNER_MAPPING[member] = model_cls
            PEFT_TYPE_TO_MIXED_MODEL_MAPPING[member] = model_cls
        else:
            raise PeftTypeConflictError(
                f"The PEFT type {key!r} belongs to {owner.__module__}.{owner.__qualname__}; "
                f"{config_cls.__module__}.{config_cls.__qualname__} was not registered. Uninstall one of the two "
                "packages, or use a version of peft_rank that was released for your version of peft."
            )
    return member


def register_mixed_tuner(
    member: PeftType, config_cls: type[PeftConfig], model_cls: type[BaseTuner], layer_cls: type[BaseTunerLayer]
) -> None:
    """Let `PeftMixedModel` combine the tuner type with PEFT's own.

    PEFT's mixed model dispatches over tuples of its own classes. They are extended here, and the dispatch itself is
    routed through a table (kept on the patched module, so that repeated registrations share one patch).
    """
    mixed = peft.tuners.mixed.model
    with _LOCK:
        tuners: dict[str, type[BaseTuner]] | None = vars(mixed).get("_peft_rank_tuners")
        if tuners is None:
            tuners = mixed._peft_rank_tuners = {}
            _route_mixed_dispatch(mixed.MixedModel, tuners)
        tuners[member.value] = model_cls
        if member not in mixed.COMPATIBLE_TUNER_TYPES:
            types = (*mixed.COMPATIBLE_TUNER_TYPES, member)
            # the name is imported from both places
            mixed.COMPATIBLE_TUNER_TYPES = peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = types
            mixed.PREFIXES.append(model_cls.prefix)
        mixed.Configs = Union[(*mixed.Configs.__args__, config_cls)]
        mixed.Layers = (*mixed.Layers, layer_cls)


def _route_mixed_dispatch(mixed_cls: type[BaseTuner], tuners: dict[str, type[BaseTuner]]) -> None:
    own_create, own_new = mixed_cls._create_and_replace, mixed_cls._create_new_module

    def _create_and_replace(self: BaseTuner, config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        tuner = tuners.get(config.peft_type)
        if tuner is None:
            return own_create(self, config, *args, **kwargs)
        return tuner._create_and_replace(self, config, *args, **kwargs)

    def _create_new_module(config: PeftConfig, *args: Any, **kwargs: Any) -> BaseTunerLayer:
        tuner = tuners.get(config.peft_type)
        return (own_new if tuner is None else tuner._create_new_module)(config, *args, **kwargs)

    mixed_cls._create_and_replace = _create_and_replace
    mixed_cls._create_new_module = staticmethod(_create_new_module)
