"""The betting bound: by hand, where it is valid, where it is tighter, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from ee_diffusion.core.betting import betting_p_value, betting_upper_bound

DELTA, ROUNDS, COUNT = 0.1, 400, 60


def by_hand(losses: list[float], risk: float, delta: float) -> float:
    capital, best, total, squares, spread = 1.0, 0.0, 0.5, 0.25, 0.25
    for place, loss in enumerate(losses, 1):
        bet = min(1.0, math.sqrt(2 * math.log(1 / delta) / (len(losses) * spread)))
        capital *= 1 - bet * (loss - risk)
        best = max(best, capital)
        total += loss
        squares += (loss - total / (1 + place)) ** 2
        spread = squares / (1 + place)
    return min(1.0, 1 / best)


def test_the_p_value_is_that_of_a_slow_loop():
    for seed, scale in ((0, 1.0), (1, 0.2), (2, 0.02)):
        losses = torch.rand(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
        for risk in (0.05, 0.3, 0.6):
            assert betting_p_value(losses, risk, delta=DELTA) == pytest.approx(by_hand(losses.tolist(), risk, DELTA))


def test_the_upper_bound_is_where_the_p_value_crosses():
    losses = torch.rand(50, generator=torch.Generator().manual_seed(1)) * 0.3
    bound = betting_upper_bound(losses, delta=DELTA)
    assert betting_p_value(losses, bound + 1e-6, delta=DELTA) <= DELTA
    assert betting_p_value(losses, bound - 1e-6, delta=DELTA) > DELTA
    assert betting_upper_bound(torch.ones(5), delta=DELTA) == 1.0


@pytest.mark.parametrize("kind", ["smooth", "all_or_nothing"])
def test_the_bound_covers_the_true_mean(kind: str):
    generator = torch.Generator().manual_seed(3)
    wrong = naive = 0
    for _ in range(ROUNDS):
        drawn = torch.rand(COUNT, generator=generator)  # true mean 0.2 both ways
        losses = 0.4 * drawn if kind == "smooth" else (drawn < 0.2).float()
        wrong += betting_upper_bound(losses, delta=DELTA) < 0.2
        naive += bool(losses.mean() < 0.2)
    most = ROUNDS * DELTA + 3 * math.sqrt(ROUNDS * DELTA * (1 - DELTA))
    assert wrong <= most
    assert naive > most, "a control that must fail: the mean of the losses promises nothing"


def test_it_is_tighter_than_hoeffding_where_losses_vary_little():
    losses = 0.1 + 0.02 * torch.rand(200, generator=torch.Generator().manual_seed(4))
    mean, hoeffding = float(losses.mean()), math.sqrt(math.log(1 / DELTA) / (2 * 200))
    assert betting_upper_bound(losses, delta=DELTA) - mean < 0.4 * hoeffding


def test_bad_input_is_refused():
    for losses in (torch.tensor([0.1, 1.1]), torch.tensor([math.nan]), torch.tensor([-0.1])):
        with pytest.raises(ValueError, match="expected numbers in"):
            betting_p_value(losses, 0.1, delta=DELTA)
    with pytest.raises(ValueError, match="expected \\(n,\\)"):
        betting_upper_bound(torch.zeros(0), delta=DELTA)
    for risk, delta in ((0.0, 0.1), (1.0, 0.1), (0.1, 0.0), (math.nan, 0.1), (0.1, math.nan)):
        with pytest.raises(ValueError, match="expected both in"):
            betting_p_value(torch.zeros(3), risk, delta=delta)
