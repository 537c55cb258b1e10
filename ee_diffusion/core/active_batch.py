"""Lane: carries the running rows of one forward through the blocks, sets answers aside, puts them back. And the plain loop over blocks.

The diffusers hooks drive the same Lane. R rows of the batch, r running rows, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ee_diffusion.core.exits import ExitHeads, ExitInputs
from ee_diffusion.core.rows import ExitedRows, rows_of
from ee_diffusion.core.session import StepSession


class ActiveBatch:
    """One forward under one step session. Rows that leave are dropped; their answers wait here.

    `context`: tensors with leading R that the heads may look at (for diffusion: `timestep`), or tuples of tensors that all rows share.
    """

    def __init__(self, step: StepSession, heads: ExitHeads, context: Mapping[str, Tensor]):
        self.step, self.heads = step, heads
        self.context = dict(context)  # of the running rows
        self.num_rows = len(step.session.rows)
        self.answers: list[tuple[list[int], Tensor]] = []  # (rows, answer)
        self.observed: ExitInputs | None = None  # the last measured exit's: who went on may still want its answer
        self._hidden: Tensor  # what is being offered

    def offer(self, depth: int, hidden: Tensor) -> Tensor:
        """Let rows leave after `depth` blocks: hidden (r, N, D) -> hidden of the rows that go on (possibly none)."""
        if depth not in self.step.session.exits:
            return hidden
        before, self._hidden = self.observed, hidden
        departure = self.step.offer(depth, self._measure)
        answer = self._newly_seen(depth, before)
        if departure is not None:
            if answer is None:  # only where it is taken
                self.step.answer_evaluated(depth, len(departure.leave))
            hidden = self._part(departure, hidden, answer)
        before, self._hidden = self.observed, hidden
        self.step.look(depth, self._measure)
        self._newly_seen(depth, before)
        return hidden

    def _newly_seen(self, depth: int, before: ExitInputs | None) -> Tensor | None:
        """Take note of what was measured since `before`; -> the answers (r, ...), if the scores were made of them."""
        seen = self.observed
        if seen is None or seen is before:
            return None
        self.context |= seen.carried
        if not seen.answered:
            return None
        self.step.answer_evaluated(depth, len(self._hidden))
        return seen.answer

    def _measure(self, exit: int) -> Tensor | None:
        """The scores (r,) of the running rows at an exit of the heads."""
        criterion = self.step.session.policy.criterion
        assert criterion is not None, "nothing is measured without a criterion"
        self.observed = ExitInputs(self.heads, exit, self._hidden, self.context)
        return criterion.measure(self.observed)

    def _part(self, departure: ExitedRows, hidden: Tensor, answer: Tensor | None) -> Tensor:
        """Set the answers of those who leave aside; -> hidden of those who go on. `answer` (r, ...): all answers, if they are known."""
        if not departure.keep:  # all leave: no row has to be looked up
            answer = self.heads.answer(departure.exit, hidden, self.context) if answer is None else answer
            self.answers.append((departure.rows, answer))
            return hidden[:0]  # (0, N, D)
        leave, keep = (torch.tensor(places, device=hidden.device) for places in (departure.leave, departure.keep))
        if answer is None:
            context = {name: rows_of(value, leave) for name, value in self.context.items()}
            leaving = hidden.index_select(0, leave)  # faster than hidden[leave]
            answer = self.heads.answer(departure.exit, leaving, context)
        else:
            answer = answer.index_select(0, leave)
        self.answers.append((departure.rows, answer))
        self.context = {name: rows_of(value, keep) for name, value in self.context.items()}
        return hidden.index_select(0, keep)  # (r, N, D)

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
        if len(self.answers) == 1 and len(self.answers[0][0]) == self.num_rows:  # all left together
            return self.answers[0][1].to(values.dtype)
        whole = values.new_zeros((self.num_rows, *values.shape[1:]))
        parts = [(self.step.rows, values), *((torch.tensor(rows), answer) for rows, answer in self.answers)]
        for rows, answer in parts:
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
    lane = ActiveBatch(step, heads, context or {})
    for layer, block in enumerate(blocks):
        hidden = lane.offer(layer, hidden)  # (r, N, D)
        if step.runs(layer):
            hidden = block(hidden)
            step.executed(layer)
    output = tail(lane.put_back(hidden)) if heads.space == "hidden" else lane.put_back(tail(hidden))
    step.close()
    return output
