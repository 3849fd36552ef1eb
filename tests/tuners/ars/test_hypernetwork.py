# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The hypernetworks with recorded parameters, the losses on top of them, and the tuner's own loss written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_rank import AdaptiveRankSVDConfig
from peft_rank.allocation.masks import alignment_loss, compression_loss, gumbel_mask, uniform_noise
from peft_rank.tuners.ars.hypernetwork import Hypernetwork, LinearMaps, PerLayerHypernetwork, SharedHypernetwork
from searches import optimizer, search, searched
from tiny_models import TINY_MODELS, TinyModel


GOLDEN = Path(__file__).parents[2] / "golden" / "ars"


def _load(name: str, network: nn.Module, others: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    archive = np.load(GOLDEN / f"{name}.npz")
    golden = {key: torch.as_tensor(archive[key]) for key in archive.files}
    parameters = {key[2:].replace("__", "."): value for key, value in golden.items() if key.startswith("p_")}
    network.load_state_dict(parameters | (others or {}))
    return golden


def test_the_released_network_of_a_layer() -> None:
    network = PerLayerHypernetwork(12)
    golden = _load("hypernet_main_n12", network)
    torch.testing.assert_close(network().detach(), golden["logits_no_b"], rtol=1e-4, atol=1e-6)


def _recorded() -> tuple[SharedHypernetwork, dict[str, Tensor]]:
    """The network with the maps of six layers, which the file has one by one."""
    archive = np.load(GOLDEN / "hypernet_fix_L6.npz")
    network = SharedHypernetwork([len(archive[f"head_bias{j}"]) for j in range(6)])
    maps = {}
    for kind in ("weight", "bias"):
        for k, members in network.members.items():
            maps[f"{kind}.{k}"] = torch.stack([torch.as_tensor(archive[f"head_{kind}{j}"]) for j in members])
    return network, _load("hypernet_fix_L6", network, maps)


def _rows(network: SharedHypernetwork) -> list[Tensor]:
    """Logits with the bias of the masks."""
    padded = network()
    ranks = {i: k for k, members in network.members.items() for i in members}
    assert all((row[ranks[i] :] == float("-inf")).all() for i, row in enumerate(padded))
    return [row[: ranks[i]] + 3.0 for i, row in enumerate(padded)]


def test_the_shared_network_with_a_head_for_each_layer() -> None:
    network, golden = _recorded()
    features = Hypernetwork.forward(network)
    torch.testing.assert_close(features.detach(), golden["hidden"], rtol=1e-4, atol=1e-6)
    logits = _rows(network)
    for j, row in enumerate(logits):
        torch.testing.assert_close(row.detach(), golden[f"logits{j}"], rtol=1e-4, atol=1e-5)
        assert torch.equal(gumbel_mask(row, golden[f"U{j}"], 0.4)[1].detach(), golden[f"mask{j}"])


def test_losses_and_gradients_through_the_shared_network() -> None:
    """16 R + 10 R_align, as released: the mean over ranks, and a target of 0.4."""
    network, golden = _recorded()
    logits = _rows(network)
    masks = [gumbel_mask(row, golden[f"U{j}"], 0.4)[1] for j, row in enumerate(logits)]
    align = sum(alignment_loss(mask, golden[f"E{j}"], reference=True) for j, mask in enumerate(masks)) / 6
    assert float(align.detach()) == pytest.approx(float(golden["r_align"]), rel=1e-4)
    # not in the file: (out, in) of the six layers, by the ranks of their heads and the compression that is in it
    shapes = _shapes(masks, float(golden["R_loss_p0.4"]))
    kept = sum(mask.sum() * sum(shape) for mask, shape in zip(masks, shapes, strict=True))
    loss = compression_loss(kept / sum(m * n for m, n in shapes), 0.4)
    assert float(loss.detach()) == pytest.approx(float(golden["R_loss_p0.4"]), rel=1e-4)
    (16 * loss + 10 * align).backward()
    for name, parameter in network.named_parameters():
        if name.startswith(("bi_gru.", "layer_norm.")):
            expected = golden[f"grad_16R_10align__{name.replace('.', '__')}"]
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)
    for k, members in network.members.items():
        for gradient, j in zip(network.weight[str(k)].grad, members, strict=True):
            torch.testing.assert_close(gradient, golden[f"grad_16R_10align__head_weight{j}"], rtol=1e-3, atol=1e-5)


