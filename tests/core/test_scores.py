"""Scores: values against formulas, answers computed once and only if asked for, the least safe row of each sample."""

from __future__ import annotations

import math

import pytest
import torch
from factories import ToyHeads

from ee_diffusion.core import scores
from ee_diffusion.core.exits import ExitInputs
from ee_diffusion.core.scores import register_score, score_named


class CountingHeads(ToyHeads):
    """Counts the answers."""

    calls = 0

    def answer(self, exit, hidden, context):
        self.calls += 1
        return super().answer(exit, hidden, context)


@pytest.fixture
def inputs() -> ExitInputs:
    heads = CountingHeads((1, 2), "output", 6, 4)
    return ExitInputs(heads, 1, torch.randn(5, 3, 6), {"timestep": torch.zeros(5)})


@pytest.mark.parametrize("name", ["max_probability", "margin", "negative_entropy"])
def test_scores_of_logits(name: str, inputs: ExitInputs):
    logits = inputs.heads.answer(1, inputs.hidden, inputs.context).double().detach()
    found = score_named(name).measure(inputs).detach()
    for row, values in enumerate(logits.tolist()):
        exps = [math.exp(value) for value in values]
        p = sorted((value / sum(exps) for value in exps), reverse=True)
        entropy = -sum(value * math.log(value) for value in p)
        expected = {"max_probability": p[0], "margin": p[0] - p[1], "negative_entropy": 1 - entropy / math.log(4)}[name]
        assert float(found[row]) == pytest.approx(expected, abs=1e-5)


def test_certain_and_undecided_logits():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]])
    heads = CountingHeads((1,), "output", 6, 4)
    heads.answer = lambda exit, hidden, context: logits
    for name, low in (("max_probability", 0.25), ("margin", 0.0), ("negative_entropy", 0.0)):
        found = score_named(name).measure(ExitInputs(heads, 0, torch.zeros(2, 3, 6), {}))
        torch.testing.assert_close(found, torch.tensor([low, 1.0]))


def test_the_answer_is_computed_once_and_only_if_asked_for(inputs: ExitInputs):
    score_named("confidence").measure(inputs)
    assert (inputs.answered, inputs.heads.calls) == (False, 0)
    score_named("margin").measure(inputs)
    score_named("max_probability").measure(inputs)
    assert (inputs.answered, inputs.heads.calls) == (True, 1)


def test_names(monkeypatch):
    monkeypatch.setattr(scores, "SCORES", dict(scores.SCORES))
    with pytest.raises(ValueError, match=r"score='sureness', expected one of \['agreement', 'closeness', 'confidence'"):
        score_named("sureness")
    register_score("sureness", lambda inputs: inputs.hidden.sum((1, 2)), low=-1.0, high=2.0)
    assert score_named("sureness").high == 2.0
    with pytest.raises(ValueError, match="in the table of scores already"):
        register_score("sureness", lambda inputs: inputs.hidden, low=0, high=1)


def test_saturation_is_the_cosine_of_consecutive_states():
    before, after = torch.randn(5, 3, 6, dtype=torch.float64), torch.randn(5, 3, 6, dtype=torch.float64)
    heads = CountingHeads((1,), "output", 6, 4)
    found = score_named("saturation").measure(ExitInputs(heads, 0, after, {"previous": before}))
    for row in range(5):
        a, b = before[row, -1].tolist(), after[row, -1].tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        assert float(found[row]) == pytest.approx(dot / norms, abs=1e-12)
    assert heads.calls == 0
    with pytest.raises(ValueError, match="only decoding keeps"):
        score_named("saturation").measure(ExitInputs(heads, 0, after, {}))


class SayingHeads(ToyHeads):
    """Answers what it was told to."""

    said: torch.Tensor

    def answer(self, exit, hidden, context):
        return self.said

    def judge(self, inputs):
        return inputs.answer[:, 0].sigmoid()


def saying(said: torch.Tensor, context: dict | None = None) -> ExitInputs:
    heads = SayingHeads((1,), "output", 6, 4)
    heads.said = said
    return ExitInputs(heads, 0, torch.zeros(len(said), 3, 6), context or {})


def test_agreement_is_with_the_exit_before():
    first = saying(torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]]))
    assert score_named("agreement").measure(first).tolist() == [0, 0, 0]
    second = saying(torch.tensor([[2.0, 1.0], [3.0, 1.0], [0.0, 1.0]]), first.carried)
    assert score_named("agreement").measure(second).tolist() == [1, 0, 1]
    assert second.carried["said"].tolist() == [0, 0, 1]


def test_closeness_falls_with_the_distance_to_the_value_before():
    first = saying(torch.tensor([[1.0], [2.0]]))
    assert score_named("closeness").measure(first).tolist() == [0, 0]
    second = saying(torch.tensor([[1.5], [2.0]]), first.carried)
    assert score_named("closeness").measure(second).tolist() == pytest.approx([math.exp(-0.5), 1.0])


def test_judged_is_the_heads_own_word_on_the_whole_observation():
    inputs = saying(torch.tensor([[0.3, 1.0]]))
    assert score_named("learned_confidence").measure(inputs).tolist() == pytest.approx([1 / (1 + math.exp(-0.3))])
    assert inputs.answered, "what a judge asks for is counted"
