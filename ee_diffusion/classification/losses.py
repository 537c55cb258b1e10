"""Losses of classifiers with exits. Pure functions of tensors, each naming its paper; nothing here knows a model.

B samples, C classes, K exits, A = K + 1 answers: the exits' in order of depth, then the model's own. Every loss is a mean over B.
Gradients: a target, a teacher or a weight that must not be trained through is detached here, not by the caller.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Direction = Literal["posterior_to_prior", "prior_to_posterior"]


def answer_losses(answers: Tensor, labels: Tensor) -> Tensor:
    """Each answer's loss: answers (A, B, C), labels (B,) -> (A, B).

    Integer labels: cross-entropy. Floating labels: squared error of the one output (C = 1).

    Raises:
        ValueError: shapes that do not fit.
    """
    if answers.ndim != 3 or labels.shape != answers.shape[1:2]:
        raise ValueError(
            f"answers {tuple(answers.shape)} and labels {tuple(labels.shape)}, expected (A, B, C) and (B,)"
        )
    if labels.is_floating_point():
        if answers.shape[2] != 1:
            raise ValueError(f"floating labels with {answers.shape[2]} outputs, expected one output (regression)")
        return (answers[:, :, 0].float() - labels).square()
    logs = answers.float().log_softmax(-1)  # (A, B, C)
    return -logs.gather(2, labels.expand(len(answers), -1)[:, :, None])[:, :, 0]


def halting_probabilities(halting: Tensor) -> Tensor:
    """`p_i = lambda_i prod_{j<i} (1 - lambda_j)`, the model's own end takes the rest: lambda (K, B) -> p (A, B), summing to 1 over A.

    PonderNet (arXiv 2107.05407), PALBERT (arXiv 2204.03276).
    """
    survival = (1 - halting).cumprod(0)  # (K, B): prod_{j<=i} (1 - lambda_j)
    before = torch.cat([torch.ones_like(halting[:1]), survival])  # (A, B): prod_{j<i}
    return torch.cat([halting * before[:-1], before[-1:]])


def truncated_geometric(rate: float, num_answers: int) -> Tensor:
    """The prior over answers: `p_i ~ rate (1 - rate)^(i - 1)`, i = 1..A, normalised -> (A,).

    Raises:
        ValueError: a rate outside (0, 1), or no answers.
    """
    if not 0 < rate < 1 or num_answers < 1:
        raise ValueError(f"rate={rate} over {num_answers} answers, expected a rate in (0, 1) and at least one answer")
    weights = (1 - rate) ** torch.arange(num_answers, dtype=torch.float64)
    return (weights / weights.sum()).float()


def halting_divergence(probabilities: Tensor, prior: Tensor, *, direction: Direction) -> Tensor:
    """KL between the exit distribution p (A, B) and a prior (A,), mean over B.

    `posterior_to_prior`: `KL(p || prior) = sum p log(p / prior)`, the papers' formula. `prior_to_posterior`: `KL(prior || p)`, what
    PALBERT's released code computes.

    Raises:
        ValueError: another direction.
    """
    p, q = probabilities.clamp(min=1e-9), prior.to(probabilities)[:, None]  # (A, B), (A, 1)
    if direction == "posterior_to_prior":
        return (probabilities * (p.log() - q.log())).sum(0).mean()
    if direction == "prior_to_posterior":
        return (q * (q.log() - p.log())).sum(0).mean()
    raise ValueError(f"direction={direction!r}, expected 'posterior_to_prior' or 'prior_to_posterior'")


def ponder_loss(
    answers: Tensor, labels: Tensor, halting: Tensor, *, rate: float, weight: float, direction: Direction
) -> Tensor:
    """`sum_i p_i CE_i + weight KL` (PALBERT; rate 0.1, weight 0.5 there): answers (A, B, C), labels (B,), lambda (K, B).

    p is not detached: it is what makes the heads of likely exits learn, and the halting layer see the losses.
    """
    p = halting_probabilities(halting)  # (A, B)
    expected = (p * answer_losses(answers, labels)).sum(0).mean()
    return expected + weight * halting_divergence(p, truncated_geometric(rate, len(p)), direction=direction)


def depth_weighted_loss(answers: Tensor, labels: Tensor) -> Tensor:
    """`sum_j j CE_j / sum_j j`, j = 1..A (PABEE, arXiv 2006.04152)."""
    weights = torch.arange(1, len(answers) + 1, device=answers.device)  # (A,)
    return (weights[:, None] * answer_losses(answers, labels)).sum(0).mean() / weights.sum()


def summed_loss(answers: Tensor, labels: Tensor) -> Tensor:
    """`sum_i CE_i`, unweighted (DeeBERT, arXiv 2004.12993, over its off-ramps; BERxiT's joint steps)."""
    return answer_losses(answers, labels).sum(0).mean()


def distillation_loss(students: Tensor, teacher: Tensor) -> Tensor:
    """`sum_i KL(p_student_i || p_teacher)`, no gradient to the teacher (FastBERT, arXiv 2004.02178).

    students (K, B, C), teacher (B, C) logits.
    """
    student, target = students.float().log_softmax(-1), teacher.detach().float().log_softmax(-1)
    return (student.exp() * (student - target)).sum(-1).sum(0).mean()


def correctness(answers: Tensor, labels: Tensor) -> Tensor:
    """What a learned-to-exit module should say, without gradient: answers (K, B, C), labels (B,) -> (K, B).

    Classes: 1 if right, else 0. Regression: `1 - tanh |y_i - y|` (BERxiT, EACL 2021).
    """
    if labels.is_floating_point():
        return 1 - (answers.detach()[:, :, 0].float() - labels).abs().tanh()
    return (answers.detach().argmax(-1) == labels).float()


def learned_exit_loss(confidence: Tensor, answers: Tensor, labels: Tensor) -> Tensor:
    """`sum_i (u_i - correct_i)^2` (BERxiT): certainty (K, B), answers (K, B, C); trains the certainty, never the heads."""
    return (confidence - correctness(answers, labels)).square().sum(0).mean()


def gate_probabilities(gates: Tensor) -> Tensor:
    """`P_l = max(0, min(g_l, 1 - sum_{j<l} g_j))`, the last takes the rest: g (K, B) -> P (A, B), summing to 1 over A.

    JEI-DNN (arXiv 2310.09163).
    """
    before = gates.cumsum(0) - gates  # (K, B): sum_{j<l} g_j
    taken = torch.minimum(gates, 1 - before).clamp(min=0)
    return torch.cat([taken, 1 - taken.sum(0, keepdim=True)])


def gate_targets(losses: Tensor, costs: Tensor, *, trade_off: float) -> Tensor:
    """`1[l >= l*]`, `l* = argmin_l (CE_l + trade_off cost_l)`, without gradient (JEI-DNN): losses (A, B), costs (A,) -> (K, B).

    `costs`: of the whole way up to an answer, in parts of the model's own.

    Raises:
        ValueError: not one cost for each answer.
    """
    if costs.shape != losses.shape[:1]:
        raise ValueError(
            f"{tuple(costs.shape)} costs, expected ({len(losses)},): one for each exit and one for the model"
        )
    best = (losses.detach() + trade_off * costs.to(losses)[:, None]).argmin(0)  # (B,)
    exits = torch.arange(len(losses) - 1, device=losses.device)
    return (exits[:, None] >= best).float()


def gate_loss(gate_logits: Tensor, targets: Tensor) -> Tensor:
    """Balanced binary cross-entropy, mean over gates and samples: gate logits and targets (K, B).

    Positive targets weigh (number of zeros) / (number of ones) in the batch, as in the authors' code; without a one nothing is balanced.
    """
    ones = targets.sum()
    ratio = (targets.numel() - ones) / ones.clamp(min=1)
    return functional.binary_cross_entropy_with_logits(gate_logits, targets, weight=1 + (ratio - 1) * targets)


def exit_weighted_loss(losses: Tensor, probabilities: Tensor) -> Tensor:
    """`sum_l P_l CE_l`, P without gradient (JEI-DNN, the inference modules' step): losses and P (A, B)."""
    return (probabilities.detach() * losses).sum(0).mean()


def released_exit_weighted_loss(losses: Tensor, probabilities: Tensor) -> Tensor:
    """JEI-DNN as released: `sum_l P_l CE_l` times the *attached* ratio `sum CE / sum P CE`; the weights cancel, every head gets the
    gradient of `sum_l CE_l`. Kept as an ablation."""
    weighted = probabilities.detach() * losses  # (A, B)
    return (weighted * (losses.sum() / weighted.sum())).sum(0).mean()
