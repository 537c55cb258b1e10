"""A decision for the whole batch, as caches take it: for ablations alone, since an image then depends on its batch-mates. E samples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ee_diffusion.core.criteria import Criterion, ExitPoint, State
from ee_diffusion.core.exits import ExitInputs


@dataclass(frozen=True)
class WholeBatch(Criterion):
    """Another criterion on the score of the least safe sample: all stop or none does."""

    criterion: Criterion

    def validate(self, num_steps: int, num_exits: int) -> None:
        self.criterion.validate(num_steps, num_exits)

    def start(self, samples: Tensor, *, step: int, previous: State | None) -> State:
        return self.criterion.start(samples, step=step, previous=previous)

    def measure(self, inputs: ExitInputs) -> Tensor | None:
        return self.criterion.measure(inputs)

    def decide(self, score: Tensor, where: ExitPoint, state: State) -> tuple[Tensor, State]:
        stop, state = self.criterion.decide(score.amin().expand(len(score)), where, state)
        return stop.all().expand(len(score)), state

    def floor(self, where: ExitPoint) -> float | None:
        return self.criterion.floor(where)
