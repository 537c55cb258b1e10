"""Losses against slow float64 loops written from the paper (DeeDiff, arXiv 2309.17074), and where their gradients go."""

from __future__ import annotations

import math

import pytest
import torch

from ee_diffusion.diffusion.distillation import deediff_losses as losses

K, B, C, H, W = 3, 2, 2, 2, 3


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uncertainty in (0, 1), predictions, target; float64, the first two with gradient."""
    uncertainty = torch.rand(K, B, C, H, W, dtype=torch.float64).requires_grad_()
    predictions = torch.randn(K, B, C, H, W, dtype=torch.float64).requires_grad_()
    return uncertainty, predictions, torch.randn(B, C, H, W, dtype=torch.float64)


def number(tensor: torch.Tensor, at: tuple[int, ...]) -> float:
    return float(tensor.detach()[at])


def elements(k: int):
    return [(k, b, c, h, w) for b in range(B) for c in range(C) for h in range(H) for w in range(W)]


def test_uncertainty_target(drawn):
    _, predictions, target = drawn
    found = losses.uncertainty_target(predictions, target)
    assert not found.requires_grad
    for k in range(K):
        for at in elements(k):
            expected = math.tanh(abs(number(predictions, at) - number(target, at[1:])))
            assert number(found, at) == pytest.approx(expected, abs=1e-12)


def test_uncertainty_loss(drawn):
    uncertainty, predictions, target = drawn
    total = 0.0
    for k in range(K):  # a sum over exits of means over samples and pixels
        terms = []
        for at in elements(k):
            wanted = math.tanh(abs(number(predictions, at) - number(target, at[1:])))
            terms.append((number(uncertainty, at) - wanted) ** 2)
        total += sum(terms) / len(terms)
    found = losses.uncertainty_loss(uncertainty, predictions, target)
    assert number(found, ()) == pytest.approx(total, abs=1e-12)
    found.backward()
    assert predictions.grad is None, "the uncertainty is trained, never the head"
    for k in range(K):
        for at in elements(k):
            wanted = math.tanh(abs(number(predictions, at) - number(target, at[1:])))
            slope = 2 * (number(uncertainty, at) - wanted) / len(elements(k))
            assert number(uncertainty.grad, at) == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_layerwise_loss(drawn, weighted: bool):
    uncertainty, predictions, target = drawn
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64) if weighted else None
    total = 0.0
    for k in range(K):
        terms = []
        for at in elements(k):
            weight = float(weights[at[1]]) if weighted else 1.0
            terms.append(
                weight * (1 - number(uncertainty, at)) * (number(predictions, at) - number(target, at[1:])) ** 2
            )
        total += sum(terms) / len(terms)
    found = losses.layerwise_loss(uncertainty, predictions, target, weights=weights)
    assert number(found, ()) == pytest.approx(total, abs=1e-12)
    found.backward()
    assert uncertainty.grad is None, "the head is trained, never the uncertainty"
    for k in range(K):
        for at in elements(k):
            weight = (float(weights[at[1]]) if weighted else 1.0) * (1 - number(uncertainty, at))
            slope = 2 * weight * (number(predictions, at) - number(target, at[1:])) / len(elements(k))
            assert number(predictions.grad, at) == pytest.approx(slope, abs=1e-12)


def test_released_uncertainty_loss(drawn):
    confidence, predictions, target = drawn
    terms = []
    for k in range(K):  # a mean over exits too
        for at in elements(k):
            wanted = 1 - math.tanh(abs(number(predictions, at) - number(target, at[1:])))
            terms.append((number(confidence, at) - wanted) ** 2)
    found = losses.released_uncertainty_loss(confidence, predictions, target)
    assert number(found, ()) == pytest.approx(sum(terms) / len(terms), abs=1e-12)
    found.backward()
    assert predictions.grad is None
    for k in range(K):
        for at in elements(k):
            wanted = 1 - math.tanh(abs(number(predictions, at) - number(target, at[1:])))
            slope = 2 * (number(confidence, at) - wanted) / len(terms)
            assert number(confidence.grad, at) == pytest.approx(slope, abs=1e-12)


def test_released_layerwise_loss(drawn):
    confidence, predictions, target = drawn
    weights, errors = [], []
    for k in range(K):
        weights.append(sum(number(confidence, at) for at in elements(k)) / len(elements(k)))
        squares = [(number(predictions, at) - number(target, at[1:])) ** 2 for at in elements(k)]
        errors.append(sum(squares) / len(squares))
    expected = sum(weight / sum(weights) * error for weight, error in zip(weights, errors, strict=True))
    found = losses.released_layerwise_loss(confidence, predictions, target)
    assert number(found, ()) == pytest.approx(expected, abs=1e-12)
    found.backward()
    for k in range(K):
        for at in elements(k):  # d (w_k / sum w) / d w_k, times the errors: the weights are not detached
            slope = (errors[k] - expected) / sum(weights) / len(elements(k))
            assert number(confidence.grad, at) == pytest.approx(slope, abs=1e-12)
            slope = (
                2 * weights[k] / sum(weights) * (number(predictions, at) - number(target, at[1:])) / len(elements(k))
            )
            assert number(predictions.grad, at) == pytest.approx(slope, abs=1e-12)


NAMES = ("uncertainty_loss", "layerwise_loss", "released_uncertainty_loss", "released_layerwise_loss")


@pytest.mark.parametrize("name", NAMES)
def test_no_exits_more_or_fewer_than_predictions(name: str, drawn):
    uncertainty, predictions, target = drawn
    loss = getattr(losses, name)
    for wrong in ((uncertainty[:2], predictions, target), (uncertainty, predictions, target[:1])):
        with pytest.raises(ValueError, match=r"must be \(K"):
            loss(*wrong)
    with pytest.raises(ValueError, match="the shape of the target"):  # (B, C, H, W) would broadcast against (K, 1, ...)
        loss(uncertainty[:, :1], predictions[:, :1], target)
