"""Runs: which forwards of a stock pipeline belong together. A run begins when the pipeline starts a loop, the timestep rises, or the shape
changes; it ends with the pipeline's call. It has B images throughout; how many rows each has is a fact of every forward, since guidance
may end under way. A second forward at a timestep, before the solver has moved on, is the second call of guidance.

Here: from forwards to step sessions. Not here: how a forward runs under one (transformer_hook.py). B images, R rows, S steps, E samples.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from ee_diffusion.core.patch import ForwardPatch, restore_all
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.session import Session, StepSession
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.guidance import condition_of, sources_of_rows
from ee_diffusion.diffusion.hooks.compatibility import perturbs_attention
from ee_diffusion.diffusion.model_specs import ModelSpec
from ee_diffusion.diffusion.step_times import times_from


class RunTracker:
    """Turns the forwards of a transformer into the steps of runs, under one policy. Nothing of a run survives it or an exception."""

    def __init__(
        self,
        policy: Policy,
        start: Callable[..., Session],
        transformer: nn.Module,
        family: ModelSpec,
        *,
        pipeline: DiffusionPipeline | None,
        rows_per_sample: int | None,
        num_steps: int | None,
        renew: Callable[[], None],
        begins: Callable[[int], None] = lambda num_steps: None,
    ):
        self._begins = begins  # called when a run begins, with its number of steps
        self._renew = renew  # called when a call has ended, for model offload then replaces the transformer's forward
        self.policy, self._start, self._family, self._pipeline = policy, start, family, pipeline
        self._transformer = transformer
        self._given_branches, self._given_steps = rows_per_sample, num_steps
        self._last: Trace | None = None
        self._said_images: int | None = None  # B, seen where the pipeline draws its latents
        self._looping = False  # inside the loop of the pipeline
        self._branch: str | None = None  # the name the pipeline gives to the forward that comes ("cond", "uncond")
        self._threads: WeakKeyDictionary[threading.Thread, RunTracker] = WeakKeyDictionary()
        self._interceptions: list[ForwardPatch] = []
        self._forget()
        if isinstance(transformer, CacheMixin):
            named = ForwardPatch(transformer, self._cache_context_of_this_thread, name="cache_context")
            self._interceptions.append(named)
        if pipeline is not None:
            self._interceptions.append(ForwardPatch(pipeline, self._loop_begins, name="progress_bar"))
            self._interceptions.append(ForwardPatch(pipeline, self._call_ends, name="maybe_free_model_hooks"))
            for name, wrapper in (("check_inputs", self._call_begins), ("prepare_latents", self._latents_drawn)):
                if callable(getattr(pipeline, name, None)):
                    self._interceptions.append(ForwardPatch(pipeline, wrapper, name=name))

    def of_this_thread(self) -> RunTracker:
        """A bare transformer runs for each thread by itself; a pipeline's calls come one at a time."""
        if self._pipeline is not None:
            return self
        thread = threading.current_thread()
        if thread not in self._threads:
            self._threads[thread] = made = copy.copy(self)
            made._last, made._branch = None, None
            made._forget()
        return self._threads[thread]

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
            ValueError: a run that does not fit the policy; rows that are no whole number for each image, or that one policy for each row
                cannot follow; or the number of images or steps is nowhere to be read.
        """
        time = float(timestep.amax())  # a host sync
        if not self._continues(time, shape):
            self._begin(arguments, time=time, shape=shape, device=device)
        elif self._is_another_call(arguments, time):
            return self._next_call(shape[0])
        return self._next_step(arguments, time, shape[0])

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

    def _continues(self, time: float, shape: torch.Size) -> bool:
        """Whether a forward belongs to the run that goes on. A pipeline says when its loop begins; in a loop of one's own another number
        of rows is another batch, unless the images of this one could have them at a further step."""
        if not self._sessions or shape[1:] != self._shape[1:] or time > self._time:
            return False
        if shape[0] == len(self._rows) or self._looping:
            return True
        return time < self._time and self._index + 1 < len(self._times) and shape[0] % self._images == 0

    def _begin(self, arguments: Mapping[str, Any], *, time: float, shape: torch.Size, device: torch.device) -> None:
        self._end()
        num_rows, apart = shape[0], self.policy.cfg_exit == "separate"
        images = self._images_of(arguments, num_rows)
        self.perturbed = perturbs_attention(self._transformer)
        if apart and self.perturbed:
            raise ValueError(
                "cfg_exit='separate' under perturbed attention guidance, whose attention takes the rows of an image together: expected "
                "cfg_exit='joint'"
            )
        times = self._times_from(time, torch.as_tensor(arguments["timestep"]).dtype)
        self._begins(len(times))
        self._rows = torch.arange(num_rows) if apart else torch.arange(images).repeat(num_rows // images)  # (R,)
        self._new_session = lambda: self._start(self.policy, rows=self._rows, num_steps=len(times), device=device)
        self._sessions = [self._new_session()]
        self._times, self._shape, self._images, self._index = times, shape, images, -1

    def _next_step(self, arguments: Mapping[str, Any], time: float, num_rows: int) -> StepSession:
        """The first forward of the next step."""
        if self._index + 1 >= len(self._times):
            raise ValueError(f"forward {self._index + 2} of a run of {len(self._times)} steps, at timestep {time}")
        condition, first = condition_of(arguments), self._sessions[0]
        if num_rows != len(self._rows):
            self._regroup(num_rows, condition)
        for session in self._sessions[1:]:
            self._catch_up(session, len(first.finished))
        self._index, self._time, self._seen, self._condition = self._index + 1, time, [self._branch], condition
        self._solver_at = self._solver_index()
        told = self._family.guidance != "calls" or self._solver_at is not None
        self._sample = None if told else arguments["hidden_states"].detach().clone()
        named = self._times[self._index]
        return first.step(self._index, time if named is None else named)

    def _next_call(self, num_rows: int) -> StepSession:
        """Another call of guidance at the step that goes on."""
        if num_rows != len(self._rows):
            raise ValueError(
                f"{num_rows} rows in another call of step {self._index}, expected {len(self._rows)} as before"
            )
        self._seen.append(self._branch)
        if self.policy.cfg_exit == "joint":
            return self._sessions[0].follow()
        if len(self._sessions) < len(self._seen):
            self._sessions.append(self._new_session())
        session = self._sessions[len(self._seen) - 1]
        self._catch_up(session, self._index)
        return session.step(self._index, self._sessions[0].finished[-1].time)

    def _catch_up(self, session: Session, num_steps: int) -> None:
        """Nobody of a session took part in the steps, up to so many, at which its call of guidance was not made."""
        for step in self._sessions[0].finished[len(session.finished) : num_steps]:
            session.miss(step)

    def _regroup(self, num_rows: int, condition: Tensor | None) -> None:
        """The images have another number of rows from now on. A row goes on from the one that was asked the same before; rows that are
        gone take what they remember along, new ones remember nothing."""
        if num_rows % self._images:
            raise ValueError(
                f"{num_rows} rows at step {self._index + 1} for {self._images} images: no whole number of rows for each"
            )
        sources = sources_of_rows(condition, self._condition, num_rows=num_rows, num_images=self._images)
        rows = torch.arange(self._images).repeat(num_rows // self._images)  # (R,)
        if self.policy.cfg_exit == "separate":
            known = [source for source in sources if source is not None]
            if len(known) < num_rows:
                raise ValueError(
                    f"{len(self._rows)} rows become {num_rows} at step {self._index + 1}, some of which were not asked before: "
                    "cfg_exit='separate' decides for each row, expected cfg_exit='joint'"
                )
            rows = self._rows[torch.tensor(known)]
        for session in self._sessions:
            session.regroup(rows, sources)
        self._rows = rows

    def _images_of(self, arguments: Mapping[str, Any], num_rows: int) -> int:
        """B, of which the first forward of a run has so many rows."""
        rows = self._rows_of_an_image(arguments)
        if rows is None:
            if num_rows % self._said_images:
                raise ValueError(f"{num_rows} rows for {self._said_images} images: no whole number of rows for each")
            return self._said_images
        if num_rows % rows:
            raise ValueError(f"{num_rows} rows of {rows} branches each: no whole number of images")
        return num_rows // rows

    def _rows_of_an_image(self, arguments: Mapping[str, Any]) -> int | None:
        """In the first forward of a run; None: that follows from the latents which the pipeline drew."""
        if self._given_branches is not None:
            return self._given_branches
        if self._family.guidance == "calls":
            return 1
        if self._family.guided is not None:
            return 2 if self._family.guided(arguments) else 1
        if self._said_images is not None:
            return None
        guided = getattr(self._pipeline, "do_classifier_free_guidance", None)
        if guided is None:
            guided = getattr(self._pipeline, "do_classifier_free_guidance", None)  # what it says of its own call
        if guided is None:
            raise ValueError(
                f"{type(self._pipeline).__name__} does not say whether it guides: attach with rows_per_sample= (rows an image has in a "
                f"forward)"
            )
        return 1 + bool(guided) + bool(getattr(self._pipeline, "do_perturbed_attention_guidance", False))

    def _times_from(self, time: float, precision: torch.dtype) -> list[float | None]:
        if self._given_steps is not None:
            return [None] * self._given_steps
        count = getattr(self._pipeline, "num_timesteps", None) if self._looping else None
        return list(times_from(self._pipeline.scheduler, time, precision, count))

    def _is_another_call(self, arguments: Mapping[str, Any], time: float) -> bool:
        """Whether a forward at the time of the last one is the second call of guidance, not the next stage of a solver or a time that is
        rounded to the same: the solver has not moved on. Where no solver says so, the pipeline names its calls, or else both are asked
        about the same sample."""
        if (
            self._family.guidance != "calls"
            or time != self._time
            or (self._branch is not None and self._branch in self._seen)
        ):
            return False
        if self._solver_at is not None:
            return self._solver_index() == self._solver_at
        return self._branch is not None or torch.equal(arguments["hidden_states"], self._sample)

    def _solver_index(self) -> int | None:
        """How far the pipeline's scheduler is, -1 before its first step; None: it does not say."""
        scheduler = None if self._pipeline is None else self._pipeline.scheduler
        if getattr(type(scheduler), "step_index", None) is None:
            return None
        return -1 if scheduler.step_index is None else int(scheduler.step_index)

    def _trace(self) -> Trace | None:
        if not self._sessions or not self._sessions[0].finished:
            return None
        first, *others = self._sessions
        return Trace.concatenate([first.trace(), *(session.trace(beside=first) for session in others)])

    def _end(self) -> None:
        try:
            self._last = self._trace() or self._last
        finally:
            self._forget()

    def _forget(self) -> None:
        self._sessions: list[Session] = []
        self._times: list[float | None] = []
        self._time, self._index, self._images, self._solver_at = 0.0, -1, 0, None
        self._rows = torch.arange(0)  # (R,) of the last forward
        self._shape: torch.Size | None = None
        self._seen: list[str | None] = []
        self._condition: Tensor | None = None  # what the rows of the last step were asked
        self._sample: Tensor | None = None  # of the last step, where only that tells steps apart
        self.perturbed = False  # attention takes the rows of an image together

    # --- what the pipeline says

    def _call_begins(self, original, *args, **kwargs):
        self._end()
        self._said_images, self._looping = None, False
        return original(*args, **kwargs)

    def _latents_drawn(self, original, *args, **kwargs):
        drawn = original(*args, **kwargs)
        latents = drawn[0] if isinstance(drawn, tuple) else drawn
        self._said_images = len(latents) if isinstance(latents, Tensor) else None
        return drawn

    def _loop_begins(self, original, *args, **kwargs):
        self._end()
        self._looping = True
        return original(*args, **kwargs)

    def _call_ends(self, original, *args, **kwargs):
        self._end()
        self._said_images, self._looping = None, False
        original(*args, **kwargs)
        self._renew()

    def _cache_context_of_this_thread(self, original, *args, **kwargs):
        return self.of_this_thread()._cache_context(original, *args, **kwargs)

    @contextmanager
    def _cache_context(self, original, name: str, *args, **kwargs) -> Iterator[None]:
        before, self._branch = self._branch, name
        try:
            with original(name, *args, **kwargs):
                yield
        finally:
            self._branch = before
