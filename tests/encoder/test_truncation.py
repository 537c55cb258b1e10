"""A truncated classifier is the stock model's first layers and its end, for every family."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import LAYERS, NAMES, batch_for, exits_for, model_named

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.encoder.attach import attach
from ee_diffusion.encoder.truncation import first_layers


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_constant_depth_of_the_models_own_end(name: str):
    model, batch = model_named(name), batch_for(name)
    smaller = first_layers(model, 2)
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
        first_layers(model, LAYERS)(**batch_for("ModernBert")).logits, model(**batch_for("ModernBert")).logits
    )


@pytest.mark.parametrize("num_layers", [0, LAYERS + 1])
def test_refused(num_layers: int):
    with pytest.raises(
        ValueError, match=f"num_layers={num_layers} of a BertForSequenceClassification, expected 1..{LAYERS}"
    ):
        first_layers(model_named("Bert"), num_layers)
