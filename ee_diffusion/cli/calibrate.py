"""The work of `ee-diffusion calibrate`: candidates run live, and the one that keeps to what was asked is written. Flags: main.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers.utils.logging import tqdm

from ee_diffusion.checkpoints import checkpoint_path
from ee_diffusion.core.devices import device_named
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.risk_control import certified, in_expectation, upper_bound
from ee_diffusion.diffusion.calibration.live import Live, live_losses, marked
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.methods import (
    accumulated_error_budget,
    deediff,
    per_step_error_threshold,
    static_cache_schedule,
)
from ee_diffusion.diffusion.pipelines.sampling import classes_of, use_sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_propagation import error_amplification, error_weights
from ee_diffusion.diffusion.step_cache.recording import record
from ee_diffusion.diffusion.step_cache.schedule_search import gap_prices, nearest, search
from ee_diffusion.diffusion.step_cache.solver import local_error_gain
from ee_diffusion.diffusion.step_cache.trajectories import check_distinct_times, fit_prediction
from ee_diffusion.metrics.image import relative_squared_error
from ee_diffusion.metrics.splits import balanced_labels, seeds, shuffled_labels

POWERS = {
    "accumulated_error_budget": 0.5,
    "static_cache_schedule": 1.0,
}  # of the amplification: best on calibration seeds

GAIN_IMAGES = 8  # on which gains are measured

TUNED = 1000  # calibration seeds at the beginning, on which these powers and other defaults were chosen: they vouch for nothing


def calibrate(options: argparse.Namespace) -> int:
    """Run the candidates live on calibration seeds and write the one that is asked for, or say that there is none."""
    values = options.values
    folder = Path(options.model or checkpoint_path())
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{options.model} is a model by itself, expected a pipeline's folder; classifiers: eval/classify.py --risk"
        )
    pipeline = EarlyExitPipeline.from_pretrained(options.model or checkpoint_path())
    num_classes = classes_of(pipeline, options.guidance_scale)
    pipeline.to(device_named(None)).set_progress_bar_config(disable=True)
    use_sampler(pipeline, options.sampler)
    settings = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    print(
        f"at most {len(values)} candidates and the full model on {options.count} images, {options.num_inference_steps} steps each"
    )
    make = maker(pipeline, options)
    known = {make(value): value for value in reversed(values)}  # of values that mean the same policy the safest
    policies = list(reversed(known))
    values = [known[policy] for policy in policies]
    cap = options.cap or 1.0
    live = live_losses(
        pipeline,
        policies,
        seeds("calibrate", options.count, first=TUNED),
        class_labels=shuffled_labels(options.count, num_classes, seed=0),
        loss=lambda images, full: (relative_squared_error(images, full) / cap).clamp(max=1),
        batch_size=options.batch_size,
        progress=partial(tqdm, desc="full model, then candidates"),
        **settings,
    )
    for value, own, cost in zip(values, live.losses, live.costs.tolist(), strict=True):
        bound = "" if options.delta is None else f", at most {upper_bound(own, options.delta):.4g}"
        print(f"{options.kind} {value}: {cost:.3f} of the blocks, loss {own.mean():.4g}{bound}")
    chosen = choice(live, options)
    if chosen is None:
        print(f"{_refused(live, options)}; nothing written")
        return 1
    if options.fit_cache is not None:
        pipeline.exits.save_pretrained(options.fit_cache)
        print(f"wrote {options.fit_cache}: cached exits, to be loaded where the policy runs")
    marked(policies[chosen], pipeline, **settings).save(options.output)
    print(f"wrote {options.output}: {options.kind} {values[chosen]}, {float(live.costs[chosen]):.3f} of the blocks")
    return 0


def maker(pipeline: EarlyExitPipeline, options: argparse.Namespace) -> Callable[[float], Policy]:
    """Number -> policy of the kind asked for; gives the pipeline cached exits where the kind needs them."""
    if options.kind == "deediff":
        return deediff
    transformer, scheduler, steps = pipeline.transformer, pipeline.scheduler, options.num_inference_steps
    if options.kind == "static_cache_schedule":
        check_distinct_times(scheduler, steps)
    pipeline.exits = _cached_exits(pipeline, options).to(transformer.device)
    local_gains = local_error_gain(pipeline.exits, scheduler, steps)
    if options.kind == "per_step_error_threshold":
        return partial(per_step_error_threshold, local_gains=local_gains)
    num_classes = classes_of(pipeline, options.guidance_scale)
    labels = balanced_labels(GAIN_IMAGES, num_classes)
    generator = torch.Generator().manual_seed(seeds("fit", 1)[0])
    call = {"num_inference_steps": steps, "guidance_scale": options.guidance_scale}
    amplification = error_amplification(
        pipeline, pipeline.exits, labels, batch_size=1 if labels else GAIN_IMAGES, every=4, generator=generator, **call
    )
    power = POWERS[options.kind] if options.power is None else options.power
    weights = error_weights(local_gains, amplification, power=power)
    if options.kind == "accumulated_error_budget":
        return partial(accumulated_error_budget, weights=weights, decay=options.decay)
    labels = balanced_labels(options.search_count, num_classes)
    trajectory = record(pipeline, pipeline.exits, seeds("fit", options.search_count), labels, **call)
    if options.fit_cache is not None:
        pipeline.exits = fit_prediction(pipeline.exits, trajectory, weights)
    found = search(gap_prices(pipeline.exits, trajectory, weights), steps)
    layers = len(transformer.transformer_blocks)

    def schedule(value: float) -> Policy:
        best = nearest(found, steps * (1 - value))
        return static_cache_schedule(best.full, num_steps=steps, num_layers=layers)

    return schedule


def _cached_exits(pipeline: EarlyExitPipeline, options: argparse.Namespace) -> CachedOutputExits:
    """Cached exits: those of `--cache`, or those beside the model, or unfitted ones."""
    beside = (
        Path(options.model or checkpoint_path()) / name for name in ("cache", "memory")
    )  # the second of an earlier version
    folder = options.cache or next((one for one in beside if one.is_dir()), None)
    known = CachedOutputExits.from_pretrained(folder) if folder else None
    if known is not None:
        known.check_fits(pipeline.transformer)
    if known is not None and options.kind == "static_cache_schedule" and known.config.length != 2:
        raise ValueError(f"{folder} caches {known.config.length} predictions, expected 2: schedules are priced by them")
    wanted = options.cached_type or ("epsilon" if options.fit_cache is not None and options.cache is None else None)
    if known is not None and wanted in (None, known.config.cached_type):
        return known
    if options.cache is not None:
        raise ValueError(f"--cached_type {wanted}, but the exits in {folder} cache {known.config.cached_type!r}")
    return CachedOutputExits.for_pipeline(pipeline.transformer, pipeline.scheduler, cached_type=wanted or "sample")


def choice(live: Live, options: argparse.Namespace) -> int | None:
    """The candidate asked for, None if there is none."""
    if options.budget is not None:
        within = (live.costs <= options.budget).nonzero()[:, 0]
        return int(within[0]) if len(within) else None
    if options.delta is None:
        return in_expectation(live.losses, risk=options.risk)
    good = certified(live.losses, risk=options.risk, delta=options.delta).nonzero()[:, 0]
    return int(good[-1]) if len(good) else None


def _refused(live: Live, options: argparse.Namespace) -> str:
    """Why no candidate was taken."""
    if options.budget is not None:
        least = f"the boldest takes {float(live.costs.min()):.3f}"
        return f"no candidate keeps to {options.budget} of the blocks: {least} (bolder --values, or --kind static_cache_schedule)"
    if options.delta is None:
        return f"no candidate keeps the risk {options.risk}: the safest has {float(live.losses[0].mean()):.4g}"
    sure = f"with probability {1 - options.delta:g} by {live.losses.shape[1]} images"
    return f"none certified: of no candidate a risk of {options.risk} is shown {sure}"
