"""A solver's step: what it accepts, and what an error of the prediction does to it, measured on the scheduler itself. Not here: predicting
the error."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from diffusers import SchedulerMixin

from ee_diffusion.diffusion.exits.cached import CachedOutputExits

PROBE = 1e-3  # small, so that no clipping of the clean image interferes


def accepted(scheduler: SchedulerMixin, **offered: Any) -> dict[str, Any]:
    """Those of the `offered` arguments that the scheduler's `step` has (not every one draws noise or knows `eta`)."""
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in offered.items() if name in known}


def local_error_gain(
    exits: CachedOutputExits, scheduler: SchedulerMixin, num_inference_steps: int
) -> tuple[float, ...]:
    """How far the next sample moves per unit of error in the clean image, at each step of a run (S numbers, first order).

    Each step of a copy of the scheduler is taken twice, with and without a small error, after steps without one. Of what a multistep
    solver carries on to later steps nothing is counted. Samples are compared in the scale in which the model sees them.

    Raises:
        ValueError: fewer than one step, exits that know another noise schedule.
    """
    exits.check_scheduler(scheduler)
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps}, expected at least 1")
    walked = copy.deepcopy(scheduler)
    walked.set_timesteps(num_inference_steps)
    return local_error_gain_along(exits, walked)


def local_error_gain_along(exits: CachedOutputExits, ready: SchedulerMixin) -> tuple[float, ...]:
    """`local_error_gain` along the times that a scheduler is set to, before its first step; it is left as it is."""
    walked = copy.deepcopy(ready)
    zero, there, found = torch.zeros(1, 1, 1, 1), exits.alphas_cumprod.device, []
    before: dict[str, Any] = {"old_pred_original_sample": None, "timestep_back": None}  # what some want to be told
    for index, time in enumerate(walked.timesteps):
        erred = copy.deepcopy(walked)
        probe = torch.full_like(zero, PROBE, device=there)
        wrong = exits.output_of(zero.to(there), probe, time.reshape(1).to(there)).to(zero)
        right = _step(walked, zero, time, before)
        moved = _step(erred, wrong, time, before)[0] - right[0]
        before = {"old_pred_original_sample": right[-1], "timestep_back": time}
        after = walked.timesteps[index + 1] if index + 1 < len(walked.timesteps) else None
        if after is not None:
            moved = scaled(walked, moved, after)
        found.append(abs(moved.item()) / PROBE)
    return tuple(found)


def check_step(scheduler: SchedulerMixin) -> None:
    """Raises ValueError for a scheduler whose `step` wants more than an output, a time and a sample."""
    more = [
        name
        for name, one in inspect.signature(scheduler.step).parameters.items()
        if one.default is one.empty and name not in ("model_output", "timestep", "sample")
    ]
    if more:
        raise ValueError(
            f"the step of {type(scheduler).__name__} wants {', '.join(more)} too, which only pipelines made for it give, expected a "
            "scheduler that takes an output, a time and a sample, such as DDIMScheduler or DPMSolverMultistepScheduler"
        )


def scaled(scheduler: SchedulerMixin, sample: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """What the model sees of a sample. Some schedulers find their place by this call; those of flow matching have none."""
    return scheduler.scale_model_input(sample, time) if hasattr(scheduler, "scale_model_input") else sample


def _step(scheduler: SchedulerMixin, output: torch.Tensor, time: torch.Tensor, before: dict[str, Any]) -> tuple:
    """The next sample first; what a solver carries on, the clean image, last."""
    sample = torch.zeros_like(output)
    scaled(scheduler, sample, time)
    more = accepted(scheduler, generator=torch.Generator().manual_seed(0), **before)
    return scheduler.step(model_output=output, timestep=time, sample=sample, return_dict=False, **more)
