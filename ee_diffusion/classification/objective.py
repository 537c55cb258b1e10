"""What training minimises: for each method its loss over all exits' answers and the model's own, on one batch.

Here: one forward from a batch to scalars, which parameters train when. Not here: formulas (classification/losses.py), data, loop.
B samples, N tokens, D width, C classes, K exits, A = K + 1 answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ee_diffusion.classification import losses
from ee_diffusion.classification.activations import INPUTS, Seen, by_length, look_through, masks_at
from ee_diffusion.classification.attach import attach, watching
from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.costs import costs_of
from ee_diffusion.classification.exits import ClassifierHeads
from ee_diffusion.classification.methods import EXITS
from ee_diffusion.classification.model_specs import model_spec_of
from ee_diffusion.classification.token_pruning import TokenTrace, check_prunable, soft_pruning
from ee_diffusion.core.policy import Policy


@dataclass(frozen=True)
class Weights:
    """The numbers of the methods' losses; a method looks at its own.

    rate, divergence, direction: PALBERT's and PonderNet's prior, its weight and the direction of the KL.
    trade_off: JEI-DNN's lambda, what the whole model's cost is worth in nats (it has no default).
    warm_up: JEI-DNN's batches of heads alone at the beginning; phase: batches of gates, then as many of heads, in turn.
    released: the cancelling weights of JEI-DNN's code.
    mask_weight, temperature, top_threshold: Magic Pyramid's soft stage: what a kept token costs, T of the sigmoid, and the last layer's
    threshold to begin with; none has a default. bottom_threshold: the first layer's; those between are on the line.

    Raises:
        ValueError: a number out of range.
    """

    rate: float = 0.1
    divergence: float = 0.5
    direction: losses.Direction = "posterior_to_prior"
    trade_off: float | None = None
    warm_up: int = 0
    phase: int = 200
    released: bool = False
    mask_weight: float | None = None
    temperature: float | None = None
    top_threshold: float | None = None
    bottom_threshold: float = 0.0

    def __post_init__(self):
        for name, least in (("divergence", 0), ("trade_off", 0), ("warm_up", 0), ("phase", 1), ("mask_weight", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}, expected at least {least}")
        for name in ("top_threshold", "bottom_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value}, expected a mean attention probability in [0, 1]")
        losses.truncated_geometric(self.rate, 1)


class ClassifierObjective(nn.Module):
    """The loss of `method` on a batch: a name of `EXITS`, or one of `PLAIN`, the model's own loss alone.

    `plain`: all tokens run; `magic_soft`: tokens fade and thresholds are learned; `magic_hard`: tokens are removed as the classifier's
    `pruning` says. Exits trained on a classifier with `pruning` see its removed tokens removed. Those three, `palbert`, `pondernet`,
    `pabee` and `berxit` train everything; `deebert` and `fastbert` exits on a frozen fine-tuned model; `jei_dnn` exits on a frozen model,
    heads and gates in turn. The number of batches seen in training is a buffer, so that a resumed run is in the phase it was in;
    `micro_steps` forwards in training are one batch, that of a step whose gradient is accumulated.
    `parts`: a batch of texts runs in so many parts of like length, with less padding; the loss is that of the whole batch.

    Raises:
        ValueError: an unknown method, parts or micro-steps below 1, exits that are not the method's, a number that the method needs and
            has no default, magic_hard on a classifier without pruning.
    """

    def __init__(
        self, classifier: EarlyExitClassifier, *, method: str, weights: Weights, parts: int = 1, micro_steps: int = 1
    ):
        super().__init__()
        _check(classifier, method, weights)
        if min(parts, micro_steps) < 1:
            raise ValueError(f"parts={parts}, micro_steps={micro_steps}, expected at least 1")
        self.classifier, self.method, self.weights, self.parts = classifier, method, weights, parts
        self.micro_steps, self._forwards = micro_steps, 0
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        if method == "magic_soft":
            layers = model_spec_of(classifier.model).num_layers(classifier.model)
            ends = (weights.bottom_threshold, weights.top_threshold)
            self.thresholds = nn.Parameter(torch.linspace(*ends, layers))  # (L,)
        classifier.model.requires_grad_(method not in FROZEN)
        classifier.exits.requires_grad_(method not in PLAIN)

    def train(self, mode: bool = True) -> ClassifierObjective:
        """As ever, but a frozen model stays in eval mode: no dropout in what is not trained."""
        super().train(mode)
        if self.method in FROZEN:
            self.classifier.model.eval()
        return self

    def trained(self) -> EarlyExitClassifier:
        """The classifier, with the thresholds that were learned, if any."""
        if self.method == "magic_soft":
            self.classifier.pruning = tuple(self.thresholds.detach().clamp(0, 1).tolist())
        return self.classifier

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: `input_ids` and `attention_mask` (B, N), or `pixel_values`; `labels` (B,). Returns scalars: `loss`, its terms, the
        accuracy of the first and last answer. `units`, if it is there: what sums over tokens are divided by in the place of the batch's
        own."""
        seen = self._see(batch)
        if "units" in batch and seen.real is not None:
            seen = replace(seen, real=batch["units"][0].to(seen.kept))
        terms = LOSSES[self.method](self, seen)
        if self.training:
            self._forwards = (self._forwards + 1) % self.micro_steps
            self.batches += not self._forwards
        facts = {name: term.detach() for name, term in terms.items() if name != "loss"}
        return {"loss": terms["loss"]} | facts | self._accuracies(seen)

    @staticmethod
    def units(batch: dict[str, Tensor]) -> Tensor:
        """(1,) the tokens of a batch of texts, which the mean of magic_soft's gates is over; all other means are over samples."""
        return batch["attention_mask"].sum()[None]

    def _see(self, batch: dict[str, Tensor]) -> Seen:
        if "vectors" in batch:
            return self._see_stored(batch)
        return Seen.joined([self._see_part(part) for part in by_length(batch, self.parts)])

    def _see_part(self, batch: dict[str, Tensor]) -> Seen:
        model = self.classifier.model
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        train_model = torch.is_grad_enabled() and self.method not in FROZEN
        traces: list[TokenTrace] = []
        with self._tokens(inputs, traces) as gates, watching(model) as states, torch.set_grad_enabled(train_model):
            own = model(**inputs).logits  # (B, C)
        kept = sum(gate.sum() for gate in gates) / len(gates) if gates else None
        real = inputs["attention_mask"].sum() if gates else None
        depths = self.classifier.exits.depths if self.method not in PLAIN else ()
        masks = masks_at(depths, inputs.get("attention_mask"), traces[0] if traces else None)
        answers, judge = self._asked([states[depth] for depth in depths], masks)
        tokens = states[0].shape[1]
        return Seen(torch.stack([*answers, own]).float(), judge, batch["labels"], tokens, kept, real)

    def _see_stored(self, batch: dict[str, Tensor]) -> Seen:
        """A batch of `StoredStates`."""
        if self.method not in FROZEN:
            raise ValueError(f"{self.method} trains the model, whose states cannot be stored; {FROZEN} do not")
        states = list(batch["vectors"][:, :, None].unbind(1))  # K of (B, 1, D)
        answers, judge = self._asked(states, None)
        tokens = int(batch["tokens"].max())
        return Seen(torch.stack([*answers, batch["own"]]).float(), judge, batch["labels"], tokens)

    def _asked(self, states: list[Tensor], masks: list[Tensor | None] | None) -> tuple[list[Tensor], Tensor | None]:
        """The exits' answers, K of (B, C), and judge logits (K, B)."""
        heads, answers, learned_confidence = ClassifierHeads(self.classifier.model, self.classifier.exits), [], []
        for observation in look_through(heads, states, masks):
            answers.append(observation.answer)
            if heads.exits.judge != "none":
                learned_confidence.append(heads.judge_logits(observation))
        return answers, torch.stack(learned_confidence).float() if learned_confidence else None

    @contextmanager
    def _tokens(self, inputs: dict[str, Tensor], traces: list[TokenTrace]) -> Iterator[list[Tensor]]:
        """What becomes of tokens in the forward within; yields the gates of soft pruning, one for each layer. What was removed is appended
        to `traces`."""
        model, pruning = self.classifier.model, self.classifier.pruning
        if self.method == "magic_soft":
            temperature = self.weights.temperature
            with soft_pruning(model, self.thresholds, inputs["attention_mask"], temperature=temperature) as gates:
                yield gates
        elif self.method != "plain" and pruning is not None:
            with attach(model, self.classifier.exits, Policy(), pruning=pruning, token_traces=traces):
                yield []
        else:
            yield []

    def batches_before(self) -> int:
        """Batches of training seen so far."""
        return int(self.batches)

    def _accuracies(self, seen: Seen) -> dict[str, Tensor]:
        if seen.labels.is_floating_point():
            return {}
        right = (seen.answers.detach().argmax(-1) == seen.labels).float().mean(1)  # (A,)
        return {"accuracy_first": right[0], "accuracy_last": right[-1]}


