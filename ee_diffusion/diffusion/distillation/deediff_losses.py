"""Losses that train exits together with their uncertainty. Pure functions of tensors; nothing here knows a model.

K exits, B samples, * any further dimensions (C, H, W for images). Predictions, uncertainties and targets have one shape per exit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uncertainty_target(predictions: Tensor, target: Tensor) -> Tensor:
    """What an uncertainty module should say: `tanh |g_i - eps|`, in [0, 1), without gradient (DeeDiff eq. 5, arXiv 2309.17074).

    predictions (K, B, *), target (B, *) -> (K, B, *).
    """
    return torch.tanh((predictions.detach() - target.detach()).abs())


def uncertainty_loss(uncertainty: Tensor, predictions: Tensor, target: Tensor) -> Tensor:
    """`L_u = sum_i || u_i - tanh|g_i - eps| ||^2` (DeeDiff eq. 6): trains the uncertainty, never the head.

    uncertainty and predictions (K, B, *), target (B, *). Mean over * and over B, sum over exits.
    """
    _check(uncertainty, predictions, target)
    return (uncertainty - uncertainty_target(predictions, target)).square().flatten(1).mean(1).sum()


def layerwise_loss(
    uncertainty: Tensor, predictions: Tensor, target: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """`L_UAL = sum_i (1 - u_i) || g_i - eps ||^2`, u without gradient (DeeDiff eq. 7): trains the heads where they are certain.

    Shapes and reductions as in `uncertainty_loss`; `weights` (B,): of the samples, None: one each (as DeeDiff).
    """
    _check(uncertainty, predictions, target)
    errors = ((1 - uncertainty.detach()) * (predictions - target).square()).flatten(2).mean(2)  # (K, B)
    return (errors if weights is None else errors * weights).mean(1).sum()


def released_uncertainty_loss(confidence: Tensor, predictions: Tensor, target: Tensor) -> Tensor:
    """The authors' released code: certainty against `1 - tanh|g_i - eps|`, mean (not sum) over exits. Shapes as above."""
    _check(confidence, predictions, target)
    return (confidence - (1 - uncertainty_target(predictions, target))).square().mean()


def released_layerwise_loss(confidence: Tensor, predictions: Tensor, target: Tensor) -> Tensor:
    """The authors' released code: `sum_i w_i mean (g_i - eps)^2`, `w_i` the mean certainty of exit i over the batch, divided by their
    sum over exits. Not detached, unlike eq. 7: through `w_i` it also trains the certainty to be higher where errors are lower.

    Shapes as above.
    """
    _check(confidence, predictions, target)
    weights = confidence.flatten(1).mean(1)  # (K,)
    errors = (predictions - target).square().flatten(1).mean(1)  # (K,)
    return (weights / weights.sum() * errors).sum()


def _check(uncertainty: Tensor, predictions: Tensor, target: Tensor) -> None:
    if uncertainty.shape != predictions.shape or predictions.shape[1:] != target.shape:
        raise ValueError(
            f"uncertainty {tuple(uncertainty.shape)} and predictions {tuple(predictions.shape)} must be "
            f"(K, *{tuple(target.shape)}), the shape of the target behind the exits"
        )
