# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Decompositions against what the released code of weighted low-rank BERT compression and of ARS computed.

Golden matrices of the first are (in, out) and were decomposed in float32; those of the second (out, in), in float64.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_rank.decomposition import decompose, weighted_error, weighted_svd


GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTED = sorted((GOLDEN / "wlra").glob("*.npz"))
CLOSED = sorted((GOLDEN / "ars").glob("decomp_*.npz"))

# how they are called there -> here; their errors carry the rounding of float32, and their Fisher a fixed damping
RELEASED = {
    "svd": "svd",
    "fwsvd_rowsum": "fisher",
    "em30": "em",
    "nesterov30": "nesterov",
    "anderson30": "anderson",
    "anderson30_reg1e-6": "anderson",
}


def _name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", WEIGHTED, ids=_name)
def test_weighted_errors_are_reached_or_beaten(path: Path) -> None:
    golden = np.load(path)
    weight = torch.from_numpy(golden["W"].T.copy())
    importance = torch.from_numpy(golden["F_normalised"].T.copy())
    for rank in (4, 16, 32):
        for released, method in RELEASED.items():
            factors = decompose(weight, rank, method, weight_importance=importance)
            error = float(weighted_error(weight, factors, "em", weight_importance=importance))
            assert error <= float(golden[f"r{rank}_{released}_err"]) * (1 + 2e-6), (rank, released)


@pytest.mark.parametrize("path", WEIGHTED, ids=_name)
@pytest.mark.parametrize("released", ["svd", "fwsvd_rowsum"])
def test_products_of_closed_forms(path: Path, released: str) -> None:
    golden = np.load(path)
    weight = torch.from_numpy(golden["W"].T.copy())
    importance = torch.from_numpy(golden["F_normalised"].T.copy())
    up, down = decompose(weight, 16, RELEASED[released], weight_importance=importance)
    expected = torch.from_numpy((golden[f"r16_{released}_left"] @ golden[f"r16_{released}_right"]).T)
    torch.testing.assert_close(up @ down, expected, rtol=0, atol=2e-4 * float(expected.abs().amax()))


def _statistics(path: Path, golden: np.lib.npyio.NpzFile) -> tuple[str, dict[str, Tensor | float]]:
    """Their scale of a column is (v + 1e-6)^alpha; for Fisher, v is the root of our mean over a column."""
    method = path.stem.split("_")[1]
    if method == "svd":
        return method, {}
    scale = torch.from_numpy(golden["svd_vector_in"]).double() + 1e-6
    alpha = float(golden["alpha"])
    if method == "activation":
        return method, {"input_scale": scale, "alpha": alpha}
    return method, {"weight_importance": scale.square().expand(golden["W"].shape), "alpha": alpha / 2}


@pytest.mark.parametrize("path", CLOSED, ids=_name)
def test_factors_up_to_sign(path: Path) -> None:
    golden = np.load(path)
    weight = torch.from_numpy(golden["W"])
    method, statistics = _statistics(path, golden)
    values, left, right = (torch.from_numpy(golden[key]) for key in ("E_exact", "UE_exact_f64", "V_t_exact_f64"))

    ours = weighted_svd(weight, method, dtype=torch.float64, **statistics)
    torch.testing.assert_close(ours.values, values, rtol=1e-6, atol=0)
    signs = (ours.up * left).sum(dim=0).sign()  # (r,)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(ours.up * signs, left / values, **close)
    torch.testing.assert_close(ours.down / values.unsqueeze(1) * signs.unsqueeze(1) / right.abs().amax(),
                               right / right.abs().amax(), **close)  # fmt: skip

    factors = decompose(weight.double(), min(weight.shape), method, **statistics)
    terms = torch.einsum("or,ri->roi", factors.up, factors.down)  # balanced, hence compared rank by rank
    torch.testing.assert_close(terms, torch.einsum("or,ri->roi", left, right), **close)
