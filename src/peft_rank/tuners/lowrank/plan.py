# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Which modules of a model are factorized, at which rank, and the factors: decided before anything is replaced."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from peft.utils.other import get_pattern_key, transpose
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ...allocation.parameters import (
    TILE,
    Shape,
    align_rank,
    break_even,
    comparable,
    default_multiple,
    parameter_budget,
    spectral_ranks,
    uniform_ranks,
)
from ...calibration.targets import linear, weight_of, weight_shape
from ...decomposition import ITERATIVE, STATISTIC, Factors, decompose, weighted_spectrum, weighted_svd
from ...decomposition.parallel import in_parallel, workers_within
from ...decomposition.svd import balanced
from .config import CompressionConfig, LowRankConfig
from .layer import FactorizedLinear
from .linear import LowRankLinear


T = TypeVar("T")

PROGRESS_AFTER = 5  # seconds


def check_target(name: str, module: nn.Module, **kwargs: Any) -> Shape:
    """
    Make sure that a module can be factorized.

    Args:
        name (`str`): Its name, for messages.
        module (`torch.nn.Module`): The module.
        kwargs: What `get_quantization_kwargs` returned.

    Returns:
        `tuple[int, int]`: (out, in) of its weight.

    Raises:
        TypeError: If it is neither an `nn.Linear` nor a `Conv1D`, is quantized, has an adapter of another method, or
            does more with its weight than multiply.
    """
    leave = "Leave it out of `target_modules`, or name it in `exclude_modules`."
    if isinstance(module, BaseTunerLayer) and not isinstance(module, FactorizedLinear):
        raise TypeError(
            f"Target module {name} has an adapter of another method ({type(module).__name__}). Merge or unload that first."
        )
    base = linear(module)
    if resolve_quantization_backend(base, **kwargs) is not None:
        raise TypeError(
            f"Target module {name} is quantized ({type(base).__name__}), so that there is no weight to decompose. Load "
            "the model without quantization, compress it, and quantize the factors afterwards."
        )
    shape = weight_shape(name, module)
    if not _multiplies_only(base):
        raise TypeError(
            f"Target module {name} is a {type(base).__name__}, which does more than a linear: factors cannot stand in for "
            f"it. {leave}"
        )
    if base.weight.element_size() < 2:
        raise TypeError(f"The weight of target module {name} is {base.weight.dtype}, too coarse to decompose. {leave}")
    return shape


@torch.no_grad()
def _multiplies_only(module: nn.Module) -> bool:
    """Whether a linear is one, also where a subclass spells out the product."""
    if isinstance(module, Conv1D) or type(module).forward is nn.Linear.forward:
        return True
    with weight_of(module) as weight:
        x = torch.linspace(-1, 1, 2 * module.in_features, device=weight.device).view(2, -1).to(weight.dtype)
        if weight.is_meta:
            return False
        try:
            found, expected = module(x), F.linear(x, weight, module.bias)
            return bool(torch.linalg.vector_norm((found - expected).float()) <= 1e-2 * expected.float().norm())
        except (TypeError, ValueError, AttributeError, RuntimeError):  # of other arguments or results
            return False


def check_dense(names: Iterable[str], model: nn.Module) -> None:
    """
    Refuse what is no linear of its own: linears of limited rank, their factors, and those of which the module that they are
    in takes the weight instead of calling them, as Mamba's `dt_proj`.

    Raises:
        TypeError: If there is one.
    """
    for name in names:
        parent_name, _, child_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if any(isinstance(owner, LowRankLinear) for owner in (model.get_submodule(name), parent)):
            raise TypeError(
                f"Target module {name} is compressed already. To compress it further, go back to its dense weight first: "
                "`peft_rank.densify(model)`. Or leave it out of `target_modules`."
            )
        code, weight = _code_of(type(parent)), f"self.{child_name}.weight"
        if f"{weight} @" in code or (weight in code and f"self.{child_name}(" not in code):
            raise TypeError(
                f"Target module {name} is not called: {type(parent).__name__} computes with its weight, which factors do "
                "not have. Leave it out of `target_modules`, or name it in `exclude_modules`."
            )


@cache
def _code_of(module_class: type[nn.Module]) -> str:
    """The methods of a module that compute something, as far as there is any source."""
    code = []
    for owner in module_class.__mro__[: module_class.__mro__.index(nn.Module)]:
        for name, method in vars(owner).items():
            if inspect.isfunction(method) and "init" not in name and "reset" not in name:
                with suppress(OSError, TypeError):
                    code.append(inspect.getsource(method))
    return "\n".join(code)


