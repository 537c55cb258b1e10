"""The best linear prediction of a model's output at a step from its outputs at earlier ones, by least squares along recorded trajectories:
per step, or jointly for all cached steps of a run.

Here: second moments and the weights that follow. Not here: trajectories (trajectories.py), the cache (core/history.py).
S steps of a trajectory, R rows, M cached values, N unknown weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEAR = 1e-3  # two times this near are one
ALONE = 1.0  # what each miss of a run counts by itself, beside their sum
FLOOR = 1e-3  # by itself no miss counts less than one whose weight is so much of the largest
NOTHING = 1e-9  # a weight of so much of the largest is none
RIDGE = 1e-13  # of the largest moment, over a run of each one's own: steps lie near one another, and what tells them apart is far below it


@dataclass(frozen=True, eq=False)
class RunWeights:
    """The cached outputs of one static schedule: `weights` (S, M) of the values at steps `places` (S, M), newest first. Where nothing is
    cached the place is -1; NaN at compute steps, and at steps whose errors weigh nothing."""

    places: Tensor
    weights: Tensor


class LinearPrediction(nn.Module):
    """`w = K^-1 k` with `K_mn = E[v_m v_n]`, `k_m = E[v_m v_t]`: the weights of cached values v_m that predict v_t with the least mean
    square error (Wiener, 1949; the mean over images and values is the expectation).

    That is best for each step by itself. The errors of a run's cached steps are small, but they point the same way (least squares draws
    each a little towards the mean) and add up. Where the compute steps are known beforehand, `joint_weights` fits all weights together.

    Made for the steps of one solver. Tables are NaN until `fit`. They stay in float32, the moments as what float32 holds of them and what
    it leaves, and are used in float64. joint: whether there is a table of error weights, which `joint_weights` needs.
    """

    def __init__(self, num_steps: int, *, joint: bool = False):
        super().__init__()
        self.register_buffer("times", torch.full((num_steps,), torch.nan))
        self.register_buffer("moments", torch.full((2, num_steps, num_steps), torch.nan))
        self.register_buffer("error_weights", torch.full((num_steps,), torch.nan) if joint else None)

    def _apply(self, fn, recurse=True):
        tables = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, table in tables.items():
            if getattr(self, name).dtype != table.dtype:  # half precision has no room for them
                setattr(self, name, table.to(getattr(self, name).device))
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether all tables are there."""
        return not any(bool(table.isnan().any()) for table in self.buffers())

    @torch.no_grad()
    def fit(self, times: Tensor, values: Tensor, error_weights: Tensor | None = None) -> None:
        """Take the moments of values (S, B, ...), the outputs at times (S,). error_weights (S,): how far an error of one unit at each step
        moves the final image; needed where there is a table of them, and only there.

        Raises:
            ValueError: another number of steps, values that are not finite, times that are not distinct, error weights that are missing,
                not expected, below 0 or not finite.
        """
        steps = len(self.times)
        if times.shape != (steps,) or len(values) != steps or not bool(values.isfinite().all()):
            raise ValueError(
                f"times {tuple(times.shape)}, values {tuple(values.shape)}, expected {steps} of both, all finite"
            )
        if len(times.unique()) != steps:
            raise ValueError(f"times {times.tolist()}, expected distinct ones: a solver with one question per step")
        if not bool(values.flatten(1).any(1).all()):
            raise ValueError(
                "values that are all zero at a step, expected what a model says: there is nothing to predict from"
            )
        if (error_weights is None) != (self.error_weights is None):
            raise ValueError(
                f"error_weights={error_weights}, joint={self.error_weights is not None}, expected both or neither"
            )
        if error_weights is not None:
            if error_weights.shape != (steps,) or not bool(
                (error_weights.float().isfinite() & (error_weights >= 0)).all()
            ):
                raise ValueError(
                    f"error_weights={error_weights.tolist()}, expected {steps} finite numbers, none below 0"
                )
            self.error_weights.copy_(error_weights)
        flat = values.flatten(1).double()  # (S, n)
        self.times.copy_(times)
        moments = flat @ flat.T / flat.shape[1]  # (S, S)
        self.moments.copy_(torch.stack([moments, moments - moments.float().double()]))

    @torch.no_grad()
    def joint_weights(self, full: Sequence[int], length: int) -> RunWeights:
        """The weights of all cached outputs of a run with compute steps `full`, from the last `length` = M of those: they make

            E |sum_t c_t e_t|^2 + ALONE * sum_t max(c_t, FLOOR max(c))^2 E |e_t|^2,  e_t = sum_m w_tm v_m - v_t,

        least, with c_t = `error_weights`, their maximum over the cached steps: the error of all together in the final image, and of each by
        itself. In the first term alone, errors could be as large as they like so long as they cancel out along the recorded
        trajectories; and a step that weighs nearly nothing could be given over to the errors of others. Of a solver that clips clean
        images nothing is known here.

        Raises:
            ValueError: tables that are missing; full steps that are not ascending places of the run, the first of them 0; a length
                below 1.
        """
        steps, places = len(self.times), list(full)
        if isinstance(length, bool) or not all(isinstance(one, int) for one in (length, *places)):
            raise ValueError(f"full steps {tuple(full)}, length={length!r}, expected whole numbers")
        if self.error_weights is None or not self.is_fitted:
            raise ValueError("a prediction without (all of) its tables: expected joint=True, and fit first")
        if not places or places != sorted(set(places)) or places[0] != 0 or places[-1] >= steps or length < 1:
            raise ValueError(
                f"full steps {tuple(full)} of {steps}, length={length}, expected ascending places, the first of them 0, and at least 1"
            )
        table, weight = self.moments.cpu().double().sum(0), self.error_weights.cpu().double()  # (S, S), (S,)
        known = torch.full((steps, length), -1)
        for step in set(range(steps)) - set(places):
            newest = [place for place in places if place < step][::-1][:length]
            known[step, : len(newest)] = torch.tensor(newest)
        most = weight.where(known[:, 0] >= 0, 0.0).max()  # of the steps that memory answers
        asked = (known >= 0) & (weight > NOTHING * most)[:, None]  # (S, M): the N unknowns
        at, said = asked.nonzero()[:, 0], known[asked]  # (N,): the step, and that of the value
        answers = asked[:, 0]  # (S,)
        alone = ALONE * (FLOOR * most / weight[at]).clamp(min=1.0).square()  # (N,)
        unknown = table[said][:, said] * (1 + alone * (at[:, None] == at))  # (N, N), of c_t w_tm
        unknown.diagonal().mul_(1 + RIDGE)
        wanted = table[said][:, answers] @ weight[answers] + alone * weight[at] * table[said, at]  # (N,)
        weights = torch.full((steps, length), torch.nan, dtype=torch.float64)
        weights[answers] = 0.0
        weights[asked] = torch.linalg.solve(unknown, wanted) / weight[at]
        return RunWeights(known.to(self.times.device), weights.to(self.times.device))

    def weights(self, times: Tensor, time: Tensor, run: RunWeights | None = None) -> Tensor:
        """times (R, M) of the cached values, NaN where nothing is; time (R,) -> (R, M), 0 where nothing is cached. NaN for rows without a
        cache, or whose times are not the trajectory's. run: what holds for rows whose compute steps are its own."""
        there = ~times.isnan()  # (R, M)
        places, found = self._places(times)
        now, found_now = self._places(time)
        known = (found | ~there).all(1) & found_now & there.any(1)
        both = there[:, :, None] & there[:, None, :]
        unit = torch.eye(times.shape[1], dtype=torch.float64, device=times.device)
        inner = torch.where(both, self._moments(places[:, :, None], places[:, None, :]), unit)  # (R, M, M)
        cross = torch.where(there, self._moments(places, now[:, None]), 0.0)  # (R, M)
        inner = inner + RIDGE * unit * inner.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
        solved = torch.linalg.solve(inner.where(known[:, None, None], unit), cross)  # (R, M)
        if run is not None:
            planned, together = (table.to(times.device)[now] for table in (run.places, run.weights))  # (R, M)
            as_planned = (torch.where(there, places, -1) == planned).all(1)  # (R,)
            solved = torch.where(as_planned[:, None] & ~together.isnan(), together, solved)
        return torch.where(known[:, None], solved, torch.nan)

    def _moments(self, one: Tensor, other: Tensor) -> Tensor:
        """Those of two places each (...), in float64."""
        return self.moments[:, one, other].double().sum(0)

    def _places(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Which step each time is, and whether it is one."""
        near = (times[..., None] - self.times.double()).abs() < NEAR  # (..., S)
        return near.long().argmax(-1), near.any(-1)