def _check(classifier: EarlyExitClassifier, method: str, weights: Weights) -> None:
    exits, problem = classifier.exits, classifier.config.problem_type
    if problem == "multi_label_classification":
        raise ValueError(
            f"problem_type={problem!r}, expected a model that gives one class or one value: the losses are of those"
        )
    if method not in PLAIN and method not in EXITS:
        raise ValueError(f"method={method!r}, expected one of {PLAIN} or of {sorted(EXITS)}")
    if method in EXITS and (exits.head, exits.judge) != EXITS[method]:
        raise ValueError(
            f"exits with head={exits.head!r} and judge={exits.judge!r}, {method} wants {' and '.join(EXITS[method])}"
        )
    missing = [name for name in NEEDS.get(method, ()) if getattr(weights, name) is None]
    if missing:
        raise ValueError(f"{method} needs {', '.join(missing)}: no default suits all models")
    if method == "magic_soft":
        check_prunable(classifier.model)
    if method == "magic_hard" and classifier.pruning is None:
        raise ValueError("magic_hard needs a classifier with pruning thresholds: train it with magic_soft first")


def _plain(objective: ClassifierObjective, seen: Seen) -> dict[str, Tensor]:
    return {"loss": losses.summed_loss(seen.answers[-1:], seen.labels)}


