"""StepSession: the only code in the project that stops anything. Loops, hooks and the replay drive it.

E elements, R rows (R >= E: guidance gives an image two), K exits of the policy, L layers. One host sync per decision (marked) brings the
scores over; decisions and bookkeeping are the host's: plain lists, since an operation on a tensor of a few numbers that comes between
two blocks costs the clock more than a loop over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ee_diffusion.core.arriving import Arriving, sent
from ee_diffusion.core.criteria import DepthTable, ExitPoint, State
from ee_diffusion.core.rows import ExitedRows, least_of
from ee_diffusion.core.schedules import depth_of

if TYPE_CHECKING:
    from ee_diffusion.core.session import Session


class StepSession:
    """One step of a run: which rows a layer runs on, who leaves after a depth, what was executed."""

    def __init__(self, session: Session, index: int, time: float, leader: StepSession | None = None):
        self.leader = leader  # the forward whose depths this one follows
        self.calls = 1  # forwards of this step: itself and those that followed
        policy, num_layers, num_exits = session.policy, session.num_layers, len(session.exits)
        self.session, self.index, self.time = session, index, time
        self.layers = policy.schedule.layers(index, time, num_steps=session.num_steps, num_layers=num_layers)
        self.last = depth_of(self.layers)  # the depth at which everyone leaves
        self.rows = session.all_rows  # (r,) rows still running, as places in the whole batch
        self.measured, self.answered = [0] * num_exits, [0] * num_exits  # rows
        self._places = session.places  # (r,) the same; lists are replaced, never written to
        self._elements = session.elements_of_rows  # (r,) element of each running row
        self.rows_per_element = self._counts = session.rows_per_element  # (E,) running rows of each element
        self.work = [[0] * len(self._counts)] * num_layers  # (L, E) rows that each layer was executed on
        self.left = [num_layers if count else -1 for count in self._counts]  # (E,)
        self._scores: dict[int, list[float]] = {}  # exit -> (E,), NaN where not measured
        self._unsound: list[int] = []  # depths where an element that was running has no number
        self._arriving: Arriving | None = None  # scores that decide at the next exit
        self._state: State = {}
        if policy.criterion is not None and leader is None:
            self._state = policy.criterion.start(session.elements, step=index, previous=session.state)

    def leave_out(self, absent: list[bool]) -> None:
        """Elements (E,) that have no part in this step: depth -1, no row runs."""
        self._mark(absent, -1)
        keep = [place for place, element in enumerate(self._elements) if not absent[element]]
        self._stay(keep)

    @property
    def depths(self) -> Tensor:
        """(E,) where each element left, so far; L: nowhere before the end; -1: absent."""
        return torch.tensor(self.left, dtype=torch.int16)

    @property
    def scores(self) -> list[list[float]]:
        """(K, E), NaN where not measured."""
        nothing = [math.nan] * len(self.left)
        return [self._scores.get(exit, nothing) for exit in range(len(self.measured))]

    @property
    def finished(self) -> bool:
        """True when no row is running any more."""
        return not self._elements

    @property
    def measures(self) -> bool:
        """Whether scores are looked at."""
        return self.leader is None and not isinstance(self.session.policy.criterion, DepthTable | None)

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
        return self.layers[layer] and bool(self._elements)

    def executed(self, layer: int) -> None:
        """The driver says: the layer ran on the running rows (on all rows, where those that stopped are carried along)."""
        self.work[layer] = self.rows_per_element if self.session.frozen else self._counts

    def add_work_of(self, follower: StepSession) -> None:
        """Count what a following forward executed as this step's."""
        pairs = zip(self.work, follower.work, strict=True)
        self.work = [[mine + other for mine, other in zip(*pair, strict=True)] for pair in pairs]
        self.answered = [mine + other for mine, other in zip(self.answered, follower.answered, strict=True)]
        self.calls += 1

    def offer(self, depth: int, measure: Callable[[int], Tensor | None]) -> ExitedRows | None:
        """Decide after `depth` executed blocks. `measure(exit)` gives the scores (r,) of the running rows at that exit of the heads
        (None: the criterion looks at nothing); it is called only where an exit is possible.

        Returns the departure of the rows that leave, or None if all go on.
        """
        session = self.session
        if depth not in session.exits or not self._elements:
            return None
        if depth == self.last:  # decided before the step began: no score, no sync
            return self._leave([True] * len(self.left), depth)
        if self.leader is not None:
            return self._leave([left <= depth for left in self.leader.left], depth)
        if session.policy.criterion is None:
            return None
        if self.looks_ahead:  # decides on what was asked at the exit before
            return None if self._arriving is None else self._decide(self._arriving, depth)
        seen = measure(session.heads_exits[depth])
        if seen is not None:
            return self._decide(self._asked(seen, depth), depth)
        return self._stop(session.no_scores, self._where(depth), depth)

    def look(self, depth: int, measure: Callable[[int], Tensor | None]) -> None:
        """Where a policy is late: ask, after the rows that left at `depth` are gone, for the scores (r,) that decide at the next exit.
        Nothing waits for them here. Where nobody decides on them, `measure` is not called."""
        following = self.session.next_exits.get(depth)
        if not self.looks_ahead or following in (None, self.last) or not self._elements:
            return
        seen = measure(self.session.heads_exits[depth])
        self._arriving = None if seen is None else self._asked(seen, depth)

    @property
    def looks_ahead(self) -> bool:
        """Whether scores decide one exit after they were measured."""
        policy = self.session.policy
        return policy.delayed and self.measures and not policy.record_all

    def close(self) -> None:
        """End the step: the state goes to the session.

        Raises:
            ValueError: a score was NaN (it stopped nobody; the step is recorded), or the step is closed already.
        """
        self.session.require_open(self)
        if self.leader is None:
            self.session.state = self._state
        self.session.closed(self)
        if self._unsound:
            raise ValueError(
                f"NaN score at step {self.index} after depths {self._unsound}: the hidden states or the heads are not finite"
            )

    def _where(self, depth: int) -> ExitPoint:
        session = self.session
        return ExitPoint(self.index, session.num_steps, self.time, depth, session.exits[depth])

    def _asked(self, seen: Tensor, depth: int) -> Arriving:
        """seen (r,), the scores of the running rows, on their way to the host."""
        self.measured[self.session.exits[depth]] += len(seen)
        joint_decision = self.session.joint_decision  # of rows: their element's least is then the same on all ranks
        said = seen if joint_decision is None else joint_decision.least(seen.float())
        return sent(said, self._elements, depth, overlapping=self.looks_ahead)

    def _decide(self, arriving: Arriving, depth: int) -> ExitedRows | None:
        """On scores that were measured after `arriving.depth` blocks, who leaves after `depth`."""
        criterion, where = self.session.policy.criterion, self._where(arriving.depth)
        assert criterion is not None, "nothing was asked without a criterion"
        least = self._scores[where.exit] = self._least(arriving)
        floor = criterion.floor(where)
        if floor is not None and not any(score > floor for score in least):
            return None
        return self._stop(torch.tensor(least, dtype=torch.float32), where, depth)  # (E,)

    def _stop(self, scores: Tensor, where: ExitPoint, depth: int) -> ExitedRows | None:
        criterion = self.session.policy.criterion
        assert criterion is not None, "nobody is stopped without a criterion"
        stop, self._state = criterion.decide(scores, where, self._state)
        return None if self.session.policy.record_all else self._leave(stop.tolist(), depth)

    def _least(self, arriving: Arriving) -> list[float]:
        """(E,): each element's least safe row."""
        said = arriving.read()  # the host sync of this exit
        if any(score != score for score in said):
            self._unsound.append(arriving.depth)
        return least_of(said, arriving.elements, num_elements=len(self.left))

    def _leave(self, stopped: list[bool], depth: int) -> ExitedRows | None:
        """The running rows of the elements that stopped (E,) leave; None: there is none."""
        if True not in stopped:
            return None
        elements, places, exit = self._elements, self._places, self.session.heads_exits[depth]
        leave = [place for place, element in enumerate(elements) if stopped[element]]
        if not leave:
            return None
        self._mark(stopped, depth)
        keep = [place for place, element in enumerate(elements) if not stopped[element]]
        self._stay(keep)
        return ExitedRows(exit, leave, keep, [places[place] for place in leave])

    def _stay(self, keep: list[int]) -> None:
        """Of the running rows only those at these places go on."""
        self._elements, self._places = (
            [self._elements[place] for place in keep],
            [self._places[place] for place in keep],
        )
        self.rows = torch.tensor(self._places) if keep else self.session.no_rows

    def _mark(self, stopped: list[bool], depth: int) -> None:
        """Elements (E,) that stop at a depth, if they had not before, have no running rows."""
        facts = list(zip(stopped, self._counts, self.left, strict=True))
        self.left = [depth if gone and count else before for gone, count, before in facts]
        self._counts = [0 if gone else count for gone, count, _ in facts]

    def answer_evaluated(self, depth: int, num_rows: int) -> None:
        """The driver says: the head at that depth was evaluated on so many rows."""
        self.answered[self.session.exits[depth]] += num_rows
