"""Session: a policy applied to one run; StepSession: one step of it, the only code in the project that stops anything.

Loops, hooks and the replay drive them. E samples, R rows (R >= E: guidance gives an image two; how many may change between steps),
K exits of the policy, L layers, S steps. One host sync per decision (marked) brings the scores over; decisions and bookkeeping are the
host's: plain lists, since an operation on a tensor of a few numbers between two blocks costs more than a loop over them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ee_diffusion.core.criteria import DepthTable, ExitPoint, State
from ee_diffusion.core.distributed import JointDecision
from ee_diffusion.core.history import OutputHistory
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.rows import ExitedRows, least_of
from ee_diffusion.core.schedules import depth_of
from ee_diffusion.core.scores import PendingScores, pending_scores
from ee_diffusion.core.trace import Trace


def begin(
    policy: Policy,
    num_layers: int,
    depths: tuple[int, ...],
    *,
    rows: Tensor,
    num_steps: int,
    samples: Tensor | None = None,
    device: torch.device | str = "cpu",
    keeps_exited_rows: str = "",
    joint_decision: JointDecision | None = None,
) -> Session:
    """Begin a run under a policy.

    Args:
        num_layers: L. depths: executed blocks at each exit of the heads.
        rows: (R,) the sample (0..E-1) of each row. num_steps: S.
        samples: (E,) ids of the samples (for plans); default 0..E-1.
        keeps_exited_rows: why the driver carries along rows that stopped, for the report; empty: it drops them.
        joint_decision: ranks that run the model together and so decide together; None: this process decides alone.

    Raises:
        ValueError: whatever does not fit together, before any work.
    """
    if joint_decision is not None:
        ids = None if samples is None else samples.tolist()
        facts = f"{policy.to_dict()}, {num_layers} blocks, exits {depths}, rows {rows.tolist()}, {num_steps} steps, ids {ids}"
        joint_decision.require_alike(facts, torch.device(device))
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps={num_steps!r}, expected a whole number, at least 1")
    _check_rows(rows, samples)
    return Session(
        policy,
        num_layers,
        depths,
        exits=policy.validate(num_steps=num_steps, num_layers=num_layers, depths=depths),
        rows=rows.cpu(),
        num_steps=num_steps,
        samples=samples,
        device=device,
        keeps_exited_rows=keeps_exited_rows,
        joint_decision=joint_decision,
    )


def _check_rows(rows: Tensor, samples: Tensor | None) -> None:
    if not isinstance(rows, Tensor):
        raise ValueError(f"rows={rows!r}, expected a tensor: the sample of each row")
    if samples is not None and (not isinstance(samples, Tensor) or samples.is_floating_point()):
        raise ValueError(f"samples={samples!r}, expected a tensor of ids, whole numbers")
    if rows.ndim != 1 or len(rows) == 0:
        raise ValueError(f"rows is {tuple(rows.shape)}, expected (R,) with at least one row: the batch is empty")
    if rows.is_floating_point() or rows.unique().tolist() != list(range(int(rows.max()) + 1)):
        raise ValueError("rows must name every sample 0..E-1 at least once")


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
        self._samples = session.samples_of_rows  # (r,) sample of each running row
        self.rows_per_sample = self._counts = session.rows_per_sample  # (E,) running rows of each sample
        self.work = [[0] * len(self._counts)] * num_layers  # (L, E) rows that each layer was executed on
        self.left = [num_layers if count else -1 for count in self._counts]  # (E,)
        self._scores: dict[int, list[float]] = {}  # exit -> (E,), NaN where not measured
        self._unsound: list[int] = []  # depths where a sample that was running has no number
        self._pending: PendingScores | None = None  # scores that decide at the next exit
        self._state: State = {}
        if policy.criterion is not None and leader is None:
            self._state = policy.criterion.start(session.samples, step=index, previous=session.state)

    def leave_out(self, absent: list[bool]) -> None:
        """Samples (E,) that have no part in this step: depth -1, no row runs."""
        self._mark(absent, -1)
        keep = [place for place, sample in enumerate(self._samples) if not absent[sample]]
        self._stay(keep)

    @property
    def depths(self) -> Tensor:
        """(E,) where each sample left, so far; L: nowhere before the end; -1: absent."""
        return torch.tensor(self.left, dtype=torch.int16)

    @property
    def scores(self) -> list[list[float]]:
        """(K, E), NaN where not measured."""
        nothing = [math.nan] * len(self.left)
        return [self._scores.get(exit, nothing) for exit in range(len(self.measured))]

    @property
    def finished(self) -> bool:
        """True when no row is running any more."""
        return not self._samples

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
        return self.layers[layer] and bool(self._samples)

    def executed(self, layer: int) -> None:
        """The driver says: the layer ran on the running rows (on all rows, where those that stopped are carried along)."""
        self.work[layer] = self.rows_per_sample if self.session.keeps_exited_rows else self._counts

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
        if depth not in session.exits or not self._samples:
            return None
        if depth == self.last:  # decided before the step began: no score, no sync
            return self._leave([True] * len(self.left), depth)
        if self.leader is not None:
            return self._leave([left <= depth for left in self.leader.left], depth)
        if session.policy.criterion is None:
            return None
        if self.looks_ahead:  # decides on what was asked at the exit before
            return None if self._pending is None else self._decide(self._pending, depth)
        seen = measure(session.heads_exits[depth])
        if seen is not None:
            return self._decide(self._asked(seen, depth), depth)
        return self._stop(session.no_scores, self._where(depth), depth)

    def look(self, depth: int, measure: Callable[[int], Tensor | None]) -> None:
        """Where a policy is late: ask, after the rows that left at `depth` are gone, for the scores (r,) that decide at the next exit.
        Nothing waits for them here. Where nobody decides on them, `measure` is not called."""
        following = self.session.next_exits.get(depth)
        if not self.looks_ahead or following in (None, self.last) or not self._samples:
            return
        seen = measure(self.session.heads_exits[depth])
        self._pending = None if seen is None else self._asked(seen, depth)

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

    def _asked(self, seen: Tensor, depth: int) -> PendingScores:
        """seen (r,), the scores of the running rows, on their way to the host."""
        self.measured[self.session.exits[depth]] += len(seen)
        joint_decision = self.session.joint_decision  # of rows: their sample's least is then the same on all ranks
        said = seen if joint_decision is None else joint_decision.least(seen.float())
        return pending_scores(said, self._samples, depth, overlapping=self.looks_ahead)

    def _decide(self, pending: PendingScores, depth: int) -> ExitedRows | None:
        """On scores that were measured after `pending.depth` blocks, who leaves after `depth`."""
        criterion, where = self.session.policy.criterion, self._where(pending.depth)
        assert criterion is not None, "nothing was asked without a criterion"
        least = self._scores[where.exit] = self._least(pending)
        floor = criterion.floor(where)
        if floor is not None and not any(score > floor for score in least):
            return None
        return self._stop(torch.tensor(least, dtype=torch.float32), where, depth)  # (E,)

    def _stop(self, scores: Tensor, where: ExitPoint, depth: int) -> ExitedRows | None:
        criterion = self.session.policy.criterion
        assert criterion is not None, "nobody is stopped without a criterion"
        stop, self._state = criterion.decide(scores, where, self._state)
        return None if self.session.policy.record_all else self._leave(stop.tolist(), depth)

    def _least(self, pending: PendingScores) -> list[float]:
        """(E,): each sample's least safe row."""
        said = pending.read()  # the host sync of this exit
        if any(score != score for score in said):
            self._unsound.append(pending.depth)
        return least_of(said, pending.samples, num_samples=len(self.left))

    def _leave(self, stopped: list[bool], depth: int) -> ExitedRows | None:
        """The running rows of the samples that stopped (E,) leave; None: there is none."""
        if True not in stopped:
            return None
        samples, places, exit = self._samples, self._places, self.session.heads_exits[depth]
        leave = [place for place, sample in enumerate(samples) if stopped[sample]]
        if not leave:
            return None
        self._mark(stopped, depth)
        keep = [place for place, sample in enumerate(samples) if not stopped[sample]]
        self._stay(keep)
        return ExitedRows(exit, leave, keep, [places[place] for place in leave])

    def _stay(self, keep: list[int]) -> None:
        """Of the running rows only those at these places go on."""
        self._samples, self._places = (
            [self._samples[place] for place in keep],
            [self._places[place] for place in keep],
        )
        self.rows = torch.tensor(self._places) if keep else self.session.no_rows

    def _mark(self, stopped: list[bool], depth: int) -> None:
        """Samples (E,) that stop at a depth, if they had not before, have no running rows."""
        facts = list(zip(stopped, self._counts, self.left, strict=True))
        self.left = [depth if gone and count else before for gone, count, before in facts]
        self._counts = [0 if gone else count for gone, count, _ in facts]

    def answer_evaluated(self, depth: int, num_rows: int) -> None:
        """The driver says: the head at that depth was evaluated on so many rows."""
        self.answered[self.session.exits[depth]] += num_rows