def check_untied(names: Iterable[str], modules: Mapping[str, nn.Module], model: nn.Module) -> None:
    """
    Refuse modules that share their weight.

    Raises:
        ValueError: If one does, with an embedding say.
    """
    # a module of two names is replaced under one of them only
    named = model.named_modules(remove_duplicate=False)
    owners = Counter(id(p) for _, module in named for p in module.parameters(recurse=False))
    tied = [name for name in names if owners[id(linear(modules[name]).weight)] > 1]
    if tied:
        raise ValueError(
            f"The weight of {', '.join(tied)} is shared with another module of the model, as that of a head tied to the "
            "embeddings, which would not follow. Name it in `exclude_modules`, or load the model with "
            "`tie_word_embeddings=False`."
        )


def work_device(weight: Tensor) -> torch.device:
    """Where a weight is decomposed: where it is, or on a CUDA device if there is one."""
    if weight.device.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return weight.device


def multiples(modules: Mapping[str, nn.Module], shapes: Mapping[str, Shape], config: CompressionConfig) -> list[int]:
    """`rank_multiple` of every module."""
    if config.rank_multiple is not None:
        return [config.rank_multiple] * len(shapes)
    return [default_multiple(shape, work_device(linear(modules[name]).weight)) for name, shape in shapes.items()]


def uncompressed_parameters(modules: Mapping[str, nn.Module], model: nn.Module, config: CompressionConfig) -> int:
    """Parameters that a ratio counts besides the targeted weights: their biases, or the rest of the model, what is tied
    once and adapters not at all."""
    if config.ratio_scope == "targets":
        return sum(0 if base.bias is None else base.bias.numel() for base in map(linear, modules.values()))
    left_out = {id(linear(module).weight) for module in modules.values()}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            left_out |= {id(p) for name in layer.adapter_layer_names for p in getattr(layer, name).parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in left_out)


def given_ranks(shapes: Mapping[str, Shape], steps: Iterable[int], config: LowRankConfig) -> dict[str, int | None]:
    """Ranks as the configuration says, aligned if it says so or tiles matter; those of a saved adapter as they are."""
    ranks, moved = {}, set()
    for (name, shape), multiple in zip(shapes.items(), steps, strict=True):
        multiple = 1 if config.rank_multiple is None and multiple < TILE else multiple
        default = None if config.factors_saved else config.rank
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), default)
        ranks[name] = rank if rank is None or config.factors_saved else align_rank(rank, shape, multiple)
        if ranks[name] not in (rank, None):
            moved.add((rank, ranks[name], multiple))
    if moved:
        changes = ", ".join(f"{rank} to {aligned} (a multiple of {step})" for rank, aligned, step in sorted(moved))
        warnings.warn(
            f"Ranks were aligned to the hardware: {changes}. `rank_multiple=1` keeps them as they are.", stacklevel=2
        )
    return ranks


def statistics_by_module(
    names: Iterable[str], model: nn.Module, config: CompressionConfig
) -> dict[str, dict[str, Tensor]]:
    """
    What `decompose` needs besides the weights.

    Raises:
        ValueError: If there are no statistics where some are needed, or those of another model or other modules.
    """
    if STATISTIC[config.decomposition] is None:
        return {name: {} for name in names}
    if config.statistics is None:
        raise ValueError(
            f"`decomposition={config.decomposition!r}` weighs by statistics, and `statistics` is None. Collect them on the "
            "model before it is compressed: `config.statistics = peft_rank.calibrate(model, batches, config=config)`."
        )
    config.statistics.check(model)
    return {name: config.statistics.for_module(name, config.decomposition) for name in names}


class Split(NamedTuple):
    """
    What a budget has to know of a weight.

    Args:
        values (`Tensor`): What every rank is worth in the metric of the decomposition, shape (min(out, in),), float64.
        factors (`Factors`, *optional*): Of the highest rank whose factors are smaller than the weight; those of lower
            ranks are their beginning. Iterative decompositions have none. All on the CPU.
    """

    values: Tensor
    factors: Factors | None


def split_weights(modules: Mapping[str, nn.Module], model: nn.Module, config: LowRankConfig) -> dict[str, Split]:
    """Decompose every weight once, before its rank is known."""
    statistics = statistics_by_module(modules, model, config)

    def split(name: str, weight: Tensor) -> Split:
        how = {"alpha": config.alpha, **statistics[name]}
        if config.decomposition in ITERATIVE:
            return Split(weighted_spectrum(weight, config.decomposition, **how).cpu(), None)
        highest = max(1, break_even(tuple(weight.shape)))
        up, down, values = weighted_svd(weight, config.decomposition, rank=highest, **how)
        factors = (factor.to(weight.dtype).cpu() for factor in balanced(up, down))
        return Split(values.double().cpu(), Factors(*factors))

    return over_weights(split, modules, modules, statistics)


