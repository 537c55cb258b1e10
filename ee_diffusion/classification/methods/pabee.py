"""PABEE (arXiv 2006.04152): stop once several exits in a row agree.

B samples, C classes, A outputs, the model's own last.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ee_diffusion.classification.method import POOLED, BatchOutputs, Method, NoSettings, output_losses
from ee_diffusion.core.criteria import Patience
from ee_diffusion.core.policy import Policy


def pabee(patience: int) -> Policy:
    """Stop once `patience` exits in a row agreed with the one before.

    Raises:
        ValueError: patience below 1.
    """
    return Policy(Patience(0.5, patience, score="agreement"))


def pabee_regression(patience: int, *, tolerance: float) -> Policy:
    """PABEE for regression: stop once `patience` outputs in a row lay within `tolerance` of the one before.

    Raises:
        ValueError: patience below 1, a tolerance not above 0.
    """
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance}, expected a finite number above 0")
    return Policy(Patience(math.exp(-tolerance), patience, score="closeness"))


def depth_weighted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`sum_j j CE_j / sum_j j`, j = 1..A: logits (A, B, C), labels (B,)."""
    weights = torch.arange(1, len(logits) + 1, device=logits.device)  # (A,)
    return (weights[:, None] * output_losses(logits, labels)).sum(0).mean() / weights.sum()


def _loss(outputs: BatchOutputs, settings: NoSettings) -> dict[str, Tensor]:
    return {"loss": depth_weighted_loss(outputs.logits, outputs.labels)}


PABEE = Method(_loss, trains="both", head=POOLED)
