"""What a criterion is, and the place of a decision. Not here: the rules themselves (criteria.py).

E elements, R rows, K exits of the policy, S steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ee_diffusion.core.fields import check_fields
from ee_diffusion.core.scores import ExitInputs

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
    """Says when an element stops. A NaN score never stops anything. One with a `__post_init__` of its own calls this one first."""

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def validate(self, num_steps: int, num_exits: int) -> None:
        """Raise ValueError if thresholds do not fit S steps and K exits."""

    @abstractmethod
    def start(self, elements: Tensor, *, step: int, previous: State | None) -> State:
        """State of a new step for elements (E,) (their ids); `previous`: the state at the end of the last step, None at the first.

        Raises ValueError if the criterion does not know an element.
        """

    @abstractmethod
    def measure(self, observation: ExitInputs) -> Tensor | None:
        """Scores of the rows still running (R,), or None if this criterion looks at nothing."""

    @abstractmethod
    def decide(self, score: Tensor, where: ExitPoint, state: State) -> tuple[Tensor, State]:
        """score (E,), NaN where an element has none -> stop (E,) bool and the new state."""

    @abstractmethod
    def floor(self, where: ExitPoint) -> float | None:
        """A number for which holds: no element with a score at or below it (or without one) stops here, and if all are so, `decide` leaves
        the state as it was. A session then need not ask. None: there is no such number."""
