"""When to stop: what a criterion is, the rules, and how their thresholds are read.

Here: decisions, pure functions of scores and state. Not here: scores themselves (scores.py), who applies them (session.py).
E samples, R rows, K exits of the policy, S steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from ee_diffusion.core.exits import ExitInputs
from ee_diffusion.core.fields import check_fields
from ee_diffusion.core.scores import score_named

__all__ = [
    "Criterion",
    "DecayingThreshold",
    "DepthTable",
    "ErrorBudget",
    "ExitPoint",
    "GatedExit",
    "Patience",
    "QExit",
    "SampledExit",
    "ScoreCriterion",
    "Threshold",
]

State = dict[str, Tensor]


class ExitPoint(NamedTuple):
    """The place of a decision: `step` of `num_steps`, its `time` (timestep or sigma), `depth` executed blocks, `exit` (policy's index)."""

    step: int
    num_steps: int
    time: float
    depth: int
    exit: int


@dataclass(frozen=True)
class Criterion(ABC):
    """Says when a sample stops. A NaN score never stops anything. One with a `__post_init__` of its own calls this one first."""

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def validate(self, num_steps: int, num_exits: int) -> None:
        """Raise ValueError if thresholds do not fit S steps and K exits."""

    @abstractmethod
    def start(self, samples: Tensor, *, step: int, previous: State | None) -> State:
        """State of a new step for samples (E,) (their ids); `previous`: the state at the end of the last step, None at the first.

        Raises ValueError if the criterion does not know a sample.
        """

    @abstractmethod
    def measure(self, inputs: ExitInputs) -> Tensor | None:
        """Scores of the rows still running (R,), or None if this criterion measures nothing."""

    @abstractmethod
    def decide(self, score: Tensor, where: ExitPoint, state: State) -> tuple[Tensor, State]:
        """score (E,), NaN where a sample has none -> stop (E,) bool and the new state."""

    @abstractmethod
    def floor(self, where: ExitPoint) -> float | None:
        """A score at or below which (or without which) no sample stops here; if all samples are below it, `decide` leaves the state
        unchanged, so a session need not call it. None: there is no such number."""


class ScoreCriterion(Criterion):
    """A rule on the score named by its field `score`. Defaults: it fits any number of steps and exits, keeps no state, and
    needs every score."""

    score: str

    def __post_init__(self) -> None:
        super().__post_init__()
        score_named(self.score)

    def validate(self, num_steps: int, num_exits: int) -> None:
        """Any number of steps and exits fits."""

    def start(self, samples: Tensor, *, step: int, previous: State | None) -> State:
        return {}

    def measure(self, inputs: ExitInputs) -> Tensor:
        return score_named(self.score).measure(inputs)

    def floor(self, where: ExitPoint) -> float | None:
        return None


Thresholds = float | tuple[float, ...] | tuple[tuple[float, ...], ...]


def threshold_at(thresholds: Thresholds, step: int, exit: int) -> float:
    """The threshold at a step and an exit."""
    if not isinstance(thresholds, tuple):
        return thresholds
    row = thresholds[step] if isinstance(thresholds[0], tuple) else thresholds
    return row[exit]


def check_range(thresholds: Thresholds, name: str) -> None:
    """Raises ValueError for no numbers, rows of several lengths, or numbers outside the range of the score of that name."""
    score = score_named(name)
    rows = thresholds if isinstance(thresholds, tuple) else (thresholds,)
    lengths = {len(row) if isinstance(row, tuple) else 1 for row in rows}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"thresholds in rows of lengths {sorted(lengths)}, expected one number, one per exit, or one per step and exit"
        )
    for value in (value for row in rows for value in (row if isinstance(row, tuple) else (row,))):
        if not score.low <= value <= score.high:
            raise ValueError(f"threshold {value} is outside [{score.low}, {score.high}], the range of score {name!r}")


def check_lengths(thresholds: Thresholds, num_steps: int, num_exits: int) -> None:
    """Raises ValueError for tuples that do not fit S steps and K exits."""
    if not isinstance(thresholds, tuple):
        return
    rows = [row for row in thresholds if isinstance(row, tuple)]
    if rows and len(thresholds) != num_steps:
        raise ValueError(f"thresholds for {len(thresholds)} steps, this run has {num_steps}")
    for length in {len(row) for row in rows} or {len(thresholds)}:
        if length != num_exits:
            raise ValueError(f"{length} thresholds, expected one for each of {num_exits} exits")


@dataclass(frozen=True)
class Threshold(ScoreCriterion):
    """Stop at the first exit whose score is above the threshold: `score > threshold` (DeeDiff: `1 - mean u > 1 - theta`).

    `threshold`: one number, one per exit (K,), or one per step and exit (S, K).
    """

    threshold: Thresholds
    score: str = "confidence"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.threshold, self.score)

    def validate(self, num_steps: int, num_exits: int) -> None:
        check_lengths(self.threshold, num_steps, num_exits)

    def decide(self, score: Tensor, where: ExitPoint, state: State) -> tuple[Tensor, State]:
        return score > threshold_at(self.threshold, where.step, where.exit), state

    def floor(self, where: ExitPoint) -> float:
        return threshold_at(self.threshold, where.step, where.exit)


