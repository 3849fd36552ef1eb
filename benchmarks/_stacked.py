# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Many small trainings of one shape as one: the frozen model runs once for all of them, in one CUDA graph.

A training of a small model is hundreds of kernels that do not fill a GPU. Here the batches of K trainings are one batch, each
adapted linear adds every training's own update to its own rows, and one optimizer step moves them all. What decides on
ranks is the tuner of each training itself: the parameters of its `PeftModel` are views of the stacked ones.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from _stacked_parts import ADAPTER, StackedLinear, kept_parameters, trained_parameters
from peft import AdaLoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_rank import SalientLoRAConfig
from peft_rank.allocation.salience import salience_scores
from peft_rank.orthogonality import orthogonality, orthogonality_with_gradient
from peft_rank.tuners.salientlora import allocator as salient_allocator


Scores = Callable[..., Tensor]
Losses = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def scored_by(scores: Scores | None) -> Iterator[None]:
    """Other scores in the place of the salience, for ablations."""
    if scores is not None:
        salient_allocator.salience_scores = scores
    try:
        yield
    finally:
        salient_allocator.salience_scores = salience_scores


class StackedTraining:
    """K trainings that are advanced a step at a time: AdamW, 6 % warm-up, then linear decay.

    Args:
        template (`nn.Module`): The base model; its tensors are shared by the `models`. It is taken apart, and runs in
            bfloat16 on a GPU, with the trained parameters in float32.
        models (`Sequence[PeftModel]`): One a training, of one method and one shape.
        rows (`dict[str, Tensor]`): The training set on the device, all rows of one shape.
        orders (`Tensor`): (K, steps, batch), the rows of each step.
        lrs (`Sequence[float]`): Highest learning rate of each training.
        losses (`Callable`): (K, batch, ...) logits and (K, batch, ...) labels to the (K,) losses.
        scores (`Sequence`, *optional*): Of each training, what stands in for the salience.
        lr_factors (`Sequence`, *optional*): Of each training, factors of the learning rate for `A`, `E`, `B`, `other`.
    """

    def __init__(
        self,
        template: nn.Module,
        models: Sequence[PeftModel],
        rows: dict[str, Tensor],
        orders: Tensor,
        lrs: Sequence[float],
        losses: Losses,
        scores: Sequence[Scores | None] | None = None,
        lr_factors: Sequence[dict[str, float]] | None = None,
    ) -> None:
        self.template, self.models, self.rows, self.orders, self.losses = (
            template.train(),
            models,
            rows,
            orders,
            losses,
        )
        self.device, self.cuda = orders.device, orders.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.count, self.steps, self.done = len(models), orders.shape[1], 0
        self.scores = scores or [None] * self.count
        self.tuners = [model.base_model for model in models]
        self.configs = [model.active_peft_config for model in models]
        self.salient = isinstance(self.configs[0], SalientLoRAConfig)
        self.adalora = isinstance(self.configs[0], AdaLoraConfig)
        self._stack_parameters()
        self._stack_modules()
        if self.salient:
            self._follow_salientlora()
        if self.adalora:
            self._follow_adalora()
        factors = lr_factors or [{}] * self.count
        by_peak: dict[float, list[nn.Parameter]] = {}
        for kind, leaves in self.leaves.items():
            for k, leaf in enumerate(leaves):
                by_peak.setdefault(lrs[k] * factors[k].get(kind, 1.0), []).append(leaf)
        self.peaks = torch.tensor(list(by_peak), device=self.device)
        self.lrs = self.peaks.clone()
        groups = [{"params": part, "lr": lr} for part, lr in zip(by_peak.values(), self.lrs.unbind(), strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, capturable=self.cuda, fused=self.cuda)
        self.batch = {key: value[orders[:, 0].flatten()] for key, value in rows.items()}
        self.graph = self._capture() if self.cuda else None

    # --- the stack --------------------------------------------------------------------------------------------------

    def _stack_parameters(self) -> None:
        """One vector a training and kind; what the models train become views of them."""
        found = [trained_parameters(model) for model in self.models]
        self.places = {kind: [place for place, _ in entries] for kind, entries in found[0].items()}
        self.leaves: dict[str, list[nn.Parameter]] = {kind: [] for kind in self.places}
        self.views: list[list[tuple[nn.Parameter, str, slice]]] = [[] for _ in self.models]
        for k, kinds in enumerate(found):
            for kind, entries in kinds.items():
                if [place for place, _ in entries] != self.places[kind]:
                    raise ValueError("Only trainings of one shape can be stacked.")
                leaf = nn.Parameter(torch.cat([p.detach().float().flatten() for _, p in entries]).to(self.device))
                self.leaves[kind].append(leaf)
                start = 0
                for _, parameter in entries:
                    part = slice(start, start := start + parameter.numel())
                    parameter.data = leaf.data[part].view(parameter.shape)
                    self.views[k].append((parameter, kind, part))
        self.parameters = sum(len(leaves[0]) for leaves in self.leaves.values())

    def _stack_modules(self) -> None:
        self.modules: dict[str, StackedLinear] = {}
        for module in self.template.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:  # a copy: others share the tensor
                    module._parameters[name] = nn.Parameter(parameter.detach().to(self.dtype), requires_grad=False)
        for place in chain.from_iterable(self.places.values()):
            if place.module not in self.modules:
                base = self.template.get_submodule(place.module)
                adapted = StackedLinear(None if place.part in ("weight", "bias") else base)
                self.modules[place.module] = adapted
                self.template.set_submodule(place.module, adapted)
        self.scalings = torch.tensor([self._scaling(k) for k in range(self.count)], device=self.device).view(-1, 1)

    def _scaling(self, k: int) -> float:
        if self.salient:
            return self.configs[k].scaling
        layer = next(module for module in self.models[k].modules() if isinstance(module, LoraLayer))
        scaling = layer.scaling[ADAPTER]
        return scaling / (float(layer.ranknum[ADAPTER]) + 1e-5) if self.adalora else scaling

    def _place_factors(self) -> None:
        """Cuts the stacked vectors into the modules' factors, E and the scaling in A."""
        stacks = {kind: torch.stack(leaves) for kind, leaves in self.leaves.items()}
        if "E" in stacks:
            stacks["E"] = stacks["E"] * self.scalings * (self.masks if self.salient else 1.0)
        pieces: dict[tuple[str, str], Tensor] = {}
        for kind, stack in stacks.items():
            stack = stack.to(self.dtype) if kind in ("B", "other") else stack
            for place, piece in zip(self.places[kind], self._cut(kind, stack), strict=True):
                pieces[place.module, place.part] = piece
        for name, module in self.modules.items():
            if module.base is None:
                module.parts = {part: pieces[name, part] for part in ("weight", "bias")}
                continue
            factor = pieces.get((name, "E"), self.scalings)
            down = pieces[name, "A"] * factor.view(self.count, -1, 1)
            module.parts = {"down": down.to(self.dtype), "up": pieces[name, "B"]}

    def _cut(self, kind: str, stack: Tensor) -> list[Tensor]:
        """(K, n) of all modules as (K, *shape) of each."""
        shapes = [place.shape for place in self.places[kind]]
        pieces = stack.split([shape.numel() for shape in shapes], 1)
        return [piece.view(self.count, *shape) for piece, shape in zip(pieces, shapes, strict=True)]

    # --- one step ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """All of a step that touches every module, so that it can be replayed; only decisions are left out."""
        labels = self.batch["labels"].unflatten(0, (self.count, -1))
        self._place_factors()
        logits = self.template(**{key: value for key, value in self.batch.items() if key != "labels"}).logits
        loss = self.losses(logits.unflatten(0, (self.count, -1)), labels).sum()
        if self.adalora:
            loss = loss + self._regularizer_of_adalora()
        loss.backward()
        if self.salient and any(config.orth_reg_weight for config in self.configs):
            self._add_regularization_gradient()
        self.optimizer.step()
        if self.salient:
            with torch.no_grad():
                self.values = torch.stack(list(self.leaves["E"])) * self.masks
                self.gradients = torch.stack([leaf.grad for leaf in self.leaves["E"]])
                self.regularizers = torch.vmap(orthogonality)(*self._factors_of_salientlora())
        if self.adalora:
            self._update_importance()

    def _capture(self) -> torch.cuda.CUDAGraph:
        leaves = list(chain.from_iterable(self.leaves.values()))
        before = [leaf.detach().clone() for leaf in leaves]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._work()
                self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # an old graph that were collected while this one is captured would spoil it
        gc.disable()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self._work()
        finally:
            gc.enable()
        with torch.no_grad():
            torch._foreach_copy_(leaves, before)
            state = list(chain.from_iterable(each.values() for each in self.optimizer.state.values()))
            torch._foreach_zero_(state + (self.averages + self.deviations if self.adalora else []))
        torch.cuda.synchronize()
        return graph

    def step(self) -> None:
        rows = self.orders[:, self.done].flatten()
        for key, value in self.rows.items():
            torch.index_select(value, 0, rows, out=self.batch[key])
        progress = self.done / self.steps
        torch.mul(self.peaks, min(progress / 0.06, (1 - progress) / 0.94), out=self.lrs)
        self.done += 1
        if self.graph is None:
            self._work()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.graph.replay()
        if self.salient:
            for tuner, scores in zip(self.tuners, self.scores, strict=True):
                with scored_by(scores):
                    tuner.update_and_allocate(self.done)
        if self.adalora:
            self._allocate_adalora()

    def run(self) -> list[dict[str, Any]]:
        """All steps; finalizes the adapters, sets the models to evaluation and returns what the trainings were."""
        while self.done < self.steps:
            self.step()
        rows = []
        for model, tuner in zip(self.models, self.tuners, strict=True):
            row = {"steps": self.steps, "initial_parameters": self.parameters, "total_rank": None}
            if self.salient:
                tuner.finalize()
                row["total_rank"] = tuner.rank_summary()["rank/total"]
            model.eval()
            rows.append({**row, "final_parameters": kept_parameters(model)})
        return rows

    # --- SalientLoRA ------------------------------------------------------------------------------------------------

    def _follow_salientlora(self) -> None:
        ranks = [len(leaf) for leaf in self.leaves["E"]]
        self.masks = torch.ones(self.count, ranks[0], device=self.device)
        for k, tuner in enumerate(self.tuners):
            tuner.resolve_schedule(self.steps)
            masks = iter(self.masks[k].split([place.shape.numel() for place in self.places["E"]]))
            for layer in tuner.adapter_layers(ADAPTER).values():
                layer.salientlora_mask[ADAPTER] = next(masks)

            def record(name: str, k: int = k) -> None:
                gradient = self.gradients[k] if self.configs[k].weighs_gradients else None
                self.tuners[k].allocator(name).record([self.values[k]], self.regularizers[k], gradient)

            tuner._record = record
        weights = [config.orth_reg_weight for config in self.configs]
        self.orth_reg_weights = torch.tensor(weights, device=self.device)

    def _factors_of_salientlora(self) -> list[list[Tensor]]:
        """A, B and the masks of all modules, each with the trainings in front."""
        stacks = {kind: torch.stack([leaf.detach() for leaf in self.leaves[kind]]) for kind in "AB"}
        return [self._cut(kind, stack) for kind, stack in (stacks | {"E": self.masks}).items()]

    def _add_regularization_gradient(self) -> None:
        """As each tuner's `add_regularization_gradient`."""
        factors = self._factors_of_salientlora()
        gradients = torch.vmap(orthogonality_with_gradient)(*factors, self.orth_reg_weights)[1]
        for kind, pieces in zip("AB", gradients, strict=True):
            rows = torch.cat([piece.flatten(1) for piece in pieces], 1)
            torch._foreach_add_([leaf.grad for leaf in self.leaves[kind]], list(rows.unbind()))

    # --- AdaLoRA ----------------------------------------------------------------------------------------------------

    def _follow_adalora(self) -> None:
        """Its moving averages of importance for all factors together; its own dictionaries hold views of them."""
        self.factors = [leaf for kind in "AEB" for leaf in self.leaves[kind]]
        self.averages = [torch.zeros_like(leaf, requires_grad=False) for leaf in self.factors]
        self.deviations = [torch.zeros_like(leaf, requires_grad=False) for leaf in self.factors]
        self.kept: list[Tensor] | None = None
        for k, tuner in enumerate(self.tuners):
            allocator = tuner.rankallocator
            allocator.update_ipt = lambda model: None
            names = {id(parameter): name for name, parameter in tuner.model.named_parameters()}
            for parameter, kind, part in self.views[k]:
                if kind != "other":
                    leaf = "AEB".index(kind) * self.count + k
                    name = names[id(parameter)]
                    allocator.exp_avg_ipt[name] = self.averages[leaf][part].view(parameter.shape)
                    allocator.exp_avg_unc[name] = self.deviations[leaf][part].view(parameter.shape)

    def _regularizer_of_adalora(self) -> Tensor:
        """As `AdaLoraModel.forward` adds it to the loss, summed over the trainings."""
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for kind in "AB":
            for piece in self._cut(kind, torch.stack(self.leaves[kind])):
                piece = piece if kind == "A" else piece.mT
                shapes.setdefault(piece.shape[1:], []).append(piece)
        total = 0.0
        for (r, _), factors in shapes.items():
            factors = torch.cat(factors)
            residual = torch.baddbmm(torch.eye(r, device=self.device), factors, factors.mT, beta=-1)
            total = total + torch.linalg.matrix_norm(residual).sum()
        return self.configs[0].orth_reg_weight * total / (len(self.places["A"]) + len(self.places["B"]))

    @torch.no_grad()
    def _update_importance(self) -> None:
        allocator = self.tuners[0].rankallocator
        importance = torch._foreach_mul(self.factors, [leaf.grad for leaf in self.factors])
        torch._foreach_abs_(importance)
        torch._foreach_lerp_(self.averages, importance, 1 - allocator.beta1)
        difference = torch._foreach_sub(importance, self.averages)
        torch._foreach_abs_(difference)
        torch._foreach_lerp_(self.deviations, difference, 1 - allocator.beta2)

    @torch.no_grad()
    def _allocate_adalora(self) -> None:
        config = self.configs[0]
        last = config.total_step - config.tfinal
        if self.done <= last:
            for tuner in self.tuners:
                tuner.update_and_allocate(self.done)
        elif self.kept is None:
            # from here on PEFT masks E anew after every step, one module at a time
            patterns = (config.rank_pattern for config in self.configs)
            kept = [list(chain.from_iterable(pattern.values())) for pattern in patterns]
            self.kept = [torch.tensor(each, dtype=torch.float32, device=self.device) for each in kept]
        if self.kept is not None:
            torch._foreach_mul_(self.leaves["E"], self.kept)
