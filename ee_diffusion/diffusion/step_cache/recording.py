"""Rehearsals: what a stock pipeline's own call hands to its solver, in full and with one answer from memory; from them, memory that is
fitted to the call, and the steps it is to run in full.

Here: watching calls, gains from them, one entry point. Not here: our own pipelines, which are walked step by step (trajectories.py,
error_propagation.py). B images as the solver has them (DiT's: with their second rows), S steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTPipeline, SchedulerMixin
from torch import Tensor

from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.fingerprint import weights_of
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.hooks.compile import unwrapped
from ee_diffusion.diffusion.methods import searched
from ee_diffusion.diffusion.model_specs import blocks_of
from ee_diffusion.diffusion.step_cache.error_propagation import between, gain_of, influence, rms
from ee_diffusion.diffusion.step_cache.run_setup import Listener, intercept_step, steady
from ee_diffusion.diffusion.step_cache.schedule_search import gap_prices, search
from ee_diffusion.diffusion.step_cache.solver import local_error_gain_along, scaled
from ee_diffusion.diffusion.step_cache.trajectories import Trajectory, check_distinct, clip_of, fit_prediction

SAME = 1e-2  # two runs that differ by less of their root mean square drew the same noise


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call: its course, `final` (B, ...), the sample it ended with, and `solver`, the scheduler as it was before the first step."""

    course: Trajectory
    final: Tensor
    solver: SchedulerMixin


@torch.no_grad()
def record_call(pipeline: DiffusionPipeline, exits: CachedOutputExits, call: Callable[[], object]) -> RecordedCall:
    """Make a call and watch its solver: `call` runs the pipeline once, from noise, at its own generators.

    Raises:
        ValueError: exits that know another noise schedule; a call that takes no steps, or others than its scheduler is set to (image to
            image); a solver that asks more than once at a time, or is given more channels than the sample has (a variance); a pipeline
            of two transformers.
    """
    exits.check_scheduler(pipeline.scheduler)
    if getattr(pipeline, "transformer_2", None) is not None:
        raise ValueError(f"{type(pipeline).__name__} has two transformers, expected one that takes all steps")
    if getattr(pipeline.scheduler, "order", None) is None:
        raise ValueError(
            f"{type(pipeline.scheduler).__name__} does not say its order, which pipelines ask for, expected a scheduler such as "
            "DDIMScheduler or DPMSolverMultistepScheduler"
        )
    ready, scales, embedded = list[SchedulerMixin](), list[float | None](), list[float | None]()
    times, clean, samples, last = list[float](), list[Tensor](), list[Tensor](), list[Tensor]()

    def step(original: Callable[[], Any], said: Mapping[str, Any]) -> Any:
        output, time, sample = said["model_output"], torch.as_tensor(said["timestep"]), said["sample"]
        if output.shape != sample.shape:
            raise ValueError(
                f"{type(pipeline.scheduler).__name__} got {tuple(output.shape)} for a sample of {tuple(sample.shape)}, expected as many"
            )
        if not ready:
            ready.append(copy.deepcopy(pipeline.scheduler))
        asked = scaled(pipeline.scheduler, sample, time)
        if isinstance(pipeline, DiTPipeline) and not torch.equal(asked.nan_to_num(), sample.nan_to_num()):
            name = type(pipeline.scheduler).__name__
            raise ValueError(
                f"DiTPipeline hands {name} samples that are scaled already, expected a solver without a scale"
            )
        there = time.to(sample.device).expand(len(sample))
        clean.append(exits.clean_of(asked.float(), output.float(), there).float())
        samples.append(asked.clone())
        times.append(float(time))
        for known, now in zip((scales, embedded), listener.taken(output), strict=True):
            known.append(now)
        result = original()
        last[:] = [result[0].clone()]
        return result

    listener = Listener(pipeline.transformer)
    watched = intercept_step(pipeline.scheduler, step)
    try:
        call()
    finally:
        watched.restore()
        listener.remove()
    _check_times(ready, times)
    course = Trajectory(
        torch.tensor(times, dtype=torch.float64),
        torch.stack(clean),
        torch.stack(samples),
        clip_of(pipeline.scheduler),
        scheduler=type(pipeline.scheduler).__name__,
        guidance_scale=steady(scales),
        embedded_guidance=embedded[0],
        weights=weights_of(unwrapped(pipeline.transformer)),
    )
    return RecordedCall(course, last[0].float(), ready[0])


