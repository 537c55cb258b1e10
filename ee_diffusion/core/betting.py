"""A bound for losses that vary little: betting against "the expected loss is above the target" (Waudby-Smith and Ramdas).

Here: one p-value and the upper bound that follows from it. Not here: running candidates. Losses lie in [0, 1]. n samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def betting_p_value(losses: Tensor, risk: float, *, delta: float) -> float:
    """p-value of "the expected loss is at least `risk`": losses (n,) in [0, 1], in the order in which they were drawn.

    The capital of a gambler who bets on smaller losses (arXiv 2010.09686, as in arXiv 2101.02703, sec. 3.1.3):
    `C_t = prod_{i <= t} (1 - v_i (L_i - risk))`, `v_i = min(1, sqrt(2 log(1 / delta) / (n s_{i-1})))`,
    `m_t = (1/2 + sum_{i <= t} L_i) / (1 + t)`, `s_t = (1/4 + sum_{i <= t} (L_i - m_i)^2) / (1 + t)`; p = min(1, 1 / max_t C_t) (Ville).
    A bet looks at earlier losses alone, so p is valid for every `delta`, which only says at which level the bets are sharp. Where losses
    vary little it is far smaller than Hoeffding-Bentkus; for losses of 0 and 1 it is not. It depends on the order of the losses, which
    must not be chosen after looking at them.

    Raises:
        ValueError: no losses, losses outside [0, 1] or NaN, a risk or delta outside (0, 1).
    """
    _check(losses, risk, delta)
    return _p_value(losses.double(), _bets(losses.double(), delta), risk)


def betting_upper_bound(losses: Tensor, *, delta: float) -> float:
    """UCB: the smallest risk that the losses (n,) refute with confidence 1 - delta; 1 if there is none.

    Raises:
        ValueError: as `betting_p_value`.
    """
    _check(losses, 0.5, delta)
    losses = losses.double()
    bets = _bets(losses, delta)
    low, high = 0.0, 1.0
    for _ in range(50):  # the capital grows with the risk at every t, so p falls with it
        middle = (low + high) / 2
        low, high = (low, middle) if _p_value(losses, bets, middle) <= delta else (middle, high)
    return high


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


def _check(losses: Tensor, risk: float, delta: float) -> None:
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"losses are {tuple(losses.shape)}, expected (n,) with n >= 1")
    if not bool(((losses >= 0) & (losses <= 1)).all()):
        raise ValueError(f"losses from {float(losses.min())} to {float(losses.max())}, expected numbers in [0, 1]")
    if not 0 < risk < 1 or not 0 < delta < 1:
        raise ValueError(f"risk={risk}, delta={delta}, expected both in (0, 1)")
