"""Fit a step cache to a pipeline's own call: cached exits, and the schedules of steps that are best computed. One entry point.

Here: `fit_schedules`. Not here: recording runs (recording.py), error amplification (error_propagation.py), the search (schedule_search.py).
S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from diffusers import DiffusionPipeline

from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.hooks.compile import unwrapped
from ee_diffusion.diffusion.methods import static_cache_schedule
from ee_diffusion.diffusion.model_specs import blocks_of
from ee_diffusion.diffusion.step_cache.error_propagation import check_every, error_weights, recorded_error_amplification
from ee_diffusion.diffusion.step_cache.recording import record_call
from ee_diffusion.diffusion.step_cache.schedule_search import gap_prices, search
from ee_diffusion.diffusion.step_cache.solver import local_error_gain_along
from ee_diffusion.diffusion.step_cache.trajectories import fit_prediction


def fit_schedules(
    pipeline: DiffusionPipeline,
    call: Callable[[], object],
    *,
    cached_type: str = "epsilon",
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
    `schedule_search.search` under `error_weights(local_gains, amplification, power)`; with them the cached outputs of any static schedule
    of as many steps (these, `periodic_cache`) are weighed together (`LinearPrediction.joint_weights`). Run it in float32: half precision's
    rounding spoils the fit. Where images are then drawn in half precision, say `last_full` (`schedule_search.search` says why).

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
    error_weights((), (), power=power)
    check_every(every)
    transformer = unwrapped(transformer)
    exits = CachedOutputExits.for_pipeline(transformer, pipeline.scheduler, cached_type=cached_type)
    full = record_call(pipeline, exits, call)
    num_steps, layers = len(full.trajectory.times), len(blocks_of(transformer))
    local_gains = local_error_gain_along(exits, full.solver)
    if not all(map(math.isfinite, local_gains)):
        raise ValueError(
            f"{type(pipeline.scheduler).__name__} makes {local_gains} of an error of each step, expected finite numbers: at zero terminal "
            "SNR noise says nothing of the image, expected prediction_type='v_prediction'"
        )
    amplification = recorded_error_amplification(pipeline, exits, call, full, every=every)
    weights = error_weights(local_gains, amplification, power=power)
    exits = fit_prediction(exits, full.trajectory, weights)
    found = search(gap_prices(exits, full.trajectory, weights), num_steps, last_full=last_full)
    return exits, {
        count: static_cache_schedule(one.full, num_steps=num_steps, num_layers=layers) for count, one in found.items()
    }
