"""Exits on stock classifiers of every class: the invariants, one forward at a time, and what is refused."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import CLASSES, LAYERS, NAMES, ROWS, batch_for, exits_for, model_named

from ee_diffusion.classification import methods
from ee_diffusion.classification.attach import attach, recorded_states
from ee_diffusion.classification.exits import ClassifierExits, ClassifierHeads
from ee_diffusion.classification.model_specs import model_spec_of
from ee_diffusion.core.exits import ExitInputs
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import replay
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.core.trace import Trace

METHODS = {
    "palbert": methods.palbert,
    "pondernet": lambda value: methods.pondernet(int(1000 * value)),
    "pabee": lambda value: methods.pabee(1 if value >= 0.5 else 2),
    "deebert": lambda value: methods.deebert((1 - value) * math.log(CLASSES), num_labels=CLASSES),
    "fastbert": lambda value: methods.fastbert(1 - value),
    "berxit": methods.berxit,
    "jei_dnn": methods.jei_dnn,
}


@functools.cache
def fixture(name: str, case: str) -> tuple[nn.Module, ClassifierExits, Policy]:
    """A model, exits and a policy whose number splits the batch: somebody leaves early, somebody later. `case`: a method, and perhaps
    ` of the mean` of all tokens or decided ` delayed`."""
    model, delayed = model_named(name), case.endswith(LATE)
    case = case.removesuffix(LATE)
    method, pooling = case.removesuffix(MEAN), "mean" if case.endswith(MEAN) else "first"
    for seed, value in itertools.product(range(11, 16), (0.5, 0.6, 0.4, 0.7, 0.3, 0.8, 0.2)):
        exits = exits_for(model, **methods.METHODS[method].exits, seed=seed, pooling=pooling)
        policy = replace(METHODS[method](value), delayed=delayed)
        if len(run(model, exits, policy, batch_for(name))[1].depths.unique()) > 1:
            return model, exits, policy
    raise AssertionError(f"no number splits the batch of {name} under {case}")


@torch.no_grad()
def run(model, exits, policy, batch, sample_ids=None) -> tuple[Tensor, Trace]:
    with attach(model, exits, policy, sample_ids=sample_ids) as traces:
        logits = model(**batch).logits
    (trace,) = traces
    return logits, trace


@torch.no_grad()
def logits_everywhere(model, exits, batch) -> Tensor:
    """(A, R, C) from the stock forward: every exit's and the model's own."""
    heads = ClassifierHeads(model, exits)
    with recorded_states(model) as states:
        own = model(**batch).logits
    context = {name: value for name, value in batch.items() if name == "attention_mask"}
    return torch.stack([*(heads.answer(k, states[d], context) for k, d in enumerate(exits.depths)), own])


CASES = [(name, "palbert") for name in NAMES] + [("Bert", method) for method in METHODS if method != "palbert"]
CASES += [("Albert", "pabee"), ("ViT", "jei_dnn"), ("ModernBert", "berxit"), ("DebertaV2", "fastbert")]
MEAN = " of the mean"
CASES += [("Bert", method + MEAN) for method in METHODS]
CASES += [("Albert", "palbert" + MEAN), ("ModernBert", "palbert" + MEAN), ("ViT", "jei_dnn" + MEAN)]
LATE = " late"
CASES += [("Bert", method + LATE) for method in METHODS]
each = pytest.mark.parametrize("name, method", CASES)


@pytest.mark.parametrize("name", NAMES)
def test_off_is_the_stock_model(name: str):
    model = model_named(name)
    exits, batch = exits_for(model, head="pooled", judge="none"), batch_for(name)
    keys, attributes = list(model.state_dict()), [dict(module.__dict__) for module in model.modules()]
    before = model(**batch).logits
    for policy in (Policy(), methods.confidence(1.0)):
        logits, trace = run(model, exits, policy, batch)
        assert torch.equal(logits, before)
        assert (trace.depths == LAYERS).all()
    run(model, exits, methods.confidence(0.4), batch)
    assert torch.equal(model(**batch).logits, before)
    assert list(model.state_dict()) == keys
    for module, had in zip(model.modules(), attributes, strict=True):
        assert module.__dict__.keys() == had.keys()
        assert all(module.__dict__[key] is value for key, value in had.items())


@each
def test_every_row_gets_the_logits_of_its_depth(name: str, method: str):
    model, exits, policy = fixture(name, method)
    logits, trace = run(model, exits, policy, batch_for(name))
    expected = logits_everywhere(model, exits, batch_for(name))
    order = [*exits.depths, LAYERS]
    for row, depth in enumerate(trace.depths[0].tolist()):
        torch.testing.assert_close(logits[row], expected[order.index(depth)][row], rtol=1e-4, atol=1e-5)


@each
def test_batch_mates_do_not_matter(name: str, method: str):
    model, exits, policy = fixture(name, method)
    logits, trace = run(model, exits, policy, batch_for(name))
    for row in range(ROWS):
        alone, its_trace = run(model, exits, policy, batch_for(name, [row]))
        assert its_trace.depths.tolist() == trace.depths[:, [row]].tolist()
        torch.testing.assert_close(alone[0], logits[row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(its_trace.scores, trace.scores[:, :, [row]], equal_nan=True, rtol=0, atol=1e-5)


@each
def test_replay_is_the_live_run_and_saving_keeps_it(name: str, method: str, tmp_path: Path):
    model, exits, policy = fixture(name, method)
    trace = run(model, exits, policy, batch_for(name))[1]
    everything = run(model, exits, Policy(policy.criterion, record_all=True), batch_for(name))[1]
    policy.save(tmp_path / "policy.json")
    loaded = Policy.load(tmp_path / "policy.json")
    assert torch.equal(replay(trace, loaded), trace.depths)
    assert torch.equal(replay(everything, loaded), trace.depths)


@pytest.mark.parametrize("method", ["palbert", "jei_dnn", "berxit", "fastbert"])
def test_a_stricter_threshold_never_stops_earlier(method: str):
    model, exits, policy = fixture("Bert", method)
    everything = run(model, exits, Policy(policy.criterion, record_all=True), batch_for("Bert"))[1]
    later = replay(everything, METHODS[method](0.99)) - replay(everything, policy)
    assert bool((later >= 0).all())
    assert bool((later > 0).any())


@each
def test_skipped_layers_are_not_executed(name: str, method: str):
    model, exits, policy = fixture(name, method)
    spec, seen = model_spec_of(model), []

    def count(module, args, kwargs) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[0])

    inners = [block.get_submodule(spec.inner) for block in spec.blocks(model)]
    handles = [inner.register_forward_pre_hook(count, with_kwargs=True) for inner in inners]
    trace = run(model, exits, policy, batch_for(name))[1]
    for handle in handles:
        handle.remove()
    expected = [int((trace.depths[0] > layer).sum()) for layer in range(LAYERS)]
    assert seen == [rows for rows in expected if rows]
    assert trace.ran[0].sum(0).tolist() == expected


def test_albert_counts_calls_of_its_one_layer():
    model = model_named("Albert", inner_group_num=2)
    assert len(model_spec_of(model).blocks(model)) == 2
    assert model_spec_of(model).num_layers(model) == 2 * LAYERS
    exits = exits_for(model, head="shared", judge="none")
    assert exits.depths == tuple(range(1, 2 * LAYERS))
    logits, trace = run(model, exits, Policy(schedule=FixedDepth(5)), batch_for("Albert"))
    assert trace.ran[0, 0].tolist() == [1] * 5 + [0] * 3
    torch.testing.assert_close(logits, logits_everywhere(model, exits, batch_for("Albert"))[4])


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_head_is_the_end_of_the_truncated_model(name: str):
    """Depth k through the model's own end is the stock model with k layers and the same weights."""
    model = model_named(name)
    config = type(model.config).from_dict(
        model.config.to_dict() | {"num_hidden_layers": 2, "n_layers": 2, "layer_types": None}
    )
    if name == "ModernBert":
        config.layer_types = model.config.layer_types[:2]
    short = type(model)(config).eval()
    missing = short.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing
    logits, _ = run(
        model, exits_for(model, head="shared", judge="none"), Policy(schedule=FixedDepth(2)), batch_for(name)
    )
    torch.testing.assert_close(logits, short(**batch_for(name)).logits, rtol=1e-4, atol=1e-5)


