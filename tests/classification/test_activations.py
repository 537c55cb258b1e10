"""Batches cut by length give the loss of the whole batch; stored states give the loss of the live model, and are refused elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_objective import FROZEN, LABELS, MAGIC, labelled, objective_for
from tiny_classifiers import CLASSES, LAYERS, ROWS, WIDTH, batch_for, exits_for, model_named

from ee_diffusion.classification.activations import (
    StoredStates,
    exit_inputs_of,
    fingerprint_of,
    split_by_length,
    stored_states,
)
from ee_diffusion.classification.evaluation import record_exits
from ee_diffusion.classification.exits import ClassifierHeads


@pytest.mark.parametrize("method", ["plain", "palbert", "jei_dnn", "berxit", "magic_soft", "fastbert"])
def test_parts_of_like_length_have_the_loss_of_the_whole(method: str):
    whole = objective_for(method, **(MAGIC if method == "magic_soft" else {}))
    parts = objective_for(method, **(MAGIC if method == "magic_soft" else {}))
    parts.parts = 3
    expected, found = whole(labelled()), parts(labelled())
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_parts_are_cut_to_their_longest():
    parts = split_by_length(labelled(), 3)
    assert [part["input_ids"].shape for part in parts] == [(2, 5), (2, 7), (2, 9)]
    assert sorted(torch.cat([part["labels"] for part in parts]).tolist()) == sorted(LABELS.tolist())
    for part in parts:
        assert part["attention_mask"].sum(1).max() == part["input_ids"].shape[1]
    images = labelled("ViT")
    assert split_by_length(images, 3) == [images]


def heads_for(
    name: str = "Bert", judge: str = "statistics", head: str = "linear", pooling: str = "first"
) -> ClassifierHeads:
    model = model_named(name)
    return ClassifierHeads(model, exits_for(model, head=head, judge=judge, pooling=pooling))


def halves(name: str = "Bert") -> list[dict]:
    """The batch in two, the later rows first, with keys."""
    found = []
    for rows in ([5, 1, 3], [0, 4, 2]):
        found.append(batch_for(name, rows) | {"labels": LABELS[rows], "key": torch.tensor(rows)})
    return found


@pytest.mark.parametrize("name", ["Bert", "ViT"])
@pytest.mark.parametrize("method, pooling", [(m, "first") for m in FROZEN] + [("jei_dnn", "mean")])
def test_stored_states_have_the_loss_of_the_live_model(method: str, pooling: str, name: str):
    objective = objective_for(method, name, pooling=pooling)
    classifier = objective.classifier
    heads = ClassifierHeads(classifier.model, classifier.exits)
    kept = stored_states(heads, halves(name), pruning=None, data="texts")
    assert (len(kept), kept.vectors.shape) == (ROWS, (ROWS, LAYERS - 1, WIDTH))
    found, expected = objective(kept[torch.arange(ROWS)]), objective(labelled(name))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_stored_states_of_removed_tokens(pooling: str):
    pruning = (0.06, 0.1, 0.12, 0.2)
    objective = objective_for("fastbert", pruning=pruning, pooling=pooling)
    heads = ClassifierHeads(objective.classifier.model, objective.classifier.exits)
    kept = stored_states(heads, halves(), pruning=pruning, data="texts")
    found, expected = objective(kept[torch.arange(ROWS)]), objective(labelled())
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="what they cost was not stored"):
        record_exits(objective.classifier, [kept[torch.arange(ROWS)]], scores=["margin"])


def test_a_record_of_stored_states_is_that_of_the_live_model(tmp_path: Path):
    objective = objective_for("jei_dnn")
    classifier, scores = objective.classifier, ("learned_confidence", "negative_entropy", "agreement")
    heads = ClassifierHeads(classifier.model, classifier.exits)
    kept = stored_states(heads, halves(), pruning=None, data="texts")
    expected = record_exits(classifier, halves(), scores=scores)
    found = record_exits(classifier, [kept[torch.arange(ROWS)]], scores=scores)
    assert expected.labels.tolist() == LABELS.tolist(), "in the order of the keys"
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for name in scores:
        torch.testing.assert_close(found.scores[name], expected.scores[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(found.costs[name], expected.costs[name])
    assert torch.equal(found.full, expected.full)


def test_a_store_is_read_for_its_own_model_and_data_alone(tmp_path: Path):
    heads = heads_for()
    kept = stored_states(heads, halves(), pruning=None, data="texts")
    kept.save(tmp_path / "deep" / "states")
    again = StoredStates.load(tmp_path / "deep" / "states", origin=fingerprint_of(heads, None, "texts"))
    for name in ("vectors", "own", "labels", "tokens"):
        assert torch.equal(getattr(again, name), getattr(kept, name))
    others = [fingerprint_of(heads, None, "other texts"), fingerprint_of(heads, (0.0,) * LAYERS, "texts")]
    torch.nn.init.zeros_(heads.model.classifier.bias)
    others.append(fingerprint_of(heads, None, "texts"))
    others.append(fingerprint_of(heads_for(pooling="mean"), None, "texts"))
    shallow = ClassifierHeads(heads.model, exits_for(heads.model, (1,), head="linear", judge="none"))
    others.append(fingerprint_of(shallow, None, "texts"))
    for origin in others:
        with pytest.raises(ValueError, match="expected"):
            StoredStates.load(tmp_path / "deep" / "states", origin=origin)
    (tmp_path / "broken").write_bytes(b"no tensors")
    for path in (tmp_path / "none", tmp_path / "broken"):
        with pytest.raises(ValueError, match="is not a readable store of states"):
            StoredStates.load(path, origin="")


def test_what_an_exit_carries_is_there_at_all_later_ones():
    heads, state = heads_for(), torch.zeros(ROWS, 1, WIDTH)
    masks = [torch.ones(ROWS, 1), None, torch.zeros(ROWS, 1)]
    found = []
    for inputs in exit_inputs_of(heads, [state] * 3, masks):
        found.append(dict(inputs.context))
        inputs.carried[f"from {inputs.exit}"] = state
    assert [one.keys() for one in found] == [
        {"attention_mask"},
        {"from 0"},
        {"from 0", "from 1", "attention_mask"},
    ]
    assert found[2]["attention_mask"] is masks[2]


def test_refused():
    for judge, head in (("halting", "shared"), ("none", "shared"), ("linear_halting", "pooled")):
        with pytest.raises(ValueError, match="stored vectors"):
            stored_states(heads_for(judge=judge, head=head), halves(), pruning=None, data="texts")
    with pytest.raises(ValueError, match="no batches"):
        stored_states(heads_for(), [], pruning=None, data="texts")
    kept = stored_states(heads_for(), halves(), pruning=None, data="texts")
    with pytest.raises(ValueError, match="pabee trains the model"):
        objective_for("pabee")(kept[torch.arange(ROWS)])
    assert kept.own.shape == (ROWS, CLASSES)