def _shapes(masks: list[Tensor], value: float) -> list[tuple[int, int]]:
    import itertools
    import math

    sides = (24, 48, 64, 96)
    counts = [float(mask.detach().sum()) for mask in masks]
    options = {k: [(m, n) for m in sides for n in sides if min(m, n) == k] for k in (24, 48, 64)}
    for choice in itertools.product(*(options[len(mask)] for mask in masks)):
        kept = sum(count * sum(shape) for count, shape in zip(counts, choice, strict=True))
        if abs(math.log(kept / sum(m * n for m, n in choice) / 0.4) - value) < 1e-6:
            return list(choice)
    raise LookupError("no shapes fit")


@pytest.mark.parametrize("sizes", [[4, 6, 4], [6, 6, 6]])
def test_everything_is_float32_under_autocast(sizes: list[int]) -> None:
    network = SharedHypernetwork(sizes)
    plain = network()
    weights = torch.rand_like(plain)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network()
        assert PerLayerHypernetwork(3)().dtype == torch.float32
    assert torch.equal(logits, plain)
    of_plain, found = (
        torch.autograd.grad(result, list(network.parameters()), weights * torch.isfinite(plain))
        for result in (plain, logits)
    )
    assert all(torch.equal(a, b) for a, b in zip(of_plain, found, strict=True))


def test_maps_are_those_of_a_linear_layer_for_each_module() -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(128, 5) for _ in range(3)]
    features, wanted = torch.randn(3, 128, requires_grad=True), torch.randn(3, 5)
    weight, bias = (
        torch.stack([getattr(x, kind).detach() for x in linears]).requires_grad_() for kind in ("weight", "bias")
    )
    result = LinearMaps.apply(features, weight, bias)
    expected = torch.stack([linear(row) for linear, row in zip(linears, features, strict=True)])
    torch.testing.assert_close(result, expected)
    found = torch.autograd.grad(result, [features, weight, bias], wanted)
    *of_linears, of_features = torch.autograd.grad(
        expected, [*(x.weight for x in linears), *(x.bias for x in linears), features], wanted
    )
    torch.testing.assert_close(found[0], of_features)
    torch.testing.assert_close(found[1], torch.stack(of_linears[:3]))
    torch.testing.assert_close(found[2], torch.stack(of_linears[3:]))


def test_maps_start_as_linear_layers_do() -> None:
    torch.manual_seed(0)
    network = SharedHypernetwork([64] * 8)
    for parameter in (network.weight["64"], network.bias["64"]):
        assert parameter.abs().max() <= 128**-0.5
        assert float(parameter.std()) == pytest.approx((128 * 3) ** -0.5, rel=0.05)


@pytest.mark.parametrize("method", ["ars", "ars-per-layer"])
def test_the_tuners_loss(method: str, llama: TinyModel) -> None:
    """lambda log(max(T, p) / p) + gamma / L sum ||(m - m') s||^2, with T capped at the dense weights."""
    model = searched(method, llama, compression_weight=7.0, alignment_weight=3.0, target_ratio=0.3)
    tuner = model.base_model
    logits = tuner.mask_logits("default").detach()
    layers = list(tuner.adapter_layers("default").values())
    assert logits.shape == (len(layers), 32)
    assert float(logits[torch.isfinite(logits)].mean()) == pytest.approx(3.0, abs=0.3)
    hard = (torch.rand(logits.shape) < 0.5).float() * torch.isfinite(logits)
    kept, dense, align = 0.0, 0, 0.0
    for row, layer in zip(hard, layers, strict=True):
        m, n = layer.shape
        count = int(row.sum())
        kept, dense = kept + min(count * (m + n), m * n), dense + m * n
        values = np.linalg.svd(layer.base_layer.weight.detach().numpy(), compute_uv=False)
        mask = row[: min(m, n)].numpy()
        prefix = (np.arange(min(m, n)) < count).astype(float)
        align += (((mask - prefix) * values) ** 2).sum() / (values**2).sum()
    expected = 7.0 * np.log(max(kept / dense, 0.3) / 0.3) + 3.0 * align / len(layers)
    assert float(tuner.regularizer("default", logits, hard)) == pytest.approx(expected, rel=1e-4)


