"""Heads and judges of exits against slow loops, what judges carry, and what they must not train."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import CLASSES, ROWS, WIDTH, batch_for, exits_for, model_named

from ee_diffusion.classification.attach import recorded_states
from ee_diffusion.classification.exits import ClassifierExits, ClassifierHeads
from ee_diffusion.classification.methods.jei_dnn import output_statistics
from ee_diffusion.core.exits import ExitInputs


def states_of(model) -> list[torch.Tensor]:
    with torch.no_grad(), recorded_states(model) as states:
        model(**batch_for("Bert"))
    return states


def test_output_statistics_against_a_slow_loop():
    logits = torch.randn(ROWS, CLASSES, requires_grad=True)
    found = output_statistics(logits)
    assert not found.requires_grad
    for row in range(ROWS):
        exps = [math.exp(float(value)) for value in logits[row].detach()]
        p = sorted((value / sum(exps) for value in exps), reverse=True)
        squares = [value**2 for value in p]
        sharper = [value / sum(squares) for value in squares]
        entropy, sharper_entropy = (-sum(x * math.log(x) for x in values) for values in (p, sharper))
        assert found[row].tolist() == pytest.approx([p[0], entropy, p[0] - p[1], sharper_entropy], abs=1e-5)


def test_halting_looks_at_this_state_and_the_one_before():
    """lambda_i = sigmoid(Lambda([z_i ; z_{i-1}])), z_0 = 0, z_i = tanh(W h_i[CLS])."""
    model = model_named("Bert")
    exits = exits_for(model, head="shared", judge="halting")
    heads, states, context = ClassifierHeads(model, exits), states_of(model), {}
    before = torch.zeros(ROWS, WIDTH)
    linears = [module for module in exits.judges[0] if isinstance(module, torch.nn.Linear)]
    assert [tuple(linear.weight.shape) for linear in linears] == [(2 * WIDTH, 2 * WIDTH)] * 3 + [(1, 2 * WIDTH)]
    for exit, depth in enumerate(exits.depths):
        dense = model.bert.pooler.dense
        z = (states[depth][:, 0] @ dense.weight.T + dense.bias).tanh()
        x = torch.cat([z, before], dim=1)
        for linear in linears[:-1]:
            x = (x @ linear.weight.T + linear.bias).tanh()
        expected = (x @ linears[-1].weight.T + linears[-1].bias)[:, 0].sigmoid()
        inputs = ExitInputs(heads, exit, states[depth], context)
        torch.testing.assert_close(heads.judge(inputs), expected)
        assert not inputs.answered, "lambda costs no answer"
        context, before = inputs.carried, z


@pytest.mark.parametrize("judge", ["linear_halting", "correctness", "statistics"])
def test_confidence_is_that_of_the_judge(judge: str):
    model = model_named("Bert")
    heads = ClassifierHeads(model, exits_for(model, head="pooled", judge=judge))
    hidden = states_of(model)[2]
    expected = heads.judge(ExitInputs(heads, 1, hidden, {}))
    assert torch.equal(heads.confidence(1, hidden, {}), expected)


def test_confidence_of_a_judge_of_two_exits_is_refused():
    model = model_named("Bert")
    heads = ClassifierHeads(model, exits_for(model, head="shared", judge="halting"))
    with pytest.raises(ValueError, match="'learned_confidence'"):
        heads.confidence(0, torch.zeros(1, 2, WIDTH), {})


@pytest.mark.parametrize("judge, trains", [("correctness", False), ("statistics", False), ("halting", True)])
def test_which_judges_train_what_is_below_them(judge: str, trains: bool):
    model = model_named("Bert")
    exits = exits_for(model, head="pooled" if judge != "halting" else "shared", judge=judge)
    hidden = torch.randn(ROWS, 3, WIDTH, requires_grad=True)
    heads = ClassifierHeads(model, exits)
    heads.judge(ExitInputs(heads, 0, hidden, {})).sum().backward()
    assert (hidden.grad is not None and bool((hidden.grad != 0).any())) == trains
    assert all(head.classify.weight.grad is None for head in exits.heads)


def test_own_heads():
    model = model_named("Bert")
    hidden = torch.randn(ROWS, 3, WIDTH)
    pooled = exits_for(model, head="pooled", judge="none")
    one = pooled.heads[1]
    expected = one.classify((one.pool(hidden[:, 0])).tanh())
    torch.testing.assert_close(ClassifierHeads(model, pooled).answer(1, hidden, {}), expected)
    linear = exits_for(model, head="linear", judge="none")
    normed = torch.nn.functional.layer_norm(hidden[:, 0], (WIDTH,))
    torch.testing.assert_close(ClassifierHeads(model, linear).answer(2, hidden, {}), linear.heads[2].classify(normed))


@pytest.mark.parametrize("masked", [True, False])
def test_exits_of_the_mean_look_at_all_tokens_but_padding(masked: bool):
    model, hidden = model_named("Bert"), torch.randn(ROWS, 3, WIDTH)
    mask = torch.tensor([[1, 1, 1]] * (ROWS - 1) + [[1, 1, 0]])
    context = {"attention_mask": mask} if masked else {}
    mean = hidden.mean(1)
    if masked:
        mean[-1] = hidden[-1, :2].mean(0)
    heads = ClassifierHeads(model, exits_for(model, head="pooled", judge="correctness", pooling="mean"))
    one = heads.exits.heads[1]
    torch.testing.assert_close(heads.answer(1, hidden, context), one.classify(one.pool(mean).tanh()))
    learned_confidence = heads.judge_logits(ExitInputs(heads, 1, hidden, context))
    torch.testing.assert_close(learned_confidence, heads.exits.judges[0](mean)[:, 0])
    linear = ClassifierHeads(model, exits_for(model, head="linear", judge="none", pooling="mean"))
    normed = torch.nn.functional.layer_norm(mean, (WIDTH,))
    torch.testing.assert_close(linear.answer(2, hidden, context), linear.exits.heads[2].classify(normed))
    shared = ClassifierHeads(model, exits_for(model, head="shared", judge="halting", pooling="mean"))
    own = model.classifier((model.bert.pooler.dense(mean)).tanh())
    torch.testing.assert_close(shared.answer(0, hidden, context), own)
    inputs = ExitInputs(shared, 0, hidden, context)
    pooled = model.bert.pooler.dense(mean).tanh()
    expected = shared.exits.judges[0](torch.cat([pooled, torch.zeros_like(pooled)], 1))[:, 0]
    torch.testing.assert_close(shared.judge_logits(inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_of_a_long_text_holds_in_half_precision(dtype: torch.dtype):
    model = model_named("Bert")
    heads = ClassifierHeads(model, exits_for(model, head="pooled", judge="none", pooling="mean"))
    hidden = (torch.randn(2, 511, WIDTH) + 300).to(dtype)
    context = {"attention_mask": torch.ones(2, 511, dtype=torch.long)}
    found = heads.vector(hidden, context)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), hidden.double().mean(1), rtol=2 * torch.finfo(dtype).eps, atol=0)
    context["attention_mask"][1] = 0
    assert torch.equal(heads.vector(hidden, context)[1], torch.zeros(WIDTH, dtype=dtype)), "a text of no tokens"


def test_heads_and_lambda_drop_in_training_only():
    model = model_named("Bert")
    vectors = torch.randn(ROWS, WIDTH)
    pooled = exits_for(model, head="pooled", judge="none").heads[0]
    layer = exits_for(model, head="shared", judge="halting").judges[0]
    for module, given in ((pooled, vectors), (layer, torch.randn(ROWS, 2 * WIDTH))):
        assert torch.equal(module(given), module(given))
        module.train()
        assert not torch.equal(module(given), module(given))


def test_settings_make_the_same_exits():
    model = model_named("Bert")
    exits = ClassifierExits.for_model(model, (0, 2), head="linear", judge="statistics", dropout=0.3, pooling="mean")
    again = ClassifierExits(**exits.settings())
    assert again.settings() == exits.settings()
    assert (again.settings()["dropout"], again.settings()["pooling"]) == (0.3, "mean")
    old = {name: value for name, value in exits.settings().items() if name != "pooling"}
    assert ClassifierExits(**old).pooling == "first", "exits that were saved before there was a choice"
    assert len({id(gate) for gate in again.judges}) == 2, "a gate for each exit"
    assert again.depths == (0, 2)
    again.load_state_dict(exits.state_dict())


@pytest.mark.parametrize(
    "judge, names",
    {
        "none": {},
        "halting": {f"0.{place}": 2 * WIDTH for place in (1, 3, 5, 7)},
        "linear_halting": {"0": WIDTH},
        "correctness": {"0": WIDTH},
        "statistics": {"0": 4, "1": 4},
    }.items(),
)
def test_saved_exits_keep_the_names_of_their_weights(judge: str, names: dict[str, int]):
    """A file of weights is loaded by these names, whatever the code calls its modules."""
    exits = ClassifierExits((1, 2), WIDTH, CLASSES, head="linear", judge=judge)
    found = {name: value.shape[1] for name, value in exits.state_dict().items() if value.ndim == 2}
    heads = {f"heads.{exit}.classify.weight": WIDTH for exit in range(2)}
    assert found == heads | {f"judges.{name}.weight": width for name, width in names.items()}
