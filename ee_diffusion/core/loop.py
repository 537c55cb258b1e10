"""Lane: carries the running rows of one forward through the blocks, sets answers aside, puts them back. And the plain loop over blocks.

The diffusers hooks drive the same Lane. R rows of the batch, r running rows, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ee_diffusion.core.heads import ExitHeads
from ee_diffusion.core.scores import Observation
from ee_diffusion.core.session import StepSession


class Lane:
    """One forward under one step session. Rows that leave are dropped; their answers wait here.

    `context`: tensors with leading R that the heads may look at (for diffusion: `timestep`). `keep`: depths whose hidden states of the
    rows that go on are kept in `kept`, for heads that remember them; rows that leave later leave there too.
    """

    def __init__(self, step: StepSession, heads: ExitHeads, context: Mapping[str, Tensor], *, keep: Sequence[int] = ()):
        self.step, self.heads = step, heads
        self.context = dict(context)  # of the running rows
        self.num_rows = len(step.session.rows)
        self.answers: list[tuple[Tensor, Tensor]] = []  # (rows, answer)
        self.observed: Observation | None = None  # the last measured exit's: who went on may still want its answer
        self.keep, self.kept = frozenset(keep), dict[int, Tensor]()  # depth -> (r, N, D)

    def offer(self, depth: int, hidden: Tensor) -> Tensor:
        """Let rows leave after `depth` blocks: hidden (r, N, D) -> hidden of the rows that go on (possibly none)."""
        hidden = self._offered(depth, hidden)
        if depth in self.keep:
            self.kept[depth] = hidden
        return hidden

    def _offered(self, depth: int, hidden: Tensor) -> Tensor:
        seen: list[Observation] = []

        def measure(exit: int) -> Tensor | None:
            self.observed = Observation(self.heads, exit, hidden, self.context)
            seen.append(self.observed)
            criterion = self.step.session.policy.criterion
            return None if criterion is None else criterion.measure(seen[0])

        departure = self.step.offer(depth, measure)
        answered = bool(seen) and seen[0].answered  # the score was made of the answers
        if answered:
            self.step.answer_evaluated(depth, len(hidden))
        if seen:
            self.context |= seen[0].carried
        if departure is None:
            return hidden
        leave, keep = departure.leave.to(hidden.device), departure.keep.to(hidden.device)
        if answered:
            answer = seen[0].answer.index_select(0, leave)
        else:  # only where it is taken
            context = {name: value.index_select(0, leave) for name, value in self.context.items()}
            answer = self.heads.answer(departure.exit, hidden.index_select(0, leave), context)
            self.step.answer_evaluated(depth, len(leave))
        self.answers.append((departure.rows, answer))
        self.context = {name: value.index_select(0, keep) for name, value in self.context.items()}
        self.kept = {depth: value.index_select(0, keep) for depth, value in self.kept.items()}
        return hidden.index_select(0, keep)  # (r, N, D); faster than hidden[keep]

    def running(self, tensor: Tensor) -> Tensor:
        """Rows of a whole-batch tensor (R, ...) that are still running -> (r, ...)."""
        rows = self.step.rows
        return tensor if len(rows) == self.num_rows else tensor.index_select(0, rows.to(tensor.device))

    def put_back(self, values: Tensor) -> Tensor:
        """values (r, ...) of the rows that ran to the end -> (R, ...) with every row that left at its place.

        Nobody left: `values` itself, untouched. Rows that had no part in the step get zeros.
        """
        if len(values) == self.num_rows:
            return values
        whole = values.new_zeros((self.num_rows, *values.shape[1:]))
        for rows, answer in [(self.step.rows, values), *self.answers]:
            whole.index_copy_(0, rows.to(whole.device), answer.to(whole.dtype))
        return whole

    def spread(self, values: Tensor) -> Tensor:
        """values (r, ...) -> (R, ...) with zeros in the place of the rows that left."""
        if len(values) == self.num_rows:
            return values
        whole = values.new_zeros((self.num_rows, *values.shape[1:]))
        whole.index_copy_(0, self.step.rows.to(whole.device), values)
        return whole


def run_blocks(
    blocks: Sequence[Callable[[Tensor], Tensor]],
    hidden: Tensor,
    step: StepSession,
    *,
    heads: ExitHeads,
    tail: Callable[[Tensor], Tensor],
    context: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The plain loop: blocks over hidden (R, N, D), dropping rows as they stop, then the tail -> (R, ...). Closes the step.

    Raises:
        ValueError: hidden with another number of rows than the session; NaN scores (after the work, the step being recorded).
    """
    if len(hidden) != len(step.session.rows) or len(blocks) != step.session.num_layers:
        raise ValueError(
            f"{len(hidden)} rows through {len(blocks)} blocks, the session was started for "
            f"{len(step.session.rows)} rows and {step.session.num_layers} blocks"
        )
    step.session.require_open(step)
    lane = Lane(step, heads, context or {})
    for layer, block in enumerate(blocks):
        hidden = lane.offer(layer, hidden)  # (r, N, D)
        if step.runs(layer):
            hidden = block(hidden)
            step.executed(layer)
    output = tail(lane.put_back(hidden)) if heads.space == "hidden" else lane.put_back(tail(hidden))
    step.close()
    return output
