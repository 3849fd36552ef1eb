# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Hooks that sum up statistics while a model runs, one batch after the other."""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..decomposition.svd import product
from .batches import Batch, TokenMask, equal_shares, samples_in, singles


_MM_HAS_OUT_DTYPE = Version(torch.__version__).release >= (2, 8)


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _summed_products(left: Tensor, right: Tensor) -> Tensor:
    """sum_k left_k right_k^T of (k, a) and (k, b), in float32 at least: products of half-precision numbers are exact in it."""
    if left.is_cuda and left.dtype == right.dtype in (torch.bfloat16, torch.float16) and _MM_HAS_OUT_DTYPE:
        return torch.mm(left.mT, right, out_dtype=torch.float32)
    dtype = torch.promote_types(_work(left), _work(right))
    return product(left.to(dtype).mT, right.to(dtype))


def _argument(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def _installed(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks, for as long as it lasts."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class FiniteCheck:
    """Numbers on the way that must be finite, looked at once a batch: looking waits for the device."""

    def __init__(self) -> None:
        self._probes: list[tuple[str, Tensor]] = []

    def add(self, name: str, probe: Tensor) -> None:
        self._probes.append((name, probe))

    def look(self, what: str) -> None:
        """
        Raises:
            ValueError: If a number was not finite; names the first module that had it.
        """
        probes, self._probes = self._probes, []
        if not probes or all(bool(torch.isfinite(t).all()) for t in _stacked([probe for _, probe in probes])):
            return
        name = next(name for name, probe in probes if not bool(torch.isfinite(probe)))
        raise ValueError(
            f"NaN or infinity in the {what} of module {name}. Look for it in the batches and in the weights; a model in "
            "float16 overflows easily: load it in bfloat16 or float32."
        )


def _stacked(probes: list[Tensor]) -> Iterator[Tensor]:
    """One tensor a device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for probe in probes:
        by_device.setdefault(probe.device, []).append(probe)
    yield from map(torch.stack, by_device.values())


@dataclass
class _Seen:
    """An input of the present forward, what it adds, and who uses it."""

    tensor: weakref.ref[Tensor]
    version: int
    added: Tensor
    tokens: int
    users: list[str] = field(default_factory=list)

    def is_it(self, x: Tensor) -> bool:
        return self.tensor() is x and self.version == x._version


class InputCollector:
    """
    Sums over tokens of |x| or of x x^T.

    Modules that get the very same tensor, as q, k and v do, are served by one sum: sums are kept by the set of modules
    that used an input together, and a module's own is the total of those of the sets that it is in. So it stays right
    even if modules share their input only at times.

    Args:
        modules (`dict[str, torch.nn.Module]`): By name.
        kind (`str`): `"input_scale"` or `"input_gram"`.
        masks (`TokenMask`): Tells padding.
    """

    def __init__(self, modules: dict[str, nn.Module], kind: str, masks: TokenMask) -> None:
        self.modules, self.gram, self.masks = modules, kind == "input_gram", masks
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.tokens: Counter[str] = Counter()
        self.samples = 0
        self._recent: deque[_Seen] = deque()
        self._finite = FiniteCheck()

    def hooks(self) -> AbstractContextManager[None]:
        return _installed(
            module.register_forward_pre_hook(partial(self._hook, name), with_kwargs=True)
            for name, module in self.modules.items()
        )

    @torch.no_grad()
    def run(self, model: nn.Module, batch: Batch) -> None:
        self.masks.start(batch)
        self.samples += samples_in(batch)
        model(**batch)
        while self._recent:
            self._flush(self._recent.popleft())
        self._finite.look("input")

    def _hook(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = _argument(args, kwargs)
        seen = next((seen for seen in self._recent if seen.is_it(x)), None)
        if seen is None:
            rows = self.masks.rows(name, module, x)
            with torch.autocast(x.device.type, enabled=False):
                added = self._added(rows)
            self._finite.add(name, added.diagonal().sum() if self.gram else added.sum())
            seen = _Seen(weakref.ref(x), x._version, added, len(rows))
            self._recent.append(seen)
            # two are enough for models that use an input again after another one
            if len(self._recent) > 2:
                self._flush(self._recent.popleft())
        seen.users.append(name)

    def _added(self, rows: Tensor) -> Tensor:
        return _summed_products(rows, rows) if self.gram else rows.abs().sum(0, dtype=_work(rows))

    def _flush(self, seen: _Seen) -> None:
        # a module that is called twice with one tensor counts twice
        for users in _rounds(seen.users):
            total = self.sums.get(users)
            self.sums[users] = seen.added.clone() if total is None else total.add_(seen.added.to(total.device))
            self.tokens.update(dict.fromkeys(users, seen.tokens))

    def results(self) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Names of modules, and their common mean, on the CPU."""
        groups: dict[tuple[tuple[str, ...], ...], list[str]] = {}
        for name in self.modules:
            groups.setdefault(tuple(users for users in self.sums if name in users), []).append(name)
        for keys, names in groups.items():
            if keys:
                first, *others = (self.sums[key] for key in keys)
                total = sum((other.to(first.device) for other in others), start=first)
                yield tuple(names), (total / max(self.tokens[names[0]], 1)).cpu()


def _rounds(users: list[str]) -> Iterator[tuple[str, ...]]:
    """Sets of users, each user in as many as it has entries."""
    counts = Counter(users)
    while counts:
        yield tuple(counts)
        counts = Counter({name: count - 1 for name, count in counts.items() if count > 1})


class GradientCollector:
    """
    Sums over samples of the squared gradient of a sample's loss.

    The gradient of a weight is taken from the module's input and the gradient of its output, sum_t dL/dy_t x_t^T, so that
    no weight needs a gradient of its own and a batch gives one for every sample. That takes samples that have equal
    shares in the loss and do not mix within a module; other batches are run sample by sample.

    Args:
        modules (`dict[str, torch.nn.Module]`): By name.
        masks (`TokenMask`): Tells padding.
        loss_scale (`float`): The loss is multiplied by it for backward: gradients would vanish in float16.
    """

    def __init__(self, modules: dict[str, nn.Module], masks: TokenMask, loss_scale: float) -> None:
        self.modules, self.masks, self.loss_scale = modules, masks, loss_scale
        self.sums: dict[str, Tensor] = {}
        self.tokens: Counter[str] = Counter()
        self.samples = 0
        self._size = 1  # samples in the present batch
        self._calls: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()
        self._partial: dict[str, Tensor] = {}
        self._separable = True
        self._finite = FiniteCheck()

    def hooks(self) -> AbstractContextManager[None]:
        return _installed(
            module.register_forward_hook(partial(self._hook, name), with_kwargs=True)
            for name, module in self.modules.items()
        )

    def run(self, model: nn.Module, batch: Batch) -> None:
        if samples_in(batch) > 1 and not (self._separable and equal_shares(batch) and self._run(model, batch)):
            for sample in singles(batch):
                self._run(model, sample)
        elif samples_in(batch) == 1:
            self._run(model, batch)

    def _run(self, model: nn.Module, batch: Batch) -> bool:
        """Run a batch forward and back; False, with nothing done, if a module mixes its samples."""
        self.masks.start(batch)
        self._size = samples_in(batch)
        self._calls.clear()
        self._counted.clear()
        with torch.enable_grad():
            loss = _loss(model(**batch))
            if self._size > 1 and not self._separable:
                return False
            loss.backward(gradient=torch.full_like(loss, self.loss_scale))
        for name in list(self._partial):
            self._add(name, self._partial.pop(name))
        self._finite.look("gradient")
        self.tokens.update(self._counted)
        self.samples += self._size
        return True

    def _hook(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = _argument(args, kwargs)
        self._calls[name] += 1
        if self._size > 1 and (x.shape[0] != self._size or x.ndim < 2 or self._calls[name] > 1):
            self._separable = False
        x, tokens = self.masks.silenced(name, module, x)
        self._counted[name] += tokens
        if not output.requires_grad:
            # the first module of the graph; a clone may be changed in place, a leaf may not
            output = output.detach().requires_grad_().clone()
        output.register_hook(partial(self._receive, name, x))
        return output

    @torch.no_grad()
    def _receive(self, name: str, x: Tensor, gradient: Tensor) -> None:
        self._calls[name] -= 1
        # of one sample, its part in a mean over the batch
        factor = self._size / self.loss_scale
        with torch.autocast(x.device.type, enabled=False):
            for of_y, of_x in zip(
                gradient.reshape(self._size, -1, gradient.shape[-1]),
                x.reshape(self._size, -1, x.shape[-1]),
                strict=True,
            ):
                of_weight = _summed_products(of_y, of_x.to(of_y.device)) * factor
                if self._size > 1:
                    self._add(name, of_weight)
                elif name in self._partial:
                    self._partial[name] += of_weight
                else:
                    self._partial[name] = of_weight
        if self._size == 1 and self._calls[name] == 0:
            self._add(name, self._partial.pop(name))

    def _add(self, name: str, of_weight: Tensor) -> None:
        square = of_weight.square_()
        self._finite.add(name, square.sum())
        total = self.sums.get(name)
        self.sums[name] = square if total is None else total.add_(square)

    def results(self) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """The name of each module, and its mean, on the CPU."""
        for name, total in self.sums.items():
            yield (name,), (total / self.samples).cpu()


def _loss(outputs: Any) -> Tensor:
    if isinstance(outputs, dict):
        loss = outputs.get("loss")
    elif isinstance(outputs, tuple):
        loss = outputs[0]
    else:
        loss = outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            "Gradients need a loss, but the model returned none. Put `labels` into every batch: for a causal language "
            "model `labels=input_ids`, with -100 where there is padding."
        )
    if not loss.requires_grad:
        raise ValueError("The loss does not depend on any of the targeted modules: check `target_modules`.")
    return loss
