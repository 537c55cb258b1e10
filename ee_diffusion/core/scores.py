"""Scores: from what is seen at an exit to one number per row; larger is safer. A score is found by its name, so that policies can be saved.

R rows, N tokens, D width, C classes. Here: measuring, and the way to the host. Not here: deciding (criteria.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ee_diffusion.core.exits import ExitInputs, JudgingHeads, PrunableHeads
from ee_diffusion.core.registry import add_row


@dataclass(frozen=True)
class Score:
    """`measure(inputs) -> (R,)` with values in [low, high]: a threshold outside that range is refused."""

    measure: Callable[[ExitInputs], Tensor]
    low: float
    high: float


def confidence(inputs: ExitInputs) -> Tensor:
    """The learned certainty of the exit (DeeDiff: 1 - mean u; gates: the gate; PonderNet: lambda). (R,) in [0, 1]."""
    return inputs.heads.confidence(inputs.exit, inputs.hidden, inputs.context)


def max_probability(inputs: ExitInputs) -> Tensor:
    """Largest softmax probability of the answer's logits (R, C) -> (R,) in [0, 1]."""
    return inputs.answer.softmax(-1).amax(-1)


def margin(inputs: ExitInputs) -> Tensor:
    """Difference of the two largest softmax probabilities (R, C) -> (R,) in [0, 1]."""
    top = inputs.answer.softmax(-1).topk(2, dim=-1).values  # (R, 2)
    return top[:, 0] - top[:, 1]


def negative_entropy(inputs: ExitInputs) -> Tensor:
    """`1 - H(p) / log C` of the answer's logits (R, C) -> (R,) in [0, 1] (FastBERT's normalised entropy, turned round)."""
    logits = inputs.answer.log_softmax(-1)
    entropy = -(logits.exp() * logits).sum(-1)
    return 1 - entropy / math.log(logits.shape[-1])


def saturation(inputs: ExitInputs) -> Tensor:
    """Cosine of the last token's hidden state before and after the last executed layer, `context["previous"]` (R, N, D)
    (CALM, arXiv 2207.07061, sec. 3.5). (R,) in [-1, 1]; needs no head.

    Raises:
        ValueError: the driver keeps no previous states.
    """
    if "previous" not in inputs.context:
        raise ValueError("score 'saturation' needs the states before the last layer, which only decoding keeps")
    return torch.cosine_similarity(inputs.hidden[:, -1], inputs.context["previous"][:, -1], dim=-1)


def learned_confidence(inputs: ExitInputs) -> Tensor:
    """What heads of the `JudgingHeads` kind make of the whole inputs: its answer, what earlier exits carried. (R,) in [0, 1]."""
    return cast(JudgingHeads, inputs.heads).judge(inputs)


def agreement(inputs: ExitInputs) -> Tensor:
    """1 where the class answered here is the one answered at the exit before, else 0; at the first exit 0. (R, C) -> (R,) (PABEE)."""
    said = inputs.answer.argmax(-1)  # (R,)
    inputs.carried["said"] = said
    before = inputs.context.get("said")
    return torch.zeros(len(said), device=said.device) if before is None else (said == before).float()


def closeness(inputs: ExitInputs) -> Tensor:
    """`exp(-|y_i - y_{i-1}|)` of regression answers (R, 1); at the first exit 0. (R,) in [0, 1] (PABEE for regression)."""
    value = inputs.answer[:, 0].float()  # (R,)
    inputs.carried["value"] = value
    before = inputs.context.get("value")
    return torch.zeros_like(value) if before is None else (-(value - before).abs()).exp()


def pruned_probability(size: int) -> Callable[[ExitInputs], Tensor]:
    """The score "largest softmax probability among the `size` best classes of the step's first checked exit", (R,) in [0, 1].

    Later exits compute those logits alone (dynamic vocabulary pruning, arXiv 2410.18952; 256 of T5-large's classes in the paper).
    Deviation: rows that leave answer with all classes.
    """

    def measure(inputs: ExitInputs) -> Tensor:
        if "vocabulary" not in inputs.context:
            best = inputs.answer.topk(min(size, inputs.answer.shape[-1]), dim=-1)  # (R, k)
            inputs.carried["vocabulary"] = best.indices
            return best.values.softmax(-1).amax(-1)
        if not isinstance(inputs.heads, PrunableHeads):
            raise ValueError(f"{type(inputs.heads).__name__} cannot answer for a part of the classes")
        classes = inputs.context["vocabulary"]
        return inputs.heads.answer_among(inputs.exit, inputs.hidden, classes).softmax(-1).amax(-1)

    return measure


SCORES: dict[str, Score] = {
    "confidence": Score(confidence, 0.0, 1.0),
    "max_probability": Score(max_probability, 0.0, 1.0),
    "margin": Score(margin, 0.0, 1.0),
    "negative_entropy": Score(negative_entropy, 0.0, 1.0),
    "saturation": Score(saturation, -1.0, 1.0),
    "learned_confidence": Score(learned_confidence, 0.0, 1.0),
    "agreement": Score(agreement, 0.0, 1.0),
    "closeness": Score(closeness, 0.0, 1.0),
    "pruned_probability": Score(pruned_probability(256), 0.0, 1.0),
}


def register_score(name: str, measure: Callable[[ExitInputs], Tensor], *, low: float, high: float) -> None:
    """Make `measure(inputs) -> (R,)` known under a name that criteria (and saved policies) can use.

    Raises:
        ValueError: the name is taken.
    """
    add_row(SCORES, name, Score(measure, low, high), called="the table of scores")


def score_named(name: str) -> Score:
    """The score of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in SCORES:
        raise ValueError(f"score={name!r}, expected one of {sorted(SCORES)}")
    return SCORES[name]


@dataclass(frozen=True)
class PendingScores:
    """Scores (r,) of rows of `samples` (r,), measured after `depth` blocks. `ready`: passed by the device once `values` has them; None:
    reading `values` waits by itself."""

    values: Tensor
    samples: list[int]
    depth: int
    ready: torch.cuda.Event | None = None

    def read(self) -> list[float]:
        """The scores as numbers, when they are there."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.values.tolist()


def pending_scores(scores: Tensor, samples: list[int], depth: int, *, overlapping: bool) -> PendingScores:
    """Scores (r,) on the device. `overlapping`: they are copied behind what the device does until then, and the host goes on."""
    if not overlapping or not scores.is_cuda:
        return PendingScores(scores, samples, depth)
    values = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
    values.copy_(scores, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(scores.device))
    return PendingScores(values, samples, depth, ready)
