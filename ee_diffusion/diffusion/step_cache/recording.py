"""The recorder: what a run of any pipeline hands to its solver, step by step. The only code that watches runs.

Here: recording calls, and runs whose outputs are looked at or replaced on the way. Not here: what is made of them (fit.py,
error_propagation.py, error_estimator.py). B images as the solver has them (DiT's: with their second rows), R rows, S steps.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTPipeline, SchedulerMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ee_diffusion.core.patch import ForwardPatch
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.fingerprint import weights_of
from ee_diffusion.diffusion.hooks.compile import unwrapped
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.run_setup import Listener, intercept_step, steady
from ee_diffusion.diffusion.step_cache.solver import scaled
from ee_diffusion.diffusion.step_cache.trajectories import (
    Trajectory,
    check_distinct,
    check_distinct_times,
    check_run,
    clip_of,
)

Change = Callable[[int, Tensor, Tensor, Callable[[], Tensor]], Tensor]


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call: its trajectory, `final` (B, ...), the sample it ended with, and `solver`, the scheduler as it was before the first step."""

    trajectory: Trajectory
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
    trajectory = Trajectory(
        torch.tensor(times, dtype=torch.float64),
        torch.stack(clean),
        torch.stack(samples),
        clip_of(pipeline.scheduler),
        scheduler=type(pipeline.scheduler).__name__,
        guidance_scale=steady(scales),
        embedded_guidance=embedded[0],
        weights=weights_of(unwrapped(pipeline.transformer)),
    )
    return RecordedCall(trajectory, last[0].float(), ready[0])


def record(
    pipeline: EarlyExitPipeline,
    exits: CachedOutputExits,
    seeds: Sequence[int],
    class_labels: Sequence[int] | None,
    *,
    num_inference_steps: int,
    guidance_scale: float,
) -> Trajectory:
    """The trajectory of a full run of one of our own pipelines, as `generate` has it: image i from the noise of seed i, in every step of
    a solver that draws some.

    Raises:
        ValueError: another number of labels than of seeds; as `check_run`, `check_distinct_times` and `record_call`.
    """
    if class_labels is not None and len(seeds) != len(class_labels):
        raise ValueError(f"{len(seeds)} seeds, {len(class_labels)} labels, expected as many")
    call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    check_run(pipeline, class_labels, **call)
    exits.check_scheduler(pipeline.scheduler)
    check_distinct_times(pipeline.scheduler, num_inference_steps)
    size, own = {} if class_labels is not None else {"batch_size": len(seeds)}, plain(pipeline)

    def run() -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        own(class_labels, generator=generators, output_type="pt", **size, **call)

    return replace(record_call(own, exits, run).trajectory, guidance_scale=float(guidance_scale))


def plain(pipeline: EarlyExitPipeline) -> EarlyExitPipeline:
    """The same model without exits, with a scheduler of its own and no progress bar: for runs that are only watched."""
    own = EarlyExitPipeline(pipeline.transformer, copy.deepcopy(pipeline.scheduler))
    own.set_progress_bar_config(disable=True)
    return own


@contextmanager
def outputs_through(transformer: nn.Module, change: Change) -> Iterator[None]:
    """Within, the output (R, ...) of forward i is `change(i, sample, timestep, forward)`, for sample (R, ...) and timestep (R,);
    `forward()` runs the model."""
    places = itertools.count()

    def changed(original: Callable[..., Any], sample: Tensor, timestep: Tensor, *rest: Any, **named: Any):
        output = change(next(places), sample, timestep, lambda: original(sample, timestep, *rest, **named).sample)
        return Transformer2DModelOutput(sample=output)

    compiled = vars(transformer).get("_compiled_call_impl") is not None
    patch = ForwardPatch(transformer, changed, name="_compiled_call_impl" if compiled else "forward")
    try:
        yield
    finally:
        patch.restore()


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
