# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Which ranks and factors a model gets: every decomposition on calibrated models, budgets, and what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from compressions import compressed, config, matrix, targets
from peft_rank import AdaptiveRankSVDConfig, LowRankConfig, calibrate, densify, get_rank_pattern
from peft_rank.allocation.parameters import parameter_budget, spectral_ranks
from peft_rank.decomposition import ITERATIVE, STATISTIC, decompose, weighted_spectrum
from peft_rank.tuners.lowrank import FactorizedLinear
from runs import assert_close, logits
from tiny_models import TINY_MODELS, TinyModel


WEIGHTED = [method for method, statistic in STATISTIC.items() if statistic]


def layers(model: PeftModel) -> dict[str, FactorizedLinear]:
    return {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, FactorizedLinear)}


def batches(tiny: TinyModel) -> list[dict[str, torch.Tensor]]:
    return [tiny.make_batch(8, seed=seed) for seed in range(3)]


def calibrated(tiny: TinyModel, decomposition: str, **overrides: Any) -> LowRankConfig:
    made = config(tiny, decomposition=decomposition, **overrides)
    made.statistics = calibrate(tiny.make_model(), batches(tiny), config=made, progress=False)
    return made


def recorded(tiny: TinyModel) -> dict[str, np.ndarray]:
    """What flows into each target on the calibration batches, padding left out: (tokens, in), float64."""
    model, inputs, mask = tiny.make_model().eval(), {}, []

    def note(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().flatten(0, -2)
            inputs.setdefault(name, []).append(x[mask[-1].flatten()].double().numpy())

        return hook

    for name, module in targets(model, tiny).items():
        module.register_forward_pre_hook(note(name))
    for batch in batches(tiny):
        mask.append(batch["attention_mask"].bool())
        model(**batch)
    return {name: np.concatenate(parts) for name, parts in inputs.items()}


# --- decompositions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("decomposition", WEIGHTED)
def test_every_decomposition_is_what_decompose_gives(name: str, decomposition: str, tmp_path: Any) -> None:
    tiny = TINY_MODELS[name]
    made = calibrated(tiny, decomposition, rank=5, alpha=0.7)
    model = get_peft_model(tiny.make_model(), made)
    dense = targets(tiny.make_model(), tiny)
    assert layers(model).keys() == dense.keys()
    for key, layer in layers(model).items():
        statistics = made.statistics.for_module(key, decomposition)
        factors = decompose(matrix(dense[key]), 5, decomposition, alpha=0.7, **statistics)
        assert torch.equal(layer.factors("default").up, factors.up)
        assert torch.equal(layer.factors("default").down, factors.down)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.make_model(), str(tmp_path))
    assert loaded.peft_config["default"].statistics is None
    assert torch.equal(logits(loaded, tiny), logits(model, tiny))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_whitening_loses_exactly_the_dropped_singular_values(name: str) -> None:
    """The squared output error on the calibration inputs, by numpy: the sum of the squares of the singular values of
    X W^T beyond the rank. Nothing of the same rank loses less: no other decomposition, and no descent on the error."""
    tiny, rank = TINY_MODELS[name], 6
    inputs = recorded(tiny)
    models = {
        method: layers(get_peft_model(tiny.make_model(), calibrated(tiny, method, rank=rank))) for method in STATISTIC
    }
    for key, module in targets(tiny.make_model(), tiny).items():
        weight = matrix(module).double().numpy()
        values = np.linalg.svd(inputs[key] @ weight.T, compute_uv=False)
        least = (values[rank:] ** 2).sum()

        def loss(product: torch.Tensor, key: str = key, weight: np.ndarray = weight) -> float:
            return ((inputs[key] @ (weight - product.double().numpy()).T) ** 2).sum()

        losses = {method: loss(found[key].product("default")) for method, found in models.items()}
        assert losses["whitening"] == pytest.approx(least, rel=1e-3), key
        assert min(losses, key=losses.get) == "whitening", (key, losses)
        assert losses["svd"] > 1.01 * losses["whitening"], "the inputs tell no direction from another"


