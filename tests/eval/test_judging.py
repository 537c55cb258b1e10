"""What eval/judging.py says of a look: lengths, budgets and guarantees against counts by hand."""

from __future__ import annotations

import pytest
import torch

from ee_diffusion.classification.evaluation import NO_SCORE, ExitRecord
from ee_diffusion.classification.methods import confidence
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.risk_control import upper_bound
from eval.judging import Candidate, Judge, budgeted, by_length, candidates, guarantee, halves

TEXTS, LAYERS = 400, 4


def made_look(seed: int = 0) -> ExitRecord:
    """Two exits of four layers; the score says how often the first exit is right; the model's own end is right in 9 of 10."""
    draw = torch.Generator().manual_seed(seed)
    sure = torch.rand(2, TEXTS, generator=draw)
    labels = torch.randint(0, 2, (TEXTS,), generator=draw)
    right = torch.cat(
        [torch.rand(2, TEXTS, generator=draw) < sure, torch.rand(1, TEXTS, generator=draw) < 0.9]
    )  # (A, n)
    said = torch.where(right, labels, 1 - labels)
    answers = 4 * torch.nn.functional.one_hot(said, 2).float()
    costs = torch.tensor([1.0, 2.0, 4.0]).double().expand(TEXTS, 3)
    tokens = torch.arange(TEXTS) % 50 + 1
    return ExitRecord(
        answers,
        {"max_probability": sure},
        {"max_probability": costs + 0.1, NO_SCORE: costs},
        torch.full((TEXTS,), 4.0).double(),
        labels,
        tokens,
        (1, 2),
        LAYERS,
    )


@pytest.fixture(scope="module")
def judge() -> Judge:
    order = torch.arange(TEXTS)
    return Judge(made_look(), order[:200], order[200:], miss_rate=0.1, draws=2, seed=0)


def test_costs_layers_and_the_paired_difference(judge: Judge):
    seen, test = judge.seen, judge.test
    taken = seen.exits_under(confidence(0.7))
    found = judge(taken, score="max_probability")
    layers, cost, hits, own = 0, 0.0, 0, 0
    for text in test.tolist():
        place = next((k for k in range(2) if float(seen.scores["max_probability"][k, text]) > 0.7), 2)
        layers, cost = layers + (1, 2, 4)[place], cost + (1.1, 2.1, 4.1)[place]
        hits += int(int(seen.logits[place, text].argmax()) == int(seen.labels[text]))
        own += int(int(seen.logits[2, text].argmax()) == int(seen.labels[text]))
    assert found["layers"] == pytest.approx(layers / 200)
    assert found["flops_fraction"] == pytest.approx(cost / 800)
    assert found["accuracy"] == pytest.approx(hits / 200)
    assert found["gain"] == pytest.approx((hits - own) / 200)
    assert found["gain_low"] < found["gain"] < found["gain_high"]


def test_a_budget_is_met_where_it_was_chosen_and_judged_elsewhere(judge: Judge):
    (row,) = budgeted(judge, confidence, [0.5])
    chosen = judge.seen.layers(judge.seen.exits_under(confidence(row["value"])))
    assert chosen[judge.calibration].double().mean() / LAYERS == pytest.approx(row["fraction"])
    assert row["fraction"] <= 0.5
    assert chosen[judge.test].double().mean() == pytest.approx(row["layers"])
    assert budgeted(judge, confidence, [0.1]) == []


def test_thirds_of_few_texts(judge: Judge):
    few = Judge(judge.seen, judge.calibration, judge.test[:4], miss_rate=0.1, draws=2, seed=0)
    assert [row["texts"] for row in by_length(few, Policy(), score=NO_SCORE)] == [2, 1, 1]


def test_thirds_by_length(judge: Judge):
    rows = by_length(judge, Policy(), score=NO_SCORE)
    assert [row["third"] for row in rows] == ["short", "middle", "long"]
    means = [row["mean_tokens"] for row in rows]
    assert means[0] < means[1] < means[2]
    assert sum(row["texts"] for row in rows) == 200
    assert all(row["flops_fraction"] == pytest.approx(1) for row in rows)
    overall = sum(row["accuracy"] * row["texts"] for row in rows) / 200
    assert overall == pytest.approx(judge(judge.seen.exits_under(Policy()))["accuracy"])


def test_a_loss_is_a_right_answer_lost(judge: Judge):
    (one,) = candidates({1.0: judge.seen}, confidence, [0.6], reference=judge.seen)
    taken = judge.seen.exits_under(confidence(0.6))
    own = judge.seen.is_correct(torch.full_like(taken, 2))
    assert one.loss.tolist() == (own & ~judge.seen.is_correct(taken)).double().tolist()
    assert one.cost.tolist() == judge.seen.cost(taken, score="max_probability").tolist()