def test_one_exit_for_everybody_and_before_the_first_layer():
    model = model_named("Bert")
    exits = exits_for(model, (0, 2), head="pooled", judge="none")
    logits, trace = run(model, exits, Policy(schedule=FixedDepth(0)), batch_for("Bert"))
    assert int(trace.ran.sum()) == 0
    torch.testing.assert_close(logits, logits_everywhere(model, exits, batch_for("Bert"))[0])


def test_the_loss_is_of_the_logits_of_all_rows():
    model, exits, policy = fixture("Bert", "palbert")
    labels = torch.arange(ROWS) % CLASSES
    with torch.no_grad(), attach(model, exits, policy):
        output = model(**batch_for("Bert"), labels=labels)
        as_tuple = model(**batch_for("Bert"), labels=labels, return_dict=False)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    assert torch.equal(as_tuple[1], output.logits)


def test_attention_implementations_agree():
    policy = methods.confidence(0.6)
    found = []
    for kind in ("sdpa", "eager"):
        model = model_named("Bert", attn_implementation=kind)
        found.append(run(model, exits_for(model, head="pooled", judge="none"), policy, batch_for("Bert")))
    assert torch.equal(found[0][1].depths, found[1][1].depths)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)


def test_regression_by_patience():
    model = model_named("Bert", num_labels=1)
    exits = exits_for(model, head="pooled", judge="none")
    everywhere = logits_everywhere(model, exits, batch_for("Bert"))[:, :, 0]  # (A, R)
    steps = (everywhere[1:-1] - everywhere[:-2]).abs()
    tolerance = float(steps.min(0).values.median())
    logits, trace = run(model, exits, methods.pabee_regression(1, tolerance=tolerance), batch_for("Bert"))
    for row in range(ROWS):
        near = [depth for depth in (2, 3) if steps[depth - 2, row] < tolerance]
        assert int(trace.depths[0, row]) == (near[0] if near else LAYERS)
    assert logits.shape == (ROWS, 1)


