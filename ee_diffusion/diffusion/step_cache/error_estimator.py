"""Fit the error estimator of cached exits along the model's own trajectories. Here: collecting errors, fitting. Not here: deciding (core).

E images, R rows (2E under guidance, conditional first), S steps, n = the steps of rows whose cache could be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ee_diffusion.core.history import OutputHistory
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.fingerprint import weights_of
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline, check_numbers
from ee_diffusion.diffusion.step_cache.recording import outputs_through, plain
from ee_diffusion.diffusion.step_cache.trajectories import check_run

STATES = ("exited", "full")


@dataclass(frozen=True, eq=False)
class ErrorSamples:
    """`features` (n, F) of the error estimator, `errors` (n,) the true root mean square error of the extrapolated clean image, `steps` (n,)
    where; `weights`: `fingerprint.weights_of` the model, None: not known."""

    features: Tensor
    errors: Tensor
    steps: Tensor
    weights: str | None = None


@torch.no_grad()
def collect_errors(
    pipeline: EarlyExitPipeline,
    exits: CachedOutputExits,
    class_labels: Sequence[int] | None,
    *,
    batch_size: int = 1,
    num_inference_steps: int,
    guidance_scale: float,
    skip: float,
    states: str,
    generator: torch.Generator,
) -> ErrorSamples:
    """Draw images with the full model at every step and compare each extrapolated clean image with the model's.

    `batch_size`: how many images of an unconditional model (class_labels None).

    A row caches a step with probability 1 - `skip` (the rows of an image alike), so that all distances to the last compute step occur.
    `states="exited"`: the other steps take the cached output, so later states are those that exits lead to; "full": all steps follow the
    model.

    Raises:
        ValueError: skip outside [0, 1), unknown states, exits that know another noise schedule; as `check_run`.
    """
    if not 0 <= skip < 1 or states not in STATES:
        raise ValueError(f"skip={skip}, states={states!r}, expected a probability below 1 and one of {STATES}")
    check_run(pipeline, class_labels, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    check_numbers(guidance_scale, batch_size=batch_size)
    exits.check_scheduler(pipeline.scheduler)
    count = batch_size if class_labels is None else len(class_labels)
    memory: OutputHistory | None = None
    seen: list[tuple[Tensor, Tensor, int]] = []

    def compare(index: int, sample: Tensor, timestep: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        nonlocal memory
        output, known = forward(), exits.extrapolate(memory, sample, timestep)
        ready = known["features"][:, 0].isfinite()  # (R,)
        wrong = exits.clean_of(sample, known["extrapolated"], timestep) - exits.clean_of(sample, output, timestep)
        seen.append((known["features"][ready], wrong.flatten(1).square().mean(1).sqrt()[ready], index))
        images = torch.rand(count, generator=generator) < skip  # (B,)
        skipped = images.repeat(len(sample) // count).to(sample.device) & ready  # (R,)
        memory = exits.append(memory, (~skipped).nonzero()[:, 0], sample=sample, timestep=timestep, output=output)
        return (
            torch.where(skipped[:, None, None, None], known["extrapolated"], output) if states == "exited" else output
        )

    own, size = plain(pipeline), {"batch_size": batch_size} if class_labels is None else {}
    call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **size}
    with outputs_through(own.transformer, compare):
        own(class_labels, generator=generator, output_type="pt", **call)
    steps = [torch.full((len(errors),), index) for _, errors, index in seen]
    features, errors = torch.cat([f for f, _, _ in seen]), torch.cat([e for _, e, _ in seen])
    return ErrorSamples(features, errors, torch.cat(steps), weights_of(pipeline.transformer))


def fit_error_estimator(
    exits: CachedOutputExits, seen: ErrorSamples, *, iterations: int = 1000, learning_rate: float = 1e-2
) -> None:
    """Train the error estimator of `exits`: smooth L1 between log u and the logarithm of the true error, all moments at once.

    Raises:
        ValueError: no samples, fewer than one iteration.
    """
    if not len(seen.errors) or iterations < 1:
        raise ValueError(
            f"{len(seen.errors)} errors were collected, iterations={iterations}: expected some, at steps with a full cache, and at least 1 "
            "iteration"
        )
    target = seen.errors.clamp(min=1e-6).log()
    optimizer = torch.optim.AdamW(exits.error_estimator.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    with torch.enable_grad():
        for _ in range(iterations):
            loss = nn.functional.smooth_l1_loss(exits.expected_error(seen.features).log(), target, beta=0.5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    exits.register_to_config(model_weights=seen.weights)
