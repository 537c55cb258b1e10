"""Risk control: which of several policies may be used so that the expected loss stays below a target, said with confidence.

Here: bounds on losses that were measured. Not here: running the candidates, proposing them (replay.py). Losses lie in [0, 1] and come
from live runs on samples that neither trained nor proposed anything. K candidates in order, the safest first; n samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def p_value(losses: Tensor, risk: float) -> float:
    """Hoeffding-Bentkus p-value of "the expected loss is above `risk`" (arXiv 2110.01052, sec. 2.2): losses (n,) in [0, 1].

    `min(exp(-n h(min(m, r), r)), e P[Bin(n, r) <= ceil(n m)])`, m the mean, `h(a, b) = a log(a/b) + (1-a) log((1-a)/(1-b))`.

    Raises:
        ValueError: no losses, losses outside [0, 1] or NaN, a risk outside (0, 1).
    """
    _check_sample(losses, risk)
    count, mean = len(losses), min(float(losses.double().mean()), 1.0)
    hoeffding = math.exp(-count * _divergence(min(mean, risk), risk))
    return min(1.0, hoeffding, math.e * _binomial_at_most(math.ceil(count * mean - 1e-9), count, risk))


def upper_bound(losses: Tensor, delta: float) -> float:
    """UCB: the smallest risk that the losses (n,) refute with confidence 1 - delta, 1 if there is none (arXiv 2101.02703).

    Raises:
        ValueError: as `p_value`; a delta outside (0, 1).
    """
    _check_sample(losses, 0.5, delta)
    low, high = float(losses.double().mean()), 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if middle <= 0 or middle >= 1 or p_value(losses, middle) > delta:
            low = middle
        else:
            high = middle
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
        if p_value(own, risk) > delta:
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


def pareto_order(costs: Tensor, losses: Tensor, *, risk: float) -> Tensor:
    """Which of many candidates (several knobs) to test, and in which order (Pareto testing, arXiv 2210.07913).

    costs (K,), losses (K, n) on samples that only propose -> indices of the candidates that no other beats in cost and mean loss, the most
    certain first. Test them by `certified` on other samples.

    Raises:
        ValueError: shapes that do not fit, costs that are no finite numbers; as `p_value`.
    """
    _check(losses, risk)
    if costs.shape != losses.shape[:1]:
        raise ValueError(f"costs {tuple(costs.shape)} and losses {tuple(losses.shape)}, expected (K,) and (K, n)")
    if not bool(costs.isfinite().all()):
        raise ValueError(f"costs {costs.tolist()}, expected finite numbers")
    means = losses.double().mean(1)  # (K,)
    no_worse = (costs[None] <= costs[:, None]) & (means[None] <= means[:, None])  # (K, K): column beats row
    better = (costs[None] < costs[:, None]) | (means[None] < means[:, None])
    front = (~(no_worse & better).any(1)).nonzero()[:, 0]
    certain = [p_value(losses[index], risk) for index in front.tolist()]
    order = sorted(range(len(front)), key=lambda place: (certain[place], float(means[front[place]])))
    return front[order]


def _divergence(a: float, b: float) -> float:
    """h(a, b) of Hoeffding's bound, 0 <= a <= b < 1."""
    first = 0.0 if a == 0 else a * math.log(a / b)
    return first + (1 - a) * math.log((1 - a) / (1 - b))


def _binomial_at_most(most: int, count: int, probability: float) -> float:
    """P[Bin(count, probability) <= most], in logarithms."""
    number = torch.arange(0, min(most, count) + 1, dtype=torch.float64)
    total = torch.tensor(count + 1.0, dtype=torch.float64)
    ways = torch.lgamma(total) - torch.lgamma(number + 1) - torch.lgamma(total - number)
    logs = ways + number * math.log(probability) + (count - number) * math.log1p(-probability)
    return min(1.0, float(logs.logsumexp(0).exp()))


def _check_sample(losses: Tensor, risk: float, delta: float = 0.5) -> None:
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