def _soft(objective: ClassifierObjective, seen: Seen) -> dict[str, Tensor]:
    answered = losses.summed_loss(seen.answers[-1:], seen.labels)
    kept = seen.kept / seen.real
    return {"loss": answered + objective.weights.mask_weight * kept, "kept": kept}


def _ponder(objective: ClassifierObjective, seen: Seen) -> dict[str, Tensor]:
    weights, halting = objective.weights, seen.judge.sigmoid()
    loss = losses.ponder_loss(
        seen.answers,
        seen.labels,
        halting,
        rate=weights.rate,
        weight=weights.divergence,
        direction=weights.direction,
    )
    p = losses.halting_probabilities(halting)  # (A, B)
    places = torch.arange(1, len(p) + 1, device=p.device)
    return {"loss": loss, "expected_exit": (p * places[:, None]).sum(0).mean()}


def _patient(objective: ClassifierObjective, seen: Seen) -> dict[str, Tensor]:
    return {"loss": losses.depth_weighted_loss(seen.answers, seen.labels)}


def _ramps(objective: ClassifierObjective, seen: Seen) -> dict[str, Tensor]:
    return {"loss": losses.summed_loss(seen.answers[:-1], seen.labels)}


def _distilled(objective: ClassifierObjective, seen: Seen) -> dict[str, Tensor]:
    return {"loss": losses.distillation_loss(seen.answers[:-1], seen.answers[-1])}


def _berxit(objective: ClassifierObjective, seen: Seen) -> dict[str, Tensor]:
    """Odd batches train the model's own answer, even ones all (BERxiT's alternating scheme); the learned-to-exit module every time."""
    own = seen.answers[-1:] if objective.batches_before() % 2 == 0 else seen.answers
    answered = losses.summed_loss(own, seen.labels)
    learned = losses.learned_exit_loss(seen.judge.sigmoid(), seen.answers[:-1], seen.labels)
    return {"loss": answered + learned, "answers": answered, "learned_to_exit": learned}


def _jei(objective: ClassifierObjective, seen: Seen) -> dict[str, Tensor]:
    """Warm-up: heads alone, unweighted. Then phases: gates, heads weighted by exit probability, gates, ..."""
    weights, exits = objective.weights, objective.classifier.exits
    each = losses.answer_losses(seen.answers, seen.labels)  # (A, B)
    if objective.batches_before() < weights.warm_up:
        return {"loss": each[:-1].sum(0).mean()}
    if ((objective.batches_before() - weights.warm_up) // weights.phase) % 2:
        weigh = losses.released_exit_weighted_loss if weights.released else losses.exit_weighted_loss
        return {"loss": weigh(each, losses.gate_probabilities(seen.judge.sigmoid()))}
    model = objective.classifier.model
    costs = costs_of(model, exits, seen.tokens, score="learned_confidence").up_to(
        exits.depths, model_spec_of(model).num_layers(model)
    )  # (A,)
    targets = losses.gate_targets(each, costs, trade_off=weights.trade_off)  # (K, B)
    return {"loss": losses.gate_loss(seen.judge, targets), "targets": targets.mean()}


PLAIN = ("plain", "magic_soft", "magic_hard")
NEEDS = {"jei_dnn": ("trade_off",), "magic_soft": ("mask_weight", "temperature", "top_threshold")}
FROZEN = ("deebert", "fastbert", "jei_dnn")
LOSSES: dict[str, Callable[[ClassifierObjective, Seen], dict[str, Tensor]]] = {
    "plain": _plain,
    "magic_soft": _soft,
    "magic_hard": _plain,
    "palbert": _ponder,
    "pondernet": _ponder,
    "pabee": _patient,
    "deebert": _ramps,
    "fastbert": _distilled,
    "berxit": _berxit,
    "jei_dnn": _jei,
}
