"""Many images from seeds, batch by batch: the same seed gives the same image whatever batch it is in. Samplers by short names, and the
control policies of a run.

n images, S steps, E samples, C, H, W image.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ee_diffusion.core.criteria import DepthTable
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import shuffled_overall, shuffled_per_step, static_depths
from ee_diffusion.core.schedules import DepthPerStep
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.distillation.deediff_objective import num_classes_of
from ee_diffusion.diffusion.guidance import is_guided
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline

SAMPLERS: dict[str, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
}


def sampler(name: str, *, like: SchedulerMixin, **changes: Any) -> SchedulerMixin:
    """A scheduler of that name with the noise schedule of another; `changes`: settings that are to differ.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler={name!r}, expected one of {sorted(SAMPLERS)}")
    config = dict(like.config)
    config.pop("_use_default_values", None)  # diffusers would put the new class's own defaults (other betas!) there
    return SAMPLERS[name].from_config(config, **changes)


def use_sampler(pipeline: EarlyExitPipeline, name: str) -> None:
    """Give the pipeline another scheduler with the noise schedule of its present one. Raises ValueError as `sampler` does."""
    pipeline.scheduler = sampler(name, like=pipeline.scheduler)


def classes_of(pipeline: EarlyExitPipeline, guidance_scale: float) -> int | None:
    """How many classes images are drawn of (`num_classes_of`); None of an unconditional model.

    Raises:
        ValueError: guidance of a model without a null class.
    """
    config = pipeline.transformer.config
    if is_guided(guidance_scale) and config.null_class is None:
        raise ValueError(
            f"guidance_scale={guidance_scale} of a model with null_class=None, expected one trained with a null class, or "
            "guidance_scale=1"
        )
    return num_classes_of(pipeline.transformer)


@dataclass(frozen=True, eq=False)
class Generated:
    """`images` (n, C, H, W) in [0, 1]; `trace` of all images, None if exits were off; `seconds` of each batch, wall clock."""

    images: Tensor
    trace: Trace | None
    seconds: tuple[float, ...]


def joined(parts: Sequence[Generated]) -> Generated:
    """Batches of one set as one. Raises ValueError for no parts or traces that do not belong together."""
    if not parts:
        raise ValueError("nothing to join, expected at least one part")
    trace = None if parts[0].trace is None else Trace.concatenate([part.trace for part in parts])
    return Generated(
        torch.cat([part.images for part in parts]), trace, tuple(s for part in parts for s in part.seconds)
    )


def generate(
    pipeline: EarlyExitPipeline,
    seeds: Sequence[int],
    class_labels: Sequence[int] | None,
    *,
    batch_size: int,
    first_id: int = 0,
    **call,
) -> Generated:
    """One image per seed, in batches; image i has id `first_id + i` (for policies with a plan). `call` goes to the pipeline.

    Raises:
        ValueError: no seeds, another number of labels, a batch size below 1.
    """
    if not seeds or batch_size < 1 or (class_labels is not None and len(class_labels) != len(seeds)):
        labels = None if class_labels is None else len(class_labels)
        raise ValueError(
            f"{len(seeds)} seeds, {labels} labels, batch_size={batch_size}: expected at least 1 and one label a seed"
        )
    apart = call.get("exit_policy") is not None and call["exit_policy"].cfg_exit == "separate"
    parts = []
    for start in range(0, len(seeds), batch_size):
        chosen = seeds[start : start + batch_size]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in chosen]
        labels = None if class_labels is None else list(class_labels[start : start + batch_size])
        ids = None if apart else torch.arange(first_id + start, first_id + start + len(chosen))
        size = {"batch_size": len(chosen)} if labels is None else {}
        begun = time.perf_counter()
        output = pipeline(labels, generator=generators, image_ids=ids, output_type="pt", **size, **call)
        parts.append(Generated(output.images, output.trace, (time.perf_counter() - begun,)))
    return joined(parts)


def controls_of(trace: Trace, *, seed: int, warm_up: int = 0) -> dict[str, Policy]:
    """What a learned exit must beat, made of its own trace (ids 0..n-1): `static`, a schedule with the policy's own mean depth per
    step; `random_per_step`, exits dealt out anew among the images of each step; `random_overall`, among all steps and images.

    The first `warm_up` steps stay as they were (an answer from memory needs full steps before it).
    """
    depths, num_layers = trace.depths.long(), trace.planned.shape[1]
    first, rest = depths[:warm_up], depths[warm_up:]
    generator = torch.Generator().manual_seed(seed)

    def planned(table: Tensor) -> Policy:
        return Policy(DepthTable(tuple(tuple(row) for row in table.tolist())))

    exits = tuple(trace.exits.tolist())
    begun = (static_depths(row[None], exits, num_layers=num_layers)[0] for row in first)
    static = (*begun, *static_depths(rest, exits, num_layers=num_layers))
    return {
        "static": Policy(schedule=DepthPerStep(static)),
        "random_per_step": planned(torch.cat([first, shuffled_per_step(rest, generator)])),
        "random_overall": planned(torch.cat([first, shuffled_overall(rest, generator)])),
    }