@dataclass(frozen=True)
class Patience(ScoreCriterion):
    """Stop at a crossing (score above threshold) once there were `patience` of them, this one included.

    `patience`: one number or one per exit (K,). `consecutive`: a miss starts the count anew (PABEE); otherwise crossings add up
    (DeeDiff as released: the first crossing among the in-blocks does not exit, the second does).
    """

    threshold: Thresholds
    patience: int | tuple[int, ...]
    score: str = "confidence"
    consecutive: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.threshold, self.score)
        counts = self.patience if isinstance(self.patience, tuple) else (self.patience,)
        if not counts or min(counts) < 1:
            raise ValueError(f"patience={self.patience}, expected 1 or more crossings")

    def validate(self, num_steps: int, num_exits: int) -> None:
        check_lengths(self.threshold, num_steps, num_exits)
        if isinstance(self.patience, tuple) and len(self.patience) != num_exits:
            raise ValueError(f"patience has {len(self.patience)} values, expected one or {num_exits} (exits)")

    def start(self, samples: Tensor, *, step: int, previous: State | None) -> State:
        return {"crossings": torch.zeros_like(samples)}  # (E,)

    def decide(self, score: Tensor, where: ExitPoint, state: State) -> tuple[Tensor, State]:
        crossed = score > threshold_at(self.threshold, where.step, where.exit)  # (E,)
        crossings = state["crossings"] + crossed
        if self.consecutive:
            crossings = torch.where(crossed, crossings, 0)
        needed = self.patience[where.exit] if isinstance(self.patience, tuple) else self.patience
        return crossed & (crossings >= needed), {"crossings": crossings}

    def floor(self, where: ExitPoint) -> float | None:
        return None if self.consecutive else threshold_at(self.threshold, where.step, where.exit)


@dataclass(frozen=True)
class QExit(ScoreCriterion):
    """Q-exit (PALBERT, arXiv 2204.03276): `p_i = lambda_i prod_{j<i}(1 - lambda_j)`; stop at the first i with `sum_{j<=i} p_j > q`."""

    q: float
    score: str = "confidence"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.q <= 1.0:
            raise ValueError(f"q={self.q}, expected a quantile in [0, 1]")

    def start(self, samples: Tensor, *, step: int, previous: State | None) -> State:
        return {"survival": torch.ones(len(samples), device=samples.device)}  # (E,)

    def decide(self, score: Tensor, where: ExitPoint, state: State) -> tuple[Tensor, State]:
        survival = state["survival"] * (1 - score)  # (E,): sum_{j<=i} p_j = 1 - prod_{j<=i} (1 - lambda_j)
        return 1 - survival > self.q, {"survival": survival}


@dataclass(frozen=True)
class SampledExit(ScoreCriterion):
    """Sampling exit (PonderNet, arXiv 2107.05407): the exit drawn from `p_i` is the first i with `sum_{j<=i} p_j > u`, u ~ U[0, 1).

    u depends on `seed`, the sample's id and the step alone, so that batches and order do not matter.
    """

    seed: int
    score: str = "confidence"

    def start(self, samples: Tensor, *, step: int, previous: State | None) -> State:
        drawn = [Random(f"{self.seed}/{step}/{sample}").random() for sample in samples.tolist()]
        return {
            "drawn": torch.tensor(drawn, dtype=torch.float32, device=samples.device),  # (E,)
            "survival": torch.ones(len(samples), device=samples.device),  # (E,)
        }

    def decide(self, score: Tensor, where: ExitPoint, state: State) -> tuple[Tensor, State]:
        survival = state["survival"] * (1 - score)  # (E,)
        return 1 - survival > state["drawn"], state | {"survival": survival}


@dataclass(frozen=True)
class GatedExit(ScoreCriterion):
    """Learned gates (JEI-DNN, arXiv 2310.09163): `P_l = max(0, min(g_l, 1 - sum_{j<l} g_j))`, `a_l = P_l / prod_{j<l}(1 - a_j)`;
    stop when `a_l >= threshold` (0.5 in the paper)."""

    threshold: float
    score: str = "confidence"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.threshold, self.score)

    def start(self, samples: Tensor, *, step: int, previous: State | None) -> State:
        zeros = torch.zeros(len(samples), device=samples.device)
        return {"sum": zeros, "survival": zeros + 1}  # (E,), (E,)

    def decide(self, score: Tensor, where: ExitPoint, state: State) -> tuple[Tensor, State]:
        probability = torch.minimum(score, 1 - state["sum"]).clamp(min=0)  # (E,)
        conditional = (probability / state["survival"].clamp(min=1e-12)).clamp(max=1)
        state = {"sum": state["sum"] + score, "survival": state["survival"] * (1 - conditional)}
        return conditional >= self.threshold, state


