"""Losses of the methods against slow float64 loops written from the papers, and who gets a gradient from which term."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ee_diffusion.classification.method import output_losses, summed_loss
from ee_diffusion.classification.methods.berxit import correctness, learned_exit_loss
from ee_diffusion.classification.methods.fastbert import distillation_loss
from ee_diffusion.classification.methods.jei_dnn import (
    exit_weighted_loss,
    gate_loss,
    gate_probabilities,
    gate_targets,
    released_exit_weighted_loss,
)
from ee_diffusion.classification.methods.pabee import depth_weighted_loss
from ee_diffusion.classification.methods.palbert import (
    PonderSettings,
    halting_divergence,
    halting_probabilities,
    ponder_loss,
    truncated_geometric,
)

OUTPUTS, ROWS, CLASSES = 4, 5, 3


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(OUTPUTS, ROWS, CLASSES, dtype=torch.float64).float().requires_grad_()


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 2, 1, 1, 0])


@pytest.fixture
def halting() -> Tensor:
    return torch.rand(OUTPUTS - 1, ROWS).mul(0.8).add(0.1).requires_grad_()


def softmax(values: list[float]) -> list[float]:
    exps = [math.exp(value) for value in values]
    return [value / sum(exps) for value in exps]


def slow_output_losses(logits: Tensor, labels: Tensor) -> list[list[float]]:
    return [
        [-math.log(softmax(logits[a, b].tolist())[int(labels[b])]) for b in range(ROWS)] for a in range(len(logits))
    ]


def slow_halting(halting: Tensor) -> list[list[float]]:
    """p[a][b]: stop at a after not stopping before; the end takes what is left."""
    out = [[0.0] * ROWS for _ in range(OUTPUTS)]
    for b in range(ROWS):
        left = 1.0
        for k in range(OUTPUTS - 1):
            out[k][b] = left * float(halting[k, b])
            left -= out[k][b]
        out[-1][b] = left
    return out


def slow_gates(gates: Tensor) -> list[list[float]]:
    out = [[0.0] * ROWS for _ in range(OUTPUTS)]
    for b in range(ROWS):
        for k in range(OUTPUTS - 1):
            out[k][b] = max(0.0, min(float(gates[k, b]), 1 - sum(float(gates[j, b]) for j in range(k))))
        out[-1][b] = 1 - sum(out[k][b] for k in range(OUTPUTS - 1))
    return out


def close(found: Tensor, expected) -> None:
    torch.testing.assert_close(
        found.detach().double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


def test_output_losses(logits, labels):
    close(output_losses(logits, labels), slow_output_losses(logits, labels))
    values = torch.randn(ROWS)
    one = logits[:, :, :1].detach()
    expected = [[(float(one[a, b, 0]) - float(values[b])) ** 2 for b in range(ROWS)] for a in range(OUTPUTS)]
    close(output_losses(one, values), expected)


def test_halting_probabilities_sum_to_one(halting):
    p = halting_probabilities(halting)
    close(p, slow_halting(halting))
    close(p.sum(0), [1.0] * ROWS)


def test_truncated_geometric():
    weights = [0.3 * 0.7**i for i in range(5)]
    close(truncated_geometric(0.3, 5), [weight / sum(weights) for weight in weights])


@pytest.mark.parametrize("direction", ["posterior_to_prior", "prior_to_posterior"])
def test_halting_divergence_has_the_direction_it_says(halting, direction):
    p, q = slow_halting(halting), truncated_geometric(0.2, OUTPUTS).tolist()
    total = 0.0
    for b in range(ROWS):
        for a in range(OUTPUTS):
            if direction == "posterior_to_prior":
                total += p[a][b] * math.log(p[a][b] / q[a])
            else:
                total += q[a] * math.log(q[a] / p[a][b])
    found = halting_divergence(halting_probabilities(halting), torch.tensor(q), direction=direction)
    close(found, total / ROWS)


def test_halting_divergence_of_exits_that_hardly_happen():
    p, q = [1e-6, 3e-4, 1 - 1e-6 - 3e-4], [0.5, 0.3, 0.2]
    given = torch.tensor(p, dtype=torch.float64)[:, None]
    for direction, first, second in (("posterior_to_prior", p, q), ("prior_to_posterior", q, p)):
        expected = sum(x * math.log(x / y) for x, y in zip(first, second, strict=True))
        close(halting_divergence(given, torch.tensor(q, dtype=torch.float64), direction=direction), expected)
    never = torch.tensor([[0.0], [0.0], [1.0]])
    assert bool(torch.isfinite(halting_divergence(never, torch.tensor(q), direction="prior_to_posterior")))


def test_ponder_loss(logits, labels, halting):
    found = ponder_loss(logits, labels, halting, PonderSettings())
    p, ce, q = (
        slow_halting(halting),
        slow_output_losses(logits, labels),
        truncated_geometric(0.1, OUTPUTS).tolist(),
    )
    expected = sum(p[a][b] * ce[a][b] for a in range(OUTPUTS) for b in range(ROWS)) / ROWS
    divergence = sum(p[a][b] * math.log(p[a][b] / q[a]) for a in range(OUTPUTS) for b in range(ROWS)) / ROWS
    close(found, expected + 0.5 * divergence)
    found.backward()
    assert bool((logits.grad != 0).any(-1).all()), "every output, the model's own among them"
    assert bool((halting.grad != 0).all())


def test_a_change_in_p_changes_the_head_gradients(logits, labels, halting):
    def gradient(lam: Tensor) -> Tensor:
        loss = ponder_loss(logits, labels, lam, PonderSettings())
        return torch.autograd.grad(loss, logits)[0]

    assert (gradient(halting) - gradient(halting * 0.5)).abs().max() > 1e-3


def test_depth_weighted_and_summed(logits, labels):
    ce = slow_output_losses(logits, labels)
    weighted = sum((a + 1) * ce[a][b] for a in range(OUTPUTS) for b in range(ROWS)) / ROWS / 10
    close(depth_weighted_loss(logits, labels), weighted)
    close(summed_loss(logits, labels), sum(map(sum, ce)) / ROWS)


def test_distillation_is_student_to_teacher(logits):
    students, teacher = logits[:-1], logits[-1]
    total = 0.0
    for k in range(OUTPUTS - 1):
        for b in range(ROWS):
            s, t = softmax(students[k, b].tolist()), softmax(teacher[b].tolist())
            total += sum(x * math.log(x / y) for x, y in zip(s, t, strict=True))
    loss = distillation_loss(students, teacher)
    close(loss, total / ROWS)
    loss.backward()
    assert bool((logits.grad[:-1] != 0).all())
    assert bool((logits.grad[-1] == 0).all()), "the teacher learns nothing"


def test_learned_exit_loss_trains_the_confidence_alone(logits, labels, halting):
    loss = learned_exit_loss(halting, logits[:-1], labels)
    total = 0.0
    for k in range(OUTPUTS - 1):
        for b in range(ROWS):
            values = logits[k, b].tolist()
            right = float(values.index(max(values)) == int(labels[b]))
            total += (float(halting[k, b]) - right) ** 2
    close(loss, total / ROWS)
    loss.backward()
    assert logits.grad is None
    assert bool((halting.grad != 0).all())


def test_correctness_of_a_regression():
    logits, labels = torch.randn(2, ROWS, 1), torch.randn(ROWS)
    expected = [[1 - math.tanh(abs(float(logits[k, b, 0]) - float(labels[b]))) for b in range(ROWS)] for k in range(2)]
    close(correctness(logits, labels), expected)
    logits.requires_grad_()
    confidence = torch.rand(2, ROWS, requires_grad=True)
    learned_exit_loss(confidence, logits, labels).backward()
    assert logits.grad is None
    assert bool((confidence.grad != 0).all())


def test_gate_probabilities_sum_to_one(halting):
    for scale in (1.0, 0.3, 1.1):  # the sum of gates passes one early, never, at once
        gates = (halting * scale).clamp(max=1)
        p = gate_probabilities(gates)
        close(p, slow_gates(gates))
        close(p.sum(0), [1.0] * ROWS)
        assert bool((p >= 0).all())


def test_gate_targets(logits, labels):
    ce, costs = slow_output_losses(logits, labels), [0.25, 0.5, 0.8, 1.0]
    for trade_off in (0.0, 1.0, 100.0):
        expected = []
        for k in range(OUTPUTS - 1):
            row = []
            for b in range(ROWS):
                totals = [ce[a][b] + trade_off * costs[a] for a in range(OUTPUTS)]
                row.append(float(k >= totals.index(min(totals))))
            expected.append(row)
        found = gate_targets(output_losses(logits, labels), torch.tensor(costs), trade_off=trade_off)
        close(found, expected)
        assert not found.requires_grad
    assert bool((found == 1).all()), "cost is everything: stop at the first"


def test_gate_loss_balances_ones_and_zeros():
    logits = torch.randn(3, ROWS)
    targets = (torch.rand(3, ROWS) < 0.3).float()
    targets[0, 0] = 1
    ones = targets.sum().item()
    total = 0.0
    for k in range(3):
        for b in range(ROWS):
            g = 1 / (1 + math.exp(-float(logits[k, b])))
            if targets[k, b]:
                total -= (3 * ROWS - ones) / ones * math.log(g)
            else:
                total -= math.log(1 - g)
    close(gate_loss(logits, targets), total / (3 * ROWS))
    nobody = gate_loss(logits, torch.zeros(3, ROWS))
    close(nobody, float(torch.nn.functional.softplus(logits.double()).mean()))


def test_exit_weighting_reaches_the_heads_and_the_released_one_cancels(logits, labels, halting):
    ce = output_losses(logits, labels)
    p = gate_probabilities(halting)
    other = gate_probabilities(halting.flip(0) * 0.3)
    close(exit_weighted_loss(ce, p), float((p.double() * ce.double()).sum() / ROWS))

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    assert (gradient(exit_weighted_loss(ce, p)) - gradient(exit_weighted_loss(ce, other))).abs().max() > 1e-3
    uniform = gradient(ce.sum(0).mean())
    for weights in (p, other):
        torch.testing.assert_close(gradient(released_exit_weighted_loss(ce, weights)), uniform)
    exit_weighted_loss(ce, p).backward(retain_graph=True)
    assert halting.grad is None, "gates learn from their own loss"


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: output_losses(torch.zeros(2, 3, 2), torch.zeros(4).long()), r"expected \(A, B, C\)"),
        (lambda: output_losses(torch.zeros(2, 3, 2), torch.zeros(3)), "expected one output"),
        (lambda: truncated_geometric(0.0, 3), "rate=0.0"),
        (lambda: halting_divergence(torch.ones(1, 1), torch.ones(1), direction="both"), "direction='both'"),
        (lambda: gate_targets(torch.zeros(3, 2), torch.zeros(2), trade_off=1.0), "2,.*costs"),
    ],
)
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