def choose_ranks(
    modules: Mapping[str, nn.Module], shapes: Mapping[str, Shape], model: nn.Module, config: LowRankConfig
) -> tuple[dict[str, int | None], dict[str, Split]]:
    """
    A rank for every targeted module, None for those that stay dense, and what was split to choose them.

    Raises:
        ValueError: If `ratio` cannot be reached, or statistics are missing.
    """
    steps = multiples(modules, shapes, config)
    if config.ratio is None or config.factors_saved:
        return given_ranks(shapes, steps, config), {}
    sizes = list(shapes.values())
    budget = parameter_budget(sizes, config.ratio, others=uncompressed_parameters(modules, model, config))
    splits: dict[str, Split] = {}
    if config.allocation == "uniform":
        ranks = uniform_ranks(sizes, budget, rank_multiple=steps)
    else:
        splits = split_weights(modules, model, config)
        spectra = [comparable(splits[name].values, config.sums_amounts) for name in shapes]
        ranks = spectral_ranks(spectra, sizes, budget, rank_multiple=steps)
    return dict(zip(shapes, ranks, strict=True)), splits


def factorize(
    ranks: Mapping[str, int],
    modules: Mapping[str, nn.Module],
    model: nn.Module,
    config: CompressionConfig,
    splits: dict[str, Split] | None = None,
) -> dict[str, Factors]:
    """
    The factors of every module, in the dtype of its weight.

    Args:
        ranks (`Mapping[str, int]`): By module name.
        modules, model, config: What they are of.
        splits (`dict[str, Split]`, *optional*): Decompositions that were made already; emptied.
    """
    factors = {}
    for name in list(splits or ()):
        split = splits.pop(name)
        if name in ranks and split.factors is not None:
            up, down = split.factors
            # copies: views would keep the ranks that are left out
            up = up[:, : ranks[name]].clone(memory_format=torch.contiguous_format)
            factors[name] = Factors(up, down[: ranks[name]].clone())
    left = [name for name in ranks if name not in factors]
    statistics = statistics_by_module(left, model, config)

    def work(name: str, weight: Tensor) -> Factors:
        if weight.is_meta:
            return empty_factors(ranks[name], modules[name], weight.device)
        found = decompose(weight, ranks[name], config.decomposition, alpha=config.alpha, **statistics[name])
        # on the CPU if there is to be no room for both them and the weights
        device = torch.device("cpu") if config.offload_dense else device_of(modules[name])
        return Factors(*(factor.to(device) for factor in found))

    return factors | over_weights(work, left, modules, statistics)


def over_weights(
    work: Callable[[str, Tensor], T],
    names: Iterable[str],
    modules: Mapping[str, nn.Module],
    statistics: Mapping[str, Mapping[str, Tensor]],
    description: str = "Decomposing",
) -> dict[str, T]:
    """`work(name, weight)` of every module, with the weight (out, in) where it is to be decomposed: on a CUDA device if
    there is one, several at a time if it has room for them."""
    groups: dict[torch.device, list[str]] = {}
    for name in names:
        groups.setdefault(work_device(linear(modules[name]).weight), []).append(name)

    def call(name: str) -> T:
        with dense_weight(modules[name]) as weight, naming(name):
            return work(name, weight if weight.is_meta else weight.to(work_device(weight)))

    results: dict[str, T] = {}
    total = sum(map(len, groups.values()))
    with tqdm(total=total, desc=description, unit="module", delay=PROGRESS_AFTER) as progress:
        for device, group in groups.items():
            needed = max(working_bytes(weight_shape(name, modules[name]), statistics[name]) for name in group)
            found = in_parallel(call, group, workers_within(needed, device), device)
            for name, result in zip(group, found, strict=True):
                results[name] = result
                progress.update()
            if device.type == "cuda":
                torch.cuda.empty_cache()  # what only these streams could use again
    return results


def working_bytes(shape: Shape, statistics: Mapping[str, Tensor]) -> int:
    """What a decomposition takes at the most: some copies of the weight and of its statistics in float64."""
    out_features, in_features = shape
    return 8 * (8 * out_features * in_features + 5 * sum(tensor.numel() for tensor in statistics.values()))


def empty_factors(rank: int, module: nn.Module, device: torch.device) -> Factors:
    """Factors that are still to be loaded: NaN, or on the meta device."""
    out_features, in_features = weight_shape("", module)
    sizes = (out_features, rank), (rank, in_features)
    dtype = linear(module).weight.dtype
    return Factors(*(torch.full(size, torch.nan, dtype=dtype, device=device) for size in sizes))


@contextmanager
def dense_weight(module: nn.Module) -> Iterator[Tensor]:
    """The weight (out, in) that factors stand in for, whatever was merged into it."""
    if isinstance(module, FactorizedLinear):
        yield transpose(module.original_weight(), module.fan_in_fan_out)
        return
    with weight_of(module) as weight:
        yield weight


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes."""
    if isinstance(module, FactorizedLinear):
        return module.lowrank_device
    with weight_of(module) as weight:
        return weight.device


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Say in a ValueError which module it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Module {name}: {error}") from error
