"""Risk control: which of several policies may be used so that the expected loss stays below a target, said with confidence.

Here: bounds on losses that were measured, conformal sets of classes. Not here: running the candidates, proposing them (replay.py).
Losses lie in [0, 1] and come from live runs on samples that neither trained nor proposed anything.
K candidates in order, the safest first; n samples; C classes; A answers (the exits' and the model's own).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def p_value(losses: Tensor, risk: float, *, delta: float) -> float:
    """p-value of "the expected loss is at least `risk`": losses (n,) in [0, 1], in the order in which they were drawn.

    The capital of a gambler who bets on smaller losses (arXiv 2010.09686, as in arXiv 2101.02703, sec. 3.1.3):
    `C_t = prod_{i <= t} (1 - v_i (L_i - risk))`, `v_i = min(1, sqrt(2 log(1 / delta) / (n s_{i-1})))`,
    `m_t = (1/2 + sum_{i <= t} L_i) / (1 + t)`, `s_t = (1/4 + sum_{i <= t} (L_i - m_i)^2) / (1 + t)`; p = min(1, 1 / max_t C_t) (Ville).
    A bet looks at earlier losses alone, so p is valid for every `delta`, which only says at which level the bets are sharp. Where losses
    vary little it is far smaller than Hoeffding-Bentkus; for losses of 0 and 1 it is about the same. It depends on the order of the
    losses, which must not be chosen after looking at them.

    Raises:
        ValueError: no losses, losses outside [0, 1] or NaN, a risk or delta outside (0, 1).
    """
    _check_sample(losses, risk, delta)
    return _p_value(losses.double(), _bets(losses.double(), delta), risk)


def upper_bound(losses: Tensor, delta: float) -> float:
    """UCB: the smallest risk that the losses (n,) refute with confidence 1 - delta, 1 if there is none (arXiv 2101.02703).

    Raises:
        ValueError: as `p_value`.
    """
    _check_sample(losses, 0.5, delta)
    losses = losses.double()
    bets = _bets(losses, delta)
    low, high = 0.0, 1.0
    for _ in range(50):  # the capital grows with the risk at every t, so p falls with it
        middle = (low + high) / 2
        low, high = (low, middle) if _p_value(losses, bets, middle) <= delta else (middle, high)
    return high


def certified(losses: Tensor, *, risk: float, delta: float) -> Tensor:
    """Learn then test, fixed sequence (arXiv 2110.01052): losses (K, n) -> (K,) bool.

    Candidates are tested in their order at level delta until the first that fails. With probability 1 - delta every certified one has an
    expected loss of at most `risk`; nothing is assumed of how the loss changes along the order. None certified is an answer.

    Raises:
        ValueError: as `p_value`; a delta outside (0, 1).
    """
    _check(losses, risk, delta)
    found = torch.zeros(len(losses), dtype=torch.bool)
    for candidate, own in enumerate(losses):
        if p_value(own, risk, delta=delta) > delta:
            break
        found[candidate] = True
    return found


def in_expectation(losses: Tensor, *, risk: float) -> int | None:
    """Conformal risk control (arXiv 2208.02814): losses (K, n) -> the boldest candidate k with `(n m_k + 1) / (n + 1) <= risk`; None if
    there is none.

    The expected loss of the choice is at most `risk` (mean over calibrations). It needs losses that grow from safe to bold for every
    sample: each is replaced by the largest so far, so the promise holds for what is chosen.

    Raises:
        ValueError: losses outside [0, 1] or NaN, a risk outside (0, 1).
    """
    _check(losses, risk)
    grown, count = losses.double().cummax(0).values, losses.shape[1]
    good = ((count * grown.mean(1) + 1) / (count + 1) <= risk).nonzero()[:, 0]
    return int(good[-1]) if len(good) else None


def pareto_order(costs: Tensor, losses: Tensor, *, risk: float, delta: float) -> Tensor:
    """Which of many candidates (several knobs) to test, and in which order (Pareto testing, arXiv 2210.07913).

    costs (K,), losses (K, n) on samples that only propose -> indices of the candidates that no other beats in cost and mean loss, the most
    certain first. Test them by `certified` on other samples.

    Raises:
        ValueError: shapes that do not fit, costs that are no finite numbers; as `p_value`.
    """
    _check(losses, risk, delta)
    if costs.shape != losses.shape[:1]:
        raise ValueError(f"costs {tuple(costs.shape)} and losses {tuple(losses.shape)}, expected (K,) and (K, n)")
    if not bool(costs.isfinite().all()):
        raise ValueError(f"costs {costs.tolist()}, expected finite numbers")
    means = losses.double().mean(1)  # (K,)
    no_worse = (costs[None] <= costs[:, None]) & (means[None] <= means[:, None])  # (K, K): column beats row
    better = (costs[None] < costs[:, None]) | (means[None] < means[:, None])
    front = (~(no_worse & better).any(1)).nonzero()[:, 0]
    certain = [p_value(losses[index], risk, delta=delta) for index in front.tolist()]
    order = sorted(range(len(front)), key=lambda place: (certain[place], float(means[front[place]])))
    return front[order]


def conformal_thresholds(
    probabilities: Tensor, labels: Tensor, answers: Tensor, *, num_answers: int, miss_rate: float
) -> Tensor:
    """Split conformal prediction for each exit, whose confidences are not another's (JEI-DNN, arXiv 2310.09163).

    The `ceil((m + 1)(1 - miss_rate))`-th smallest `1 - p(true)` of the m samples of each answer -> (A,); 1 where m is too small,
    so that the set is everything.

    probabilities (n, C) of the answers given, labels (n,), answers (n,): which one was taken, 0..A-1.

    Raises:
        ValueError: shapes that do not fit; NaN, logits or whatever else are no probabilities of one class each; labels and answers that are
            none; a miss rate outside (0, 1).
    """
    _check_answers(probabilities, answers, num_answers)
    if labels.shape != answers.shape or not 0 < miss_rate < 1:
        raise ValueError(
            f"labels {tuple(labels.shape)} and miss_rate={miss_rate}, expected ({len(answers)},) and (0, 1)"
        )
    _check_indices("labels", labels, probabilities.shape[1])
    scores = 1 - probabilities.gather(1, labels.long()[:, None])[:, 0]  # (n,)
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
    _check_answers(probabilities, answers, len(thresholds))
    return 1 - probabilities <= thresholds[answers.long()][:, None]  # uint8 would be a mask


def _bets(losses: Tensor, delta: float) -> Tensor:
    """v (n,), each from the losses before its own."""
    count = torch.arange(1, len(losses) + 1, dtype=torch.float64)
    means = (0.5 + losses.cumsum(0)) / (1 + count)  # (n,)
    spread = (0.25 + (losses - means).square().cumsum(0)) / (1 + count)  # (n,)
    before = torch.cat([torch.tensor([0.25], dtype=torch.float64), spread[:-1]])
    return (2 * math.log(1 / delta) / (len(losses) * before)).sqrt().clamp(max=1.0)


def _p_value(losses: Tensor, bets: Tensor, risk: float) -> float:
    capital = torch.log1p(-bets * (losses - risk)).cumsum(0)  # (n,), logarithms
    return min(1.0, math.exp(-float(capital.max())))


def _check_sample(losses: Tensor, risk: float, delta: float) -> None:
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"losses are {tuple(losses.shape)}, expected (n,) with n >= 1: those of one candidate")
    _check(losses[None], risk, delta)


def _check(losses: Tensor, risk: float, delta: float = 0.5) -> None:
    if losses.ndim != 2 or not losses.numel():
        raise ValueError(f"losses are {tuple(losses.shape)}, expected (K, n) with at least one of each")
    if not bool(((losses >= 0) & (losses <= 1)).all()):
        raise ValueError(f"losses from {float(losses.min())} to {float(losses.max())}, expected numbers in [0, 1]")
    if not 0 < risk < 1 or not 0 < delta < 1:
        raise ValueError(f"risk={risk}, delta={delta}, expected both in (0, 1)")


def _check_answers(probabilities: Tensor, answers: Tensor, num_answers: int) -> None:
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
