"""What becomes of an error: how far one answer from memory moves the final image, found by letting it happen.

Here: measuring. Not here: the error of one step (solver.py), deciding (core). B images, R rows (2B, conditional first), S steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ee_diffusion.core.memory import Memory
from ee_diffusion.diffusion.memory_exits import MemoryExits
from ee_diffusion.diffusion.pipeline import EarlyExitPipeline
from ee_diffusion.diffusion.solver import step_sensitivity


@dataclass
class _Branch:
    """A run that took one answer from memory at `step`, moving its sample by about `moved`, and goes on in full."""

    scheduler: SchedulerMixin
    latents: Tensor
    step: int
    moved: float


@torch.no_grad()
def step_gains(
    pipeline: EarlyExitPipeline,
    exits: MemoryExits,
    class_labels: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    every: int,
    generator: torch.Generator,
) -> tuple[float, ...]:
    """g_t (S,): the root mean square by which one answer from memory at step t moves the final sample, over what it moves the next one
    (`step_sensitivity` times its true error). Above 1 the model makes it grow, below 1 it mends it.

    Measured at every `every`-th step on images of the given classes, one branch each, run to the end; between them log-linear. For
    deterministic solvers.

    Raises:
        ValueError: every below 1, or a run too short to remember two steps and be put to the test.
    """
    first = exits.config.length + 1  # memory must be full and have been put to the test
    if every < 1 or num_inference_steps <= first:
        raise ValueError(
            f"every={every}, num_inference_steps={num_inference_steps}, expected 1 or more, and more than {first} steps"
        )
    sensitivity = step_sensitivity(exits, pipeline.scheduler, num_inference_steps)
    scheduler, device = copy.deepcopy(pipeline.scheduler), pipeline.transformer.device
    scheduler.set_timesteps(num_inference_steps, device=device)
    config, count = pipeline.transformer.config, len(class_labels)
    size = (count, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(size, generator=generator).to(device) * scheduler.init_noise_sigma
    memory: Memory | None = None
    branches: list[_Branch] = []
    for index, time in enumerate(scheduler.timesteps):
        samples = [latents, *(branch.latents for branch in branches)]
        sample, output = _asked(pipeline, scheduler, samples, time, class_labels)  # (1 + branches, R, C, H, W)
        timestep, born = time.expand(2 * count), None
        if index >= first and (index - first) % every == 0:
            recalled = exits.recall(memory, sample[0], timestep)["recalled"]
            wrong = exits.clean_of(sample[0], recalled, timestep) - exits.clean_of(sample[0], output[0], timestep)
            own, answer = copy.deepcopy(scheduler), _guided(recalled, guidance_scale)
            after = own.step(answer, time, latents).prev_sample
            born = _Branch(own, after, index, sensitivity[index] * _rms(wrong))
        rows = torch.arange(2 * count)
        memory = exits.remember(memory, rows, sample=sample[0], timestep=timestep, output=output[0])
        for branch, said in zip(branches, output[1:], strict=True):
            branch.latents = branch.scheduler.step(_guided(said, guidance_scale), time, branch.latents).prev_sample
        latents = scheduler.step(_guided(output[0], guidance_scale), time, latents).prev_sample
        branches += [] if born is None else [born]
    found = {branch.step: _rms(branch.latents - latents) / branch.moved for branch in branches}
    return _between(found, num_inference_steps)


def influence(sensitivity: Sequence[float], gains: Sequence[float], *, power: float) -> tuple[float, ...]:
    """w_t = s_t g_t^power (S,): what an error of the clean image at step t does in the end. Gains are measured one answer at a time and on
    few images: `power` below 1 trusts them less, 0 not at all.

    Raises:
        ValueError: numbers of steps that differ, or a power outside [0, 1].
    """
    if len(sensitivity) != len(gains) or not 0 <= power <= 1:
        raise ValueError(
            f"{len(sensitivity)} sensitivities, {len(gains)} gains, power={power}: expected as many, and a power in [0, 1]"
        )
    return tuple(s * g**power for s, g in zip(sensitivity, gains, strict=True))


def _asked(
    pipeline: EarlyExitPipeline,
    scheduler: SchedulerMixin,
    samples: list[Tensor],
    time: Tensor,
    class_labels: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """What the model is asked and says for runs of B images each: two of (runs, R, C, H, W)."""
    count, null = len(class_labels), pipeline.transformer.config.null_class
    rows = torch.cat([torch.cat([one, one]) for one in samples])  # (runs R, C, H, W)
    rows = scheduler.scale_model_input(rows, time)
    labels = torch.tensor([*class_labels, *[null] * count] * len(samples), device=rows.device)
    output = pipeline.transformer(rows, time.expand(len(rows)), labels).sample
    return rows.unflatten(0, (-1, 2 * count)), output.unflatten(0, (-1, 2 * count))


def _guided(output: Tensor, scale: float) -> Tensor:
    conditional, unconditional = output.chunk(2)
    return unconditional + scale * (conditional - unconditional)  # (B, C, H, W)


def _rms(difference: Tensor) -> float:
    """Root mean square of each row, mean over rows."""
    return difference.flatten(1).square().mean(1).sqrt().mean().item()


def _between(found: dict[int, float], num_steps: int) -> tuple[float, ...]:
    """All steps from some: log-linear between them, constant before and after."""
    known = sorted(found)
    made = []
    for step in range(num_steps):
        low = max((one for one in known if one <= step), default=known[0])
        high = min((one for one in known if one >= step), default=known[-1])
        share = 0.0 if high <= low else (step - low) / (high - low)
        made.append(math.exp((1 - share) * math.log(found[low]) + share * math.log(found[high])))
    return tuple(made)
