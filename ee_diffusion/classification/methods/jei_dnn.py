"""JEI-DNN (arXiv 2310.09163): gates and heads of a frozen model, trained in turn for a trade-off of loss and cost.

B samples, R rows, D width, C classes, K exits, A = K + 1 outputs, the model's own last. The gates' rule is `core.criteria.GatedExit`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ee_diffusion.classification.method import BatchOutputs, Head, Judge, Method, output_losses, require_range
from ee_diffusion.core.criteria import GatedExit
from ee_diffusion.core.policy import Policy


def jei_dnn(threshold: float) -> Policy:
    """Stop where `P_l / prod_{j<l} (1 - a_j) >= threshold`, `P_l = max(0, min(g_l, 1 - sum_{j<l} g_j))`.

    threshold in [0, 1], 0.5 in the paper; larger is safer.

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    return Policy(GatedExit(threshold, score="learned_confidence"))


class LinearHead(nn.Module):
    """LayerNorm, Linear(D -> C) on one vector of a text (the paper's inference modules)."""

    def __init__(self, hidden_size: int, num_labels: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.classify = nn.Linear(hidden_size, num_labels)

    def forward(self, vector: Tensor) -> Tensor:
        return self.classify(self.norm(vector))  # (R, D) -> (R, C)


def output_statistics(logits: Tensor) -> Tensor:
    """Four detached facts of the softmax p of logits (R, C) -> (R, 4): max p, H(p), margin of the two largest, H(p^2 / sum p^2).

    Entropies in nats.
    """
    logs = logits.detach().float().log_softmax(-1)
    sharper = (2 * logs).log_softmax(-1)  # p^2 / sum p^2
    top = logs.exp().topk(2, dim=-1).values  # (R, 2)
    entropy, sharper_entropy = (-(one.exp() * one).sum(-1) for one in (logs, sharper))
    return torch.stack([top[:, 0], entropy, top[:, 0] - top[:, 1], sharper_entropy], dim=-1)


LINEAR = Head("linear", lambda size, num_labels, dropout: LinearHead(size, num_labels))
# A gate for each exit: Linear(4 -> 1) on statistics of the exit's output.
STATISTICS = Judge(
    "statistics",
    lambda size, dropout: nn.Linear(4, 1),
    lambda heads, inputs: output_statistics(inputs.answer),
    looks_at="logits",
    per_exit=True,
)


@dataclass(frozen=True)
class JeiDnnSettings:
    """trade_off: lambda, what the whole model's cost is worth in nats. warm_up: batches of heads alone at the beginning.
    phase: batches of gates, then as many of heads, in turn. released: the cancelling weights of the authors' code.

    Raises:
        ValueError: a number out of range.
    """

    trade_off: float
    warm_up: int = 0
    phase: int = 200
    released: bool = False

    def __post_init__(self) -> None:
        require_range(self, 0, "trade_off", "warm_up")
        require_range(self, 1, "phase")


def gate_probabilities(gates: Tensor) -> Tensor:
    """`P_l = max(0, min(g_l, 1 - sum_{j<l} g_j))`, the last takes the rest: g (K, B) -> P (A, B), summing to 1 over A."""
    before = gates.cumsum(0) - gates  # (K, B): sum_{j<l} g_j
    taken = torch.minimum(gates, 1 - before).clamp(min=0)
    return torch.cat([taken, 1 - taken.sum(0, keepdim=True)])


def gate_targets(losses: Tensor, costs: Tensor, *, trade_off: float) -> Tensor:
    """`1[l >= l*]`, `l* = argmin_l (CE_l + trade_off cost_l)`, without gradient: losses (A, B), costs (A,) -> (K, B).

    `costs`: of the whole way to an output, in parts of the model's own.

    Raises:
        ValueError: not one cost for each output.
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
    """`sum_l P_l CE_l`, P without gradient (the inference modules' step): losses and P (A, B)."""
    return (probabilities.detach() * losses).sum(0).mean()


def released_exit_weighted_loss(losses: Tensor, probabilities: Tensor) -> Tensor:
    """As released: `sum_l P_l CE_l` times the *attached* ratio `sum CE / sum P CE`; the weights cancel, every head gets the gradient of
    `sum_l CE_l`. Kept as an ablation."""
    weighted = probabilities.detach() * losses  # (A, B)
    return (weighted * (losses.sum() / weighted.sum())).sum(0).mean()


def _loss(outputs: BatchOutputs, settings: JeiDnnSettings) -> dict[str, Tensor]:
    """Warm-up: heads alone, unweighted. Then phases: gates, heads weighted by exit probability, gates, ..."""
    losses = output_losses(outputs.logits, outputs.labels)  # (A, B)
    if outputs.batches_seen < settings.warm_up:
        return {"loss": losses[:-1].sum(0).mean()}
    if ((outputs.batches_seen - settings.warm_up) // settings.phase) % 2:
        weighted = released_exit_weighted_loss if settings.released else exit_weighted_loss
        return {"loss": weighted(losses, gate_probabilities(outputs.judge_logits.sigmoid()))}
    targets = gate_targets(losses, outputs.costs("learned_confidence"), trade_off=settings.trade_off)  # (K, B)
    return {"loss": gate_loss(outputs.judge_logits, targets), "targets": targets.mean()}


JEI_DNN = Method(_loss, trains="exits", head=LINEAR, judge=STATISTICS, settings=JeiDnnSettings)
