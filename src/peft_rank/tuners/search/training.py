# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The training loop's side of a search: draws masks, adds the regularizers, takes note of steps, ends it."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from peft.utils import load_peft_weights
from peft.utils.other import _get_submodules
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.trainer_pt_utils import get_model_param_count

from ...allocation.masks import gumbel_mask, keep_probability, uniform_noise
from ..adaptive import AdaptiveRankTuner, ShrinkPolicy, add_to_gradients, check_step
from ..functional import compute_dtype
from ..lowrank.entry import record_compression
from ..lowrank.final import settle_trained_modules
from ..names import exact_pattern
from .functional import StepMask, pad_rows
from .graph import DrawnMasks, SharedGraph, check_checkpointing, versions
from .layer import SearchLayer
from .state import SearchState, Selection


_OF_A_STEP = (
    "_armed",
    "_graphs",
    "_drawn",
    "_spectra",
)  # attributes by adapter that are made anew where they are missing


class RankSearchTraining(AdaptiveRankTuner):
    """What a training loop calls. Methods differ in where their logits come from and in their regularizers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # injection, which the base class starts, needs them
        self._states: dict[str, SearchState] = {}
        # names of the modules that became `LowRankLinear`, by adapter
        self._compact: dict[str, list[str]] = {}
        # and of those that were trained beside them, of a final adapter
        self._beside: list[str] = []
        # logits and the regularizer's gradient with respect to them, which the next backward adds, by adapter
        self._armed: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._searching: dict[str, dict[str, SearchLayer]] = {}
        # logits of this step with their graph, its masks likewise, singular values: with what they were made from
        self._graphs: dict[str, tuple[tuple, Tensor]] = {}
        self._drawn: dict[str, DrawnMasks] = {}
        self._spectra: dict[str, tuple[tuple, Tensor]] = {}
        # what the present selection was made from
        self._selected_from: tuple | None = None
        super().__init__(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # a copy has no part in the graph
        return {**self.__dict__, **{kept: {} for kept in _OF_A_STEP}}

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        # moved and cast: what was made of the old values may come to lie where they were
        for kept in _OF_A_STEP:
            getattr(self, kept).clear()
        self._selected_from = None
        return super()._apply(*args, **kwargs)

    @abstractmethod
    def mask_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """All that is trained in a search."""

    @abstractmethod
    def mask_logits(self, adapter_name: str) -> Tensor:
        """(modules, K) float32, padded with -inf: the logits of all modules in search, with their gradient."""

    @abstractmethod
    def regularizer(self, adapter_name: str, logits: Tensor, hard: Tensor) -> Tensor:
        """Weighted sum of the losses that need no batch, for logits and the mask of the step, (modules, K)."""

    def _forget_masks(self, adapter_name: str) -> None:
        """Let go of the parameters of masks: the ranks are final."""
        self._forget_step(adapter_name)
        for layer in self.adapter_layers(adapter_name).values():
            layer._modules.pop(f"{self.prefix}ranks", None)
            for attribute in layer.adapter_layer_names:
                masks = getattr(layer, attribute)
                if adapter_name in masks:
                    del masks[adapter_name]

    def _forget_step(self, adapter_name: str) -> None:
        for kept in ("_searching", *_OF_A_STEP):
            getattr(self, kept).pop(adapter_name, None)

    def searching_layers(self, adapter_name: str) -> dict[str, SearchLayer]:
        """The layers whose ranks are not final, by module name in the base model."""
        if adapter_name not in self._searching:
            layers = self.adapter_layers(adapter_name).items()
            self._searching[adapter_name] = {name: layer for name, layer in layers if layer.searching}
        return self._searching[adapter_name]

    def _forget_layers(self) -> None:
        super()._forget_layers()
        self._searching.clear()

    def singular_values(self, adapter_name: str) -> Tensor:
        """(modules, K), padded with 0, scaled to a sum of squares of 1 in each module."""
        # straight from where they are: `nn.Module` takes ten times as long
        values = [x._modules["factors"]._parameters["values"] for x in self.searching_layers(adapter_name).values()]
        stamp = versions(values)
        if self._spectra.get(adapter_name, (None,))[0] != stamp:
            rows = [v / v.norm().clamp(min=torch.finfo(v.dtype).tiny) for v in values]
            self._spectra[adapter_name] = stamp, pad_rows(rows, 0.0)
        return self._spectra[adapter_name][1]

    def _trained_adapters(self) -> list[str]:
        searching = (name for name in self.active_adapters if name in self._states)
        return [name for name in searching if any(p.requires_grad for p in self.mask_parameters(name))]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._forget_step(adapter_name)
        self._states.pop(adapter_name, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # with the hook that prepares the layers, which also serves `generate`; the base class goes around it
        return self.model(*args, **kwargs)

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # what is prepared waits for the device and keeps a graph of its own: a compiled forward takes it as it is
        self._prepare(module, torch.compiler.is_compiling())

    @torch.compiler.disable
    def _prepare(self, module: nn.Module, compiled: bool) -> None:
        """Draw the masks of the step, or select the ranks that would be kept."""
        for name in self.active_adapters:
            if name not in self._states:
                continue
            layers = self.searching_layers(name)
            first = next(iter(layers.values()))
            # transformers deletes and switches adapters without telling the tuner
            if first.disable_adapters or name not in first.active_adapters:
                continue
            if module.training:
                self._begin_step(name, layers, compiled)
            else:
                self._select_ranks()

    def _begin_step(self, name: str, layers: dict[str, SearchLayer], compiled: bool) -> None:
        if self._states[name].recorded == 0:
            check_checkpointing(self.model)
        parameters = [p for p in self.mask_parameters(name) if p.requires_grad]
        drawn = self._draw(name, self._logits(name))
        # a compiled model would be compiled anew for every other number of rows
        rows = [(None, 0)] * len(drawn.sizes) if compiled else drawn.rows()
        self._selected_from = None
        hard = SharedGraph.apply([drawn.hard], self._armed.get(name, []), *parameters)
        # in float32 up to here, and in float16 not even then: see `masked_product`
        dtype = compute_dtype(next(iter(layers.values())).factors.up)
        # unbound, whose backward is one kernel for all modules
        masks = (hard if dtype == torch.float16 else hard.to(dtype)).unbind(0)
        for layer, mask, size, needed in zip(layers.values(), masks, drawn.sizes, rows, strict=True):
            # a slice has a node of its own, which only a gradient of this module reaches
            layer.begin_step(StepMask(mask[:size] if size < hard.shape[1] or not layer._reached else mask, *needed))

    def _draw(self, name: str, logits: Tensor) -> DrawnMasks:
        """The masks of this optimizer step: the same for all of its micro-batches, for the regularizers and on every
        process."""
        state, drawn = self._states[name], self._drawn.get(name)
        when = (state.seed, state.step)
        if drawn is None or drawn.logits is not logits or drawn.when != when:
            with torch.enable_grad():
                noise = uniform_noise(logits.shape, *when, logits.device)
                masks = gumbel_mask(logits, noise, self.peft_config[name].tau)
            drawn = self._drawn[name] = DrawnMasks(logits, when, *masks, state.sizes)
        return drawn

    def _logits(self, name: str) -> Tensor:
        """`mask_logits`, made once for each optimizer step."""
        stamp = versions(self.mask_parameters(name))
        if self._graphs.get(name, (None,))[0] != stamp:
            with torch.enable_grad():
                self._graphs[name] = stamp, self.mask_logits(name)
        return self._graphs[name][1]

    @torch.no_grad()
    def _select_ranks(self) -> None:
        """Let every layer in search keep what it would keep if the search ended now."""
        for name, state in self._states.items():
            key = (name, versions(self.mask_parameters(name)))
            layers = list(self.searching_layers(name).values())
            if key == self._selected_from and all(layer._selected for layer in layers):
                continue
            selection = state.choose(self.mask_logits(name), state.end)
            for layer, ranks in zip(layers, selection, strict=True):
                layer.select(ranks)
            self._selected_from = key

    def restart_allocation(self) -> None:
        for name in self._trained_adapters():
            self._states[name].restart()

    def resolve_schedule(self, total_steps: int) -> str:
        plans = []
        for name in self.active_adapters:
            if name not in self._states:
                plans.append(f"{name}: ranks are final, no search")
                continue
            self._check_trained()
            state = self._states[name]
            state.total_steps = total_steps
            plans.append(
                f"{name}: search over {sum(state.sizes)} ranks of {len(state.sizes)} modules with {sum(state.dense):,} parameters in "
                f"{total_steps} steps, to keep {' then '.join(map(str, self.peft_config[name].ratios))} of them"
            )
        return "\n".join(plans)

    def add_regularization_gradient(self) -> None:
        for name in self._trained_adapters():
            self._check_reached(name)
            parameters = [p for p in self.mask_parameters(name) if p.requires_grad]
            logits, gradient = self._regularizer_gradient(name)
            add_to_gradients(parameters, torch.autograd.grad(logits, parameters, gradient, retain_graph=True))

    def arm_regularization(self, loss_scale: float = 1.0) -> None:
        for name in self._trained_adapters():
            logits, gradient = self._regularizer_gradient(name)
            self._armed[name] = [(logits, gradient * loss_scale)]

    def _regularizer_gradient(self, name: str) -> tuple[Tensor, Tensor]:
        """The logits of the step with their graph, and the gradient of the regularizer with respect to them."""
        logits = self._logits(name)
        loss = self.regularizer(name, logits, self._draw(name, logits).hard)
        return logits, torch.autograd.grad(loss, logits, retain_graph=True)[0]

    def _check_reached(self, name: str) -> None:
        """After the first backward: a module whose output the loss does not depend on cannot be searched."""
        if self._states[name].recorded:
            return
        missed = [key for key, layer in self.searching_layers(name).items() if not layer._reached]
        if missed:
            raise RuntimeError(
                f"The loss has no gradient for the masks of {', '.join(missed)}: the model does not use their output, so "
                "that their ranks cannot be learned. Name them in `exclude_modules`. (Is this the first backward at all? "
                "Then call `add_regularization_gradient` after it.)"
            )

    @torch.no_grad()
    def update_and_allocate(
        self, global_step: int, optimizer: Optimizer | None = None, shrink: ShrinkPolicy = "each"
    ) -> bool:
        check_step(global_step)
        decided = False
        for name in self._trained_adapters():
            state = self._states[name]
            if global_step <= state.step:
                continue
            self._check_schedule(name)
            self._graphs.pop(name, None)  # engines change parameters without a trace
            self._armed.pop(name, None)
            state.step = global_step
            # the next step's masks come out of the same wait for the device
            drawn = self._draw(name, self._logits(name))
            reached = state.record(drawn.logits)
            drawn.rows()
            if reached is not None:
                decided = True
                self._write_snapshot(name, reached)
        return decided

    def _check_schedule(self, name: str) -> None:
        """For methods whose losses depend on the length of the training."""

    def skip_step(self, global_step: int) -> None:
        for name in self._trained_adapters():
            self._states[name].step = max(self._states[name].step, global_step)
            self._armed.pop(name, None)

    @property
    def allocation_finished(self) -> bool:
        return all(self._states[name].finished for name in self._trained_adapters())

    @property
    def should_stop(self) -> bool:
        names = self._trained_adapters()
        return bool(names) and all(self._states[name].out_of_patience for name in names)

    @torch.no_grad()
    def finalize(
        self, optimizer: Optimizer | None = None, compact: bool = True, *, ratio: float | None = None
    ) -> None:
        """
        End the search: every module keeps its ranks, within the exact budget, or its weight.

        Args:
            optimizer (`Optimizer`, *optional*): Not needed: what it trained is gone.
            compact (`bool`, *optional*, defaults to `True`): Put [`LowRankLinear`]s and the original modules into the
                model, which is then a plain one, with factors that train. False leaves them in the layers of the tuner.
            ratio (`float`, *optional*): One of the ratios that were reached, for the ranks as they were then. By default
                the smallest, for the ranks of now.

        Raises:
            RuntimeError: If no step of the search was ever recorded.
            ValueError: If `ratio` was not reached.
        """
        for name, state in list(self._states.items()):
            selection = self._final_selection(name, state, ratio)
            for layer, ranks in zip(self.searching_layers(name).values(), selection, strict=True):
                layer.end_search(None if ranks is None else layer.factors.select(ranks, layer.base_layer.bias))
            del self._states[name]
            self._forget_masks(name)
        for name in [name for name in self.peft_config if name not in self._compact]:
            self.peft_config[name].write_ranks(
                {exact_pattern(key): linear.rank for key, linear in self._linears(name).items()}
            )
            self.peft_config[name] = self.peft_config[name].without_statistics()
            if compact:
                self._make_compact(name)

    def _final_selection(self, name: str, state: SearchState, ratio: float | None) -> Selection:
        if state.recorded == 0:
            raise RuntimeError(self._never_searched(name))
        if ratio is not None:
            if ratio not in state.snapshots:
                reached = ", ".join(map(str, state.snapshots)) or "none"
                raise ValueError(f"`ratio={ratio}` was not reached; of `target_ratio`, {reached} was.")
            return state.snapshots[ratio]
        logits, target = self.mask_logits(name), state.end
        if not state.finished:
            warnings.warn(
                f"The search of adapter {name!r} ended at a ratio of {float(state.ratio(state.likely(logits))):.3f}, before "
                f"it reached {target}. The ranks least likely to be kept are dropped now. Search for more steps, at a "
                "higher learning rate, or with a larger `compression_weight`.",
                stacklevel=3,
            )
        return state.choose(logits, target)

    def _make_compact(self, name: str) -> None:
        """Put the modules that the layers stand for into the model."""
        self._compact[name] = []
        for key, layer in self.adapter_layers(name).items():
            if layer.merged:
                layer.unmerge()
            parent, _, child_name = _get_submodules(self.model, key)
            if layer.factors is not None:
                self._compact[name].append(key)
                layer.factors.requires_grad_(self.peft_config[name].train_factors).train(layer.training)
            setattr(parent, child_name, layer.base_layer if layer.factors is None else layer.factors)
        self._beside = settle_trained_modules(self.model)
        self._forget_layers()
        # a plain model, which another adapter may wrap
        self._hook.remove()
        if "peft_config" in vars(self.model):
            del self.model.peft_config
        # and which `save_pretrained` writes completely
        record_compression(self.model, self.peft_config[name])

    def check_resumed(self, global_step: int, checkpoint: Path | None = None) -> None:
        for name in self._trained_adapters():
            state = self._states[name]
            if checkpoint is not None and state.step != global_step and checkpoint.is_dir():
                self._restore_state(name, load_peft_weights(str(checkpoint), device="cpu"))
            if state.step < global_step:
                raise RuntimeError(
                    f"The training resumes at step {global_step}, but the search of adapter {name!r} knows only its first "
                    f"{state.step} steps. Was it trained without RankAllocationCallback, or were the weights loaded "
                    "without their checkpoint? Resume from a checkpoint that the callback was part of, or start afresh."
                )

    def _never_searched(self, name: str) -> str:
        return (
            f"The search of adapter {name!r} never ran: its masks are those of the start. Add `RankAllocationCallback()` to "
            "the Trainer's callbacks, or call `model.base_model.update_and_allocate(step)` after every optimizer step."
        )

    @torch.no_grad()
    def rank_summary(self) -> dict[str, float]:
        summary = {"parameters/trainable": get_model_param_count(self, trainable_only=True)}
        for name in self.active_adapters:
            if name not in self._states:
                ranks = [module.rank for module in self._linears(name).values()]
                return {"rank/total": sum(ranks), "rank/mean": sum(ranks) / max(1, len(ranks)), **summary}
            state, logits = self._states[name], self._logits(name)
            likely = state.likely(logits)
            selection = state.choose(logits, state.end)
            kept = [size if ranks is None else len(ranks) for size, ranks in zip(state.sizes, selection, strict=True)]
            return {
                "rank/total": float(likely.sum()),
                "rank/mean": float(likely.mean()),
                "rank/budget": sum(kept),
                "search/ratio": float(state.ratio(likely)),
                "search/expected_ratio": float(state.ratio(keep_probability(logits).sum(dim=1))),
                "search/target": state.target,
                "search/dense_modules": sum(ranks is None for ranks in selection),
                "search/regularizer": float(self.regularizer(name, logits, self._draw(name, logits).hard)),
                **summary,
            }
        return summary