def test_descent_on_the_output_error_does_not_beat_whitening(llama: TinyModel) -> None:
    """From plain SVD, and from the whitened factors themselves."""
    key, rank = "model.layers.1.mlp.down_proj", 6
    x = torch.from_numpy(recorded(llama)[key])
    weight = matrix(targets(llama.make_model(), llama)[key]).double()
    whitened = layers(get_peft_model(llama.make_model(), calibrated(llama, "whitening", rank=rank)))[key]
    least = (x @ (weight - whitened.product("default").double()).T).square().sum()
    for start in (decompose(weight, rank), whitened.factors("default")):
        up, down = (factor.detach().double().clone().requires_grad_() for factor in start)
        optimizer = torch.optim.LBFGS([up, down], max_iter=300, line_search_fn="strong_wolfe")

        def error(up: torch.Tensor = up, down: torch.Tensor = down, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (x @ (weight - up @ down).T).square().sum()
            loss.backward()
            return loss

        optimizer.step(error)
        assert error() >= least * (1 - 1e-6)


@pytest.mark.parametrize("allocation", ["uniform", "spectral"])
def test_a_whitened_model_is_closer_than_a_plain_one(llama: TinyModel, allocation: str) -> None:
    dense, distance = logits(llama.make_model(), llama), {}
    for method in ("svd", "whitening"):
        made = calibrated(llama, method, ratio=0.6, rank_multiple=1, allocation=allocation)
        distance[method] = (logits(get_peft_model(llama.make_model(), made), llama) - dense).square().sum()
    assert distance["whitening"] < 0.8 * distance["svd"]


@pytest.mark.parametrize("decomposition", WEIGHTED)
def test_without_statistics_the_remedy_is_named(llama: TinyModel, decomposition: str) -> None:
    with pytest.raises(ValueError, match=rf"`decomposition='{decomposition}'` weighs by statistics.*calibrate\("):
        compressed(llama, rank=4, decomposition=decomposition)
    allocation = "spectral" if decomposition not in ITERATIVE else "uniform"
    with pytest.raises(ValueError, match=r"weighs by statistics.*calibrate\("):
        compressed(llama, ratio=0.5, decomposition=decomposition, allocation=allocation)


def test_statistics_of_another_model_are_refused(llama: TinyModel) -> None:
    made = calibrated(llama, "whitening", rank=4)
    with pytest.raises(ValueError, match="The statistics belong to another model"):
        get_peft_model(llama.make_model(seed=1), made)


def test_statistics_of_other_modules_or_methods_are_refused(llama: TinyModel) -> None:
    made = calibrated(llama, "whitening", rank=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"No statistics for module 'model\.layers\.0\.self_attn\.v_proj'"):
        get_peft_model(
            llama.make_model(),
            LowRankConfig(
                rank=4, decomposition="whitening", target_modules=["q_proj", "v_proj"], statistics=made.statistics
            ),
        )
    with pytest.raises(ValueError, match="Decomposition 'fisher' needs the statistic 'fisher' of module"):
        get_peft_model(
            llama.make_model(),
            LowRankConfig(rank=4, decomposition="fisher", target_modules=["q_proj"], statistics=made.statistics),
        )


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["targets", "model"])
@pytest.mark.parametrize("ratio", [0.35, 0.62, 0.8, 0.97])
def test_a_ratio_is_never_exceeded_and_nearly_met(tiny: TinyModel, scope: str, ratio: float) -> None:
    base = tiny.make_model()
    modules = targets(base, tiny)
    counted = modules.values() if scope == "targets" else [base]
    before = sum(p.numel() for module in counted for p in module.parameters())
    shapes = {name: matrix(module).shape for name, module in modules.items()}
    rest = before - sum(m * n for m, n in shapes.values())
    for allocation in ("uniform", "spectral"):
        overrides = {"ratio": ratio, "ratio_scope": scope, "rank_multiple": 2, "allocation": allocation}
        if rest + sum(map(sum, shapes.values())) > ratio * before:  # rank 1 everywhere
            with pytest.raises(ValueError, match=rf"`ratio={ratio}` must be in \[0\.\d+, 1\].*cannot shrink"):
                compressed(tiny, **overrides)
            continue
        ranks = get_rank_pattern(compressed(tiny, **overrides))
        kept = rest + sum(ranks[k] * (m + n) if k in ranks else m * n for k, (m, n) in shapes.items())
        assert kept <= ratio * before
        assert kept > ratio * before - 2 * max(map(sum, shapes.values()))


