"""What becomes of an error: how far one answer from memory moves the final image, found by letting it happen.

Here: measuring. Not here: the error of one step (solver.py), deciding (core). B images, R rows (2B, conditional first; B without
guidance), S questions of a run to the model, one per step of most solvers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ee_diffusion.core.history import OutputHistory
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.hooks.compile import unwrapped
from ee_diffusion.diffusion.methods import static_cache_schedule
from ee_diffusion.diffusion.model_specs import blocks_of
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline, check_numbers
from ee_diffusion.diffusion.step_cache.recording import Change, RecordedCall, outputs_through, plain, record_call
from ee_diffusion.diffusion.step_cache.solver import local_error_gain, local_error_gain_along
from ee_diffusion.diffusion.step_cache.trajectories import check_run

SAME = 1e-2  # two runs that differ by less of their root mean square drew the same noise


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
            as `check_run`.
    """
    check_numbers(guidance_scale, every=every, batch_size=batch_size)
    check_run(pipeline, class_labels, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    local_gains = local_error_gain(exits, pipeline.scheduler, num_inference_steps)
    first = exits.config.length + 1  # the cache must be full and have been put to the test
    if len(local_gains) <= first:
        raise ValueError(f"num_inference_steps={num_inference_steps}, expected more than {first} steps")
    own, drawn = plain(pipeline), generator.get_state()
    outputs, cached, wrong = list[Tensor](), dict[int, Tensor](), dict[int, float]()
    memory: OutputHistory | None = None

    def full(index: int, sample: Tensor, timestep: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        nonlocal memory
        output = forward()
        if index >= first and (index - first) % every == 0:
            cached[index] = exits.extrapolate(memory, sample, timestep)["extrapolated"]
            clean = (exits.clean_of(sample, one, timestep) for one in (cached[index], output))
            wrong[index] = rms(torch.sub(*clean))
        rows = torch.arange(len(sample))
        memory = exits.append(memory, rows, sample=sample, timestep=timestep, output=output)
        outputs.append(output)
        return output

    def final(change: Change) -> Tensor:
        """The last sample (B, C, H, W) of the run with these outputs: the same noise in all of them."""
        generator.set_state(drawn)
        last: dict[str, Tensor] = {}
        size = {"batch_size": batch_size} if class_labels is None else {}
        call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **size}
        call["callback_on_step_end"] = lambda pipe, index, time, values: last.update(values) or values
        with outputs_through(own.transformer, change):
            own(class_labels, generator=generator, output_type="pt", **call)
        return last["latents"]

    whole, found = final(full), {}
    for step, answer in cached.items():
        known = {**dict(enumerate(outputs[:step])), step: answer}  # before the cached step there is nothing new
        erred = final(
            lambda index, sample, timestep, forward, known=known: known[index] if index in known else forward()
        )
        found[step] = gain_of(rms(erred - whole), local_gains[step] * wrong[step])
    return between(found, len(local_gains))


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
    num_steps, first = len(full.trajectory.times), exits.config.length + 1
    check_every(every)
    if num_steps <= first:
        raise ValueError(f"a run of {num_steps} steps, expected more than {first}")
    local_gains, found = local_error_gain_along(exits, full.solver), {}
    layers = len(blocks_of(unwrapped(pipeline.transformer)))
    for index in range(first, num_steps, every):
        others = [step for step in range(num_steps) if step != index]
        with attach_exits(pipeline, exits, static_cache_schedule(others, num_steps=num_steps, num_layers=layers)):
            erred = record_call(pipeline, exits, call)
        before, now = (one.trajectory.samples[: index + 1].float() for one in (full, erred))
        if bool(((now - before).square().mean() > SAME**2 * before.square().mean()).item()):
            raise ValueError(
                "the call drew other noise than the time before, expected one that makes its generators anew, and that begins with "
                "torch.manual_seed where its pipeline gives the solver none (DiTPipeline)"
            )
        wrong = rms(erred.trajectory.clean[index] - full.trajectory.clean[index])
        found[index] = gain_of(rms(erred.final - full.final), local_gains[index] * wrong)
    return between(found, num_steps)


def error_weights(local_gains: Sequence[float], amplification: Sequence[float], *, power: float) -> tuple[float, ...]:
    """w_t = l_t g_t^power (S,): what an error of the clean image at step t does in the end, from `local_error_gain` l and
    `error_amplification` g. g is measured one cached step at a time and on few images: `power` below 1 trusts it less, 0 not at all.

    Raises:
        ValueError: numbers of steps that differ, a power outside [0, 1], numbers that are negative or not finite.
    """
    if len(local_gains) != len(amplification) or not 0 <= power <= 1:
        raise ValueError(
            f"{len(local_gains)} local gains, {len(amplification)} amplifications, power={power}: expected as many, and a power in [0, 1]"
        )
    for name, values in (("local_gains", local_gains), ("amplification", amplification)):
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError(f"{name}={tuple(values)}, expected finite numbers, none below 0")
    return tuple(local * growth**power for local, growth in zip(local_gains, amplification, strict=True))


def check_every(every: int) -> None:
    """Raises ValueError for what is no number of steps."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r}, expected a whole number of steps, at least 1")


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
