# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What calibration found out about the modules of a model, kept by their names and bound to that model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..decomposition import STATISTIC
from .targets import base_model, sketch, weight_shape


FORMAT = "1"
_KEY = "peft_rank_calibration"
# half a unit in the last place of bfloat16, with some room; and that of a subnormal float16
_RELATIVE, _ABSOLUTE = 2.0**-7, 1e-7


def statistic_for(method: str) -> str | None:
    """What has to be collected for a method: `"input_scale"`, `"input_gram"`, `"fisher"`, `"importance"`, or nothing.

    The last two are both a `weight_importance` to `decompose`, but different ones.

    Raises:
        ValueError: If the method is unknown.
    """
    if method not in STATISTIC:
        raise ValueError(f"`decomposition` must be one of {', '.join(STATISTIC)}, got {method!r}.")
    if STATISTIC[method] == "weight_importance":
        return "importance" if method == "importance" else "fisher"
    return STATISTIC[method]


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names for a message, the first few of them if they are many."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass
class CalibrationStatistics:
    """
    Statistics of the modules of one model, as [`calibrate`] collects them. Tensors are on the CPU, in float32 (float64
    for a float64 model).

    Args:
        tensors (`dict[str, dict[str, Tensor]]`): By statistic, then by plain module name: `"input_scale"` (in,), mean
            absolute input; `"input_gram"` (in, in), mean of x x^T over tokens; `"fisher"` (out, in), mean of squared
            per-sample gradients; `"importance"` (out, in), mean of (w dL/dw)^2. Modules that share their input share
            the tensor.
        tokens (`dict[str, int]`): Tokens that each module saw, padding left out where it could be told apart.
        samples (`int`): Samples in all.
        shapes (`dict[str, tuple[int, int]]`): (out, in) of each module.
        sketches (`dict[str, Tensor]`): Some entries of each weight, which tell a wrong model.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    sketches: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Plain names of the modules, in the order of the model."""
        return list(self.shapes)

    def for_module(self, name: str, method: str | None = None) -> dict[str, Tensor]:
        """The statistics of a module, as keyword arguments of `decompose`.

        Args:
            name (`str`): Plain name of the module in the base model.
            method (`str`, *optional*): What to decompose by. Given, exactly what it needs is returned.

        Raises:
            ValueError: If the module, or what the method needs, was not calibrated; or, without a method, if both kinds
                of `weight_importance` were.
        """
        if name not in self.shapes:
            raise ValueError(
                f"No statistics for module {name!r}: calibrated were {listed(self.shapes)}. Calibrate again with a "
                "config of the same `target_modules`, `exclude_modules` and `layers_to_transform`."
            )
        if method is None:
            found = list(self.tensors)
        else:
            needed = statistic_for(method)
            if needed is not None and needed not in self.tensors:
                raise ValueError(
                    f"Decomposition {method!r} needs the statistic {needed!r} of module {name!r}, calibrated were "
                    f"{listed(self.tensors) or 'none'}. Calibrate again with a config of `decomposition={method!r}`."
                )
            found = [needed] if needed is not None else []
        if {"fisher", "importance"} <= set(found):
            raise ValueError(
                "Both 'fisher' and 'importance' were calibrated, which are different `weight_importance`: say which "
                "`method` they are for."
            )
        arguments = {"fisher": "weight_importance", "importance": "weight_importance"}
        return {arguments.get(kind, kind): self.tensors[kind][name] for kind in found}

    def check(self, model: nn.Module) -> None:
        """Make sure that the statistics belong to this model, or to the same weights in another dtype or elsewhere.

        Args:
            model (`torch.nn.Module`): Before or after its modules were replaced by adapters.

        Raises:
            ValueError: If calibrated modules are missing, have another shape or other weights.
        """
        modules = dict(base_model(model).named_modules())
        remedy = "Load the model that was calibrated, or calibrate this one."
        missing = [name for name in self.shapes if name not in modules]
        if missing:
            raise ValueError(
                f"The statistics belong to another model: this {type(base_model(model)).__name__} has no module "
                f"{listed(missing)}. {remedy}"
            )
        changed = []
        for name, shape in self.shapes.items():
            found = weight_shape(name, modules[name])
            if found != shape:
                raise ValueError(
                    f"The statistics belong to another model: the weight of {name} was {shape} (out, in), here it is "
                    f"{found}. {remedy}"
                )
            if not _same_weight(self.sketches.get(name), sketch(modules[name])):
                changed.append(name)
        if changed:
            raise ValueError(
                f"The statistics belong to another model: names and shapes agree, but not the weights of "
                f"{listed(changed)}. {remedy}"
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; what modules share is in it once.

        Args:
            path (`str` or `Path`): The file.
        """
        stored: dict[str, Tensor] = {}
        owners: dict[str, dict[str, str]] = {}
        for kind, by_name in self.tensors.items():
            first: dict[int, str] = {}
            owners[kind] = {name: first.setdefault(id(tensor), name) for name, tensor in by_name.items()}
            stored |= {f"{kind}:{name}": by_name[name].contiguous() for name in first.values()}
        stored |= {f"sketch:{name}": tensor for name, tensor in self.sketches.items()}
        description = {
            "format": FORMAT,
            "samples": self.samples,
            "modules": {name: {"shape": self.shapes[name], "tokens": self.tokens[name]} for name in self.shapes},
            "owners": owners,
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, path, metadata={_KEY: json.dumps(description)})

    @classmethod
    def load(cls, path: str | Path) -> CalibrationStatistics:
        """Read what `save` wrote.

        Args:
            path (`str` or `Path`): The file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist: write it by `calibrate(...).save(path)`.")
        try:
            with safe_open(path, framework="pt") as file:
                description = json.loads((file.metadata() or {}).get(_KEY, "null"))
                if description is None or description["format"] != FORMAT:
                    raise ValueError(
                        f"{path} holds no statistics that this version reads: write it by `calibrate(...).save(path)`."
                    )
                stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): calibrate again.") from error
        modules, owners = description["modules"], description["owners"]
        return cls(
            tensors={
                kind: {name: stored[f"{kind}:{owner}"] for name, owner in by_name.items()}
                for kind, by_name in owners.items()
            },
            tokens={name: entry["tokens"] for name, entry in modules.items()},
            samples=description["samples"],
            shapes={name: tuple(entry["shape"]) for name, entry in modules.items()},
            sketches={name: stored[key] for name in modules if (key := f"sketch:{name}") in stored},
        )


def _same_weight(before: Tensor | None, now: Tensor | None) -> bool:
    """Equal up to the rounding of a move to another dtype; what is not in memory cannot be told apart."""
    if before is None or now is None:
        return True
    return bool(torch.isclose(now, before, rtol=_RELATIVE, atol=_ABSOLUTE).all())


def empty_statistics(targets: dict[str, nn.Module]) -> CalibrationStatistics:
    """Bound to the model, without any statistic yet."""
    sketches = {name: sketch(module) for name, module in targets.items()}
    return CalibrationStatistics(
        tokens=dict.fromkeys(targets, 0),
        shapes={name: weight_shape(name, module) for name, module in targets.items()},
        sketches={name: entries for name, entries in sketches.items() if entries is not None},
    )


def statistics_for_config(config: PeftConfig) -> str | None:
    """What to collect for a compression config.

    Raises:
        TypeError: If the config has no `decomposition`.
    """
    if "decomposition" not in vars(config):
        raise TypeError(
            f"`config` must be of a compression method, one with a field `decomposition` such as `LowRankConfig`, got "
            f"{type(config).__name__}."
        )
    return statistic_for(config.decomposition)
