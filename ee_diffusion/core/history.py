"""The history of a run's outputs, row by row, and its extrapolation in time. Explicit state, passed in and out.

Here: appending and extrapolating. Not here: what of a model's output is cached (the sides). R rows, M cached values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class OutputHistory:
    """The last M values of each row with their times; they are extrapolated by the polynomial through those that are there.

    `values` (R, M, ...), newest first. `times` (R, M): NaN where nothing is cached yet. `bend` (R,): how far the extrapolation was from
    the newest value when that came (root mean square), over `remainder` at that time; NaN until it could be measured.

    Rows differ: each holds the steps at which it ran to the end.
    """

    values: Tensor
    times: Tensor
    bend: Tensor

    @classmethod
    def empty(cls, like: Tensor, *, length: int) -> OutputHistory:
        """Nothing cached yet, for rows of the shape of `like` (R, ...) and `length` = M values of each.

        Raises:
            ValueError: length below 1.
        """
        if length < 1:
            raise ValueError(f"a history of length {length}, expected at least 1 value")
        num_rows, nan = len(like), torch.nan
        return cls(
            like.new_zeros(num_rows, length, *like.shape[1:]),
            torch.full((num_rows, length), nan, dtype=torch.float64, device=like.device),
            torch.full((num_rows,), nan, dtype=torch.float64, device=like.device),
        )

    @property
    def count(self) -> Tensor:
        """How many values each row holds, (R,)."""
        return (~self.times.isnan()).sum(1)

    def weights(self, time: Tensor) -> Tensor:
        """The weights of the cached values in `extrapolate` at time (R,) -> (R, M); they add up to 1 where anything is cached, else 0."""
        there = ~self.times.isnan()  # (R, M)
        length = self.times.shape[1]
        ahead = time[:, None] - self.times  # (R, M): t - t_m
        apart = self.times[:, :, None] - self.times[:, None, :]  # (R, M, M): t_j - t_m
        other = there[:, None, :] & ~torch.eye(length, dtype=torch.bool, device=there.device)  # (R, M, M)
        factors = torch.where(other, ahead[:, None, :] / torch.where(other, apart, 1.0), 1.0)
        return torch.where(there, factors.prod(2), 0.0)  # (R, M)

    def extrapolate(self, time: Tensor) -> Tensor:
        """The polynomial through what each row holds (Lagrange, degree count - 1) at time (R,) -> (R, ...); zeros for rows
        without a value."""
        return weighted(self.values, self.weights(time))

    def remainder(self, time: Tensor) -> Tensor:
        """`prod_m |t - t_m|` over what each row holds, at time (R,) -> (R,): the error of the extrapolation grows like it."""
        return torch.where(self.times.isnan(), 1.0, (time[:, None] - self.times).abs()).prod(1)

    def expected_error(self, time: Tensor) -> Tensor:
        """`bend * remainder` at time (R,) -> (R,), root mean square: the error of the extrapolation if the trajectory bends on as before.

        NaN for a row whose extrapolation has never been compared with a value, whose history is not full (its polynomial changes its
        degree), or at the time of its newest value: a solver's second stage has another input, of which the history knows nothing.
        """
        full = (self.count == self.times.shape[1]) & (time != self.times[:, 0])
        return torch.where(full, self.bend * self.remainder(time), torch.nan)

    def regrouped(self, sources: Sequence[int | None]) -> OutputHistory:
        """The history of a batch whose row i goes on from row `sources[i]` of this one; None: a row without a value yet."""
        device = self.values.device
        taken = torch.tensor([0 if source is None else source for source in sources], device=device)
        new = torch.tensor([source is None for source in sources], device=device)
        values, times, bend = (tensor.index_select(0, taken) for tensor in (self.values, self.times, self.bend))
        wide = new.reshape(-1, *[1] * (values.ndim - 1))
        return OutputHistory(
            values.masked_fill(wide, 0.0), times.masked_fill(new[:, None], torch.nan), bend.masked_fill(new, torch.nan)
        )

    def append(self, rows: Tensor, value: Tensor, time: Tensor) -> OutputHistory:
        """The history after rows (r,) put out value (r, ...) at time (r,). The others keep what they hold.

        Raises:
            ValueError: shapes that do not fit.
        """
        expected = (len(rows), *self.values.shape[2:])
        if value.shape != expected or time.shape != (len(rows),):
            raise ValueError(
                f"value {tuple(value.shape)} and time {tuple(time.shape)}, expected {expected} and one time a row"
            )
        past = OutputHistory(*(tensor.index_select(0, rows) for tensor in (self.values, self.times, self.bend)))
        missed = (past.extrapolate(time) - value).flatten(1).double().square().mean(1).sqrt()  # (r,)
        again = (
            past.times[:, 0] == time
        )  # a solver may ask twice at one time: the later answer takes the place of the first
        known = (past.count == self.times.shape[1]) & ~again
        bend = torch.where(known, missed / past.remainder(time), past.bend)
        return OutputHistory(
            self.values.index_copy(0, rows, _push(past.values, value, again)),
            self.times.index_copy(0, rows, _push(past.times, time.double(), again)),
            self.bend.index_copy(0, rows, bend),
        )


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """values (R, M, ...), weights (R, M) -> (R, ...)."""
    weights = weights.to(values.dtype).reshape(*weights.shape, *[1] * (values.ndim - 2))
    return (weights * values).sum(1)  # (R, ...)


def _push(past: Tensor, newest: Tensor, again: Tensor) -> Tensor:
    """past (r, M, ...) with `newest` (r, ...) before it, the oldest dropped; where `again` (r,), the newest is replaced instead."""
    again = again.reshape(-1, *[1] * (past.ndim - 1))
    return torch.cat([newest[:, None], torch.where(again, past[:, 1:], past[:, :-1])], 1)
