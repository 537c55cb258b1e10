"""A truncated classifier is the stock model's first layers and its end, for every class."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import LAYERS, NAMES, batch_for, exits_for, model_named

from ee_diffusion.classification.attach import attach
from ee_diffusion.classification.truncate import truncate
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_constant_depth_of_the_models_own_end(name: str):
    model, batch = model_named(name), batch_for(name)
    smaller = truncate(model, 2)
    assert type(smaller) is type(model)
    assert (smaller.config.num_hidden_layers, model.config.num_hidden_layers) == (2, LAYERS)
    assert not smaller.training
    with attach(model, exits_for(model, (2,), head="shared", judge="none"), Policy(schedule=FixedDepth(2))):
        expected = model(**batch).logits
    torch.testing.assert_close(smaller(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    torch.nn.init.zeros_(smaller.classifier.bias if name != "Roberta" else smaller.classifier.out_proj.bias)
    with attach(model, exits_for(model, (2,), head="shared", judge="none"), Policy(schedule=FixedDepth(2))):
        assert torch.equal(model(**batch).logits, expected), "a copy"


@torch.no_grad()
def test_all_layers_are_the_model():
    model = model_named("ModernBert")
    torch.testing.assert_close(
        truncate(model, LAYERS)(**batch_for("ModernBert")).logits, model(**batch_for("ModernBert")).logits
    )


def test_weights_that_are_not_the_classes_own_are_refused():
    model = model_named("Bert")
    model.bert.encoder.layer[0].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"not those of its class \(bert.encoder.layer.0.adapter.bias, in all 2\); merge"
    ):
        truncate(model, 2)
    model = model_named("Bert")
    del model.bert.embeddings.token_type_embeddings
    with pytest.raises(
        ValueError, match=r"not those of its class .bert.embeddings.token_type_embeddings.weight, in all 1"
    ):
        truncate(model, 2)
    model = model_named("Bert")
    model.bert.encoder.layer[3].adapter = torch.nn.Linear(2, 2)  # of a layer that is left out
    truncate(model, 2)


def test_an_albert_whose_groups_would_be_dealt_out_anew_is_refused():
    model, batch = model_named("Albert", num_hidden_groups=2), batch_for("Albert")
    with pytest.raises(ValueError, match="of 2 groups deals them out over all its layers"):
        truncate(model, 2)
    torch.testing.assert_close(truncate(model, LAYERS)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("num_layers", [0, LAYERS + 1, True, 2.0])
def test_refused(num_layers: int):
    with pytest.raises(
        ValueError, match=f"num_layers={num_layers} of a BertForSequenceClassification, expected 1..{LAYERS}"
    ):
        truncate(model_named("Bert"), num_layers)