def tails(tiny: TinyModel, ranks: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Sums of the squared singular values beyond the rank of each target, and of all: by numpy."""
    squares = {
        name: np.linalg.svd(matrix(module).double().numpy(), compute_uv=False) ** 2
        for name, module in targets(tiny.make_model(), tiny).items()
    }
    return {name: (values[ranks.get(name, 99) :].sum(), values.sum()) for name, values in squares.items()}


def test_a_spectral_budget_drops_less_than_others(tiny: TinyModel) -> None:
    """In the sum that it is told to look at: of what is dropped, or of the parts that this is of the modules."""
    budgets = {"uniform": {}, "relative": {}, "absolute": {"spectral_loss": "absolute"}}
    amount, part = {}, {}
    for name, overrides in budgets.items():
        allocation = "uniform" if name == "uniform" else "spectral"
        model = compressed(tiny, ratio=0.6, rank_multiple=1, allocation=allocation, **overrides)
        dropped = tails(tiny, get_rank_pattern(model)).values()
        amount[name] = sum(tail for tail, _ in dropped)
        part[name] = sum(tail / whole for tail, whole in dropped)
    assert part["relative"] < part["uniform"]
    assert part["relative"] <= part["absolute"] * (1 + 1e-9)
    assert amount["absolute"] < amount["uniform"]
    assert amount["absolute"] <= amount["relative"] * (1 + 1e-9)


def test_a_relative_budget_does_not_depend_on_the_size_of_weights(llama: TinyModel) -> None:
    base = llama.make_model()
    ranks = {}
    for factor in (1, 1000):
        with torch.no_grad():
            base.model.layers[0].mlp.up_proj.weight.mul_(factor)
        for loss in ("relative", "absolute"):
            made = config(llama, ratio=0.6, rank_multiple=1, allocation="spectral", spectral_loss=loss)
            ranks[loss, factor] = get_rank_pattern(get_peft_model(copy.deepcopy(base), made))
    assert ranks["relative", 1] == ranks["relative", 1000]
    # there all that the budget can give goes to the large one
    assert "model.layers.0.mlp.up_proj" in ranks["absolute", 1]
    assert "model.layers.0.mlp.up_proj" not in ranks["absolute", 1000]


def test_gradients_are_compared_by_amount_and_the_rest_by_parts() -> None:
    amounts = {method for method in STATISTIC if LowRankConfig(ratio=0.5, decomposition=method).sums_amounts}
    assert amounts == {"fisher", "fisher_two_sided", "importance", "em", "nesterov", "anderson"}
    for method in ("fisher", "whitening"):
        for loss in ("relative", "absolute"):
            made = LowRankConfig(ratio=0.5, decomposition=method, allocation="spectral", spectral_loss=loss)
            assert made.sums_amounts == (loss == "absolute")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("decomposition", list(STATISTIC))
def test_spectral_ranks_and_their_factors(name: str, decomposition: str) -> None:
    tiny = TINY_MODELS[name]
    made = config(tiny, decomposition=decomposition, ratio=0.6, rank_multiple=1, allocation="spectral")
    if STATISTIC[decomposition]:
        made.statistics = calibrate(tiny.make_model(), batches(tiny), config=made, progress=False)
    dense = {key: matrix(module) for key, module in targets(tiny.make_model(), tiny).items()}
    given = {key: made.statistics.for_module(key, decomposition) if made.statistics else {} for key in dense}
    spectra = [weighted_spectrum(weight, decomposition, **given[key]) for key, weight in dense.items()]
    shapes = [tuple(weight.shape) for weight in dense.values()]
    biases = sum(m.bias.numel() for m in targets(tiny.make_model(), tiny).values() if m.bias is not None)
    budget = parameter_budget(shapes, 0.6, others=biases)
    if decomposition in ("svd", "activation", "whitening"):  # the others weigh by gradients, whose unit is the loss
        spectra = [values / values.norm() for values in spectra]
    expected = spectral_ranks(spectra, shapes, budget, rank_multiple=1)
    model = get_peft_model(tiny.make_model(), made)
    ranks = get_rank_pattern(model)
    assert ranks == {key: rank for key, rank in zip(dense, expected, strict=True) if rank is not None}
    for key, layer in layers(model).items():
        up, down = layer.factors("default")
        assert up.is_contiguous()
        assert up.untyped_storage().nbytes() == up.nbytes, "nothing of higher ranks is kept"
        assert down.untyped_storage().nbytes() == down.nbytes
        alone = decompose(dense[key], ranks[key], decomposition, **given[key])
        assert_close(layer.product("default"), alone.up @ alone.down, 1e-4)


def test_a_spectral_budget_decomposes_every_weight_once(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """At scale decompositions are all that takes time."""
    made = calibrated(llama, "whitening", ratio=0.6, rank_multiple=1, allocation="spectral")
    calls = []
    for name in ("eigh", "svd", "svdvals"):
        exact = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *args, exact=exact, **kwargs: calls.append(0) or exact(*args, **kwargs)
        )
    get_peft_model(llama.make_model(), made)
    assert len(calls) == len(targets(llama.make_model(), llama))


def test_tied_weights_count_once_and_adapters_not_at_all() -> None:
    tiny = TINY_MODELS["gpt2"]
    base = tiny.make_model()
    total = sum(p.numel() for p in base.parameters())
    assert base.lm_head.weight is base.transformer.wte.weight
    model = compressed(tiny, ratio=0.7, ratio_scope="model", rank_multiple=1)
    model.add_adapter("second", config(tiny, ratio=0.7, ratio_scope="model", rank_multiple=1))
    assert get_rank_pattern(model, adapter_name="second") == get_rank_pattern(model, adapter_name="default")
    model.delete_adapter("second")
    model.base_model.finalize()
    kept = sum(p.numel() for p in model.get_base_model().parameters())
    assert 0.7 * total - 160 < kept <= 0.7 * total


def test_given_ranks_are_aligned_if_a_multiple_is_given(llama: TinyModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert set(get_rank_pattern(compressed(llama, rank=11)).values()) == {11}
        assert set(get_rank_pattern(compressed(llama, rank=3, rank_multiple=8)).values()) == {3}
    with pytest.warns(UserWarning, match=r"11 to 8 \(a multiple of 8\).*`rank_multiple=1`"):
        assert set(get_rank_pattern(compressed(llama, rank=11, rank_multiple=8)).values()) == {8}


def test_modules_whose_factors_do_not_pay_stay_as_they_are(llama: TinyModel) -> None:
    """32 x 32 ends at rank 15, 64 x 32 at rank 21, 16 x 32 (grouped keys and values) at rank 10."""
    model = compressed(llama, rank=16)
    assert {name.split(".")[-1] for name in get_rank_pattern(model)} == {"gate_proj", "up_proj", "down_proj"}
    plain = llama.make_model()
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(
        model.base_model.model.model.layers[0].self_attn.q_proj.weight, plain.model.layers[0].self_attn.q_proj.weight
    )


def test_a_compression_of_nothing_says_so(llama: TinyModel, tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match="All 14 targeted modules stay dense.*Lower `rank`"):
        model = compressed(llama, rank=500)
    assert get_rank_pattern(model) == {}
    assert torch.equal(logits(model, llama), logits(llama.make_model(), llama))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama.make_model(), str(tmp_path))
    assert torch.equal(logits(loaded, llama), logits(llama.make_model(), llama))


# --- what is refused, before anything is changed ----------------------------------------------------------------------


def refuse(model: nn.Module, made: LowRankConfig, error: type[Exception], message: str) -> None:
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        get_peft_model(model, made)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_tied_weights_are_refused() -> None:
    tiny = TINY_MODELS["gpt2"]
    made = LowRankConfig(rank=4, target_modules=["c_fc", "lm_head"])
    refuse(tiny.make_model(), made, ValueError, "weight of lm_head is shared with another module.*`exclude_modules`")
    untied = get_peft_model(
        tiny.make_model(tie_word_embeddings=False), LowRankConfig(rank=4, target_modules=["lm_head"])
    )
    assert get_rank_pattern(untied) == {"lm_head": 4}


def test_modules_of_two_names_are_refused() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(16, 16))
    refuse(model, LowRankConfig(rank=2, target_modules=["0"]), ValueError, "weight of 0 is shared with another module")
    assert get_rank_pattern(get_peft_model(model, LowRankConfig(rank=2, target_modules=["3"]))) == {"3": 2}


def test_other_modules_are_refused(llama: TinyModel) -> None:
    made = LowRankConfig(rank=4, target_modules=["q_proj", "embed_tokens"])
    refuse(llama.make_model(), made, TypeError, "Target module model.embed_tokens is a Embedding")


def test_adapters_of_other_methods_are_refused(llama: TinyModel) -> None:
    model = get_peft_model(llama.make_model(), LoraConfig(r=2, target_modules=["q_proj"])).base_model.model
    del model.peft_config
    refuse(model, LowRankConfig(rank=4, target_modules=["q_proj"]), TypeError, "has an adapter of another method")


@pytest.mark.parametrize("config_class", [LowRankConfig, AdaptiveRankSVDConfig])
@pytest.mark.parametrize("targets", ["all-linear", ["up"], ["q_proj"]], ids=str)
def test_what_is_compressed_already_is_refused(llama: TinyModel, config_class: type, targets: Any) -> None:
    """Factors of factors are a model that nothing could build again; the product is better to compress anyway."""
    size = {"ratio": 0.9} if config_class is LowRankConfig else {"target_ratio": 0.9}
    made = config_class(target_modules=targets, rank_multiple=1, **size)
    model = compressed(llama, rank=8)
    model.base_model.finalize()
    plain = model.get_base_model()
    refuse(plain, made, TypeError, r"layers\.0\.\S+ is (compressed already.*densify\(model\)|a LowRankLinear, which)")
    again = get_peft_model(densify(plain), config_class(target_modules="all-linear", rank_multiple=1, **size))
    assert again.base_model is not None


class Reader(nn.Module):
    """As Mamba, WavLM and T5 have them."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("multiplied", "passed", "looked_at"):
            setattr(self, name, nn.Linear(16, 16))
        nn.init.zeros_(self.looked_at.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.multiplied(x) if x.shape[0] > 9 else (self.multiplied.weight @ x.mT).mT
        x = nn.functional.linear(x, self.passed.weight)
        return self.looked_at(x.to(self.looked_at.weight.dtype))


@pytest.mark.parametrize("name", ["multiplied", "passed"])
def test_weights_that_others_compute_with_are_refused(name: str) -> None:
    made = LowRankConfig(rank=4, target_modules=[name])
    refuse(nn.Sequential(Reader()), made, TypeError, rf"0\.{name} is not called: Reader computes.*`exclude_modules`")
    made = LowRankConfig(rank=4, target_modules="all-linear", exclude_modules=["multiplied", "passed"])
    assert get_rank_pattern(get_peft_model(nn.Sequential(Reader()), made)) == {"0.looked_at": 4}


def test_what_was_left_dense_can_be_compressed_later(llama: TinyModel) -> None:
    model = compressed(llama, rank_pattern={"up_proj": 8}, target_modules=["up_proj"])
    model.base_model.finalize()
    model = get_peft_model(model.get_base_model(), LowRankConfig(rank_pattern={"gate_proj": 6}))
    model.base_model.finalize()
    assert sorted(get_rank_pattern(model).values()) == [6, 6, 8, 8]


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Spelled(nn.Linear):
    """As Falcon has them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_that_spell_out_the_product_are_compressed(bias: bool, dtype: torch.dtype) -> None:
    base = nn.Sequential(Spelled(16, 16, bias=bias)).to(dtype)
    state = torch.get_rng_state()
    model = get_peft_model(base, LowRankConfig(rank=4, target_modules=["0"]))
    assert torch.equal(torch.get_rng_state(), state)
    assert get_rank_pattern(model) == {"0": 4}


def test_linears_that_do_more_are_refused() -> None:
    made = LowRankConfig(rank=2, target_modules=["0"])
    refuse(
        nn.Sequential(Scaled(16, 16)), made, TypeError, "Target module 0 is a Scaled, which does more than a linear"
    )
    attention = nn.Sequential(nn.MultiheadAttention(16, 2))
    refuse(attention, LowRankConfig(rank=2, target_modules=["out_proj"]), TypeError, "out_proj is not called")


def test_coarse_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16).to(torch.float8_e4m3fn))
    refuse(model, LowRankConfig(rank=2, target_modules=["0"]), TypeError, "is torch.float8_e4m3fn, too coarse")


def test_quantized_weights_are_refused() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bitsandbytes.nn.Linear8bitLt(16, 16, has_fp16_weights=False))
    refuse(model, LowRankConfig(rank=2, target_modules=["0"]), TypeError, "0 is quantized .*Linear8bitLt.*compress it")


def test_a_damaged_weight_is_named(llama: TinyModel) -> None:
    model = llama.make_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    refuse(model, config(llama, rank=4), ValueError, r"Module model\.layers\.1\.mlp\.up_proj: `weight` must be finite")


def test_no_target_is_an_error(llama: TinyModel) -> None:
    with pytest.raises(ValueError, match="Target modules .*nowhere.* not found"):
        get_peft_model(llama.make_model(), LowRankConfig(rank=4, target_modules=["nowhere"]))


def test_zero_weights_are_factorized_and_can_be_trained() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 16)).requires_grad_(False), LowRankConfig(rank=2, target_modules=["0"])
    )
    with torch.no_grad():
        model.base_model.model[0].base_layer.weight.zero_()
    model.add_adapter("zero", LowRankConfig(rank=2, target_modules=["0"]))
    model.set_adapter("zero")
    x = torch.randn(3, 16)
    assert_close(model(x), model.base_model.model[0].bias.expand(3, -1), 0)
    assert any(factor.detach().any() for factor in model.base_model.model[0].factors("zero"))
