"""Trajectories: what the full model says of the clean image at every step of a run.

Here: what is kept of a run, what it must be, fitting the prediction to it. Not here: recording (recording.py), which steps then run
(schedule_search.py). B images, S steps.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.guidance import is_guided
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline, check_numbers
from ee_diffusion.diffusion.step_cache.solver import check_step

LONGEST = 9  # steps between two full steps, at most, that anything is fitted to or searched for


@dataclass(frozen=True, eq=False)
class Trajectory:
    """`times` (S,); `clean` (S, B, ...) the clean images under guidance, `samples` (S, B, ...) what the model was asked; `clip`: what the
    solver clips clean images to, None: nothing. `scheduler`, `guidance_scale` (of all steps or of each), `embedded_guidance`, `weights`
    (`fingerprint.weights_of` the transformer): what made it, None: not known."""

    times: Tensor
    clean: Tensor
    samples: Tensor
    clip: float | None
    scheduler: str | None = None
    guidance_scale: float | Sequence[float | None] | None = None
    embedded_guidance: float | None = None
    weights: str | None = None

    def clipped(self, clean: Tensor) -> Tensor:
        """What the solver makes of clean images."""
        return clean if self.clip is None else clean.clamp(-self.clip, self.clip)


def check_run(
    pipeline: EarlyExitPipeline, class_labels: Sequence[int] | None, *, num_inference_steps: int, guidance_scale: float
) -> None:
    """Raises ValueError for numbers, or labels (B,), with which no run of this model begins; guidance needs a null class, and an
    unconditional model None for labels."""
    check_numbers(guidance_scale, num_inference_steps=num_inference_steps)
    check_step(pipeline.scheduler)
    pipeline.check_labels(class_labels)
    if is_guided(guidance_scale) and pipeline.transformer.config.null_class is None:
        raise ValueError(f"guidance_scale={guidance_scale} of a model with null_class=None, expected one that has it")


def check_distinct_times(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Raises ValueError for a solver that asks more than once at a time: a trajectory has one answer for every step."""
    walked = copy.deepcopy(scheduler)
    walked.set_timesteps(num_inference_steps)
    check_distinct(type(scheduler).__name__, walked.timesteps.tolist(), run=f"{num_inference_steps} steps")


def check_distinct(name: str, times: Sequence[float], *, run: str = "a run") -> None:
    """Raises ValueError for times of a scheduler of that class that come more than once."""
    if len(set(times)) < len(times):
        raise ValueError(
            f"{name} asks the model {len(times)} times in {run}, at times that repeat; trajectories and schedules need a solver with "
            "one call per step, such as DDIMScheduler or DPMSolverMultistepScheduler"
        )


def values_of(exits: CachedOutputExits, trajectory: Trajectory) -> Tensor:
    """What exits would cache of a trajectory, (S, B, ...)."""
    times = trajectory.times.to(trajectory.clean.device)[:, None].expand(trajectory.clean.shape[:2])  # (S, B)
    said = zip(trajectory.samples, trajectory.clean, times, strict=True)
    return torch.stack([exits.value_of(*one).float() for one in said])


def fit_prediction(
    exits: CachedOutputExits, trajectory: Trajectory, weights: Sequence[float] | None = None
) -> CachedOutputExits:
    """The same exits, but answering by the best linear prediction along a trajectory instead of the line (or of another trajectory).

    weights: w_t (S,), what an error of the clean image at step t does in the end (`error_propagation.error_weights`). With them the
    cached outputs of a static schedule are weighed together (`LinearPrediction.joint_weights`), without each by itself.

    Raises:
        ValueError: a trajectory that is not finite or that has a time twice, weights of another number or that
            are negative or not finite.
    """
    scaled = None
    if weights is not None:
        numbers = isinstance(weights, Sequence) and all(isinstance(one, int | float) for one in weights)
        if not numbers or len(weights) != len(trajectory.times):
            raise ValueError(f"weights={weights!r}, expected {len(trajectory.times)} numbers, none below 0")
        scaled = torch.tensor(weights, dtype=torch.float64) * exits.clean_per_value(trajectory.times)
    whose = {"fitted_scheduler": trajectory.scheduler, "fitted_guidance": trajectory.guidance_scale}
    whose |= {
        "fitted_embedded_guidance": trajectory.embedded_guidance,
        "fitted_shape": list(trajectory.samples.shape[2:]),
    }
    whose |= {"joint": None if weights is None else True, "model_weights": trajectory.weights}
    made = (
        type(exits)
        .from_config(exits.config, fitted_steps=len(trajectory.times), **whose)
        .to(exits.alphas_cumprod.device)
    )
    rest = {name: value for name, value in exits.state_dict().items() if not name.startswith("prediction.")}
    made.load_state_dict(rest, strict=False)  # all but the prediction
    made.prediction.fit(trajectory.times, values_of(exits, trajectory), scaled)
    return made.eval()


def clip_of(scheduler: SchedulerMixin) -> float | None:
    """To what a scheduler clips the clean image. A config may hold what another class was made with, so the class is asked too."""
    known = inspect.signature(type(scheduler).__init__).parameters
    return scheduler.config.clip_sample_range if "clip_sample" in known and scheduler.config.clip_sample else None
