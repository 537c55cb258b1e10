"""Records against live runs: every rule replayed gives the depths and the logits of a run under it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import CLASSES, LAYERS, ROWS, batch_for, exits_for, model_named

from ee_diffusion.classification import evaluation as evaluate
from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.evaluation import ExitRecord, record_exits
from ee_diffusion.classification.methods import berxit, confidence, fastbert, jei_dnn, pabee
from ee_diffusion.core.criteria import DepthTable
from ee_diffusion.core.io import read_tensors, write_tensors
from ee_diffusion.core.policy import Policy

LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
SCORES = ("learned_confidence", "max_probability", "negative_entropy", "agreement")


@pytest.fixture(scope="module")
def classifier() -> EarlyExitClassifier:
    model = model_named("Bert")
    return EarlyExitClassifier.from_classifier(model, exits_for(model, head="linear", judge="statistics"))


@pytest.fixture(scope="module")
def seen(classifier) -> ExitRecord:
    halves = [
        batch_for("Bert", [0, 1, 2]) | {"labels": LABELS[:3]},
        batch_for("Bert", [3, 4, 5]) | {"labels": LABELS[3:]},
    ]
    return record_exits(classifier, halves, scores=SCORES)


PLAN = Policy(DepthTable(((1, 2, 3, 4, 1, 2),)))


@pytest.mark.parametrize("policy", [jei_dnn(0.5), confidence(0.6), fastbert(0.6), pabee(1), Policy(), PLAN])
def test_replayed_is_live(classifier: EarlyExitClassifier, seen: ExitRecord, policy: Policy):
    classifier.policy = policy
    with torch.no_grad(), classifier.recording() as traces:
        live = classifier(**batch_for("Bert")).logits
    taken = seen.exits_under(policy)
    depths = torch.tensor([1, 2, 3, LAYERS])[taken]
    assert depths.tolist() == (traces[0].depths[0].tolist() if traces else [LAYERS] * ROWS)
    torch.testing.assert_close(seen.logits_at(taken), live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("judge, depths", [("correctness", None), ("none", (0, 2))])
def test_replayed_is_live_where_exits_look_at_what_is_left(judge: str, depths: tuple[int, ...] | None):
    model = model_named("Bert")
    exits = exits_for(model, depths, head="pooled", judge=judge, pooling="mean")
    classifier = EarlyExitClassifier.from_classifier(model, exits)
    classifier.pruning = (0.06, 0.1, 0.12, 0.2)
    halves = [batch_for("Bert", rows) | {"labels": LABELS[rows]} for rows in ([0, 1, 2], [3, 4, 5])]
    seen = record_exits(classifier, halves, scores=("learned_confidence",) * (judge != "none") + ("max_probability",))
    rules = [berxit(value) for value in (0.3, 0.5, 0.7) if judge != "none"]
    for policy in [*rules, confidence(0.5), confidence(0.7), Policy()]:
        classifier.policy = policy
        with torch.no_grad():
            live = classifier(**batch_for("Bert")).logits
        torch.testing.assert_close(seen.logits_at(seen.exits_under(policy)), live, rtol=1e-4, atol=1e-5)


def test_layers_that_look_at_no_saliency_are_not_charged_for_it_in_a_record():
    model = model_named("Bert")
    classifier = EarlyExitClassifier.from_classifier(model, exits_for(model, head="pooled", judge="none"))
    halves = [batch_for("Bert", rows) | {"labels": LABELS[rows]} for rows in ([0, 1, 2], [3, 4, 5])]
    costs = []
    for thresholds in ((0.0, 0.0, 0.0, 0.0), (1e-30, 0.0, 0.0, 0.0)):
        classifier.pruning = thresholds
        seen = record_exits(classifier, halves, scores=("max_probability",))
        costs.append(seen.costs["max_probability"][:, -1])
    n = seen.tokens.double()
    torch.testing.assert_close(costs[1] - costs[0], 2 * n**2 * model.config.hidden_size, rtol=0, atol=0.5)


def test_where_tokens_were_is_not_kept_from_batch_to_batch(monkeypatch):
    held = []
    joined = evaluate._joined
    monkeypatch.setattr(evaluate, "_joined", lambda traces: held.extend(traces) or joined(traces))
    model = model_named("Bert")
    exits = exits_for(model, head="pooled", judge="none", pooling="mean")
    classifier = EarlyExitClassifier.from_classifier(model, exits)
    classifier.pruning = (0.06, 0.1, 0.12, 0.2)
    batch = batch_for("Bert") | {"labels": LABELS}
    record_exits(classifier, [batch, batch], scores=("max_probability",))
    assert [trace.keys for trace in held] == [(), ()]


def test_what_a_record_holds(seen: ExitRecord):
    assert seen.logits.shape == (LAYERS, ROWS, CLASSES)
    assert all(seen.scores[name].shape == (LAYERS - 1, ROWS) for name in SCORES)
    assert seen.labels.tolist() == LABELS.tolist()
    assert seen.tokens.tolist() == [9, 4, 7, 9, 5, 6]


def test_the_oracle_is_the_first_right_answer(seen: ExitRecord):
    right = seen.logits.argmax(-1) == LABELS
    for row, taken in enumerate(seen.oracle().tolist()):
        assert not bool(right[:taken, row].any())
        assert taken == LAYERS - 1 or bool(right[taken, row])


def test_refused(classifier, seen: ExitRecord):
    with pytest.raises(ValueError, match="'margin' was not recorded"):
        seen.trace("margin")
    with pytest.raises(ValueError, match="no batches"):
        record_exits(classifier, [], scores=SCORES)
    with pytest.raises(ValueError, match="no scores"):
        record_exits(classifier, [batch_for("Bert")], scores=())
    with pytest.raises(ValueError, match="score='luck'"):
        record_exits(classifier, [batch_for("Bert")], scores=("luck",))


def test_a_record_of_before_is_read(seen: ExitRecord, tmp_path: Path):
    """Files called the logits `answers`."""
    seen.save(tmp_path / "new")
    tensors, facts = read_tensors(tmp_path / "new", "record")
    tensors["answers"] = tensors.pop("logits")
    write_tensors(tmp_path / "old", tensors, facts)
    found, expected = ExitRecord.load(tmp_path / "old"), ExitRecord.load(tmp_path / "new")
    assert torch.equal(found.logits, seen.logits)
    assert torch.equal(expected.logits, seen.logits)
    assert (found.depths, found.num_layers, found.scores.keys()) == (seen.depths, seen.num_layers, seen.scores.keys())