class Session:
    """A policy applied to one run. State between steps is here and nowhere else. Made by `begin`."""

    def __init__(
        self,
        policy: Policy,
        num_layers: int,
        depths: tuple[int, ...],
        *,
        exits: tuple[int, ...],
        rows: Tensor,
        num_steps: int,
        samples: Tensor | None,
        device: torch.device | str,
        keeps_exited_rows: str = "",
        joint_decision: JointDecision | None = None,
    ):
        self.keeps_exited_rows = keeps_exited_rows  # why rows that stopped are carried along; empty: they are dropped
        self.joint_decision = joint_decision  # ranks that decide together
        self.policy, self.num_layers, self.num_steps, self.device = policy, num_layers, num_steps, torch.device(device)
        self.heads_exits = {depth: depths.index(depth) for depth in exits}  # depth -> exit among the heads
        self.exits = {depth: exit for exit, depth in enumerate(exits)}  # depth -> exit among the policy's
        self.next_exits = dict(itertools.pairwise(exits))  # depth -> depth of the exit that follows
        num_samples = 1 + int(rows.max())
        self._seat(rows, num_samples)
        self.no_scores = torch.full((num_samples,), torch.nan)
        self.samples = torch.arange(num_samples) if samples is None else torch.as_tensor(samples).cpu()
        if self.samples.shape != (num_samples,):
            raise ValueError(f"{tuple(self.samples.shape)} sample ids, expected ({num_samples},)")
        self.state: State | None = None
        self.histories: dict[
            int, OutputHistory
        ] = {}  # for heads that remember: what the rows' last full steps said, by call
        self.finished: list[StepSession] = []
        self._open: StepSession | None = None

    def _seat(self, rows: Tensor, num_samples: int) -> None:
        self.rows = rows  # (R,) sample of each row
        self.samples_of_rows: list[int] = rows.tolist()
        self.places, self.all_rows, self.no_rows = list(range(len(rows))), torch.arange(len(rows)), torch.arange(0)
        self.rows_per_sample: list[int] = torch.bincount(rows, minlength=num_samples).tolist()  # (E,)

    def regroup(self, rows: Tensor, sources: Sequence[int | None]) -> None:
        """From the next step on the batch has other rows (guidance that ends in mid-run): rows (R,), the sample of each, among those of
        the run. A sample without a row is absent. Row i remembers what row `sources[i]` of the batch before did, None: nothing; rows
        that are no source take their memory along.

        Raises:
            ValueError: a step is going on, or samples that the run does not have.
        """
        num_samples = len(self.samples)
        if self._open is not None or len(sources) != len(rows) or int(rows.max()) >= num_samples:
            raise ValueError(
                f"rows of samples {rows.tolist()} that go on from {list(sources)}: expected samples below {num_samples}, a source for "
                "each row, and no step that is going on"
            )
        self._seat(rows, num_samples)
        self.histories = {call: memory.regrouped(sources) for call, memory in self.histories.items()}

    def step(self, index: int, time: float, *, absent: Tensor | None = None) -> StepSession:
        """Begin step `index` at `time` (timestep or sigma). Steps come in order; the one before must be closed.

        `absent`: (E,) bool, samples that have no part in this step (sequences that have ended); None: all take part.

        Raises:
            ValueError: a step out of order or beyond the run; or one begun before the last was closed; absent of another shape.
        """
        if index != len(self.finished) or index >= self.num_steps or self._open is not None:
            raise ValueError(
                f"step {index} of {self.num_steps}, expected step {len(self.finished)} with the one before closed"
            )
        if absent is not None and absent.shape != (len(self.samples),):
            raise ValueError(f"absent is {tuple(absent.shape)}, expected ({len(self.samples)},): one for each sample")
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
        """A step that another session of the run took, and no sample of this one (a call of guidance that was not made)."""
        self.step(other.index, other.time, absent=torch.ones(len(self.samples), dtype=torch.bool)).close()

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
        """Everything that happened in the closed steps; `beside`: a session of the same run, samples are absent from its further steps.

        Raises:
            ValueError: no step was closed.
        """
        steps = [*self.finished, *map(self._missed, beside.finished[len(self.finished) :] if beside else ())]
        if not steps:
            raise ValueError("no step has been closed: there is nothing to trace")
        return Trace(
            samples=self.samples,
            rows=torch.tensor([step.rows_per_sample for step in steps]),
            times=torch.tensor([step.time for step in steps], dtype=torch.float64),
            exits=torch.tensor(list(self.exits), dtype=torch.int64),
            planned=torch.tensor([step.layers for step in steps]),
            depths=torch.tensor([step.left for step in steps], dtype=torch.int16),
            scores=torch.tensor([step.scores for step in steps]).view(len(steps), len(self.exits), len(self.samples)),
            ran=torch.tensor([step.work for step in steps], dtype=torch.int16).transpose(1, 2).contiguous(),
            measured=torch.tensor([step.measured for step in steps]),
            answered=torch.tensor([step.answered for step in steps]),
            policy=self.policy.to_dict(),
            recorded_all=self.policy.record_all,
            calls=tuple(step.calls for step in steps),
            keeps_exited_rows=self.keeps_exited_rows,
        )

    def _missed(self, other: StepSession) -> StepSession:
        """The same step without anybody of this session, which does not take note of it."""
        made = StepSession(self, other.index, other.time)
        made.leave_out([True] * len(self.samples))
        return made
