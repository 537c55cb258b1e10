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
        ValueError: shapes that do not fit, a miss rate outside (0, 1).
    """
    _check(probabilities, answers, num_answers)
    if labels.shape != answers.shape or not 0 < miss_rate < 1:
        raise ValueError(
            f"labels {tuple(labels.shape)} and miss_rate={miss_rate}, expected ({len(answers)},) and (0, 1)"
        )
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
        ValueError: shapes that do not fit.
    """
    _check(probabilities, answers, len(thresholds))
    return 1 - probabilities <= thresholds[answers][:, None]


def _check(probabilities: Tensor, answers: Tensor, num_answers: int) -> None:
    if probabilities.ndim != 2 or answers.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities {tuple(probabilities.shape)} and answers {tuple(answers.shape)}, expected (n, C) and (n,)"
        )
    if len(answers) and not 0 <= int(answers.min()) <= int(answers.max()) < num_answers:
        raise ValueError(f"answers {int(answers.min())}..{int(answers.max())}, expected 0..{num_answers - 1}")
