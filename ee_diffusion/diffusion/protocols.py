"""Kinds of heads: what attaching needs of exits for denoisers, and what it may find there besides.

R rows, r running rows, N tokens, D width.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from diffusers import SchedulerMixin
from torch import Tensor

from ee_diffusion.core.exits import ExitHeads
from ee_diffusion.core.history import OutputHistory
from ee_diffusion.core.schedules import Schedule


@runtime_checkable
class DenoiserHeads(ExitHeads, Protocol):
    """What attaching needs of heads: those of the core, and what all exits of a forward share."""

    def context(self, timestep: Tensor) -> dict[str, Tensor]:
        """timestep (R,), in the scheduler's units -> tensors with leading R, `timestep` among them, for `confidence` and `answer`."""
        ...


@runtime_checkable
class CachingHeads(DenoiserHeads, Protocol):
    """Heads that return outputs extrapolated from earlier steps of the run."""

    def extrapolate(self, memory: OutputHistory | None, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """The context of a step: the session's history (None: a run begins), sample (R, ...), timestep (R,) -> tensors with leading R."""
        ...

    def append(
        self, memory: OutputHistory | None, rows: Tensor, *, sample: Tensor, timestep: Tensor, output: Tensor
    ) -> OutputHistory:
        """The history after a step in which `rows` (r,) of the batch ran to the end."""
        ...


@runtime_checkable
class ScheduledHeads(DenoiserHeads, Protocol):
    """Heads that know the noise schedule they work on."""

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """Raises ValueError if the scheduler's is another, or reads the model's output in another way."""
        ...


@runtime_checkable
class PlanningHeads(DenoiserHeads, Protocol):
    """Heads that answer better where they know beforehand which layers run at which step."""

    def along(self, schedule: Schedule, *, num_steps: int, num_layers: int) -> DenoiserHeads:
        """The heads for a run under a schedule and no criterion."""
        ...


@runtime_checkable
class PackableHeads(DenoiserHeads, Protocol):
    """Heads that have a faster form for a run without gradients."""

    def packed(self) -> DenoiserHeads:
        """The same answers and certainties, from the weights as they are now."""
        ...
