"""Session and StepSession: the only code in the project that stops anything. Loops, hooks and the replay drive it.

E elements, R rows (R >= E: guidance gives an image two), K exits of the policy, L layers, S steps. Index bookkeeping is on the CPU;
scores stay on their device, and one host sync per decision (marked) brings the verdict over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ee_diffusion.core.criteria import Planned
from ee_diffusion.core.criterion import State, Where
from ee_diffusion.core.memory import Memory
from ee_diffusion.core.ranks import Vote
from ee_diffusion.core.rows import Departure, repeats_of
from ee_diffusion.core.schedules import depth_of
from ee_diffusion.core.scores import per_element
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
        vote: Vote | None = None,
    ):
        self.frozen = frozen  # why rows that stopped are carried along; empty: they are dropped
        self.vote = vote  # ranks that decide together
        self.policy, self.num_layers, self.num_steps, self.device = policy, num_layers, num_steps, torch.device(device)
        self.heads_exits = {depth: depths.index(depth) for depth in exits}  # depth -> exit among the heads
        self.exits = {depth: exit for exit, depth in enumerate(exits)}  # depth -> exit among the policy's
        self.rows = rows  # (R,) element of each row
        num_elements = int(rows.max()) + 1
        self.all_rows = torch.arange(len(rows))
        self.rows_per_element = torch.bincount(rows, minlength=num_elements).to(torch.int16)  # (E,)
        self.repeats = repeats_of(rows, num_elements)
        self.elements_there = rows.to(self.device)  # (R,) as `rows`, on the device
        self.all_alive = torch.ones(num_elements, dtype=torch.bool)
        self.no_rows = torch.zeros(num_elements, dtype=torch.int16)
        self.full_depths = torch.full((num_elements,), num_layers, dtype=torch.int16)
        self.no_scores = torch.full((len(exits), num_elements), torch.nan)
        self.elements = torch.arange(num_elements) if elements is None else torch.as_tensor(elements).cpu()
        if self.elements.shape != (num_elements,):
            raise ValueError(f"{tuple(self.elements.shape)} element ids, expected ({num_elements},)")
        self.state: State | None = None
        self.memories: dict[int, Memory] = {}  # for heads that remember: what the rows' last full steps said, by call
        self.finished: list[StepSession] = []
        self._open: StepSession | None = None

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
            self._open.leave_out(absent.cpu())
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

    def trace(self) -> Trace:
        """Everything that happened in the closed steps.

        Raises:
            ValueError: no step was closed.
        """
        if not self.finished:
            raise ValueError("no step has been closed: there is nothing to trace")
        steps = self.finished
        return Trace(
            elements=self.elements,
            rows=self.rows_per_element.long(),
            times=torch.tensor([step.time for step in steps], dtype=torch.float64),
            exits=torch.tensor(list(self.exits), dtype=torch.int64),
            planned=torch.tensor([step.layers for step in steps]),
            depths=torch.stack([step.depths for step in steps]),
            scores=torch.stack([step.scores for step in steps]),
            ran=torch.stack([step.ran for step in steps]),
            measured=torch.tensor([step.measured for step in steps]),
            answered=torch.tensor([step.answered for step in steps]),
            policy=self.policy.to_dict(),
            recorded_all=self.policy.record_all,
            calls=tuple(step.calls for step in steps),
            frozen=self.frozen,
        )


class StepSession:
    """One step of a run: which rows a layer runs on, who leaves after a depth, what was executed."""

    def __init__(self, session: Session, index: int, time: float, leader: StepSession | None = None):
        self.leader = leader  # the forward whose depths this one follows
        self.calls = 1  # forwards of this step: itself and those that followed
        policy, num_layers = session.policy, session.num_layers
        self.session, self.index, self.time = session, index, time
        self.layers = policy.schedule.layers(index, time, num_steps=session.num_steps, num_layers=num_layers)
        self.last = depth_of(self.layers)  # the depth at which everyone leaves
        num_exits = len(session.exits)
        self.rows = session.all_rows  # (r,) rows still running, as places in the whole batch
        self.alive, self.depths, self.scores = (
            session.all_alive,
            session.full_depths,
            session.no_scores,
        )  # replaced, never written to
        self.measured, self.answered = [0] * num_exits, [0] * num_exits  # rows
        self._scores_there: dict[int, Tensor] = {}
        self._elements_there = session.elements_there  # (r,) element of each running row, on the device
        self._ran = [session.no_rows] * num_layers  # for each layer (E,)
        self._counts = session.rows_per_element  # (E,) running rows of each element
        self._state: State = {}
        if policy.criterion is not None and leader is None:
            ids = session.elements.to(session.device)
            self._state = policy.criterion.start(ids, step=index, previous=session.state)

    def leave_out(self, absent: Tensor) -> None:
        """Elements (E,) bool that have no part in this step: depth -1, no row runs."""
        self.alive = ~absent
        self.depths = self.depths.masked_fill(absent, -1)
        self._counts = self._counts.masked_fill(absent, 0)
        self.rows = self.rows[self.alive[self.session.rows]]
        self._elements_there = self.session.rows[self.rows].to(self.session.device)

    @property
    def ran(self) -> Tensor:
        """(E, L) rows of each element that each layer was executed on."""
        return torch.stack(self._ran, dim=1)

    @property
    def finished(self) -> bool:
        """True when no row is running any more."""
        return len(self.rows) == 0

    @property
    def measures(self) -> bool:
        """Whether scores are looked at."""
        return self.leader is None and not isinstance(self.session.policy.criterion, Planned | None)

    @property
    def call(self) -> int:
        """Which forward of its step this is: 0, or 1 for the second call of guidance."""
        return 0 if self.leader is None else self.leader.calls

    @property
    def may_exit(self) -> bool:
        """Whether a row may leave before the last layer."""
        return self.session.policy.criterion is not None or self.last != self.session.num_layers

    def runs(self, layer: int) -> bool:
        """Whether the layer is to be executed, on the rows that are still running."""
        return self.layers[layer] and len(self.rows) > 0

    def executed(self, layer: int) -> None:
        """The driver says: the layer ran on the running rows (on all rows, where those that stopped are carried along)."""
        self._ran[layer] = self.session.rows_per_element if self.session.frozen else self._counts

    def add_work_of(self, follower: StepSession) -> None:
        """Count what a following forward executed as this step's."""
        self._ran = [mine + other for mine, other in zip(self._ran, follower._ran, strict=True)]
        self.answered = [mine + other for mine, other in zip(self.answered, follower.answered, strict=True)]
        self.calls += 1

    def offer(self, depth: int, measure: Callable[[int], Tensor | None]) -> Departure | None:
        """Decide after `depth` executed blocks. `measure(exit)` gives the scores (r,) of the running rows at that exit of the heads
        (None: the criterion looks at nothing); it is called only where an exit is possible.

        Returns the departure of the rows that leave, or None if all go on.
        """
        if depth not in self.session.exits or self.finished:
            return None
        if depth == self.last:  # decided before the step began: no score, no sync
            return self._leave(depth, torch.ones_like(self.alive))
        if self.leader is not None:
            return self._leave_where(self.leader.depths <= depth, depth)
        criterion = self.session.policy.criterion
        if criterion is None:
            return None
        exit = self.session.exits[depth]
        score = self._score(exit, measure(self.session.heads_exits[depth]))  # (E,)
        where = Where(self.index, self.session.num_steps, self.time, depth, exit)
        stop, self._state = criterion.decide(score, where, self._state)
        if self.session.policy.record_all:
            return None
        return self._leave_where(stop if stop.is_cpu else stop.cpu(), depth)  # the host sync of this exit

    def close(self) -> None:
        """End the step: scores come to the host, the state goes to the session.

        Raises:
            ValueError: a score was NaN (it stopped nobody; the step is recorded), or the step is closed already.
        """
        self.session.require_open(self)
        if self._scores_there:
            said = torch.stack(list(self._scores_there.values())).cpu()  # in the order of the exits
            if len(said) < len(self.scores):
                said = self.scores.index_copy(0, torch.tensor(list(self._scores_there)), said)
            self.scores = said
        if self.leader is None:
            self.session.state = self._state
        self.session.closed(self)
        if self._scores_there and bool(self.scores.isnan().any()):
            self._refuse_nan()

    def _refuse_nan(self) -> None:
        """Raise if an element that reached a measured exit has no number there; NaN elsewhere says that nothing was measured."""
        reached = torch.tensor(list(self.session.exits))[:, None] <= self.depths  # (K, E)
        bad = (self.scores.isnan() & reached & (torch.tensor(self.measured) > 0)[:, None]).any(1)
        if bool(bad.any()):
            depths = [depth for depth, exit in self.session.exits.items() if bad[exit]]
            raise ValueError(
                f"NaN score at step {self.index} after depths {depths}: the hidden states or the heads are not finite"
            )

    def _score(self, exit: int, rows: Tensor | None) -> Tensor:
        num_elements = len(self.alive)
        if rows is None:
            return torch.full((num_elements,), torch.nan, device=self.session.device)
        repeats = self.session.repeats
        if repeats and len(rows) == len(self.session.rows):  # the usual case, cheaper than a scatter
            score = rows if rows.dtype == torch.float32 else rows.float()
            score = score if repeats == 1 else score.view(repeats, num_elements).amin(0)
        else:
            score = per_element(rows, self._elements_there, num_elements=num_elements)
        score = score if self.session.vote is None else self.session.vote.least(score)
        self._scores_there[exit] = score
        self.measured[exit] += len(rows)
        return score  # (E,)

    def _leave_where(self, stopped: Tensor, depth: int) -> Departure | None:
        if True not in stopped.tolist():  # the usual case; a list of few is quicker to search than a tensor
            return None
        return self._leave(depth, stopped) if bool((stopped & self.alive).any()) else None

    def _leave(self, depth: int, stopped: Tensor) -> Departure:
        elements = self.session.rows[self.rows]  # (r,)
        leaving = stopped[elements]  # (r,) bool
        leave, keep = leaving.nonzero()[:, 0], (~leaving).nonzero()[:, 0]
        departure = Departure(self.session.heads_exits[depth], leave, keep, self.rows[leave])
        self.depths = self.depths.masked_fill(stopped & self.alive, depth)
        self.alive = self.alive & ~stopped
        self._counts = self._counts.masked_fill(stopped, 0)
        self.rows = self.rows[keep]
        self._elements_there = elements[keep].to(self.session.device, non_blocking=True)
        return departure

    def answer_evaluated(self, depth: int, num_rows: int) -> None:
        """The driver says: the head at that depth was evaluated on so many rows."""
        self.answered[self.session.exits[depth]] += num_rows
