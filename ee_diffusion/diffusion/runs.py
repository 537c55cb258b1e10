"""Runs: which forwards of a stock pipeline belong together. A run begins when the pipeline starts a loop, the timestep rises, or the shape
changes; it ends with the pipeline's call. A repeated timestep is the second call of guidance or the next stage of a solver.

Here: from forwards to step sessions. Not here: how a forward runs under one (attach.py). B images, R rows, S steps, E elements.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from ee_diffusion.core.intercept import Interception, restore_all
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.session import Session
from ee_diffusion.core.step_session import StepSession
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.families import Family


class Runs:
    """Turns the forwards of a transformer into the steps of runs, under one policy. Nothing of a run survives it or an exception."""

    def __init__(
        self,
        policy: Policy,
        start: Callable[..., Session],
        transformer: nn.Module,
        family: Family,
        *,
        pipeline: DiffusionPipeline | None,
        branches: int | None,
        num_steps: int | None,
        renew: Callable[[], None],
        begins: Callable[[int], None] = lambda num_steps: None,
    ):
        self._begins = begins  # called when a run begins, with its number of steps
        self._renew = renew  # called when a call has ended, for model offload then replaces the transformer's forward
        self.policy, self._start, self._family, self._pipeline = policy, start, family, pipeline
        self._given_branches, self._given_steps = branches, num_steps
        self._last: Trace | None = None
        self._guided: bool | None = None  # what the pipeline said when it encoded its prompts
        self._branch: str | None = None  # the name the pipeline gives to the forward that comes ("cond", "uncond")
        self._interceptions: list[Interception] = []
        self._forget()
        if isinstance(transformer, CacheMixin):
            self._interceptions.append(Interception(transformer, self._cache_context, name="cache_context"))
        if pipeline is not None:
            self._interceptions.append(Interception(pipeline, self._loop_begins, name="progress_bar"))
            self._interceptions.append(Interception(pipeline, self._call_ends, name="maybe_free_model_hooks"))
            if "do_classifier_free_guidance" in _parameters(type(pipeline)):
                self._interceptions.append(Interception(pipeline, self._prompt_encoded, name="encode_prompt"))

    @property
    def trace(self) -> Trace | None:
        """Of the run that goes on, or else of the last one; None before the first."""
        return self._trace() or self._last

    def detach(self) -> None:
        """Restore the pipeline's methods."""
        restore_all(self._interceptions)
        self._interceptions = []

    def step(
        self, arguments: Mapping[str, Any], timestep: Tensor, *, shape: torch.Size, device: torch.device
    ) -> StepSession:
        """The step session of a forward with `timestep` (R,) in the scheduler's units, latents of `shape` (R, ...) on `device`.

        Raises:
            ValueError: a run that does not fit the policy; or the number of branches or steps is nowhere to be read.
        """
        time = float(timestep.amax())  # a host sync
        if not self._sessions or shape != self._shape or time > self._time:
            self._begin(arguments, time=time, shape=shape, device=device)
        elif time == self._time and self._is_another_branch():
            self._seen.append(self._branch)
            if self.policy.guidance == "together":
                return self._sessions[0].follow()
            if len(self._sessions) < len(self._seen):
                self._sessions.append(self._new_session())
            return self._sessions[len(self._seen) - 1].step(self._index, self._times[self._index])
        self._index, self._time, self._seen = self._index + 1, time, [self._branch]
        if self._index >= len(self._times):
            raise ValueError(f"forward {self._index + 1} of a run of {len(self._times)} steps, at timestep {time}")
        named = self._times[self._index]
        return self._sessions[0].step(self._index, time if named is None else named)

    @contextmanager
    def forgotten_if_it_fails(self) -> Iterator[None]:
        """A forward that raises ends its run."""
        finished = False
        try:
            yield
            finished = True
        finally:
            if not finished:
                self._forget()

    def _begin(self, arguments: Mapping[str, Any], *, time: float, shape: torch.Size, device: torch.device) -> None:
        self._end()
        branches, num_rows = self._branches(arguments), shape[0]
        if num_rows % branches:
            raise ValueError(f"{num_rows} rows of {branches} branches each: no whole number of images")
        apart = self.policy.guidance == "apart"
        rows = torch.arange(num_rows) if apart else torch.arange(num_rows // branches).repeat(branches)  # (R,)
        times = self._times_from(time, torch.as_tensor(arguments["timestep"]).dtype)
        self._begins(len(times))
        self._new_session = lambda: self._start(self.policy, rows=rows, num_steps=len(times), device=device)
        self._sessions = [self._new_session()]
        self._times, self._shape, self._index = times, shape, -1

    def _branches(self, arguments: Mapping[str, Any]) -> int:
        """Rows of an image in one forward."""
        if self._given_branches is not None:
            return self._given_branches
        if self._family.guidance == "calls":
            return 1
        guided = self._guided if self._family.guided is None else self._family.guided(arguments)
        if guided is None:
            guided = getattr(self._pipeline, "do_classifier_free_guidance", None)  # what it says of its own call
        if guided is None:
            raise ValueError(
                f"{type(self._pipeline).__name__} does not say whether it guides: attach with branches= (rows an image has in a forward)"
            )
        return 2 if guided else 1

    def _times_from(self, time: float, precision: torch.dtype) -> list[float | None]:
        """The scheduler's timesteps from the first one seen on (image to image begins in the middle); the model sees them rounded to
        `precision`."""
        if self._given_steps is not None:
            return [None] * self._given_steps
        planned = [float(one) for one in self._pipeline.scheduler.timesteps]
        nearest = min(range(len(planned)), key=lambda place: abs(planned[place] - time))
        rounded = 1e-6 + (torch.finfo(precision).eps if precision.is_floating_point else 0)
        return planned[nearest:] if abs(planned[nearest] - time) <= 1000 * rounded else planned

    def _is_another_branch(self) -> bool:
        """Whether a forward at the time of the last one is the second call of guidance, not the next stage of a solver: the pipeline
        names its calls, or else the scheduler says whether the time is to come twice."""
        if self._family.guidance != "calls":
            return False
        if self._branch is not None:
            return self._branch not in self._seen
        now, upcoming = self._times[self._index], self._times[self._index + 1 : self._index + 2]
        return now is None or upcoming != [now]

    def _trace(self) -> Trace | None:
        traces = [session.trace() for session in self._sessions if session.finished]
        return Trace.concatenate(traces) if traces else None

    def _end(self) -> None:
        self._last = self._trace() or self._last
        self._forget()

    def _forget(self) -> None:
        self._sessions: list[Session] = []
        self._times: list[float | None] = []
        self._time, self._index = 0.0, -1
        self._shape: torch.Size | None = None
        self._seen: list[str | None] = []

    # --- what the pipeline says

    def _loop_begins(self, original, *args, **kwargs):
        self._end()
        return original(*args, **kwargs)

    def _call_ends(self, original, *args, **kwargs):
        self._end()
        self._guided = None
        original(*args, **kwargs)
        self._renew()

    def _prompt_encoded(self, original, *args, **kwargs):
        arguments = inspect.signature(original).bind(*args, **kwargs)
        arguments.apply_defaults()
        self._guided = bool(arguments.arguments["do_classifier_free_guidance"])
        return original(*args, **kwargs)

    @contextmanager
    def _cache_context(self, original, name: str, *args, **kwargs) -> Iterator[None]:
        before, self._branch = self._branch, name
        try:
            with original(name, *args, **kwargs):
                yield
        finally:
            self._branch = before


def _parameters(kind: type) -> Mapping[str, Any]:
    """Parameters of a pipeline class's `encode_prompt`; empty if it has none."""
    encode = getattr(kind, "encode_prompt", None)
    return {} if encode is None else inspect.signature(encode).parameters


def times_of(family: Family, timestep: Any, sample: Tensor) -> Tensor:
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
