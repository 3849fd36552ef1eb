# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The module that a compressed linear becomes."""

import pytest
import torch
from torch import nn

from peft_rank.decomposition import decompose
from peft_rank.tuners.lowrank import LowRankLinear


@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_product_of_its_factors(bias):
    linear = nn.Linear(12, 20, bias=bias)
    factors = decompose(linear.weight.detach(), 5)
    module = LowRankLinear.from_factors(factors, linear.bias)
    x = torch.randn(3, 12)
    assert (module.in_features, module.out_features, module.rank) == (12, 20, 5)
    expected = nn.functional.linear(x, factors.up @ factors.down, linear.bias)
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module.dense()(x), expected)
    assert isinstance(module.dense(), nn.Linear)
    assert (module.bias is None) is (not bias)


def test_weight_tells_dtype_and_device():
    module = LowRankLinear(4, 6, 2, device="meta", dtype=torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert module.weight.device.type == "meta"
    assert set(module.state_dict()) == {"down.weight", "up.weight", "up.bias"}


def test_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        LowRankLinear(4, 6, 0)
