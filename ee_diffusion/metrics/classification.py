"""Figures of classified texts or images: accuracy, F1, Matthews, calibration and Brier; of regressions Spearman and squared error.

Here: figures of answers given, whichever exit gave them. Not here: which answer that was (classification/evaluation.py). n samples, C
classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)

BINS = 15


def figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Logits (n, C) of the answers given against labels (n,) -> name -> value, none in per cent.

    Classes: `accuracy`, `f1` (macro), `matthews`, `ece` (expected calibration error, 15 equal bins of the largest probability, of one
    softmax), `brier` (sum over classes of squared differences). C = 1 and floating labels: `spearman`, `mse`.

    Raises:
        ValueError: nothing to judge, shapes that do not fit, NaN.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}, expected (n, C) and (n,), n >= 1"
        )
    if logits.isnan().any() or (labels.is_floating_point() and labels.isnan().any()):
        raise ValueError("logits or labels hold NaN")
    logits = logits.double()
    if labels.is_floating_point():
        values = logits[:, 0]
        return {
            "spearman": spearman_corrcoef(values, labels.double()).item(),
            "mse": (values - labels).square().mean().item(),
        }
    classes, p = logits.shape[1], logits.softmax(-1)
    said = p.argmax(-1)
    truth = torch.nn.functional.one_hot(labels, classes)
    return {
        "accuracy": (said == labels).double().mean().item(),
        "f1": multiclass_f1_score(said, labels, num_classes=classes, average="macro").item(),
        "matthews": multiclass_matthews_corrcoef(said, labels, num_classes=classes).item(),
        "ece": multiclass_calibration_error(p, labels, num_classes=classes, n_bins=BINS, norm="l1").item(),
        "brier": (p - truth).square().sum(1).mean().item(),
    }
