"""Bounds against slow float64 readings, and the promise itself: over many calibrations the risk passes the target as rarely as is said."""

from __future__ import annotations

import math

import pytest
import torch

from ee_diffusion.core.risk_control import certified, in_expectation, p_value, pareto_order, upper_bound

RISK, DELTA, ROUNDS, COUNT = 0.2, 0.1, 400, 60


def population(seed: int = 0) -> torch.Tensor:
    """True losses (K, N) of 8 candidates on a large population, in part all-or-nothing, growing from safe to bold on the whole."""
    generator = torch.Generator().manual_seed(seed)
    hardness = torch.rand(COUNT * 20, generator=generator)  # (N,)
    bold = torch.linspace(0.02, 0.6, 8)[:, None]
    smooth = (bold * hardness * 1.2).clamp(max=1)
    return torch.where(torch.rand(8, COUNT * 20, generator=generator) < 0.5, smooth, (hardness < bold).float())


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
            assert p_value(losses, risk, delta=DELTA) == pytest.approx(by_hand(losses.tolist(), risk, DELTA))
    assert p_value(torch.ones(20), 0.1, delta=DELTA) == 1.0


def test_the_upper_bound_is_where_the_p_value_crosses():
    losses = torch.rand(50, generator=torch.Generator().manual_seed(1)) * 0.3
    bound = upper_bound(losses, DELTA)
    assert p_value(losses, bound + 1e-6, delta=DELTA) <= DELTA < p_value(losses, bound - 1e-6, delta=DELTA)
    assert upper_bound(torch.ones(5), 0.1) == 1.0


@pytest.mark.parametrize("kind", ["smooth", "all_or_nothing"])
def test_the_bound_covers_the_true_mean(kind: str):
    generator = torch.Generator().manual_seed(3)
    wrong = naive = 0
    for _ in range(ROUNDS):
        uniform = torch.rand(COUNT, generator=generator)  # true mean 0.2 both ways
        losses = 0.4 * uniform if kind == "smooth" else (uniform < 0.2).float()
        wrong += upper_bound(losses, DELTA) < 0.2
        naive += bool(losses.mean() < 0.2)
    assert not too_many(wrong)
    assert too_many(naive), "a control that must fail: the mean of the losses promises nothing"


def test_it_is_tighter_than_hoeffding_where_losses_vary_little():
    losses = 0.1 + 0.02 * torch.rand(200, generator=torch.Generator().manual_seed(4))
    mean, hoeffding = float(losses.mean()), math.sqrt(math.log(1 / DELTA) / (2 * 200))
    assert upper_bound(losses, DELTA) - mean < 0.4 * hoeffding


def drawn(generator: torch.Generator, losses: torch.Tensor) -> torch.Tensor:
    return losses[:, torch.randint(losses.shape[1], (COUNT,), generator=generator)]


def too_many(failures: int) -> bool:
    """More than a binomial with probability delta explains, at three standard deviations."""
    return failures > ROUNDS * DELTA + 3 * math.sqrt(ROUNDS * DELTA * (1 - DELTA))


def test_certified_candidates_keep_their_promise_and_naive_choice_does_not():
    losses, generator = population(), torch.Generator().manual_seed(2)
    true = losses.mean(1)
    wrong = naive = none = 0
    for _ in range(ROUNDS):
        sample = drawn(generator, losses)
        found = certified(sample, risk=RISK, delta=DELTA)
        wrong += bool((true[found] > RISK).any())
        none += not bool(found.any())
        below = (sample.mean(1) <= RISK).nonzero()[:, 0]
        naive += bool(len(below)) and bool(true[below[-1]] > RISK)
    assert not too_many(wrong)
    assert too_many(naive), "a control that must fail: the empirical mean promises nothing"
    assert none < ROUNDS / 2


def test_the_upper_bound_covers():
    losses, generator = population(3), torch.Generator().manual_seed(4)
    true = losses.mean(1)
    wrong = sum(upper_bound(drawn(generator, losses)[4], DELTA) < true[4] for _ in range(ROUNDS))
    assert not too_many(int(wrong))


