"""`check_model` of classifiers: it holds for every class of the table and for one that a user registers, and names what a row forgets."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import CONFIGS, LAYERS, NAMES, batch_for, class_name, exits_for, model_named, widen

from ee_diffusion.classification.attach import attach
from ee_diffusion.classification.model_check import check_model
from ee_diffusion.classification.model_specs import MODEL_SPECS, ModelSpec, register_model
from ee_diffusion.classification.truncate import truncate
from ee_diffusion.core.criteria import DepthTable
from ee_diffusion.core.policy import Policy

BERT = MODEL_SPECS["BertForSequenceClassification"]
ELECTRA = ModelSpec(  # as a user writes it
    "ElectraForSequenceClassification",
    "ElectraLayer",
    pool=lambda model, hidden, mask: nn.functional.gelu(model.classifier.dense(hidden[:, 0])),
    classify=lambda model, pooled: model.classifier.out_proj(pooled),
    row_arguments=("attention_mask",),
)


@pytest.fixture
def table(monkeypatch) -> dict[str, ModelSpec]:
    """The table, to be changed."""
    known = MODEL_SPECS | {}
    monkeypatch.setattr("ee_diffusion.classification.model_specs.MODEL_SPECS", known)
    return known


def electra() -> nn.Module:
    torch.manual_seed(0)
    made = transformers.ElectraForSequenceClassification(
        transformers.ElectraConfig(**CONFIGS["Bert"], embedding_size=8, num_labels=3)
    )
    widen(made)
    return made.eval()


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_for_the_table(name: str):
    model = model_named(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_model(model, functools.partial(batch_for, name))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_it_holds_for_a_block_of_several_layers():
    check_model(model_named("Albert", inner_group_num=2), functools.partial(batch_for, "Albert"))


def test_it_holds_for_a_class_that_a_user_registers_right(table):
    register_model(ELECTRA)
    check_model(electra(), functools.partial(batch_for, "Bert"))


WRONG = [
    ("Bert", {"row_arguments": ()}, r"the length of 'attention_mask', an argument of BertLayer, follows the number of"),
    ("ModernBert", {"row_arguments": ("position_embeddings",)}, "the length of 'attention_mask"),
    ("Bert", {"returns_tuple": True}, "layer 0 returns a Tensor, returns_tuple=True"),
    ("DebertaV2", {"returns_tuple": False}, "layer 0 returns a tuple, returns_tuple=False"),
    ("Bert", {"block": "BertAttention"}, "BertAttention has no module 'attention'|expected"),
    ("Bert", {"block": "Nothing"}, "no module of class 'Nothing'"),
    ("Bert", {"inner": "nothing"}, "BertLayer has no module 'nothing'"),
    ("Bert", {"inner": "attention.self.query.nothing"}, "BertLayer has no module"),
    ("Bert", {"pool": lambda model, hidden, mask: hidden[:, 0]}, "pool and classify make logits that are"),
    (
        "Bert",
        {"classify": lambda model, pooled: 2 * model.classifier(pooled)},
        "pool and classify make logits that are",
    ),
    ("DebertaV2", {"first_exit": 0}, "row . of a batch, which stops after|fails"),
    ("ModernBert", {"tail_takes_all": False}, "row . of a batch, which stops after|fails"),
    ("Albert", {"repeats": "num_hidden_layers"}, "AlbertLayer is called 4 times in a forward, expected 16"),
]


@pytest.mark.parametrize("name, change, words", WRONG)
def test_a_wrong_row_is_refused(name: str, change: dict, words: str, table):
    table[class_name(name)] = replace(table[class_name(name)], **change)
    with pytest.raises(ValueError, match=words):
        check_model(model_named(name), functools.partial(batch_for, name))


@pytest.mark.parametrize(
    "inputs, words",
    [
        (lambda rows: batch_for("Bert", [0] * len(rows)), "expected rows that differ"),
        (lambda rows: batch_for("Bert", [*reversed(rows)]), "the same arguments whatever rows are beside it"),
    ],
)
def test_inputs_that_show_nothing_are_refused(inputs, words: str):
    with pytest.raises(ValueError, match=words):
        check_model(model_named("Bert"), inputs)


def test_a_model_in_train_mode_is_refused():
    with pytest.raises(ValueError, match=r"in train mode, torch.float32, expected eval, float32"):
        check_model(model_named("Bert").train(), functools.partial(batch_for, "Bert"))


@pytest.mark.parametrize("row", [object(), None, "BertForSequenceClassification"])
def test_what_is_no_row_of_the_table_is_refused(row, table):
    with pytest.raises(ValueError, match=r"expected ee_diffusion.classification.model_specs.ModelSpec\(...\)"):
        register_model(row)


class ShiftedLayer(nn.Module):
    """Multiplies by what all rows have an entry of: one row becomes as many."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(16, 16)

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs):
        seen = 1 if attention_mask is None else attention_mask[:, 0, 0, :, None]  # None: no row has padding
        return hidden_states + self.attention(hidden_states) * seen  # (R, N, D)


class ShiftedForSequenceClassification(transformers.BertForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.bert.encoder.layer = nn.ModuleList(ShiftedLayer() for _ in range(config.num_hidden_layers))


@torch.no_grad()
def test_one_row_broadcast_to_all_is_refused_in_a_run_too(table):
    """Where one row of six goes on, a layer meets the mask of all six."""
    model, batch = ShiftedForSequenceClassification(model_named("Bert").config), batch_for("Bert")
    widen(model.eval())
    right = replace(BERT, class_name=type(model).__name__, block="ShiftedLayer")
    register_model(right)
    check_model(model, functools.partial(batch_for, "Bert"))
    exits = exits_for(model, (1, 2), head="shared", judge="none")
    plan = Policy(DepthTable(((1, 1, LAYERS, 1, 1, 1),)))
    table[right.class_name] = replace(right, row_arguments=())
    with pytest.raises(ValueError, match="the length of 'attention_mask', an argument of ShiftedLayer, follows"):
        check_model(model, functools.partial(batch_for, "Bert"))
    with (
        attach(model, exits, plan),
        pytest.raises(
            ValueError, match="returned 6 rows for 1: an argument with one entry per row is not among row_arg"
        ),
    ):
        model(**batch)


# --- truncation of what is registered


@torch.no_grad()
def test_a_registered_class_is_truncated_where_it_says_what_the_exit_says(table):
    register_model(ELECTRA)
    model, batch = electra(), batch_for("Bert")
    with pytest.raises(ValueError, match=r"registered by hand.*give inputs="):
        truncate(model, 2)
    exits = exits_for(model, (2,), head="shared", judge="none")
    with attach(model, exits, Policy(DepthTable(((2,) * 6,)))):
        expected = model(**batch).logits
    torch.testing.assert_close(truncate(model, 2, inputs=batch)(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    table[ELECTRA.class_name] = replace(ELECTRA, classify=lambda model, pooled: 2 * model.classifier.out_proj(pooled))
    with pytest.raises(
        ValueError, match=r"first 2 layers of ElectraForSequenceClassification alone are .* off from its output"
    ):
        truncate(model, 2, inputs=batch)
