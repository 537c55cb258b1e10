"""Training objectives: values against the formulas, which parameters learn from which term, phases, and a run that learns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import CLASSES, LAYERS, ROWS, batch_for, exits_for, model_named

from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.costs import costs_of
from ee_diffusion.classification.method import output_losses
from ee_diffusion.classification.methods import METHODS, method_named
from ee_diffusion.classification.methods.jei_dnn import JeiDnnSettings, gate_loss, gate_targets
from ee_diffusion.classification.methods.palbert import PonderSettings, halting_probabilities, ponder_loss
from ee_diffusion.classification.objective import ClassifierObjective

LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


def objective_for(
    method: str,
    name: str = "Bert",
    *,
    pruning: tuple[float, ...] | None = None,
    pooling: str = "first",
    **settings,
) -> ClassifierObjective:
    model, made = model_named(name), method_named(method)
    exits = exits_for(model, **made.exits, pooling=pooling)
    classifier = EarlyExitClassifier.from_classifier(model, exits)
    classifier.pruning = pruning
    chosen = made.settings_from({"trade_off": 0.5} | settings, name=method)
    return ClassifierObjective(classifier, method=method, settings=chosen).eval()


FROZEN = tuple(name for name, method in METHODS.items() if method.trains == "exits")
MAGIC = {"mask_weight": 0.1, "temperature": 0.01, "top_threshold": 0.1}


def labelled(name: str = "Bert") -> dict[str, Tensor]:
    return batch_for(name) | {"labels": LABELS}


def learners(objective: ClassifierObjective, loss: Tensor) -> set[str]:
    """The parts that get a gradient that is not zero somewhere: model, heads, judges."""
    objective.zero_grad(set_to_none=True)
    loss.backward()
    found = set()
    for name, parameter in objective.classifier.named_parameters():
        if parameter.grad is not None and bool((parameter.grad != 0).any()):
            found.add(".".join(name.split(".")[:2]) if name.startswith("exits") else "model")
    return found


@pytest.mark.parametrize(
    "method, expected",
    {
        "plain": {"model"},
        "palbert": {"model", "exits.judges"},
        "pondernet": {"model", "exits.judges"},
        "pabee": {"model", "exits.heads"},
        "deebert": {"exits.heads"},
        "fastbert": {"exits.heads"},
        "berxit": {"model", "exits.judges"},
    }.items(),
)
def test_who_learns(method: str, expected: set[str]):
    objective = objective_for(method)
    assert learners(objective, objective(labelled())["loss"]) == expected
    assert all(p.requires_grad == (method not in FROZEN) for p in objective.classifier.model.parameters())
    assert all(p.requires_grad for p in objective.classifier.exits.parameters())
    plain = ClassifierObjective(objective.classifier, method="plain")
    assert not any(p.requires_grad for p in plain.classifier.exits.parameters())
    assert all(p.requires_grad for p in plain.classifier.model.parameters())


@pytest.mark.parametrize("method", ["plain", "palbert", "deebert", "jei_dnn"])
def test_looking_without_gradients_builds_no_graph(method: str):
    objective, graphs = objective_for(method), []
    note = lambda module, args, output: graphs.append(output.logits.requires_grad)  # noqa: E731
    objective.classifier.model.register_forward_hook(note)
    with torch.no_grad():
        found = objective(labelled())
    assert graphs == [False]
    assert not any(value.requires_grad for value in found.values())


def test_losses_and_facts_by_hand():
    """Ramps and students alone, the model's own answer left out; accuracies of the first and last answer."""
    for method in ("deebert", "fastbert", "jei_dnn"):
        objective = objective_for(method, warm_up=5)
        seen, total = objective.outputs(labelled()), 0.0
        logs = seen.logits.detach().double().log_softmax(-1)  # (A, B, C)
        for exit in range(LAYERS - 1):
            for row in range(ROWS):
                if method == "fastbert":
                    student, teacher = logs[exit, row], logs[-1, row]
                    total += float((student.exp() * (student - teacher)).sum()) / ROWS
                else:
                    total -= float(logs[exit, row, LABELS[row]]) / ROWS
        found = objective(labelled())
        assert float(found["loss"]) == pytest.approx(total, rel=1e-5)
        for name, place in (("accuracy_first", 0), ("accuracy_last", -1)):
            right = [int(seen.logits[place, row].argmax()) == int(LABELS[row]) for row in range(ROWS)]
            assert float(found[name]) == pytest.approx(sum(right) / ROWS)
        assert found["accuracy_first"] != found["accuracy_last"] or method == "jei_dnn"


