"""Factor, bias and rank of a predicted error, by hand."""

from __future__ import annotations

import pytest
import torch

from ee_diffusion.metrics.gauges import gauge_figures


def test_figures_by_hand():
    error = torch.tensor([1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0])
    said = torch.tensor([2.0, 4.0, 8.0, 2.0, 1.0, 0.5, 9.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2])  # ranked, ranked the other way round, alone
    found = gauge_figures(said, error, groups=groups)
    assert found["factor"] == pytest.approx(2.0)
    assert found["bias"] == pytest.approx(2.0)
    assert found["rank"] == pytest.approx(0.0, abs=1e-4)
    assert found["moments"] == 7
    assert gauge_figures(said[:3], error[:3], groups=groups[:3])["rank"] == pytest.approx(1.0, abs=1e-4)


def test_the_factor_counts_both_ways():
    found = gauge_figures(torch.tensor([0.25, 4.0, 4.0]), torch.ones(3), groups=torch.arange(3))
    assert found["factor"] == pytest.approx(4.0)
    assert found["rank"] is None


@pytest.mark.parametrize("sizes", [(0, 0, 0), (2, 3, 3), (3, 3, 2)])
def test_bad_input(sizes: tuple[int, int, int]):
    said, error, groups = (torch.ones(size) for size in sizes)
    with pytest.raises(ValueError, match="expected three of one length"):
        gauge_figures(said, error, groups=groups)
