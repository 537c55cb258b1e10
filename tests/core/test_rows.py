"""Rows and samples: the least safe row of each sample, rows picked from tensors."""

from __future__ import annotations

import math

import pytest
import torch

from ee_diffusion.core.rows import content_ids, least_of, rows_of


def test_a_sample_is_as_safe_as_its_least_safe_row():
    found = least_of([0.5, 0.2, 0.9, 0.3], [2, 0, 2, 0], num_samples=4)
    assert (found[0], found[2]) == (0.2, 0.5)
    assert math.isnan(found[1])
    assert math.isnan(found[3])


def test_infinite_scores_are_scores():
    assert least_of([math.inf, math.inf, -math.inf], [0, 1, 1], num_samples=2) == [math.inf, -math.inf]


@pytest.mark.parametrize("values", [[math.nan, 0.5], [0.5, math.nan], [0.5, math.nan, 0.4], [math.nan, math.nan]])
def test_a_row_that_is_nan_makes_its_sample_nan(values: list[float]):
    found = least_of([*values, 0.7], [0] * len(values) + [1], num_samples=2)
    assert math.isnan(found[0])
    assert found[1] == 0.7


def test_rows_of_a_tensor():
    values, places = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 0])
    assert torch.equal(rows_of(values, places), values[[3, 0]])
    for one in (values[:1].expand(5, 2), values.new_ones(1, 2)[0].expand(5, 2)):
        assert torch.equal(rows_of(one, places), one[[3, 0]])
        assert rows_of(one, places).stride(0) == 0, "what is one for all rows stays one"
        assert rows_of(one, places[:0]).shape == (0, 2)
    shared = (values, values)
    assert rows_of(shared, places) is shared


def test_ids_are_made_of_what_a_row_holds():
    tokens = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [5, 6, 7, 8]])
    mask = (tokens > 0).long()
    ids = content_ids(tokens, mask)
    assert len(set(ids.tolist())) == 3
    assert bool((ids >= 0).all())
    assert torch.equal(content_ids(tokens.int().flip(1), mask.flip(1).bool())[1:2], content_ids(torch.tensor([[9, 8]])))
    assert torch.equal(content_ids(tokens[[1]][:, :2]), ids[[1]]), "neither mates nor padding nor a mask of ones matter"
    assert torch.equal(content_ids(torch.stack([tokens[0]] * 2)), content_ids(tokens[[0]]).repeat(2))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        images = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(content_ids(images)[[2]], content_ids(images[[2]]))
