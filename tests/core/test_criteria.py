"""Criteria: decisions against slow loops written from the formulas, pure, deaf to NaN; numbers out of range are refused."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from ee_diffusion.core.criteria import (
    DecayingThreshold,
    DepthTable,
    ErrorBudget,
    ExitPoint,
    GatedExit,
    Patience,
    QExit,
    SampledExit,
    Threshold,
)

K, E, NAN = 4, 6, float("nan")


def depths(criterion, scores: torch.Tensor, step: int = 0, num_steps: int = 1) -> list[int]:
    """The exit (index, K: none) at which each sample stops first; scores (K, E)."""
    state = criterion.start(torch.arange(scores.shape[1]), step=step, previous=None)
    first = [K] * scores.shape[1]
    for exit, score in enumerate(scores):
        where = ExitPoint(step, num_steps, 0.0, depth=exit + 1, exit=exit)
        stop, state = criterion.decide(score, where, state)
        assert stop.dtype == torch.bool
        for sample in stop.nonzero()[:, 0].tolist():
            first[sample] = min(first[sample], exit)
    return first


def draws(count: int = 30):
    for seed in range(count):
        yield torch.rand(K, E, generator=torch.Generator().manual_seed(seed))


def test_threshold_stops_above_and_not_at():
    assert depths(Threshold(0.5), torch.tensor([[0.5, 0.51], [0.4, 0], [0.6, 0], [0, 0]])) == [2, 0]
    per_exit = Threshold((0.9, 0.8, 0.1, 0.0))
    assert depths(per_exit, torch.tensor([[0.85, 0.95], [0.85, 0], [0, 0], [0, 0]])) == [1, 0]
    per_step = Threshold(((0.9,) * K, (0.1, 0.9, 0.9, 0.9)))
    scores = torch.tensor([[0.5, 0.5], [0.5, 0.95], [0, 0], [0, 0]])
    assert depths(per_step, scores, step=0, num_steps=2) == [K, 1]
    assert depths(per_step, scores, step=1, num_steps=2) == [0, 0]


@pytest.mark.parametrize("needed", [1, 2, 3, (2, 1, 3, 1)])
@pytest.mark.parametrize("consecutive", [True, False])
def test_patience(needed, consecutive: bool):
    for scores in draws():
        expected = []
        for sample in range(E):
            count, stopped = 0, K
            for exit in range(K):
                crossed = float(scores[exit, sample]) > 0.4
                count = count + 1 if crossed else (0 if consecutive else count)
                wanted = needed[exit] if isinstance(needed, tuple) else needed
                if crossed and count >= wanted:
                    stopped = min(stopped, exit)
            expected.append(stopped)
        assert depths(Patience(0.4, needed, consecutive=consecutive), scores) == expected


def test_sampled_stops_where_the_cumulated_probability_passes_a_draw_of_the_samples_own():
    for seed, scores in enumerate(draws()):
        expected = []
        for sample in range(E):
            drawn = random.Random(f"{seed}/0/{sample}").random()
            left, stopped = 1.0, K
            for exit in range(K):
                left *= 1 - float(scores[exit, sample])
                if stopped == K and 1 - left > drawn:
                    stopped = exit
            expected.append(stopped)
        assert depths(SampledExit(seed), scores) == expected
    assert depths(SampledExit(1), scores) != depths(SampledExit(2), scores)
    state = SampledExit(3).start(torch.tensor([4, 2]), step=1, previous=None)
    alone = SampledExit(3).start(torch.tensor([2]), step=1, previous=None)
    assert float(state["drawn"][1]) == float(alone["drawn"][0]), "a sample's draw is its own in every batch"
    assert float(alone["drawn"][0]) != float(SampledExit(3).start(torch.tensor([2]), step=0, previous=None)["drawn"][0])
    with pytest.raises(ValueError, match="score='luck'"):
        SampledExit(0, score="luck")


def test_cumulative():
    for scores in draws():
        for q in (0.2, 0.7, 0.95):
            expected = []
            for sample in range(E):
                survival, total, stopped = 1.0, 0.0, K
                for exit in range(K):
                    gate = float(scores[exit, sample])
                    total += gate * survival  # p_i = lambda_i prod_{j<i} (1 - lambda_j)
                    survival *= 1 - gate
                    if total > q:
                        stopped = min(stopped, exit)
                expected.append(stopped)
            assert depths(QExit(q), scores) == expected


def test_gate():
    for scores in draws():
        scores = scores / 2
        for threshold in (0.2, 0.5, 0.9):
            expected = []
            for sample in range(E):
                total, survival, stopped = 0.0, 1.0, K
                for exit in range(K):
                    gate = float(scores[exit, sample])
                    probability = max(0.0, min(gate, 1 - total))
                    conditional = min(1.0, probability / max(survival, 1e-12))
                    total, survival = total + gate, survival * (1 - conditional)
                    if conditional >= threshold:
                        stopped = min(stopped, exit)
                expected.append(stopped)
            assert depths(GatedExit(threshold), scores) == expected


def test_patience_and_cumulative_do_not_stop_at_their_numbers():
    scores = torch.tensor([[0.5, 0.75], [0.5, 0.75], [0, 0], [0, 0]])
    assert depths(Patience(0.5, 1), scores) == [K, 0]
    assert depths(QExit(0.5), scores) == [1, 0]
    assert depths(QExit(0.75), scores) == [K, 1]


def test_gate_stops_at_its_threshold():
    assert depths(GatedExit(0.5), torch.tensor([[0.5, 0.49], [0, 0], [0, 0], [0, 0]])) == [0, K]


def test_planned_stops_at_the_first_exit_deep_enough():
    plan = DepthTable(((1, 2, 9, 4), (3, 3, 3, 3)))
    nothing = torch.full((K, 4), NAN)
    assert depths(plan, nothing, step=0, num_steps=2) == [0, 1, K, 3]
    assert depths(plan, nothing, step=1, num_steps=2) == [2, 2, 2, 2]
    assert plan.measure(None) is None
    state = plan.start(torch.tensor([3, 0]), step=0, previous=None)
    assert state["plan"].tolist() == [4, 1], "a sample's id is its column"


@pytest.mark.parametrize(
    "criterion",
    [Threshold(0.0), Patience(0.0, 1), Patience(0.0, 1, consecutive=False), QExit(0.0), GatedExit(0.0)],
    ids=repr,
)
def test_nan_never_stops(criterion):
    scores = torch.full((K, 3), NAN)
    assert depths(criterion, scores) == [K] * 3
    scores[:, 1] = 0.9
    assert depths(criterion, scores) == [K, 0, K], "a neighbour's NaN changes nothing"


@pytest.mark.parametrize(
    "criterion",
    [
        Threshold(((0.9, 0.2, 0.4, 0.6), (0.8, 0.3, 0.5, 0.7))),
        DecayingThreshold(0.5, 4),
        Patience((0.3, 0.5, 0.7, 0.9), 2, consecutive=False),
        ErrorBudget(0.7, (0.5, 1.0), 0.5),
    ],
    ids=repr,
)
def test_at_the_floor_nobody_stops_and_nothing_changes(criterion):
    state = criterion.start(torch.arange(3), step=0, previous=None)
    _, state = criterion.decide(torch.tensor([0.95, 0.5, NAN]), ExitPoint(0, 2, 0.0, 1, 0), state)
    for step, exit in itertools.product(range(2), range(K)):
        where = ExitPoint(step, 2, 0.0, exit + 1, exit)
        floor = torch.tensor(criterion.floor(where), dtype=torch.float64).float()
        below = floor.nextafter(torch.tensor(-1.0)) if floor > criterion.floor(where) else floor
        stop, after = criterion.decide(torch.stack([below, below - 0.1, torch.tensor(NAN)]), where, state)
        assert not stop.any()
        assert all(torch.equal(after[name], value) for name, value in state.items())


def test_a_criterion_that_changes_its_state_at_any_score_has_no_floor():
    for criterion in (Patience(0.5, 2), QExit(0.5), SampledExit(0), GatedExit(0.5), DepthTable(((1,),))):
        assert criterion.floor(ExitPoint(0, 1, 0.0, 1, 0)) is None


@pytest.mark.parametrize("criterion", [Threshold(0.5), Patience(0.3, 2), QExit(0.8), GatedExit(0.4)], ids=repr)
def test_decisions_are_pure_and_forget_the_step_before(criterion):
    (scores,) = draws(1)
    ids = torch.arange(E)
    state = criterion.start(ids, step=0, previous=None)
    before = {name: value.clone() for name, value in state.items()}
    where = ExitPoint(0, 2, 0.0, depth=1, exit=0)
    stop, after = criterion.decide(scores[0], where, state)
    again, _ = criterion.decide(scores[0], where, state)
    assert torch.equal(stop, again)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert all(len(value) == E for value in after.values()), "state has leading E"
    fresh = criterion.start(ids, step=1, previous=after)
    assert all(torch.equal(fresh[name], value) for name, value in before.items())


def test_samples_do_not_see_one_another():
    for criterion in (Threshold(0.5), Patience(0.3, 2), QExit(0.8), GatedExit(0.4)):
        (scores,) = draws(1)
        whole = depths(criterion, scores)
        order = random.Random(0).sample(range(E), E)
        assert depths(criterion, scores[:, order]) == [whole[sample] for sample in order]
        assert [depths(criterion, scores[:, [sample]])[0] for sample in range(E)] == whole


@pytest.mark.parametrize(
    "make",
    [
        lambda: Threshold(1.01),
        lambda: Threshold(-0.01),
        lambda: Threshold(NAN),
        lambda: Threshold(None),
        lambda: Threshold([0.5]),
        lambda: Threshold("0.5"),
        lambda: Threshold(()),
        lambda: Threshold(((),)),
        lambda: Threshold((0.5, 1.5)),
        lambda: Threshold(((0.5,), (NAN,))),
        lambda: Threshold((0.5, (0.5, 0.5))),
        lambda: Threshold(((0.5,) * 4, (0.5,) * 3)),
        lambda: Threshold(((0.5, 0.5), 0.5)),
        lambda: Threshold(0.5, score="sureness"),
        lambda: Patience(0.5, 0),
        lambda: Patience(0.5, ()),
        lambda: Patience(0.5, (1, 0)),
        lambda: Patience(2.0, 1),
        lambda: QExit(1.1),
        lambda: QExit(NAN),
        lambda: QExit(-0.1),
        lambda: QExit(0.5, score="sureness"),
        lambda: GatedExit(1.5),
        lambda: GatedExit(NAN),
        lambda: DepthTable(()),
        lambda: DepthTable(((),)),
        lambda: DepthTable(((1, 2), (1,))),
        lambda: DepthTable(((1, -2),)),
    ],
)
def test_numbers_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"expected|outside|mix"):
        make()


@pytest.mark.parametrize(
    "criterion",
    [
        Threshold((0.5,) * 3),
        Threshold((0.5,) * 5),
        Threshold(((0.5,) * 4,)),
        Threshold(((0.5,) * 4,) * 3),
        Patience((0.5,) * 3, 1),
        Patience(0.5, (1, 2, 3)),
        DepthTable(((1, 2),)),
        DepthTable(((1, 2),) * 2, every_step=True),
    ],
    ids=repr,
)
def test_wrong_lengths_are_refused(criterion):
    with pytest.raises(ValueError, match=r"has|have|thresholds|expected"):
        criterion.validate(2, 4)


@pytest.mark.parametrize("ids", [[0, 2], [-1, 0]])
def test_a_plan_knows_its_samples(ids):
    with pytest.raises(ValueError, match="column"):
        DepthTable(((1, 2),)).start(torch.tensor(ids), step=0, previous=None)


def test_a_plan_may_hold_at_every_step():
    plan = DepthTable(((1, 2, 4),), every_step=True)
    plan.validate(7, 4)
    for step in (0, 6):
        state = plan.start(torch.tensor([2, 0]), step=step, previous=None)
        stop, _ = plan.decide(torch.full((2,), torch.nan), ExitPoint(step, 7, 0.0, 2, 1), state)
        assert stop.tolist() == [False, True]


def test_a_decaying_threshold_decays():
    criterion = DecayingThreshold(0.6, 5, rate=2.0)
    for step in (0, 3, 50):
        limit = 0.9 * 0.6 + 0.1 * 0.6 * math.exp(-2 * step / 5)
        stop, _ = criterion.decide(torch.tensor([limit - 1e-6, limit + 1e-6]), ExitPoint(step, 99, 0.0, 2, 1), {})
        assert stop.tolist() == [False, True]
    for wrong, name in (
        ({"horizon": 0}, "horizon"),
        ({"horizon": 5, "rate": -1.0}, "rate"),
        ({"horizon": 5, "rate": math.nan}, "rate"),
    ):
        with pytest.raises(ValueError, match=f"{name}=.*expected"):
            DecayingThreshold(0.6, **wrong)


def test_accumulated_is_a_slow_loop():
    """By hand, sample by sample: what is spent decays, grows where a sample stops, and never passes the budget."""
    scores = torch.rand(12, 5, generator=torch.Generator().manual_seed(3)).clamp(min=0.2)
    scores[4, 1], scores[5, 2] = 0.0, torch.nan  # nothing known; not measured
    weights = tuple(0.1 + 0.05 * step for step in range(12))
    criterion = ErrorBudget(0.25, weights, 0.6)
    criterion.validate(12, 1)
    spent, previous, stopped = [0.0] * 5, None, 0
    for step in range(12):
        state = criterion.start(torch.arange(5), step=step, previous=previous)
        stop, previous = criterion.decide(scores[step], ExitPoint(step, 12, 0.0, 0, 0), state)
        for sample in range(5):
            spent[sample] *= 0.6 if step else 1.0
            score = scores[step, sample].item()
            after = spent[sample] + weights[step] * (1 - score)
            may = score > 0 and after <= 0.25
            assert bool(stop[sample]) == may
            spent[sample] = after if may else spent[sample]
            assert previous["spent"][sample].item() == pytest.approx(spent[sample], rel=1e-5)
        stopped += int(stop.sum())
    assert 0 < stopped < 58


def test_accumulated_refuses_what_makes_no_budget():
    for budget, weights, decay in (
        (0.0, (1.0,), 0.5),
        (1.0, (1.0,), 1.5),
        (math.inf, (1.0,), 0),
    ):
        with pytest.raises(ValueError, match="expected a positive number and a factor"):
            ErrorBudget(budget, weights, decay)
    with pytest.raises(ValueError, match=r"ErrorBudget\.budget=nan, expected a number"):
        ErrorBudget(math.nan, (1.0,), 0.5)
    with pytest.raises(ValueError, match=r"ErrorBudget\.weights=\(nan,\), expected a tuple of numbers"):
        ErrorBudget(1.0, (math.nan,), 0.5)
    for weights in ((), (math.inf,), (-1.0,)):
        with pytest.raises(ValueError, match="expected one finite number >= 0 for each step"):
            ErrorBudget(1.0, weights, 0.5)
    for steps in (1, 3):
        with pytest.raises(ValueError, match=f"weights for 2 steps, this run has {steps}"):
            ErrorBudget(1.0, (1.0, 1.0), 0.5).validate(steps, 1)


def test_accumulated_spends_its_budget_to_the_last():
    """In numbers that float32 holds: 0.25 of 0.25, then half of it again, then what is left."""
    criterion, previous = ErrorBudget(0.25, (0.5, 0.25, 1.0), 0.5), None
    for step, (score, stops, spent) in enumerate(((0.5, True, 0.25), (0.5, True, 0.25), (0.75, False, 0.125))):
        state = criterion.start(torch.arange(1), step=step, previous=previous)
        stop, previous = criterion.decide(torch.tensor([score]), ExitPoint(step, 3, 0.0, 0, 0), state)
        assert (bool(stop[0]), float(previous["spent"][0])) == (stops, spent)