def test_patience_counts_agreements_in_a_row():
    """Against a plain loop over the classes of all layers."""
    model, exits, _ = fixture("Bert", "pabee")
    classes = logits_everywhere(model, exits, batch_for("Bert")).argmax(-1)  # (A, R)
    for patience in (1, 2):
        trace = run(model, exits, methods.pabee(patience), batch_for("Bert"))[1]
        for row in range(ROWS):
            count, depth = 0, LAYERS
            for exit in range(1, len(exits.depths)):
                count = count + 1 if classes[exit, row] == classes[exit - 1, row] else 0
                if count == patience:
                    depth = exits.depths[exit]
                    break
            assert int(trace.depths[0, row]) == depth


def test_drawn_exits_follow_the_exit_distribution():
    model, exits, _ = fixture("Bert", "pondernet")
    everything = run(model, exits, Policy(methods.pondernet(0).criterion, record_all=True), batch_for("Bert"))[1]
    halting = everything.scores[0]  # (K, R)
    before = torch.cat([torch.ones(1, ROWS), (1 - halting).cumprod(0)])
    expected = torch.cat([halting * before[:-1], before[-1:]])  # (A, R)
    found = torch.zeros_like(expected)
    for seed in range(400):
        depths = replay(everything, methods.pondernet(seed))[0]
        for place, depth in enumerate((*exits.depths, LAYERS)):
            found[place] += (depths == depth) / 400
    assert (found - expected).abs().max() < 0.1


def test_training_sees_what_inference_sees():
    """The judge run exit by exit with what was carried gives the scores of the live run, rows leaving or not."""
    model, exits, policy = fixture("Bert", "palbert")
    everything = run(model, exits, Policy(policy.criterion, record_all=True), batch_for("Bert"))[1]
    heads, context = ClassifierHeads(model, exits), {"attention_mask": batch_for("Bert")["attention_mask"]}
    with torch.no_grad(), recorded_states(model) as states:
        model(**batch_for("Bert"))
        for exit, depth in enumerate(exits.depths):
            inputs = ExitInputs(heads, exit, states[depth], context)
            torch.testing.assert_close(heads.judge(inputs), everything.scores[0, exit])
            context |= inputs.carried


def test_labels_leave_no_kind_of_problem_behind():
    """transformers' loss writes the kind of problem into the config it is given: not into the model's own."""
    model, exits, policy = fixture("DebertaV2", "palbert")
    with attach(model, exits, policy):
        model(**batch_for("DebertaV2"), labels=torch.arange(ROWS) % CLASSES)
    assert model.config.problem_type is None
