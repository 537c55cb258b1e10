"""What becomes of an error: how far one answer from memory moves the final image, found by letting it happen.

Here: measuring. Not here: the error of one step (solver.py), deciding (core). B images, R rows (2B, conditional first; B without
guidance), S questions of a run to the model, one per step of most solvers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ee_diffusion.core.history import OutputHistory
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.guidance import cfg_labels, guided, prepare_model_input
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline, check_numbers
from ee_diffusion.diffusion.step_cache.solver import accepted, local_error_gain
from ee_diffusion.diffusion.step_cache.trajectories import check_run


@dataclass
class _Branch:
    """A run that took one answer from memory at `step`, moving its sample by about `moved`, and goes on in full."""

    scheduler: SchedulerMixin
    latents: Tensor
    step: int
    moved: float


@torch.no_grad()
def error_amplification(
    pipeline: EarlyExitPipeline,
    exits: CachedOutputExits,
    class_labels: Sequence[int] | None,
    *,
    batch_size: int = 1,
    num_inference_steps: int,
    guidance_scale: float,
    every: int,
    generator: torch.Generator,
) -> tuple[float, ...]:
    """g_t (S,): the root mean square by which one answer from memory at step t moves the final sample, over what it moves the next one
    (`local_error_gain` times its true error). Above 1 the model makes it grow, below 1 it mends it.

    Measured at every `every`-th step on images of the given classes (of an unconditional model, None: `batch_size` images), one branch
    each, run to the end; between them log-linear. Where a
    solver draws noise, all runs draw the same at a step, from `generator`: what is measured is the error alone.

    Raises:
        ValueError: every below 1, a run too short to remember two steps and be put to the test, exits that know another noise schedule;
            as `courses.check_run`.
    """
    check_numbers(guidance_scale, every=every, batch_size=batch_size)
    check_run(pipeline, class_labels, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    sensitivity = local_error_gain(exits, pipeline.scheduler, num_inference_steps)
    scheduler, device = copy.deepcopy(pipeline.scheduler), pipeline.transformer.device
    scheduler.set_timesteps(num_inference_steps, device=device)
    first = exits.config.length + 1  # memory must be full and have been put to the test
    if len(scheduler.timesteps) <= first:
        raise ValueError(f"num_inference_steps={num_inference_steps}, expected more than {first} steps")
    config = pipeline.transformer.config
    count = batch_size if class_labels is None else len(class_labels)
    size = (count, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(size, generator=generator).to(device) * scheduler.init_noise_sigma
    memory: OutputHistory | None = None
    rows_per_sample: list[_Branch] = []
    for index, time in enumerate(scheduler.timesteps):
        samples = [latents, *(branch.latents for branch in rows_per_sample)]
        call = {"scheduler": scheduler, "time": time, "guidance_scale": guidance_scale}
        sample, output = _asked(pipeline, samples, class_labels, **call)  # (1 + branches, R, C, H, W)
        timestep, born = time.expand(sample.shape[1]), None
        step = {"time": time, "generator": generator, "drawn_from": generator.get_state()}
        if index >= first and (index - first) % every == 0:
            recalled = exits.recall(memory, sample[0], timestep)["recalled"]
            wrong = exits.clean_of(sample[0], recalled, timestep) - exits.clean_of(sample[0], output[0], timestep)
            own, answer = copy.deepcopy(scheduler), guided(recalled, guidance_scale)
            born = _Branch(own, _stepped(own, answer, latents, **step), index, sensitivity[index] * rms(wrong))
        rows = torch.arange(sample.shape[1])
        memory = exits.remember(memory, rows, sample=sample[0], timestep=timestep, output=output[0])
        for branch, said in zip(rows_per_sample, output[1:], strict=True):
            branch.latents = _stepped(branch.scheduler, guided(said, guidance_scale), branch.latents, **step)
        latents = _stepped(scheduler, guided(output[0], guidance_scale), latents, **step)
        rows_per_sample += [] if born is None else [born]
    found = {branch.step: gain_of(rms(branch.latents - latents), branch.moved) for branch in rows_per_sample}
    return between(found, len(scheduler.timesteps))


def influence(sensitivity: Sequence[float], gains: Sequence[float], *, power: float) -> tuple[float, ...]:
    """w_t = s_t g_t^power (S,): what an error of the clean image at step t does in the end. Gains are measured one answer at a time and on
    few images: `power` below 1 trusts them less, 0 not at all.

    Raises:
        ValueError: numbers of steps that differ, a power outside [0, 1], numbers that are negative or not finite.
    """
    if len(sensitivity) != len(gains) or not 0 <= power <= 1:
        raise ValueError(
            f"{len(sensitivity)} sensitivities, {len(gains)} gains, power={power}: expected as many, and a power in [0, 1]"
        )
    for name, values in (("sensitivity", sensitivity), ("gains", gains)):
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError(f"{name}={tuple(values)}, expected finite numbers, none below 0")
    return tuple(s * g**power for s, g in zip(sensitivity, gains, strict=True))


def _asked(
    pipeline: EarlyExitPipeline,
    samples: list[Tensor],
    class_labels: Sequence[int] | None,
    *,
    scheduler: SchedulerMixin,
    time: Tensor,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    """What the model is asked and says for runs of B images each: two of (runs, R, C, H, W)."""
    transformer, call = pipeline.transformer, {"guidance_scale": guidance_scale}
    rows = torch.cat([prepare_model_input(scheduler, one, time, dtype=transformer.dtype, **call) for one in samples])
    labels = cfg_labels(class_labels, transformer.config.null_class, device=rows.device, **call)  # (R,)
    labels = labels if labels is None else labels.repeat(len(samples))
    output = transformer(rows, time.expand(len(rows)), labels).sample  # (runs R, C, H, W)
    return rows.unflatten(0, (len(samples), -1)), output.unflatten(0, (len(samples), -1))


def _stepped(
    scheduler: SchedulerMixin,
    answer: Tensor,
    latents: Tensor,
    *,
    time: Tensor,
    generator: torch.Generator,
    drawn_from: Tensor,
) -> Tensor:
    """The solver's next sample (B, C, H, W); what noise it draws is drawn from this state of the generator."""
    generator.set_state(drawn_from)
    return scheduler.step(answer, time, latents, **accepted(scheduler, generator=generator)).prev_sample


def gain_of(apart: float, moved: float) -> float:
    """What is left at the end over what was moved; 0 where nothing was."""
    return 0.0 if moved == 0 else apart / moved


def rms(difference: Tensor) -> float:
    """Root mean square of each row, mean over rows."""
    return difference.flatten(1).square().mean(1).sqrt().mean().item()


def between(found: dict[int, float], num_steps: int) -> tuple[float, ...]:
    """All steps from some: log-linear between them, constant before and after. A gain of 0 is of its own step alone."""
    logs = {step: math.log(gain) for step, gain in found.items() if gain != 0}
    known = sorted(logs)
    made = []
    for step in range(num_steps):
        if found.get(step) == 0 or not known:
            made.append(0.0)
            continue
        low = max((one for one in known if one <= step), default=known[0])
        high = min((one for one in known if one >= step), default=known[-1])
        share = 0.0 if high <= low else (step - low) / (high - low)
        made.append(math.exp((1 - share) * logs[low] + share * logs[high]))
    return tuple(made)
