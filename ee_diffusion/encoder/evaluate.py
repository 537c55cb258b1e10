"""One look at a data set, from which every rule and threshold is judged by replay: all answers, all scores, labels, lengths.

Here: looking, replaying, which answer each text got. Not here: figures (measure/classification.py), curves (eval/classify.py).
n texts, C classes, K exits, A = K + 1 answers, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_diffusion.core.calibrate import replay
from ee_diffusion.core.criteria import Planned
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.scores import Observation, score_named
from ee_diffusion.core.trace import Trace
from ee_diffusion.encoder.attach import attach, watching
from ee_diffusion.encoder.classifier import EarlyExitClassifier
from ee_diffusion.encoder.exits import ClassifierHeads


@dataclass(frozen=True, eq=False)
class Look:
    """answers (A, n, C) logits, the exits' and the model's own; scores: name -> (K, n); labels (n,); tokens (n,), padding left out;
    depths of the exits; num_layers."""

    answers: Tensor
    scores: dict[str, Tensor]
    labels: Tensor
    tokens: Tensor
    depths: tuple[int, ...]
    num_layers: int

    def trace(self, score: str) -> Trace:
        """As if a run had recorded that score at every exit: what `replay` takes.

        Raises:
            ValueError: a score that was not looked at.
        """
        if score not in self.scores:
            raise ValueError(f"score {score!r} was not looked at, only {sorted(self.scores)}")
        n, layers, exits = len(self.labels), self.num_layers, len(self.depths)
        return Trace(
            elements=torch.arange(n),
            rows=torch.ones(n, dtype=torch.int64),
            times=torch.zeros(1, dtype=torch.float64),
            exits=torch.tensor(self.depths),
            planned=torch.ones(1, layers, dtype=torch.bool),
            depths=torch.full((1, n), layers, dtype=torch.int16),
            scores=self.scores[score][None],  # (1, K, n)
            ran=torch.ones(1, n, layers, dtype=torch.int16),
            measured=torch.full((1, exits), n),
            answered=torch.zeros(1, exits, dtype=torch.int64),
            policy={},
            recorded_all=True,
        )

    def taken(self, policy: Policy) -> Tensor:
        """Which answer each text gets under a policy, (n,) in 0..K; K is the model's own.

        Raises:
            ValueError: a policy whose score was not looked at.
        """
        criterion = policy.criterion
        if criterion is None:
            return torch.full((len(self.labels),), len(self.depths))
        score = next(iter(self.scores)) if isinstance(criterion, Planned) else criterion.score
        depths = replay(self.trace(score), policy)[0]  # (n,)
        return torch.bucketize(depths.long(), torch.tensor([*self.depths, self.num_layers]))

    def given(self, taken: Tensor) -> Tensor:
        """The logits given, where text i takes answer `taken[i]` -> (n, C)."""
        return self.answers[taken, torch.arange(len(taken))]

    def oracle(self) -> Tensor:
        """The first right answer of each text; the model's own where none is -> (n,)."""
        right = self.answers.argmax(-1) == self.labels  # (A, n)
        right[-1] = True
        return right.int().argmax(0)


@torch.no_grad()
def look(classifier: EarlyExitClassifier, batches: Iterable[dict[str, Tensor]], *, scores: Sequence[str]) -> Look:
    """Run every batch (`input_ids`, `attention_mask`, `labels`) once, nobody leaving, tokens pruned as the classifier is set.

    Raises:
        ValueError: no batches, no or unknown scores.
    """
    if not scores:
        raise ValueError("no scores to look at, expected at least one")
    heads = ClassifierHeads(classifier.model, classifier.exits)
    parts = [_look_at(heads, classifier.pruning, batch, [*map(score_named, scores)]) for batch in batches]
    if not parts:
        raise ValueError("no batches to look at")
    answers, found, labels, tokens = zip(*parts, strict=True)
    stacked = torch.cat(found, dim=2)  # (number of scores, K, n)
    return Look(
        torch.cat(answers, dim=1),
        dict(zip(scores, stacked, strict=True)),
        torch.cat(labels),
        torch.cat(tokens),
        heads.depths,
        heads.family.num_layers(heads.model),
    )


def _look_at(heads: ClassifierHeads, pruning, batch: dict[str, Tensor], measures: list) -> tuple[Tensor, ...]:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with attach(heads.model, heads.exits, Policy(), pruning=pruning), watching(heads.model) as states:
        own = heads.model(**inputs).logits  # (B, C)
    context, answers, found = {"attention_mask": inputs["attention_mask"]}, [], []
    for exit, depth in enumerate(heads.depths):
        observation = Observation(heads, exit, states[depth], context)
        found.append(torch.stack([score.measure(observation) for score in measures]))
        answers.append(observation.answer)
        context = context | observation.carried
    tokens = inputs["attention_mask"].sum(1)
    return torch.stack([*answers, own]).cpu(), torch.stack(found, dim=1).cpu(), batch["labels"].cpu(), tokens.cpu()
