"""What a method of a paper consists of: kinds of exit modules, a training loss, and what they look at. One paper is one file in methods/.

Here: the parts and the losses that several papers share. Not here: the papers (methods/), training (objective.py).
B samples, D width, F features, C classes, K exits, A = K + 1 outputs: the exits' in order of depth, then the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ee_diffusion.core.exits import ExitInputs


class PoolingHeads(Protocol):
    """What a learned judge may take from the exits beside their input: vectors of a text, hidden (R, N, D) -> (R, D)."""

    def pool(self, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """What the model's own classifier would look at."""
        ...

    def vector(self, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """The first token, or the mean of the tokens."""
        ...


@dataclass(frozen=True)
class Head:
    """A kind of exit head. build: (D, C, dropout) -> module, (R, D) -> logits (R, C); None: the model's own pooler and classifier."""

    name: str
    build: Callable[[int, int, float], nn.Module] | None


@dataclass(frozen=True)
class Judge:
    """A kind of learned judge: the sigmoid of `module(features)` says how safe an exit's output is.

    build: (D, dropout) -> module, features (R, F) -> (R, 1). features: (heads, inputs of an exit) -> (R, F).
    looks_at: what the features are made of: the exit's `vector`, the model's own `pooled` vector, or the exit's `logits`.
    per_exit: a module for each exit; otherwise all exits share one. carries: the features need those of the exit before.
    """

    name: str
    build: Callable[[int, float], nn.Module]
    features: Callable[[PoolingHeads, ExitInputs], Tensor]
    looks_at: Literal["vector", "pooled", "logits"]
    per_exit: bool = False
    carries: bool = False


class PooledHead(nn.Module):
    """Linear(D -> D), tanh, dropout, Linear(D -> C) on one vector of a text: the shape of BERT's own end."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float):
        super().__init__()
        self.pool = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(hidden_size, num_labels)

    def forward(self, vector: Tensor) -> Tensor:
        return self.classify(self.dropout(self.pool(vector).tanh()))  # (R, D) -> (R, C)


SHARED = Head("shared", None)
POOLED = Head("pooled", PooledHead)


@dataclass(frozen=True, eq=False)
class BatchOutputs:
    """What a loss sees of a batch: logits (A, B, C); judge logits (K, B) (None: no judge); labels (B,); tokens of the longest text.

    kept: tokens that soft pruning left, mean over layers, and real: all of them (None: no soft pruning).
    batches_seen: training batches before this one. costs: name of a score -> (A,), the cost of the way to each output under a rule of that
    score, the whole model's being 1.
    """

    logits: Tensor
    judge_logits: Tensor | None
    labels: Tensor
    num_tokens: int
    kept: Tensor | None = None
    real: Tensor | None = None
    batches_seen: int = 0
    costs: Callable[[str], Tensor] | None = None

    @staticmethod
    def concatenate(parts: Sequence[BatchOutputs]) -> BatchOutputs:
        """Parts of one batch as one."""
        first = parts[0]
        return BatchOutputs(
            torch.cat([part.logits for part in parts], dim=1),
            None if first.judge_logits is None else torch.cat([part.judge_logits for part in parts], dim=1),
            torch.cat([part.labels for part in parts]),
            max(part.num_tokens for part in parts),
            None if first.kept is None else sum(part.kept for part in parts),
            None if first.kept is None else sum(part.real for part in parts),
        )


@dataclass(frozen=True)
class NoSettings:
    """The settings of a loss without numbers."""


class TokenGates(Protocol):
    """Learned token pruning in training: a module with its own parameters."""

    def attached(self, mask: Tensor) -> AbstractContextManager[list[Tensor]]:
        """Within, a forward of the model fades tokens, mask (B, N); yields the gates (B, N) of each layer that ran."""
        ...

    def pruning(self) -> tuple[float, ...]:
        """The thresholds learned, for `EarlyExitClassifier.pruning`."""
        ...


@dataclass(frozen=True)
class Method:
    """How the exits of one paper are made and trained.

    loss: (outputs, settings) -> scalars, `loss` and its terms. settings: the frozen dataclass of the loss's numbers.
    trains: `model` (no exits), `exits` (on a frozen model), or `both` together.
    pruning: what happens in training to a classifier with pruning thresholds: they are `ignored`, `used` or `required`.
    token_gates: (model, settings) -> a module that learns such thresholds.
    """

    loss: Callable[[BatchOutputs, Any], dict[str, Tensor]]
    trains: Literal["model", "exits", "both"]
    head: Head = SHARED
    judge: Judge | None = None
    settings: type = NoSettings
    pruning: Literal["ignored", "used", "required"] = "used"
    token_gates: Callable[[nn.Module, Any], nn.Module] | None = None

    @property
    def exits(self) -> dict[str, str]:
        """The arguments of `ClassifierExits` that name this method's modules."""
        return {"head": self.head.name, "judge": "none" if self.judge is None else self.judge.name}

    def settings_from(self, values: Mapping[str, Any], *, name: str) -> Any:
        """This method's settings out of a mapping that may hold more; None stands for a number that was not given.

        Raises:
            ValueError: a number that has no default was not given; a number out of range.
        """
        found = {
            field.name: values[field.name] for field in fields(self.settings) if values.get(field.name) is not None
        }
        missing = [
            field.name for field in fields(self.settings) if field.default is MISSING and field.name not in found
        ]
        if missing:
            raise ValueError(f"{name} needs {', '.join(missing)}: no default suits all models")
        return self.settings(**found)


def require_range(settings: Any, least: float, *names: str, most: float = float("inf")) -> None:
    """Raise ValueError if a number of the settings is outside [least, most]."""
    for name in names:
        if not least <= getattr(settings, name) <= most:
            expected = f"at least {least}" if most == float("inf") else f"a number in [{least}, {most}]"
            raise ValueError(f"{name}={getattr(settings, name)}, expected {expected}")


def output_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each output: logits (A, B, C), labels (B,) -> (A, B).

    Integer labels: cross-entropy. Floating labels: squared error of the one output (C = 1).

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[1:2]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}, expected (A, B, C) and (B,)")
    if labels.is_floating_point():
        if logits.shape[2] != 1:
            raise ValueError(f"floating labels with {logits.shape[2]} outputs, expected one output (regression)")
        return (logits[:, :, 0].float() - labels).square()
    logs = logits.float().log_softmax(-1)  # (A, B, C)
    return -logs.gather(2, labels.expand(len(logits), -1)[:, :, None])[:, :, 0]


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`sum_i CE_i`, unweighted, mean over the batch: logits (A, B, C), labels (B,)."""
    return output_losses(logits, labels).sum(0).mean()
