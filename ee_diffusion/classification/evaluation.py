"""The record of one pass over a data set, from which every rule and threshold is evaluated by replay.

Here: recording, replaying, which exit each text took and what it cost. Not here: metrics (metrics/classification.py), curves (eval/).
n texts, C classes, K exits, A = K + 1 outputs: the exits' and the model's own, L layers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ee_diffusion.classification.activations import INPUTS, exit_inputs_of, masks_at, text_lengths
from ee_diffusion.classification.attach import attach, recorded_states
from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.costs import path_flops
from ee_diffusion.classification.exits import ClassifierHeads
from ee_diffusion.classification.model_specs import model_spec_of
from ee_diffusion.classification.token_pruning import TokenTrace
from ee_diffusion.core.criteria import DepthTable
from ee_diffusion.core.io import read_tensors, write_tensors
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import replay
from ee_diffusion.core.scores import score_named
from ee_diffusion.core.trace import Trace

_FORMAT = "ee_diffusion.look.1"
PLAIN = ("logits", "full", "labels", "tokens")
RENAMED = {"answers": "logits"}  # what files of before call a tensor -> its name
NO_SCORE = "nothing"  # the name, among costs, of a rule without a score


@dataclass(frozen=True, eq=False)
class ExitRecord:
    """The outputs of all exits on n texts, from forwards without early exits.

    logits (A, n, C). scores: name -> (K, n). costs: name of a score, or NO_SCORE -> (n, A) FLOPs up to each output under a rule of that
    score. full (n,): FLOPs of the model without exits and with all tokens. labels (n,). tokens (n,), padding left out.
    """

    logits: Tensor
    scores: dict[str, Tensor]
    costs: dict[str, Tensor]
    full: Tensor
    labels: Tensor
    tokens: Tensor
    depths: tuple[int, ...]
    num_layers: int

    def trace(self, score: str) -> Trace:
        """As if a run had recorded that score at every exit: what `replay` takes.

        Raises:
            ValueError: a score that was not recorded.
        """
        if score not in self.scores:
            raise ValueError(f"score {score!r} was not recorded, only {sorted(self.scores)}")
        n, layers, exits = len(self.labels), self.num_layers, len(self.depths)
        return Trace(
            samples=torch.arange(n),
            rows=torch.ones(1, n, dtype=torch.int64),
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

    def exits_under(self, policy: Policy) -> Tensor:
        """Which exit each text takes under a policy, (n,) in 0..K; K is the model's own end.

        Raises:
            ValueError: a policy whose score was not recorded.
        """
        criterion = policy.criterion
        if criterion is None:
            return torch.full((len(self.labels),), len(self.depths))
        score = next(iter(self.scores)) if isinstance(criterion, DepthTable) else criterion.score
        depths = replay(self.trace(score), policy)[0]  # (n,)
        return torch.bucketize(depths.long(), torch.tensor([*self.depths, self.num_layers]))

    def logits_at(self, taken: Tensor) -> Tensor:
        """The logits of text i at exit `taken[i]` -> (n, C)."""
        return self.logits[taken, torch.arange(len(taken))]

    def is_correct(self, taken: Tensor) -> Tensor:
        """Whether the predicted class is the label -> (n,) bool."""
        return self.logits_at(taken).argmax(-1) == self.labels

    def quality(self, taken: Tensor) -> Tensor:
        """Larger is better: 1 or 0 for a class, minus the squared error of a regression -> (n,) float64."""
        if self.labels.is_floating_point():
            return -(self.logits_at(taken)[:, 0].double() - self.labels).square()
        return self.is_correct(taken).double()

    def cost(self, taken: Tensor, *, score: str = NO_SCORE) -> Tensor:
        """FLOPs up to each text's exit under a rule of `score` -> (n,)."""
        return self.costs[score].gather(1, taken[:, None])[:, 0]

    def layers(self, taken: Tensor) -> Tensor:
        """Layers before each text's exit -> (n,)."""
        return torch.tensor([*self.depths, self.num_layers])[taken]

    def oracle(self) -> Tensor:
        """The first exit with the right class; the model's own end where none has it -> (n,)."""
        correct = self.logits.argmax(-1) == self.labels  # (A, n)
        correct[-1] = True
        return correct.int().argmax(0)

    def select(self, texts: Tensor) -> ExitRecord:
        """The record of some of the texts."""
        return replace(
            self,
            logits=self.logits[:, texts],
            scores={name: value[:, texts] for name, value in self.scores.items()},
            costs={name: value[texts] for name, value in self.costs.items()},
            **{name: getattr(self, name)[texts] for name in ("full", "labels", "tokens")},
        )

    @classmethod
    def concatenate(cls, records: Sequence[ExitRecord]) -> ExitRecord:
        """Records of several data sets with the same classifier as one."""
        first = records[0]
        dicts = {
            "scores": {name: torch.cat([one.scores[name] for one in records], dim=1) for name in first.scores},
            "costs": {name: torch.cat([one.costs[name] for one in records]) for name in first.costs},
        }
        flat = {name: torch.cat([getattr(one, name) for one in records]) for name in ("full", "labels", "tokens")}
        return replace(first, logits=torch.cat([one.logits for one in records], dim=1), **dicts, **flat)

    def save(self, path: str | os.PathLike) -> None:
        """Write to one safetensors file, whole or not at all."""
        tensors = {name: getattr(self, name) for name in PLAIN}
        for kind in ("scores", "costs"):
            tensors |= {f"{kind}.{name}": value for name, value in getattr(self, kind).items()}
        facts = {"format": _FORMAT, "depths": json.dumps(self.depths), "num_layers": json.dumps(self.num_layers)}
        write_tensors(path, tensors, facts)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ExitRecord:
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, or one that is no record of exits.
        """
        tensors, facts = read_tensors(path, "record of exits", format=_FORMAT)
        tensors = {RENAMED.get(name, name): value for name, value in tensors.items()}
        if missing := [name for name in PLAIN if name not in tensors]:
            raise ValueError(f"{path} is not a readable record of exits: it lacks the tensors {missing}")
        kinds: dict[str, dict[str, Tensor]] = {"scores": {}, "costs": {}}
        for name in [name for name in tensors if "." in name]:
            kind, own = name.split(".")
            kinds[kind][own] = tensors.pop(name)
        depths, layers = (json.loads(facts[name]) for name in ("depths", "num_layers"))
        return cls(**tensors, **kinds, depths=tuple(depths), num_layers=layers)


@torch.no_grad()
def record_exits(
    classifier: EarlyExitClassifier, batches: Iterable[dict[str, Tensor]], *, scores: Sequence[str]
) -> ExitRecord:
    """Run every batch (inputs and `labels`, or a batch of `StoredStates`) once without early exits, with its pruning.

    Batches that hold a `key` may come in any order: the record is in the order of the keys.

    Raises:
        ValueError: no batches, no or unknown scores, stored states of a classifier that prunes (their cost is not known).
    """
    if not scores:
        raise ValueError("no scores to record, expected at least one")
    heads, measures = ClassifierHeads(classifier.model, classifier.exits), [*map(score_named, scores)]
    parts, traces = [], []
    for batch in batches:
        parts.append(_record_batch(heads, classifier.pruning, batch, measures, traces))
    if not parts:
        raise ValueError("no batches to record")
    logits, found, labels, tokens, keys = zip(*parts, strict=True)
    order = torch.cat(keys).argsort() if keys[0] is not None else torch.arange(sum(map(len, labels)))
    pruned = None if classifier.pruning is None else _joined(traces)
    lengths = torch.cat(tokens)
    costs = {name: path_flops(heads.model, heads.exits, lengths, score=name, pruned=pruned) for name in scores}
    costs[NO_SCORE] = path_flops(heads.model, heads.exits, lengths, score=None, pruned=pruned)
    full = path_flops(heads.model, heads.exits, lengths, score=None)[:, -1]
    stacked = torch.cat(found, dim=2)  # (number of scores, K, n)
    whole = ExitRecord(
        torch.cat(logits, dim=1),
        dict(zip(scores, stacked, strict=True)),
        costs,
        full,
        torch.cat(labels),
        lengths,
        heads.depths,
        model_spec_of(heads.model).num_layers(heads.model),
    )
    return whole.select(order)


def _record_batch(heads: ClassifierHeads, pruning, batch: dict[str, Tensor], measures: list, traces: list[TokenTrace]):
    """Of one batch: logits (A, B, C), scores (number of scores, K, B), labels, tokens, keys (B,)."""
    if "vectors" in batch:
        if pruning is not None:
            raise ValueError("stored states of a classifier that prunes tokens: what they cost was not stored")
        states, masks = list(batch["vectors"][:, :, None].unbind(1)), None
        own, tokens = batch["own"], batch["tokens"]
    else:
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        run = attach(heads.model, heads.exits, Policy(), pruning=pruning, token_traces=traces)
        with run, recorded_states(heads.model) as all_states:
            own = heads.model(**inputs).logits  # (B, C)
        states = [all_states[depth] for depth in heads.depths]
        masks = masks_at(heads.depths, inputs.get("attention_mask"), None if pruning is None else traces[-1])
        if pruning is not None:
            traces[-1] = replace(traces[-1], keys=())  # not to be kept on the device for all batches
        tokens = text_lengths(batch, all_states[0])
    logits, found = [], []
    for inputs_of_exit in exit_inputs_of(heads, states, masks):
        found.append(torch.stack([score.measure(inputs_of_exit) for score in measures]))
        logits.append(inputs_of_exit.answer)
    keys = batch["key"].cpu() if "key" in batch else None
    return (
        torch.stack([*logits, own]).cpu(),
        torch.stack(found, dim=1).cpu(),
        batch["labels"].cpu(),
        tokens.cpu(),
        keys,
    )


def _joined(traces: list[TokenTrace]) -> TokenTrace:
    """The token traces of several batches as one."""
    kinds = ("attended", "fed", "looked")
    return TokenTrace(
        *(torch.cat([getattr(trace, kind) for trace in traces]) for kind in kinds),
        sum(trace.computed for trace in traces),
    )
