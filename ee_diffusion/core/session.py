"""Session: a policy applied to one run. What is kept from step to step, and the trace of it all. Not here: who stops (step_session.py).

E elements, R rows (R >= E: guidance gives an image two; how many may change between steps), K exits of the policy, L layers, S steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ee_diffusion.core.criteria import State
from ee_diffusion.core.distributed import JointDecision
from ee_diffusion.core.history import OutputHistory
from ee_diffusion.core.step_session import StepSession
from ee_diffusion.core.trace import Trace

if TYPE_CHECKING:
    from ee_diffusion.core.policy import Policy


class Session:
    """A policy applied to one run. State between steps is here and nowhere else. Made by `Policy.start`."""

    def __init__(
        self,
        policy: Policy,
        num_layers: int,
        depths: tuple[int, ...],
        *,
        exits: tuple[int, ...],
        rows: Tensor,
        num_steps: int,
        elements: Tensor | None,
        device: torch.device | str,
        frozen: str = "",
        joint_decision: JointDecision | None = None,
    ):
        self.frozen = frozen  # why rows that stopped are carried along; empty: they are dropped
        self.joint_decision = joint_decision  # ranks that decide together
        self.policy, self.num_layers, self.num_steps, self.device = policy, num_layers, num_steps, torch.device(device)
        self.heads_exits = {depth: depths.index(depth) for depth in exits}  # depth -> exit among the heads
        self.exits = {depth: exit for exit, depth in enumerate(exits)}  # depth -> exit among the policy's
        self.next_exits = dict(itertools.pairwise(exits))  # depth -> depth of the exit that follows
        num_elements = 1 + int(rows.max())
        self._seat(rows, num_elements)
        self.no_scores = torch.full((num_elements,), torch.nan)
        self.elements = torch.arange(num_elements) if elements is None else torch.as_tensor(elements).cpu()
        if self.elements.shape != (num_elements,):
            raise ValueError(f"{tuple(self.elements.shape)} element ids, expected ({num_elements},)")
        self.state: State | None = None
        self.histories: dict[
            int, OutputHistory
        ] = {}  # for heads that remember: what the rows' last full steps said, by call
        self.finished: list[StepSession] = []
        self._open: StepSession | None = None

    def _seat(self, rows: Tensor, num_elements: int) -> None:
        self.rows = rows  # (R,) element of each row
        self.elements_of_rows: list[int] = rows.tolist()
        self.places, self.all_rows, self.no_rows = list(range(len(rows))), torch.arange(len(rows)), torch.arange(0)
        self.rows_per_element: list[int] = torch.bincount(rows, minlength=num_elements).tolist()  # (E,)

    def regroup(self, rows: Tensor, sources: Sequence[int | None]) -> None:
        """From the next step on the batch has other rows (guidance that ends in mid-run): rows (R,), the element of each, among those of
        the run. An element without a row is absent. Row i remembers what row `sources[i]` of the batch before did, None: nothing; rows
        that are no source take their memory along.

        Raises:
            ValueError: a step is going on, or elements that the run does not have.
        """
        num_elements = len(self.elements)
        if self._open is not None or len(sources) != len(rows) or int(rows.max()) >= num_elements:
            raise ValueError(
                f"rows of elements {rows.tolist()} that go on from {list(sources)}: expected elements below {num_elements}, a source for "
                "each row, and no step that is going on"
            )
        self._seat(rows, num_elements)
        self.histories = {call: memory.regrouped(sources) for call, memory in self.histories.items()}

    def step(self, index: int, time: float, *, absent: Tensor | None = None) -> StepSession:
        """Begin step `index` at `time` (timestep or sigma). Steps come in order; the one before must be closed.

        `absent`: (E,) bool, elements that have no part in this step (sequences that have ended); None: all take part.

        Raises:
            ValueError: a step out of order or beyond the run; or one begun before the last was closed; absent of another shape.
        """
        if index != len(self.finished) or index >= self.num_steps or self._open is not None:
            raise ValueError(
                f"step {index} of {self.num_steps}, expected step {len(self.finished)} with the one before closed"
            )
        if absent is not None and absent.shape != (len(self.elements),):
            raise ValueError(f"absent is {tuple(absent.shape)}, expected ({len(self.elements)},): one for each element")
        self._open = StepSession(self, index, float(time))
        if absent is not None and bool(absent.any()):
            self._open.leave_out(absent.tolist())
        return self._open

    def follow(self) -> StepSession:
        """Begin another forward of the step that was closed last (the second call of guidance): its rows leave where the first call's
        did, nothing is measured, and its work is added to that step's.

        Raises:
            ValueError: no step was closed, or one is going on.
        """
        if not self.finished or self._open is not None:
            raise ValueError("a following forward needs a step that was closed, and none that is going on")
        leader = self.finished[-1]
        self._open = StepSession(self, leader.index, leader.time, leader=leader)
        return self._open

    def miss(self, other: StepSession) -> None:
        """A step that another session of the run took, and no element of this one (a call of guidance that was not made)."""
        self.step(other.index, other.time, absent=torch.ones(len(self.elements), dtype=torch.bool)).close()

    def require_open(self, step: StepSession) -> None:
        """Raise ValueError unless `step` is the one that is going on."""
        if self._open is not step:
            raise ValueError(f"step {step.index} is closed: begin a step for each forward")

    def closed(self, step: StepSession) -> None:
        """Called by a step session when it ends."""
        if step.leader is None:
            self.finished.append(step)
        else:
            step.leader.add_work_of(step)
        self._open = None

    def trace(self, beside: Session | None = None) -> Trace:
        """Everything that happened in the closed steps; `beside`: a session of the same run, elements are absent from its further steps.

        Raises:
            ValueError: no step was closed.
        """
        steps = [*self.finished, *map(self._missed, beside.finished[len(self.finished) :] if beside else ())]
        if not steps:
            raise ValueError("no step has been closed: there is nothing to trace")
        return Trace(
            elements=self.elements,
            rows=torch.tensor([step.rows_per_element for step in steps]),
            times=torch.tensor([step.time for step in steps], dtype=torch.float64),
            exits=torch.tensor(list(self.exits), dtype=torch.int64),
            planned=torch.tensor([step.layers for step in steps]),
            depths=torch.tensor([step.left for step in steps], dtype=torch.int16),
            scores=torch.tensor([step.scores for step in steps]).view(len(steps), len(self.exits), len(self.elements)),
            ran=torch.tensor([step.work for step in steps], dtype=torch.int16).transpose(1, 2).contiguous(),
            measured=torch.tensor([step.measured for step in steps]),
            answered=torch.tensor([step.answered for step in steps]),
            policy=self.policy.to_dict(),
            recorded_all=self.policy.record_all,
            calls=tuple(step.calls for step in steps),
            frozen=self.frozen,
        )

    def _missed(self, other: StepSession) -> StepSession:
        """The same step without anybody of this session, which does not take note of it."""
        made = StepSession(self, other.index, other.time)
        made.leave_out([True] * len(self.elements))
        return made
