"""Figures of classifications against counts by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ee_diffusion.metrics.classification import figures

P = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 0])


def test_by_hand():
    found = figures(P.log() + 3, LABELS)
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx((2 * 2 / (2 * 2 + 1) + 2 * 1 / (2 * 1 + 1)) / 2)
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 0) / (3 * 1 * 2 * 2) ** 0.5)
    assert found["brier"] == pytest.approx((2 * 0.01 + 2 * 0.36 + 2 * 0.04 + 2 * 0.09) / 4)
    # four bins of one sample each: |confidence - right|
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.3) / 4, abs=1e-6)


def test_regression():
    found = figures(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0.1, 0.2, 0.3]))
    assert found["spearman"] == pytest.approx(1, abs=1e-5)
    assert found["mse"] == pytest.approx((0.81 + 3.24 + 13.69) / 3, abs=1e-5)


def test_refused():
    for logits, labels in ((torch.zeros(0, 2), torch.zeros(0).long()), (torch.zeros(2, 2), torch.zeros(3).long())):
        with pytest.raises(ValueError, match="expected"):
            figures(logits, labels)
    for logits, labels in ((P.log() * math.nan, LABELS), (torch.tensor([[math.nan]]), torch.tensor([0.5]))):
        with pytest.raises(ValueError, match="NaN"):
            figures(logits, labels)
