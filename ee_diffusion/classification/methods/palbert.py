"""PALBERT (arXiv 2204.03276): exits by the quantile of a learned exit distribution. PonderNet (arXiv 2107.05407): exits drawn from it.

B samples, D width, C classes, K exits, A = K + 1 outputs, the model's own last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ee_diffusion.classification.method import (
    SHARED,
    BatchOutputs,
    Judge,
    Method,
    PoolingHeads,
    output_losses,
    require_range,
)
from ee_diffusion.core.criteria import QExit, SampledExit
from ee_diffusion.core.exits import ExitInputs
from ee_diffusion.core.policy import Policy

Direction = Literal["posterior_to_prior", "prior_to_posterior"]


def palbert(q: float) -> Policy:
    """PALBERT's Q-exit: stop at the first i with `sum_{j<=i} p_j > q`, `p_i = lambda_i prod_{j<i} (1 - lambda_j)`.

    q in [0, 1], 0.5 in the paper; larger is safer. Deviations: the rows of a batch leave on their own (the released code runs batches of
    one); the model's own end takes the mass that remains, so that p sums to 1.

    Raises:
        ValueError: q outside [0, 1].
    """
    return Policy(QExit(q, score="learned_confidence"))


def pondernet(seed: int) -> Policy:
    """PonderNet's sampling exit: the exit is drawn from p. The control of PALBERT's Q-exit.

    Deviation: one draw per sample by the inverse of the cumulative distribution, fixed by `seed` and the sample's id, where the paper
    draws a Bernoulli at every layer; the distribution of the exit is the same. A text's id is made of its tokens where none is given.
    """
    return Policy(SampledExit(seed, score="learned_confidence"))


def _lambda_layer(hidden_size: int, dropout: float) -> nn.Module:
    width = 2 * hidden_size
    layers = [module for _ in range(3) for module in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Dropout(dropout), *layers, nn.Linear(width, 1))


def _pooled(heads: PoolingHeads, inputs: ExitInputs) -> Tensor:
    """z_i (R, D)."""
    return heads.pool(inputs.hidden, inputs.context)


def _pooled_pair(heads: PoolingHeads, inputs: ExitInputs) -> Tensor:
    """`[z_i ; z_{i-1}]` (R, 2 D), z_0 = 0; z_i goes on to the next exit."""
    pooled = _pooled(heads, inputs)
    inputs.carried["pooled"] = pooled
    return torch.cat([pooled, inputs.context.get("pooled", torch.zeros_like(pooled))], dim=-1)


# PALBERT's Lambda layer: three times Linear and tanh of width 2 D, then Linear. PonderNet's: a single Linear. All exits share one.
HALTING = Judge("halting", _lambda_layer, _pooled_pair, looks_at="pooled", carries=True)
LINEAR_HALTING = Judge("linear_halting", lambda size, dropout: nn.Linear(size, 1), _pooled, looks_at="pooled")


@dataclass(frozen=True)
class PonderSettings:
    """prior_rate: lambda_p of the geometric prior; divergence_weight: beta, the weight of the KL; divergence_direction: of the KL.

    Raises:
        ValueError: a rate outside (0, 1), a negative weight, another direction.
    """

    prior_rate: float = 0.1
    divergence_weight: float = 0.5
    divergence_direction: Direction = "posterior_to_prior"

    def __post_init__(self) -> None:
        truncated_geometric(self.prior_rate, 1)
        require_range(self, 0, "divergence_weight")
        _check_direction(self.divergence_direction)


def halting_probabilities(halting: Tensor) -> Tensor:
    """`p_i = lambda_i prod_{j<i} (1 - lambda_j)`, the model's own end takes the rest: lambda (K, B) -> p (A, B), summing to 1 over A."""
    survival = (1 - halting).cumprod(0)  # (K, B): prod_{j<=i} (1 - lambda_j)
    before = torch.cat([torch.ones_like(halting[:1]), survival])  # (A, B): prod_{j<i}
    return torch.cat([halting * before[:-1], before[-1:]])


def truncated_geometric(rate: float, num_outputs: int) -> Tensor:
    """The prior over outputs: `p_i ~ rate (1 - rate)^(i - 1)`, i = 1..A, normalized -> (A,).

    Raises:
        ValueError: a rate outside (0, 1), or no outputs.
    """
    if not 0 < rate < 1 or num_outputs < 1:
        raise ValueError(
            f"prior_rate={rate} over {num_outputs} outputs, expected a rate in (0, 1) and at least one output"
        )
    weights = (1 - rate) ** torch.arange(num_outputs, dtype=torch.float64)
    return (weights / weights.sum()).float()


def halting_divergence(probabilities: Tensor, prior: Tensor, *, direction: Direction) -> Tensor:
    """KL between the exit distribution p (A, B) and a prior (A,), mean over B.

    `posterior_to_prior`: `KL(p || prior) = sum p log(p / prior)`, the papers' formula. `prior_to_posterior`: `KL(prior || p)`, what
    PALBERT's released code computes.

    Raises:
        ValueError: another direction.
    """
    _check_direction(direction)
    p, q = probabilities.clamp(min=1e-9), prior.to(probabilities)[:, None]  # (A, B), (A, 1)
    if direction == "posterior_to_prior":
        return (probabilities * (p.log() - q.log())).sum(0).mean()
    return (q * (q.log() - p.log())).sum(0).mean()


def _check_direction(direction: str) -> None:
    if direction not in ("posterior_to_prior", "prior_to_posterior"):
        raise ValueError(f"divergence_direction={direction!r}, expected 'posterior_to_prior' or 'prior_to_posterior'")


def ponder_loss(logits: Tensor, labels: Tensor, halting: Tensor, settings: PonderSettings) -> Tensor:
    """`sum_i p_i CE_i + beta KL`: logits (A, B, C), labels (B,), lambda (K, B).

    p is not detached: it makes the heads of likely exits learn, and lets the halting layer see the losses.
    """
    p = halting_probabilities(halting)  # (A, B)
    expected = (p * output_losses(logits, labels)).sum(0).mean()
    prior = truncated_geometric(settings.prior_rate, len(p))
    return expected + settings.divergence_weight * halting_divergence(p, prior, direction=settings.divergence_direction)


def _loss(outputs: BatchOutputs, settings: PonderSettings) -> dict[str, Tensor]:
    halting = outputs.judge_logits.sigmoid()  # (K, B)
    p = halting_probabilities(halting)  # (A, B)
    places = torch.arange(1, len(p) + 1, device=p.device)
    loss = ponder_loss(outputs.logits, outputs.labels, halting, settings)
    return {"loss": loss, "expected_exit": (p * places[:, None]).sum(0).mean()}


PALBERT = Method(_loss, trains="both", head=SHARED, judge=HALTING, settings=PonderSettings)
PONDERNET = Method(_loss, trains="both", head=SHARED, judge=LINEAR_HALTING, settings=PonderSettings)
