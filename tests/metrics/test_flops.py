"""Counted FLOPs against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from ee_diffusion.metrics.flops import counting_flops


@pytest.mark.parametrize("masked", [False, True])
def test_products_and_attention_are_counted(masked: bool):
    query, keys = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool) if masked else None
    with counting_flops() as outer:
        linear(torch.randn(4, 6), torch.randn(9, 6))
        with counting_flops() as inner, torch.no_grad():
            scaled_dot_product_attention(query, keys, keys, attn_mask=mask)
    assert inner.get_total_flops() == 4 * 2 * 3 * 5 * 7 * 8
    assert outer.get_total_flops() == inner.get_total_flops() + 2 * 4 * 6 * 9