def recorded_error_amplification(
    pipeline: DiffusionPipeline, exits: CachedOutputExits, call: Callable[[], object], full: RecordedCall, *, every: int
) -> tuple[float, ...]:
    """g_t (S,): the root mean square by which one answer from memory at step t moves the final sample, over what it moves the next one,
    from the call made again with that answer at every `every`-th step.

    Over the error of what the solver is given, under guidance: schedules are priced by it. (`gains.error_amplification`: over that of the
    model's rows, which is what an uncertainty knows.)

    Raises:
        ValueError: every below 1, a run too short; a call that does not begin as `full` did; as `record_call` and `attach_exits`.
    """
    num_steps, first = len(full.course.times), exits.config.length + 1
    _check_every(every)
    if num_steps <= first:
        raise ValueError(f"a run of {num_steps} steps, expected more than {first}")
    sensitivity, found = local_error_gain_along(exits, full.solver), {}
    layers = len(blocks_of(unwrapped(pipeline.transformer)))
    for index in range(first, num_steps, every):
        others = [step for step in range(num_steps) if step != index]
        with attach_exits(pipeline, exits, searched(others, num_steps=num_steps, num_layers=layers)):
            erred = record_call(pipeline, exits, call)
        before, now = (one.course.samples[: index + 1].float() for one in (full, erred))
        if bool(((now - before).square().mean() > SAME**2 * before.square().mean()).item()):
            raise ValueError(
                "the call drew other noise than the time before, expected one that makes its generators anew, and that begins with "
                "torch.manual_seed where its pipeline gives the solver none (DiTPipeline)"
            )
        wrong = rms(erred.course.clean[index] - full.course.clean[index])
        found[index] = gain_of(rms(erred.final - full.final), sensitivity[index] * wrong)
    return between(found, num_steps)


def fit_schedules(
    pipeline: DiffusionPipeline,
    call: Callable[[], object],
    *,
    terms: str = "noise",
    every: int = 4,
    power: float = 0.5,
    last_full: bool = False,
) -> tuple[CachedOutputExits, dict[int, Policy]]:
    """Memory fitted to a pipeline's call, and the steps it is best to run in full: -> exits and, by number of full steps, policies.

        def call():
            pipe([207, 360], generator=torch.Generator().manual_seed(0), num_inference_steps=50, output_type="latent")

        exits, policies = fit_schedules(pipe, call)
        with attach_exits(pipe, exits, policies[20]):
            ...  # calls with as many steps, the same solver and guidance; other seeds and labels

    `call` is made about 1 + S / `every` times; its images are all that is known, so let it draw some 8 to 32. Schedules are those of
    `search.search` under weights `influence(sensitivity, gains, power)`; with them the answers of any static schedule of as many steps
    (these, `periodic_cache`) are weighed together (`LinearPrediction.over_run`). Run it in float32: half precision's rounding spoils the
    fit. Where images are then drawn in half precision, say `last_full` (`search.search` says why).

    Raises:
        ValueError: no pipeline around a transformer, one with exits attached already, no call, numbers out of range; as `record_call`,
            `recorded_error_amplification`, `CachedOutputExits.for_pipeline`.
    """
    transformer = getattr(pipeline, "transformer", None)
    if not isinstance(pipeline, DiffusionPipeline) or transformer is None:
        raise ValueError(f"{type(pipeline).__name__}, expected a diffusers pipeline around a transformer")
    if "_ee_hook" in unwrapped(transformer).__dict__:
        raise ValueError(
            "exits are attached to this pipeline already, expected none: its call is to run in full; detach first"
        )
    if not callable(call):
        raise ValueError(f"call={call!r}, expected a function that runs the pipeline once")
    influence((), (), power=power)
    _check_every(every)
    transformer = unwrapped(transformer)
    exits = CachedOutputExits.for_pipeline(transformer, pipeline.scheduler, terms=terms)
    full = record_call(pipeline, exits, call)
    num_steps, layers = len(full.course.times), len(blocks_of(transformer))
    sensitivity = local_error_gain_along(exits, full.solver)
    if not all(map(math.isfinite, sensitivity)):
        raise ValueError(
            f"{type(pipeline.scheduler).__name__} makes {sensitivity} of an error of each step, expected finite numbers: at zero terminal "
            "SNR noise says nothing of the image, expected prediction_type='v_prediction'"
        )
    gains = recorded_error_amplification(pipeline, exits, call, full, every=every)
    weights = influence(sensitivity, gains, power=power)
    exits = fit_prediction(exits, full.course, weights)
    found = search(gap_prices(exits, full.course, weights), num_steps, last_full=last_full)
    return exits, {count: searched(one.full, num_steps=num_steps, num_layers=layers) for count, one in found.items()}


def _check_every(every: int) -> None:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r}, expected a whole number of steps, at least 1")


def _check_times(ready: list[SchedulerMixin], times: list[float]) -> None:
    """Raises ValueError for times that are not those that the scheduler was set to, one question each."""
    if not ready:
        raise ValueError("the call took no step of the pipeline's scheduler, expected one that draws images")
    planned = [float(time) for time in ready[0].timesteps]
    check_distinct(type(ready[0]).__name__, planned)
    if planned != times:
        raise ValueError(
            f"the call took {len(times)} steps from {times[0]:g} to {times[-1]:g}, expected the {len(planned)} that its scheduler is set "
            f"to, {planned[0]:g} to {planned[-1]:g}: one whole run, no image to image"
        )
