"""Conformal sets of early answers: sets of classes that miss the true one at most so often, with a threshold for each exit.

Split conformal prediction on `1 - p(true class)`, calibrated among the samples that left at the same exit, since an exit's confidences are
not another's (JEI-DNN, arXiv 2310.09163). Calibration samples must be held out from training and from choosing thresholds.
n samples, C classes, A answers (the exits' and the model's own).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def conformal_thresholds(
    probabilities: Tensor, labels: Tensor, answers: Tensor, *, num_answers: int, miss_rate: float
) -> Tensor:
    """The `ceil((m + 1)(1 - miss_rate))`-th smallest `1 - p(true)` of the m samples of each answer -> (A,); 1 where m is too small,
    so that the set is everything.

    probabilities (n, C) of the answers given, labels (n,), answers (n,): which one was taken, 0..A-1.

    Raises:
        ValueError: shapes that do not fit; NaN, logits or whatever else are no probabilities of one class each; labels and answers that are
            none; a miss rate outside (0, 1).
    """
    _check(probabilities, answers, num_answers)
    if labels.shape != answers.shape or not 0 < miss_rate < 1:
        raise ValueError(
            f"labels {tuple(labels.shape)} and miss_rate={miss_rate}, expected ({len(answers)},) and (0, 1)"
        )
    _check_indices("labels", labels, probabilities.shape[1])
    scores = 1 - probabilities.gather(1, labels[:, None])[:, 0]  # (n,)
    found = torch.ones(num_answers, dtype=probabilities.dtype)
    for answer in range(num_answers):
        own = scores[answers == answer].sort().values  # (m,)
        place = math.ceil((len(own) + 1) * (1 - miss_rate))
        if place <= len(own):
            found[answer] = own[place - 1]
    return found


def conformal_sets(probabilities: Tensor, answers: Tensor, *, thresholds: Tensor) -> Tensor:
    """The classes with `1 - p <= threshold` of the sample's answer: (n, C) and (n,) -> (n, C) bool; at threshold 1 every class.

    Raises:
        ValueError: as `conformal_thresholds`; thresholds outside [0, 1] or NaN.
    """
    if thresholds.ndim != 1 or not bool(((thresholds >= 0) & (thresholds <= 1)).all()):
        raise ValueError(f"thresholds {thresholds.tolist()}, expected (A,) numbers in [0, 1]")
    _check(probabilities, answers, len(thresholds))
    return 1 - probabilities <= thresholds[answers][:, None]


def _check(probabilities: Tensor, answers: Tensor, num_answers: int) -> None:
    if probabilities.ndim != 2 or answers.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities {tuple(probabilities.shape)} and answers {tuple(answers.shape)}, expected (n, C) and (n,)"
        )
    _check_indices("answers", answers, num_answers)
    if not len(answers):
        return
    low, high = float(probabilities.min()), float(probabilities.max())
    sums = probabilities.double().sum(1)  # (n,)
    if not probabilities.is_floating_point() or not 0 <= low <= high <= 1 or bool(((sums - 1).abs() > 0.01).any()):
        raise ValueError(
            f"{probabilities.dtype} from {low:.4g} to {high:.4g} in rows with sums from {float(sums.min()):.4g} to "
            f"{float(sums.max()):.4g}, expected probabilities (softmax): in [0, 1], each row with the sum 1"
        )


def _check_indices(name: str, values: Tensor, count: int) -> None:
    if values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"{name} {values.dtype}, expected whole numbers in 0..{count - 1}")
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < count:
        raise ValueError(f"{name} {int(values.min())}..{int(values.max())}, expected 0..{count - 1}")