def test_berxit_alternates():
    objective = objective_for("berxit").train()
    assert learners(objective, objective(labelled())["loss"]) == {"model", "exits.judges"}
    assert learners(objective, objective(labelled())["loss"]) == {"model", "exits.judges", "exits.heads"}


def test_jei_dnn_warms_up_then_trains_gates_and_heads_in_turn():
    objective = objective_for("jei_dnn", warm_up=2, phase=1).train()
    parts = [learners(objective, objective(labelled())["loss"]) for _ in range(6)]
    heads, gates = {"exits.heads"}, {"exits.judges"}
    assert parts == [heads, heads, gates, heads, gates, heads]
    assert int(objective.batches) == 6
    objective.eval()(labelled())
    assert int(objective.batches) == 6, "looking is not training"


def test_a_resumed_objective_is_in_the_same_phase():
    objective = objective_for("jei_dnn", warm_up=1, phase=1).train()
    objective(labelled())
    again = objective_for("jei_dnn", warm_up=1, phase=1).train()
    again.load_state_dict(objective.state_dict())
    assert "targets" in again(labelled())


def head_gradient(objective: ClassifierObjective) -> Tensor:
    objective.zero_grad(set_to_none=True)
    objective(labelled())["loss"].backward()
    return torch.stack([head.classify.weight.grad for head in objective.classifier.exits.heads])


@pytest.mark.parametrize("released", [False, True])
def test_gates_change_what_the_heads_learn_unless_released(released: bool):
    objective = objective_for("jei_dnn", warm_up=0, phase=1, released=released)
    objective.batches += 1  # the phase of heads
    before = head_gradient(objective)
    with torch.no_grad():
        for gate in objective.classifier.exits.judges:
            gate.bias -= 3
    difference = (head_gradient(objective) - before).abs().max()
    assert (difference < 1e-6) == released


def test_palbert_loss_is_that_of_the_formula():
    objective = objective_for("palbert")
    seen = objective.outputs(labelled())
    found = objective(labelled())
    assert seen.logits.shape == (LAYERS, ROWS, CLASSES)
    halting = seen.judge_logits.sigmoid()
    expected = ponder_loss(seen.logits, LABELS, halting, PonderSettings())
    torch.testing.assert_close(found["loss"], expected)
    p = halting_probabilities(halting)
    mean = sum((place + 1) * float(p[place, row]) for place in range(LAYERS) for row in range(ROWS)) / ROWS
    assert float(found["expected_exit"]) == pytest.approx(mean, rel=1e-5)
    each = {"prior_rate": 0.4, "divergence_weight": 2.0, "divergence_direction": "prior_to_posterior"}
    for changed in ({}, *({name: value} for name, value in each.items()), each):
        expected = ponder_loss(seen.logits, LABELS, halting, PonderSettings(**changed))
        torch.testing.assert_close(objective_for("palbert", **changed)(labelled())["loss"], expected)


def test_jei_dnn_targets_use_costs_of_the_batchs_length():
    objective = objective_for("jei_dnn", warm_up=0)
    seen, exits = objective.outputs(labelled()), objective.classifier.exits
    each = output_losses(seen.logits, LABELS)

    def targets_for(score: str | None, trade_off: float) -> Tensor:
        costs = costs_of(objective.classifier.model, exits, 9, score=score).up_to(exits.depths, LAYERS)
        return gate_targets(each, costs, trade_off=trade_off)

    torch.testing.assert_close(
        objective(labelled())["loss"], gate_loss(seen.judge_logits, targets_for("learned_confidence", 0.5))
    )
    tried = (value / 500 for value in range(1, 5000))
    trade_off = next(
        value for value in tried if not torch.equal(targets_for("learned_confidence", value), targets_for(None, value))
    )
    gates_cost = ClassifierObjective(objective.classifier, method="jei_dnn", settings=JeiDnnSettings(trade_off)).eval()
    torch.testing.assert_close(
        gates_cost(labelled())["loss"], gate_loss(seen.judge_logits, targets_for("learned_confidence", trade_off))
    )


@pytest.mark.parametrize("method", ["palbert", "berxit", "jei_dnn"])
def test_a_few_steps_lower_the_loss(method: str):
    objective = objective_for(method, warm_up=100)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    first = float(objective(labelled())["loss"].detach())
    for _ in range(12):
        optimizer.zero_grad()
        objective(labelled())["loss"].backward()
        optimizer.step()
    assert float(objective(labelled())["loss"].detach()) < 0.9 * first