def test_its_gradient_is_added_to_the_networks(llama: TinyModel) -> None:
    model = searched("ars", llama)
    tuner, name = model.base_model, "default"
    model(**llama.make_batch(4)).loss.backward()
    before = [p.grad.clone() for p in tuner.mask_parameters(name)]
    logits = tuner.mask_logits(name)
    _, hard = gumbel_mask(logits, uniform_noise(logits.shape, 0, 0), 0.4)
    wanted = torch.autograd.grad(tuner.regularizer(name, logits, hard), tuner.mask_parameters(name))
    tuner.add_regularization_gradient()
    for parameter, old, added in zip(tuner.mask_parameters(name), before, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, old + added)


def test_a_step_runs_the_network_once(llama: TinyModel) -> None:
    """Its sequence is long and its kernels are small: with more runs it would take longer than the model."""
    model, runs = searched("ars", llama), []
    tuner = model.base_model
    search(model, llama, optimizer(model, "ars"), 1)
    next(tuner._networks("default")).register_forward_hook(lambda *args: runs.append(1))
    steps = optimizer(model, "ars")
    for step in (2, 3):
        for batch in range(2):
            model.train()(**llama.make_batch(4, seed=batch)).loss.backward()
        tuner.add_regularization_gradient()
        steps.step()
        tuner.update_and_allocate(step, steps)
        steps.zero_grad()
        assert len(runs) == step - 1


def test_singular_values_are_those_of_the_factors(llama: TinyModel, tmp_path: Path) -> None:
    """Also after others have been loaded."""
    model = searched("ars", llama)
    search(model, llama, optimizer(model, "ars"), 1)
    other = get_peft_model(llama.make_model(seed=1), model.peft_config["default"])
    search(other, llama, optimizer(other, "ars"), 1)
    other.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    for row, layer in zip(
        model.base_model.singular_values("default"), other.base_model.adapter_layers("default").values(), strict=True
    ):
        values = np.linalg.svd(layer.base_layer.weight.detach().numpy(), compute_uv=False)
        np.testing.assert_allclose(row[: len(values)], values / np.linalg.norm(values), rtol=1e-4, atol=1e-5)


def test_modules_of_different_rank_share_one_network() -> None:
    model = searched("ars", TINY_MODELS["llama"])
    sizes = [min(layer.shape) for layer in model.base_model.adapter_layers("default").values()]
    assert set(sizes) == {16, 32}
    logits = model.base_model.mask_logits("default")
    assert [int(torch.isfinite(row).sum()) for row in logits] == sizes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hypernetwork": "own"}, "`hypernetwork='own'` must be 'shared' or 'per_layer'"),
        ({"hypernetwork": "per_layer", "start": "spectral"}, "`start='spectral'` needs a bias for each rank"),
        ({"mask_bias": float("nan")}, "`mask_bias=nan` must be a number that is finite"),
        ({"alignment_weight": -1.0}, "`alignment_weight=-1.0` must be a number of 0 or more"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveRankSVDConfig(**settings)


def test_the_papers_settings_are_the_defaults() -> None:
    config = AdaptiveRankSVDConfig()
    assert (config.tau, config.mask_bias, config.compression_weight, config.alignment_weight) == (0.4, 3.0, 16.0, 10.0)