@dataclass(frozen=True)
class DepthTable(Criterion):
    """Stop where a table says: sample e at step s stops at the first exit whose depth is at least `depths[s][e]`.

    Measures nothing. For controls (random exits, oracle) and depths chosen by request. `depths`: (S, number of ids); a sample's id is
    its column. `every_step`: one row that holds at every step.
    """

    depths: tuple[tuple[int, ...], ...]
    every_step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = {len(row) for row in self.depths}
        if len(lengths) != 1 or lengths == {0} or min(min(row) for row in self.depths) < 0:
            raise ValueError(
                f"a plan with rows of lengths {sorted(lengths)}, expected rows of one length, depths of at least 0"
            )

    def validate(self, num_steps: int, num_exits: int) -> None:
        if len(self.depths) != (1 if self.every_step else num_steps):
            raise ValueError(f"the plan has {len(self.depths)} steps, this run has {num_steps}")

    def start(self, samples: Tensor, *, step: int, previous: State | None) -> State:
        columns = len(self.depths[0])
        if int(samples.max()) >= columns or int(samples.min()) < 0:
            raise ValueError(f"sample ids {samples.tolist()} need columns in a plan for {columns} samples")
        row = torch.tensor(self.depths[0 if self.every_step else step], device=samples.device)
        return {"plan": row[samples]}  # (E,)

    def measure(self, inputs: ExitInputs) -> None:
        return None

    def decide(self, score: Tensor, where: ExitPoint, state: State) -> tuple[Tensor, State]:
        return state["plan"] <= where.depth, state

    def floor(self, where: ExitPoint) -> None:
        return None


@dataclass(frozen=True)
class DecayingThreshold(ScoreCriterion):
    """A threshold that falls with the step (CALM, arXiv 2207.07061, sec. 3.4):

    `score > 0.9 * threshold + 0.1 * threshold * exp(-rate * t / T)`, T = `horizon` in steps (of a decode: tokens), rate 4 in the paper.
    """

    threshold: float
    horizon: int
    rate: float = 4.0
    score: str = "confidence"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.threshold, self.score)
        if self.horizon < 1 or not 0 <= self.rate < math.inf:
            raise ValueError(
                f"horizon={self.horizon}, rate={self.rate}, expected a step or more and a finite rate >= 0"
            )

    def decide(self, score: Tensor, where: ExitPoint, state: State) -> tuple[Tensor, State]:
        return score > self.floor(where), state

    def floor(self, where: ExitPoint) -> float:
        return self.threshold * (0.9 + 0.1 * math.exp(-self.rate * where.step / self.horizon))


@dataclass(frozen=True)
class ErrorBudget(ScoreCriterion):
    """Errors that add up over the steps of a run are kept within a budget (ours).

    `a_t = decay * a_{t-1} + w_t (1 - score)` where a sample stops, `a_t = decay * a_{t-1}` where it runs to the end; it stops as long as
    `a_t <= budget`. `weights`: w_t (S,), what an error of 1 at that step does. A score of 0 says that nothing is known: it never stops.
    Law 5 holds within a step: a smaller budget may leave more of it to later ones.
    """

    budget: float
    weights: tuple[float, ...]
    decay: float
    score: str = "confidence"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.budget > 0 and math.isfinite(self.budget) and 0 <= self.decay <= 1):
            raise ValueError(
                f"budget={self.budget}, decay={self.decay}, expected a positive number and a factor in [0, 1]"
            )
        if not self.weights or not all(math.isfinite(weight) and weight >= 0 for weight in self.weights):
            raise ValueError(f"weights={self.weights}, expected one finite number >= 0 for each step")

    def validate(self, num_steps: int, num_exits: int) -> None:
        if len(self.weights) != num_steps:
            raise ValueError(f"weights for {len(self.weights)} steps, this run has {num_steps}")

    def start(self, samples: Tensor, *, step: int, previous: State | None) -> State:
        if previous is None:
            return {"spent": torch.zeros(len(samples), device=samples.device)}  # (E,)
        return {"spent": self.decay * previous["spent"]}

    def decide(self, score: Tensor, where: ExitPoint, state: State) -> tuple[Tensor, State]:
        after = state["spent"] + self.weights[where.step] * (1 - score)  # (E,)
        stop = (score > 0) & (after <= self.budget)
        return stop, {"spent": torch.where(stop, after, state["spent"])}

    def floor(self, where: ExitPoint) -> float:
        return 0.0


CRITERIA: dict[str, type[Criterion]] = {
    kind.__name__: kind
    for kind in (Threshold, DecayingThreshold, Patience, QExit, SampledExit, GatedExit, ErrorBudget, DepthTable)
}
