"""docs/adding-a-method.md: its blocks run as they stand, and the criterion and the method in them do what they say."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from tree import ROOT, python_blocks

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import LAYERS, batch_for, model_named

from ee_diffusion import Policy
from ee_diffusion.classification import methods
from ee_diffusion.classification.method import BatchOutputs, PooledHead
from ee_diffusion.core import criteria, policy

PAGE = ROOT / "docs" / "adding-a-method.md"
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


@pytest.fixture
def names(monkeypatch) -> dict:
    """What the page's blocks define, run on a tiny classifier; its rows are gone afterwards."""
    rows = dict(criteria.CRITERIA)
    monkeypatch.setattr(criteria, "CRITERIA", rows)
    monkeypatch.setattr(policy, "CRITERIA", rows)
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    found = {"model": model_named("Bert"), "batch": batch_for("Bert") | {"labels": LABELS}}
    for block in python_blocks(PAGE.read_text(encoding="utf-8")):
        exec(compile(block, PAGE.name, "exec"), found)
    return found


def test_the_criterion_stops_where_the_score_has_settled(names: dict):
    scores = torch.tensor([[0.5, 0.5, 0.9], [0.505, 0.7, 0.8], [0.9, 0.7, math.nan]])  # (K, E)
    rule = names["policy"].criterion
    state = rule.start(torch.arange(3), step=0, previous=None)
    stops = []
    for exit, score in enumerate(scores):
        stop, state = rule.decide(score, criteria.ExitPoint(0, 1, 0.0, exit + 1, exit), state)
        stops.append(stop.tolist())
    assert stops == [[False, False, False], [True, False, True], [False, True, False]]
    assert Policy.from_dict(names["policy"].to_dict()) == names["policy"]


def test_the_method_trains_and_its_exits_run_under_the_policy(names: dict):
    classifier = names["classifier"]
    assert [type(head) for head in classifier.exits.heads] == [PooledHead] * (LAYERS - 1)
    for module in (classifier.model.classifier, *(head.classify for head in classifier.exits.heads)):
        assert bool((module.weight.grad != 0).any())
    with classifier.eval().recording() as traces:
        classifier(**batch_for("Bert"))
    assert int(traces[0].depths.min()) < LAYERS
    outputs = BatchOutputs(torch.tensor([[[2.0, 0.0]]]), None, torch.tensor([1]), num_tokens=1)
    p = 1 / (1 + math.exp(2))
    found = names["focal_loss"](outputs, names["FocalSettings"](power=1.0))["loss"]
    assert float(found) == pytest.approx(-(1 - p) * math.log(p), rel=1e-5)


def test_the_worked_examples_are_short():
    blocks = python_blocks(PAGE.read_text(encoding="utf-8"))
    assert sum(len(block.splitlines()) for block in blocks) <= 60


@pytest.mark.parametrize("kind", ["head", "judge"])
def test_a_kind_that_has_the_name_of_another_is_refused(kind: str, names: dict):
    other = methods.METHODS["jei_dnn"]
    taken = {"head": names["Method"](names["focal_loss"], trains="both", head=type(other.head)("pooled", None))}
    taken["judge"] = names["Method"](
        names["focal_loss"],
        trains="both",
        judge=type(other.judge)("halting", other.judge.build, other.judge.features, looks_at="logits"),
    )
    with pytest.raises(ValueError, match=f"is the name of another {kind} already"):
        methods.register_method("mine", taken[kind])
    with pytest.raises(ValueError, match="jei_dnn is in the table of methods already"):
        methods.register_method("jei_dnn", other)
