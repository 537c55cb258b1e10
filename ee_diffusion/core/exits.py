"""What a driver needs of the exits of one model, and what an exit sees. The modules themselves belong to the sides.

R rows, N tokens, D width, K exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

Space = Literal["hidden", "output"]


class ExitHeads(Protocol):
    """K exit heads with their uncertainty modules, one component of a pipeline.

    `depths`: the number of executed blocks at each exit, ascending. `space`: `hidden` if an answer still goes through the model's own
    tail, `output` if it stands in the place of the tail's output. `context` holds tensors with leading R (for diffusion: `timestep`).
    """

    depths: tuple[int, ...]
    space: Space

    def answer(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """What the model would say at the end: hidden (R, N, D) -> (R, N, D) or (R, ...), as `space` says."""
        ...

    def confidence(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """How safe `answer` is believed to be: hidden (R, N, D) -> (R,); larger is safer."""
        ...

    def check_fits(self, model: nn.Module) -> None:
        """Raise ValueError if these are heads of another model."""
        ...


def require_depths(depths: object) -> None:
    """Raises ValueError unless `depths` is a tuple or list of ascending distinct whole numbers from 0 on, at least one."""
    listed = list(depths) if isinstance(depths, tuple | list) else []
    whole = all(isinstance(depth, int) and not isinstance(depth, bool) for depth in listed)
    if not listed or not whole or listed != sorted(set(listed)) or listed[0] < 0:
        raise ValueError(f"depths={depths!r}, expected ascending distinct numbers of blocks, at least one")


class ExitInputs:
    """What one exit sees of the rows that are still running. The head's answer is computed at most once, and only if asked for.

    `hidden` (R, N, D); `context`: tensors with leading R (tuples: what all rows share);
    `exit`: index among the heads. What a score puts into `carried` (tensors with
    leading R) is in the context of the rows that go on at the next exit of the same step.
    """

    def __init__(self, heads: ExitHeads, exit: int, hidden: Tensor, context: Mapping[str, Tensor]):
        self.heads, self.exit, self.hidden, self.context = heads, exit, hidden, context
        self.carried: dict[str, Tensor] = {}

    @cached_property
    def answer(self) -> Tensor:
        return self.heads.answer(self.exit, self.hidden, self.context)

    @property
    def answered(self) -> bool:
        return "answer" in self.__dict__


class JudgingHeads(ExitHeads, Protocol):
    """Heads whose learned certainty looks at the answer, or at what earlier exits of the same step carried."""

    def judge(self, inputs: ExitInputs) -> Tensor:
        """(R,) in [0, 1]; larger is safer. May read `inputs.answer` and write `inputs.carried`."""
        ...


@runtime_checkable
class PrunableHeads(Protocol):
    """Exit heads that can answer for a part of the classes at a part of the cost."""

    def answer_among(self, exit: int, hidden: Tensor, classes: Tensor) -> Tensor:
        """Logits of the given classes alone: hidden (R, N, D), classes (R, k) -> (R, k)."""
        ...
