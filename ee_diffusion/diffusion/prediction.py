"""The best linear prediction of what a model says at a step from what it said at earlier ones, from second moments along full courses.

Here: the moments and the weights that follow. Not here: whose courses (courses.py), remembering (core/memory.py).
S steps of a course, R rows, M remembered values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NEAR = 1e-3  # two times this near are one
RIDGE = 1e-13  # of the largest moment: steps lie near one another, and what tells them apart is far below it


class LinearPrediction(nn.Module):
    """`w = K^-1 k` with `K_mn = E[v_m v_n]`, `k_m = E[v_m v_t]`: the weights of remembered values v_m that miss v_t by the least mean
    square (Wiener, 1949; the mean over images and values is the expectation).

    Made for the steps of one solver. `times` and `moments` are NaN until `fit`. Tables stay in float32, the moments as what float32 holds
    of them and what it leaves, and are used in float64.
    """

    def __init__(self, num_steps: int):
        super().__init__()
        self.register_buffer("times", torch.full((num_steps,), torch.nan))
        self.register_buffer("moments", torch.full((2, num_steps, num_steps), torch.nan))

    def _apply(self, fn, recurse=True):
        tables = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, table in tables.items():
            if getattr(self, name).dtype != table.dtype:  # half precision has no room for them
                setattr(self, name, table.to(getattr(self, name).device))
        return self

    @torch.no_grad()
    def fit(self, times: Tensor, values: Tensor) -> None:
        """Take the moments of values (S, B, ...) that were said at times (S,).

        Raises:
            ValueError: another number of steps, values that are not finite, times that are not distinct.
        """
        steps = len(self.times)
        if times.shape != (steps,) or len(values) != steps or not bool(values.isfinite().all()):
            raise ValueError(
                f"times {tuple(times.shape)}, values {tuple(values.shape)}, expected {steps} of both, all finite"
            )
        if len(times.unique()) != steps:
            raise ValueError(f"times {times.tolist()}, expected distinct ones: a solver with one question per step")
        flat = values.flatten(1).double()  # (S, n)
        self.times.copy_(times)
        moments = flat @ flat.T / flat.shape[1]  # (S, S)
        self.moments.copy_(torch.stack([moments, moments - moments.float().double()]))

    def weights(self, times: Tensor, time: Tensor) -> Tensor:
        """times (R, M) of the remembered values, NaN where nothing is; time (R,) -> (R, M), 0 where nothing is remembered. NaN for rows
        that remember nothing, or whose times are not those of the course."""
        there = ~times.isnan()  # (R, M)
        places, found = self._places(times)
        now, found_now = self._places(time)
        known = (found | ~there).all(1) & found_now & there.any(1)
        both = there[:, :, None] & there[:, None, :]
        unit = torch.eye(times.shape[1], dtype=torch.float64, device=times.device)
        table = self.moments.double().sum(0)  # (S, S)
        inner = torch.where(both, table[places[:, :, None], places[:, None, :]], unit)  # (R, M, M)
        cross = torch.where(there, table[places, now[:, None]], 0.0)  # (R, M)
        inner = inner + RIDGE * unit * inner.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
        solved = torch.linalg.solve(inner.where(known[:, None, None], unit), cross)  # (R, M)
        return torch.where(known[:, None], solved, torch.nan)

    def _places(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Which step each time is, and whether it is one."""
        near = (times[..., None] - self.times.double()).abs() < NEAR  # (..., S)
        return near.long().argmax(-1), near.any(-1)
