"""Fit an error estimator: a run to fit it to, a run of other seeds to evaluate it on."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from ee_diffusion.checkpoints import checkpoint_path
from ee_diffusion.core.devices import device_named
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.pipelines.sampling import classes_of
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_estimator import ErrorSamples, collect_errors, fit_error_estimator
from ee_diffusion.diffusion.step_cache.recording import record
from ee_diffusion.diffusion.step_cache.trajectories import fit_prediction
from ee_diffusion.metrics.gauges import gauge_figures
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from train.fit_step_cache import StepCacheConfig


@torch.no_grad()
def figures(exits: CachedOutputExits, seen: ErrorSamples) -> dict[str, float | int | None]:
    return gauge_figures(exits.expected_error(seen.features), seen.errors, groups=seen.steps)


def run(config: StepCacheConfig) -> None:
    """Raises ValueError for guidance that the model cannot have, and as what it calls does."""
    pipeline = EarlyExitPipeline.from_pretrained(config.model or checkpoint_path()).to(device_named(None))
    cached = {"length": config.length, "cached_type": config.cached_type}
    exits = CachedOutputExits.for_pipeline(pipeline.transformer, pipeline.scheduler, **cached)
    sampling = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    call = sampling | {"skip": config.skip, "states": config.states}
    if pipeline.transformer.config.num_classes is None:
        call["batch_size"] = config.count
    labels = balanced_labels(config.count, classes_of(pipeline, config.guidance_scale))
    started = time.perf_counter()
    if config.linear_prediction:
        exits = fit_prediction(exits, record(pipeline, exits, seeds("fit", config.count), labels, **sampling))
    walks = {
        purpose: collect_errors(
            pipeline, exits, labels, generator=torch.Generator().manual_seed(seeds(purpose, 1)[0]), **call
        )
        for purpose in ("fit", "test")
    }
    recorded = time.perf_counter() - started
    rows = [{"uncertainty": "unfitted", **figures(exits, walks["test"])}]
    fit_error_estimator(exits, walks["fit"], iterations=config.iterations)
    rows.append({"uncertainty": "fitted", **figures(exits, walks["test"])})
    folder = Path(config.output_dir)
    exits.save_pretrained(folder / "exits")
    seconds = {"walks": recorded, "all": time.perf_counter() - started}
    facts = {"settings": asdict(config), "environment": environment(), "seconds": seconds, "rows": rows}
    write_json(folder / "report.json", facts)
    print(markdown_table(rows))
    print(json.dumps(seconds))