def test_conformal_risk_control_holds_in_the_mean():
    losses, generator = population(5), torch.Generator().manual_seed(6)
    grown = losses.cummax(0).values.mean(1)
    risks = []
    for _ in range(ROUNDS):
        chosen = in_expectation(drawn(generator, losses), risk=RISK)
        risks.append(0.0 if chosen is None else float(grown[chosen]))
    assert sum(risks) / ROUNDS <= RISK
    assert sum(risks) / ROUNDS > RISK / 3
    by_hand = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.3, 0.0], [0.9, 0.0, 0.0]])
    assert in_expectation(by_hand, risk=0.33) == 1  # (0.3 + 1) / 4; the third: (0.9 + 0.3 + 1) / 4
    assert in_expectation(by_hand, risk=0.6) == 2
    assert in_expectation(by_hand, risk=0.2) is None


def test_pareto_order_keeps_what_nothing_beats():
    costs = torch.tensor([1.0, 0.5, 0.5, 0.3, 0.4])
    losses = torch.tensor([[0.0, 0.0], [0.1, 0.1], [0.3, 0.1], [0.4, 0.4], [0.5, 0.5]])
    assert pareto_order(costs, losses, risk=0.6, delta=DELTA).tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match=r"costs \(2,\) and losses \(5, 2\)"):
        pareto_order(costs[:2], losses, risk=0.6, delta=DELTA)


@pytest.mark.parametrize("losses", [torch.tensor([[0.1, 1.1]]), torch.tensor([[math.nan]]), torch.tensor([[-0.1]])])
def test_losses_out_of_range_are_refused(losses: torch.Tensor):
    with pytest.raises(ValueError, match="expected numbers in"):
        certified(losses, risk=0.1, delta=0.1)
    with pytest.raises(ValueError, match="expected numbers in"):
        in_expectation(losses, risk=0.1)


def test_bad_numbers_are_refused():
    for risk, delta in ((0.0, 0.1), (1.0, 0.1), (0.1, 0.0), (math.nan, 0.1), (0.1, math.nan)):
        with pytest.raises(ValueError, match="expected both in"):
            certified(torch.zeros(1, 3), risk=risk, delta=delta)
    with pytest.raises(ValueError, match="at least one of each"):
        certified(torch.zeros(2, 0), risk=0.1, delta=0.1)


@pytest.mark.parametrize(
    "bound", [lambda losses: p_value(losses, 0.1, delta=0.1), lambda losses: upper_bound(losses, 0.1)]
)
def test_the_losses_of_several_candidates_are_no_sample(bound):
    with pytest.raises(ValueError, match=r"losses are \(3, 50\), expected \(n,\)"):
        bound(torch.zeros(3, 50))
    with pytest.raises(ValueError, match=r"losses are \(0,\), expected \(n,\)"):
        bound(torch.zeros(0))


def test_costs_that_are_no_numbers_order_nothing():
    with pytest.raises(ValueError, match=r"costs .*expected finite numbers"):
        pareto_order(torch.tensor([1.0, math.nan]), torch.zeros(2, 5), risk=0.1, delta=DELTA)


def test_after_the_first_failure_nothing_is_certified():
    """A later candidate that would pass alone: going on would test as often as one likes."""
    good, bad = torch.zeros(60), torch.full((60,), 0.9)
    assert certified(torch.stack([good, bad, good]), risk=0.1, delta=0.1).tolist() == [True, False, False]
    assert certified(torch.stack([bad, good]), risk=0.1, delta=0.1).tolist() == [False, False]


def test_conformal_risk_control_takes_the_largest_loss_so_far():
    losses = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.3, 0.0], [0.9, 0.0, 0.0]])
    assert in_expectation(losses, risk=0.5) == 1, "(0.9 + 0.3 + 1) / 4 is above 0.5, without the 0.3 it would be below"
    swapped = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert in_expectation(swapped, risk=0.5) == 0, "what the bolder gets right the safer got wrong: 3 / 4, not 2 / 4"
