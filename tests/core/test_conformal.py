"""Conformal sets: the quantile by hand, coverage on fresh samples, exits kept apart."""

from __future__ import annotations

import math

import pytest
import torch

from ee_diffusion.core.risk_control import conformal_sets, conformal_thresholds


def draw(n: int, seed: int):
    """Two answers, the second more certain; labels drawn from the very probabilities of a sharper model."""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(0, 2, (n,), generator=generator)
    probabilities = (torch.randn(n, 5, generator=generator) * (1 + 2 * answers[:, None])).softmax(-1)
    truth = probabilities ** (0.2 + 0.8 * answers[:, None])  # the first answer is overconfident
    labels = truth.multinomial(1, generator=generator)[:, 0]
    return probabilities, labels, answers


def test_the_quantile_by_hand():
    probabilities, labels, answers = draw(60, 0)
    found = conformal_thresholds(probabilities, labels, answers, num_answers=3, miss_rate=0.2)
    for answer in (0, 1):
        own = sorted(
            1 - float(p[y]) for p, y, a in zip(probabilities, labels, answers, strict=True) if int(a) == answer
        )
        assert float(found[answer]) == pytest.approx(own[math.ceil((len(own) + 1) * 0.8) - 1])
    assert float(found[2]) == 1.0, "nobody left there: every class"


@pytest.mark.parametrize("miss_rate", [0.05, 0.2])
def test_sets_miss_as_often_as_they_may_at_every_exit(miss_rate: float):
    thresholds = conformal_thresholds(*draw(4000, 1), num_answers=2, miss_rate=miss_rate)
    probabilities, labels, answers = draw(4000, 2)
    sets = conformal_sets(probabilities, answers, thresholds=thresholds)
    held = sets.gather(1, labels[:, None])[:, 0]
    for answer in (0, 1):
        assert float(held[answers == answer].float().mean()) == pytest.approx(1 - miss_rate, abs=0.025)
    assert sets.sum(1).float().mean() < 5


def test_one_threshold_for_all_exits_would_not_hold():
    probabilities, labels, answers = draw(4000, 1)
    pooled = conformal_thresholds(probabilities, labels, torch.zeros_like(answers), num_answers=1, miss_rate=0.2)
    sets = conformal_sets(probabilities, torch.zeros_like(answers), thresholds=pooled)
    held = sets.gather(1, labels[:, None])[:, 0].float()
    assert abs(float(held[answers == 0].mean()) - float(held[answers == 1].mean())) > 0.05


def test_too_few_samples_give_every_class():
    probabilities, labels, answers = draw(3, 0)
    thresholds = conformal_thresholds(probabilities, labels, answers, num_answers=2, miss_rate=0.05)
    assert bool(conformal_sets(probabilities, answers, thresholds=thresholds).all())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"miss_rate": 0.0}, "miss_rate=0.0"),
        ({"num_answers": 1}, r"answers 0\.\.1"),
        ({"labels": torch.zeros(3).long()}, r"labels \(3,\)"),
        ({"answers": torch.zeros(3).long()}, r"answers \(3,\)"),
        ({"answers": torch.zeros(20)}, r"answers torch.float32.*expected whole numbers"),
        ({"labels": torch.zeros(20)}, r"labels torch.float32.*expected whole numbers"),
        ({"labels": torch.full((20,), 5)}, r"labels 5\.\.5, expected 0\.\.4"),
        ({"labels": torch.full((20,), -100)}, r"labels -100\.\.-100, expected 0\.\.4"),
    ],
)
def test_refused(changes, words):
    probabilities, labels, answers = draw(20, 0)
    values = {"labels": labels, "answers": answers, "num_answers": 2, "miss_rate": 0.1} | changes
    with pytest.raises(ValueError, match=words):
        conformal_thresholds(probabilities, values.pop("labels"), values.pop("answers"), **values)


def spoiled(kind: str) -> torch.Tensor:
    probabilities = draw(20, 0)[0]
    if kind == "nan":
        probabilities[3, 1] = math.nan
    if kind == "several classes at once":
        probabilities = torch.full((20, 5), 0.9)
    return {"logits": probabilities.log(), "integers": (probabilities > 0.5).long()}.get(kind, probabilities)


@pytest.mark.parametrize("kind", ["nan", "logits", "several classes at once", "integers"])
def test_what_are_no_probabilities_is_refused(kind: str):
    """NaN gave empty sets, and of logits nobody knows what their sets would promise."""
    _, labels, answers = draw(20, 0)
    with pytest.raises(ValueError, match="expected probabilities"):
        conformal_thresholds(spoiled(kind), labels, answers, num_answers=2, miss_rate=0.1)
    with pytest.raises(ValueError, match="expected probabilities"):
        conformal_sets(spoiled(kind), answers, thresholds=torch.full((2,), 0.5))


@pytest.mark.parametrize("thresholds", [[math.nan, 0.5], [-0.1, 0.5], [0.5, 1.5], [[0.5, 0.5]]])
def test_thresholds_that_are_none_are_refused(thresholds: list):
    probabilities, _, answers = draw(20, 0)
    with pytest.raises(ValueError, match=r"thresholds .*expected"):
        conformal_sets(probabilities, answers * 0, thresholds=torch.tensor(thresholds))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_and_answers_are_numbers_in_every_integer_dtype(dtype: torch.dtype):
    """torch takes uint8 for a mask: two answers of two samples picked one threshold for both."""
    probabilities, labels, answers = draw(40, 0)
    thresholds = conformal_thresholds(probabilities, labels, answers, num_answers=2, miss_rate=0.2)
    found = conformal_thresholds(probabilities, labels.to(dtype), answers.to(dtype), num_answers=2, miss_rate=0.2)
    assert torch.equal(found, thresholds)
    two = probabilities[:2], torch.tensor([0, 1])
    thresholds = torch.tensor([0.4, 0.9])
    sets = conformal_sets(two[0], two[1].to(dtype), thresholds=thresholds)
    assert torch.equal(sets, conformal_sets(*two, thresholds=thresholds))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_probabilities_of_every_precision_are_probabilities(dtype: torch.dtype):
    logits = 3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    probabilities, answers = logits.to(dtype).softmax(-1), torch.zeros(50, dtype=torch.int64)
    labels = probabilities.argmax(-1)
    thresholds = conformal_thresholds(probabilities, labels, answers, num_answers=1, miss_rate=0.1)
    sets = conformal_sets(probabilities, answers, thresholds=thresholds)
    assert int(sets.gather(1, labels[:, None]).sum()) >= 45


def test_a_class_at_the_threshold_is_in_the_set():
    """The quantile is itself a calibration sample's score: leaving it out would miss more often than promised."""
    probabilities = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], dtype=torch.float64)
    labels, answers = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    thresholds = conformal_thresholds(probabilities, labels, answers, num_answers=1, miss_rate=0.4)
    assert thresholds.tolist() == [0.5]  # the third of four: ceil(5 * 0.6)
    sets = conformal_sets(probabilities, answers, thresholds=thresholds)
    assert sets.tolist() == [[False, True], [True, True], [True, False], [True, False]]
