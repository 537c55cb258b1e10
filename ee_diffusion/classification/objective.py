"""What training minimizes: one forward of a classifier with exits, from a batch to the loss of a method.

Here: the forward, what is trained, what is counted. Not here: the losses (methods/), data, the loop.
B samples, N tokens, D width, C classes, K exits, A = K + 1 outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ee_diffusion.classification.activations import INPUTS, exit_inputs_of, masks_at, split_by_length
from ee_diffusion.classification.attach import attach, recorded_states
from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.costs import costs_of
from ee_diffusion.classification.exits import ClassifierHeads
from ee_diffusion.classification.method import BatchOutputs, Method
from ee_diffusion.classification.methods import method_named
from ee_diffusion.classification.model_specs import model_spec_of
from ee_diffusion.classification.token_pruning import TokenTrace
from ee_diffusion.core.policy import Policy


class ClassifierObjective(nn.Module):
    """The loss of a method on a batch.

    `method`: a name of `METHODS`; it says what is trained and what becomes of tokens. `settings`: the numbers of its loss, an instance of
    the method's own settings class; None: its defaults. Exits trained on a classifier with `pruning` see its removed tokens removed.
    The number of batches seen in training is a buffer, so that a resumed run is in the phase it was in; `micro_steps` forwards in training
    are one batch, that of a step whose gradient is accumulated. `parts`: a batch of texts runs in so many parts of like length, with less
    padding; the loss is that of the whole batch.

    Raises:
        ValueError: an unknown method, parts or micro-steps below 1, exits that are not the method's, a number that the method needs and
            has no default, a method that needs pruning on a classifier without it.
    """

    def __init__(
        self,
        classifier: EarlyExitClassifier,
        *,
        method: str,
        settings: Any = None,
        parts: int = 1,
        micro_steps: int = 1,
    ):
        super().__init__()
        if min(parts, micro_steps) < 1:
            raise ValueError(f"parts={parts}, micro_steps={micro_steps}, expected at least 1")
        self.name, self.method = method, method_named(method)
        self.settings = self.method.settings_from({}, name=method) if settings is None else settings
        _check(classifier, method, self.method, self.settings)
        self.classifier, self.parts, self.micro_steps, self._forwards = classifier, parts, micro_steps, 0
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        make_gates = self.method.token_gates
        self.token_gates = None if make_gates is None else make_gates(classifier.model, self.settings)
        classifier.model.requires_grad_(not self.is_frozen)
        classifier.exits.requires_grad_(self.method.trains != "model")

    @property
    def is_frozen(self) -> bool:
        """Whether the exits alone are trained."""
        return self.method.trains == "exits"

    def train(self, mode: bool = True) -> ClassifierObjective:
        """As ever, but a frozen model stays in eval mode: no dropout in what is not trained."""
        super().train(mode)
        if self.is_frozen:
            self.classifier.model.eval()
        return self

    def trained(self) -> EarlyExitClassifier:
        """The classifier, with the pruning thresholds that were learned, if any."""
        if self.token_gates is not None:
            self.classifier.pruning = self.token_gates.pruning()
        return self.classifier

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: `input_ids` and `attention_mask` (B, N), or `pixel_values`; `labels` (B,). Returns scalars: `loss`, its terms, the
        accuracy of the first and last output. `units`, if it is there, divides sums over tokens in the place of the batch's own."""
        outputs = self.outputs(batch)
        if "units" in batch and outputs.real is not None:
            outputs = replace(outputs, real=batch["units"][0].to(outputs.kept))
        terms = self.method.loss(outputs, self.settings)
        if self.training:
            self._forwards = (self._forwards + 1) % self.micro_steps
            self.batches += not self._forwards
        facts = {name: term.detach() for name, term in terms.items() if name != "loss"}
        return {"loss": terms["loss"]} | facts | _accuracies(outputs)

    @staticmethod
    def units(batch: dict[str, Tensor]) -> Tensor:
        """(1,) the tokens of a batch of texts, which the mean of magic_soft's gates is over; all other means are over samples."""
        return batch["attention_mask"].sum()[None]

    def outputs(self, batch: dict[str, Tensor]) -> BatchOutputs:
        """What the loss sees of a batch."""
        if "vectors" in batch:
            outputs = self._stored(batch)
        else:
            outputs = BatchOutputs.concatenate([self._part(part) for part in split_by_length(batch, self.parts)])
        costs = functools.partial(self._costs, outputs.num_tokens)
        return replace(outputs, batches_seen=int(self.batches), costs=costs)

    def _part(self, batch: dict[str, Tensor]) -> BatchOutputs:
        model = self.classifier.model
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        train_model = torch.is_grad_enabled() and not self.is_frozen
        traces: list[TokenTrace] = []
        with (
            self._tokens(inputs, traces) as gates,
            recorded_states(model) as states,
            torch.set_grad_enabled(train_model),
        ):
            own = model(**inputs).logits  # (B, C)
        kept = sum(gate.sum() for gate in gates) / len(gates) if gates else None
        real = inputs["attention_mask"].sum() if gates else None
        depths = self.classifier.exits.depths if self.method.trains != "model" else ()
        masks = masks_at(depths, inputs.get("attention_mask"), traces[0] if traces else None)
        logits, judge_logits = self._exits([states[depth] for depth in depths], masks)
        return BatchOutputs(
            torch.stack([*logits, own]).float(), judge_logits, batch["labels"], states[0].shape[1], kept, real
        )

    def _stored(self, batch: dict[str, Tensor]) -> BatchOutputs:
        """Of a batch of `StoredStates`."""
        if not self.is_frozen:
            raise ValueError(
                f"{self.name} trains the model, whose states cannot be stored; expected a method that trains exits alone"
            )
        states = list(batch["vectors"][:, :, None].unbind(1))  # K of (B, 1, D)
        logits, judge_logits = self._exits(states, None)
        num_tokens = int(batch["tokens"].max())
        return BatchOutputs(torch.stack([*logits, batch["own"]]).float(), judge_logits, batch["labels"], num_tokens)

    def _exits(self, states: list[Tensor], masks: list[Tensor | None] | None) -> tuple[list[Tensor], Tensor | None]:
        """The exits' logits, K of (B, C), and judge logits (K, B)."""
        heads, logits, judge_logits = ClassifierHeads(self.classifier.model, self.classifier.exits), [], []
        for inputs in exit_inputs_of(heads, states, masks):
            logits.append(inputs.answer)
            if heads.exits.judge_kind is not None:
                judge_logits.append(heads.judge_logits(inputs))
        return logits, torch.stack(judge_logits).float() if judge_logits else None

    @contextmanager
    def _tokens(self, inputs: dict[str, Tensor], traces: list[TokenTrace]) -> Iterator[list[Tensor]]:
        """What becomes of tokens in the forward within; yields the gates of learned pruning, one for each layer. What was removed is
        appended to `traces`."""
        model, pruning = self.classifier.model, self.classifier.pruning
        if self.token_gates is not None:
            with self.token_gates.attached(inputs["attention_mask"]) as gates:
                yield gates
        elif self.method.pruning != "ignored" and pruning is not None:
            with attach(model, self.classifier.exits, Policy(), pruning=pruning, token_traces=traces):
                yield []
        else:
            yield []

    def _costs(self, num_tokens: int, score: str) -> Tensor:
        """(A,) of the way to each output on texts of so many tokens."""
        model, exits = self.classifier.model, self.classifier.exits
        return costs_of(model, exits, num_tokens, score=score).up_to(
            exits.depths, model_spec_of(model).num_layers(model)
        )


def _accuracies(outputs: BatchOutputs) -> dict[str, Tensor]:
    if outputs.labels.is_floating_point():
        return {}
    correct = (outputs.logits.detach().argmax(-1) == outputs.labels).float().mean(1)  # (A,)
    return {"accuracy_first": correct[0], "accuracy_last": correct[-1]}


def _check(classifier: EarlyExitClassifier, name: str, method: Method, settings: Any) -> None:
    exits, problem = classifier.exits, classifier.config.problem_type
    if problem == "multi_label_classification":
        raise ValueError(
            f"problem_type={problem!r}, expected a model that gives one class or one value: the losses are of those"
        )
    found = {"head": exits.head, "judge": exits.judge}
    if method.trains != "model" and found != method.exits:
        raise ValueError(f"exits with {found}, {name} needs {method.exits}")
    if not isinstance(settings, method.settings):
        raise ValueError(f"settings={settings!r}, {name} takes {method.settings.__name__}(...)")
    if method.pruning == "required" and classifier.pruning is None:
        raise ValueError(f"{name} needs a classifier with pruning thresholds: train it with magic_soft first")