def offered() -> list[Candidate]:
    """Costs 4, 3, 2, 1 with losses in 0, 1, 20, 60 per cent of 1,000 texts, and one that a cheaper, safer one beats."""
    found = []
    for cost, percent, scale in ((4.0, 0, 1.0), (3.0, 1, 1.0), (2.0, 20, 1.0), (1.0, 60, 1.0), (3.5, 30, 0.5)):
        loss = (torch.arange(1000) * 7 % 100 < percent).double()
        found.append(Candidate({"pruning_scale": scale, "value": cost}, torch.full((1000,), cost).double(), loss))
    return found


def test_the_cheapest_setting_that_keeps_the_risk():
    texts = torch.arange(1000)
    found = guarantee(offered(), torch.full((1000,), 4.0), texts[:800], texts[800:], risk=0.25, delta=0.1, seed=0)
    assert (found["candidates"], found["pareto"]) == (5, 4)
    for rule in ("learn_then_test", "conformal", "naive"):
        assert (found[rule]["value"], found[rule]["risk_on_test"], found[rule]["flops_fraction"]) == (
            2.0,
            pytest.approx(0.2),
            0.5,
        )
    found = guarantee(offered(), torch.full((1000,), 4.0), texts[:800], texts[800:], risk=0.205, delta=0.1, seed=0)
    assert found["naive"]["value"] == 2.0, "the mean alone"
    assert found["learn_then_test"]["value"] == found["bound"]["value"] == 3.0, (
        "400 texts are too few to be sure of 0.2"
    )


def test_who_proposes_does_not_decide():
    """A setting that looked harmless to the half that proposes and is not."""
    texts = torch.arange(1000)
    loss = torch.ones(1000).double()
    loss[halves(texts[:800], seed=0)[0]] = 0
    lucky = Candidate({"pruning_scale": 1.0, "value": 9.0}, torch.ones(1000).double(), loss)
    settings = [*offered()[:2], lucky]
    found = guarantee(settings, torch.full((1000,), 4.0), texts[:800], texts[800:], risk=0.25, delta=0.1, seed=0)
    assert found["learn_then_test"] is None, "nothing else was proposed: it beat the others in cost and mean loss"
    for rule in ("conformal", "bound", "naive"):
        assert found[rule]["value"] == 3.0


def test_bounds_share_delta_among_the_candidates():
    texts, settings = torch.arange(1000), offered()[:4]
    deciding = settings[2].loss[halves(texts[:800], seed=0)[1]]
    risk = (upper_bound(deciding, 0.1 / 4) + upper_bound(deciding, 0.1)) / 2
    found = guarantee(settings, torch.full((1000,), 4.0), texts[:800], texts[800:], risk=risk, delta=0.1, seed=0)
    assert found["bound"]["value"] == 3.0
    assert found["learn_then_test"]["value"] == 2.0, "a fixed order shares nothing"


def test_a_file_in_the_order_of_its_classes_breaks_no_promise():
    """The class that stands last is the easy one: whoever splits the texts as they come decides on that class alone."""
    ordered = torch.arange(2000)
    hard, calibration, test = ordered < 800, ordered[:1600], ordered[1600:]
    broken, certified = 0, 0
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        difficult = torch.where(ordered < 1600, hard, torch.rand(2000, generator=draw) < 0.5)
        settings = [
            Candidate(
                {"pruning_scale": 1.0, "value": cost},
                torch.full((2000,), cost).double(),
                (difficult & (torch.rand(2000, generator=draw) < share)).double(),
            )
            for cost, share in ((3.0, 0.01), (1.0, 0.4))  # expected losses of 0.005 and 0.2
        ]
        found = guarantee(settings, torch.full((2000,), 4.0), calibration, test, risk=0.05, delta=0.1, seed=seed)
        for rule in ("learn_then_test", "bound", "conformal"):
            certified += found[rule] is not None
            broken += found[rule] is not None and found[rule]["value"] == 1.0
    assert (broken, certified) == (0, 120), "the safe one every time, the other one never"


def test_halves_are_a_seeded_draw():
    texts = torch.arange(100) * 3
    one, other = halves(texts, seed=1)
    assert sorted([*one.tolist(), *other.tolist()]) == texts.tolist()
    assert abs(one.double().mean() - other.double().mean()) < 60
    assert torch.equal(halves(texts, seed=1)[0], one)
    assert not torch.equal(halves(texts, seed=2)[0], one)


def test_nothing_is_an_answer():
    texts, risky = torch.arange(1000), offered()[2:4]
    found = guarantee(risky, torch.full((1000,), 4.0), texts[:800], texts[800:], risk=0.05, delta=0.1, seed=0)
    assert [found[rule] for rule in ("learn_then_test", "conformal", "bound", "naive")] == [None] * 4
