"""Times of steps: what a forward says of its own, and which of a scheduler's a run goes through.

Here: from arguments to times. Not here: which forwards are steps (run_tracker.py). R rows.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ee_diffusion.diffusion.model_specs import ModelSpec


def times_of(family: ModelSpec, timestep: Any, sample: Tensor) -> Tensor:
    """A forward's `timestep` for sample (R, ...) -> (R,) in the scheduler's units. Where every token has a time of its own, a row's is its
    latest (noisiest). One time for all rows stays one (`expand`).

    Raises:
        ValueError: neither one time nor one a row.
    """
    times = torch.as_tensor(timestep, device=sample.device)
    if times.ndim != 1:
        times = times.amax(-1) if times.ndim > 1 else times.reshape(-1)
    if len(times) not in (1, len(sample)):
        raise ValueError(f"{len(times)} timesteps for {len(sample)} rows, expected one or one a row")
    if family.time != (1.0, 0.0):
        shared = len(times) > 1 and times.stride(0) == 0
        times = (times[:1] if shared else times).float() * family.time[0] + family.time[1]
    return times if len(times) == len(sample) else times.expand(len(sample))


def times_from(scheduler: SchedulerMixin, time: float, precision: torch.dtype, count: int | None) -> list[float]:
    """The timesteps of a run (image to image begins in the middle) whose first forward is at `time`, which the model sees rounded to
    `precision`: from where the scheduler says that it begins, or else the last `count` (None: that is not known), or else from the
    nearest one on; at most `count`."""
    planned = [float(one) for one in scheduler.timesteps]
    tolerance = 1e-3 + (1000 * torch.finfo(precision).eps if precision.is_floating_point else 0)
    near = [place for place, one in enumerate(planned) if abs(one - time) <= tolerance]
    said = [getattr(scheduler, "begin_index", None), None if count is None else len(planned) - count]
    nearest = min(near, key=lambda place: abs(planned[place] - time), default=0)
    begin = next((place for place in said if place in near), nearest)
    return planned[begin:][:count]