def test_magic_pyramids_soft_stage_learns_weights_and_thresholds():
    objective = objective_for("magic_soft", **MAGIC)
    found = objective(labelled())
    assert 0 < float(found["kept"]) < 1
    assert learners(objective, found["loss"]) == {"model"}
    assert bool((objective.token_gates.thresholds.grad != 0).any())
    plain = objective_for("magic_soft", **MAGIC | {"mask_weight": 0.0})(labelled())
    torch.testing.assert_close(found["loss"] - plain["loss"], 0.1 * found["kept"])
    assert objective.classifier.pruning is None
    assert objective.token_gates.thresholds.tolist() == pytest.approx([0.0, 0.1 / 3, 0.2 / 3, 0.1])
    assert objective_for("magic_soft", **MAGIC, bottom_threshold=0.04).token_gates.thresholds.tolist() == pytest.approx(
        [0.04, 0.06, 0.08, 0.1]
    )
    assert objective.trained().pruning == tuple(objective.token_gates.thresholds.tolist())
    with torch.no_grad():
        objective.token_gates.thresholds.copy_(torch.tensor([-0.1, 0.2, 0.3, 1.5]))
    assert objective.trained().pruning == pytest.approx((0.0, 0.2, 0.3, 1.0))


def test_magic_pyramids_hard_stage_trains_through_removed_tokens():
    pruning = (0.06, 0.1, 0.12, 0.2)
    objective = objective_for("magic_hard", pruning=pruning)
    found = objective(labelled())
    assert learners(objective, found["loss"]) == {"model"}
    expected = objective.classifier(**batch_for("Bert")).logits
    torch.testing.assert_close(found["loss"], torch.nn.functional.cross_entropy(expected, LABELS))
    assert found["loss"] != objective_for("plain")(labelled())["loss"]
    assert objective_for("plain", pruning=pruning)(labelled())["loss"] == objective_for("plain")(labelled())["loss"]
    ramps = objective_for("fastbert", pruning=pruning)(labelled())["loss"]
    assert ramps != objective_for("fastbert")(labelled())["loss"], "students see what is left"


def test_a_frozen_model_has_no_dropout_in_training():
    objective = objective_for("deebert").train()
    assert not objective.classifier.model.training
    assert objective.classifier.exits.training


def test_images_and_regression():
    objective = objective_for("jei_dnn", "ViT", warm_up=0)
    assert torch.isfinite(objective(labelled("ViT"))["loss"])
    model = model_named("Bert", num_labels=1)
    classifier = EarlyExitClassifier.from_classifier(model, exits_for(model, head="pooled", judge="correctness"))
    berxit = ClassifierObjective(classifier, method="berxit")
    found = berxit(batch_for("Bert") | {"labels": torch.randn(ROWS)})
    assert torch.isfinite(found["loss"])
    assert "accuracy_last" not in found


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: objective_for("cat"), "method='cat'"),
        (
            lambda: ClassifierObjective(objective_for("palbert").classifier, method="pabee"),
            "pabee needs .*pooled",
        ),
        (
            lambda: ClassifierObjective(objective_for("jei_dnn").classifier, method="jei_dnn"),
            "trade_off",
        ),
        (lambda: objective_for("magic_hard"), "magic_soft first"),
        (lambda: objective_for("magic_soft", mask_weight=0.1), "needs temperature"),
        (lambda: objective_for("palbert", prior_rate=1.0), "prior_rate=1.0"),
        (lambda: objective_for("jei_dnn", phase=0), "phase=0"),
        (lambda: objective_for("palbert", divergence_weight=-0.1), "divergence_weight=-0.1"),
        (lambda: objective_for("jei_dnn", trade_off=-1.0), "trade_off=-1.0"),
        (lambda: objective_for("jei_dnn", warm_up=-1), "warm_up=-1"),
        (lambda: objective_for("magic_soft", **MAGIC | {"mask_weight": -1.0}), "mask_weight=-1.0"),
        (lambda: objective_for("magic_soft", **MAGIC | {"top_threshold": 1.5}), "top_threshold=1.5"),
        (lambda: objective_for("magic_soft", **MAGIC | {"bottom_threshold": -0.1}), "bottom_threshold=-0.1"),
        (
            lambda: ClassifierObjective(objective_for("plain").classifier, method="plain", parts=0),
            "parts=0",
        ),
    ],
)
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_model_that_gives_several_classes_at_once_is_refused():
    model = model_named("Bert", problem_type="multi_label_classification")
    classifier = EarlyExitClassifier.from_classifier(model, exits_for(model, head="pooled", judge="none"))
    with pytest.raises(ValueError, match="problem_type='multi_label_classification', expected"):
        ClassifierObjective(classifier, method="pabee")
