"""Fit the uncertainty of exits that remember to a model, along its own trajectories; no data needed.

python -m train.fit_step_cache --model runs/exits --output_dir runs/memory

Walks with the full model at every step and compares what memory would have answered; a second walk, of other seeds, says what the fit is
worth beside the unfitted uncertainty. Writes the component `exits/` (load it with CachedOutputExits.from_pretrained) and report.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

from ee_diffusion.checkpoints import checkpoint_path
from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.devices import device_named
from ee_diffusion.diffusion.exits.cached import TERMS, CachedOutputExits
from ee_diffusion.diffusion.pipelines.sampling import classes_of
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_estimator import STATES, Walk, fit_error_estimator, walk
from ee_diffusion.diffusion.step_cache.recording import record
from ee_diffusion.diffusion.step_cache.trajectories import Trajectory, fit_prediction
from ee_diffusion.metrics.gauges import gauge_figures
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import environment, markdown_table, write_json


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Pipeline folder; none: the checkpoint that comes with the package.")
    parser.add_argument("--output_dir", required=True, help="Where exits/ and report.json go.")
    parser.add_argument("--length", type=int, default=2, help="Remembered predictions: 1 repeats, 2 draws a line.")
    parser.add_argument("--terms", choices=TERMS, default="clean", help="What is remembered.")
    parser.add_argument(
        "--linear_prediction", action="store_true", help="Answer by the best linear prediction along full courses."
    )
    parser.add_argument("--states", choices=STATES, default="exited", help="Whose trajectories are walked.")
    parser.add_argument("--skip", type=float, default=0.6, help="Probability that a step is answered from memory.")
    parser.add_argument("--count", type=int, default=64, help="Images of each walk.")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="Classifier-free guidance.")
    parser.add_argument("--iterations", type=int, default=1000, help="Optimiser steps, each on the whole walk.")
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for flags out of range or that contradict each other."""
    for name, low in (("length", 1), ("count", 1), ("iterations", 1), ("num_inference_steps", options.length + 2)):
        if getattr(options, name) < low:
            why = f": memory of {options.length} is first put to the test at step {low}" if low > 1 else ""
            raise ValueError(f"--{name} {getattr(options, name)}, expected at least {low}{why}")
    if not 0 <= options.skip < 1 or not math.isfinite(options.guidance_scale):
        raise ValueError(
            f"--skip {options.skip} --guidance_scale {options.guidance_scale}, expected a probability below 1 and a finite number"
        )


def course_of(
    pipeline: EarlyExitPipeline, exits: CachedOutputExits, options: argparse.Namespace, labels: list[int] | None
) -> Trajectory:
    """The full model's courses of fitting seeds."""
    call = {name: getattr(options, name) for name in ("num_inference_steps", "guidance_scale")}
    return record(pipeline, exits, seeds("fit", options.count), labels, **call)


@torch.no_grad()
def figures(exits: CachedOutputExits, seen: Walk) -> dict[str, float | int | None]:
    return gauge_figures(exits.expected_error(seen.features), seen.errors, groups=seen.steps)


def main() -> None:
    options = flags()
    check(options)
    device = device_named(None)
    pipeline = EarlyExitPipeline.from_pretrained(options.model or checkpoint_path()).to(device)
    made = {"length": options.length, "terms": options.terms}
    exits = CachedOutputExits.for_pipeline(pipeline.transformer, pipeline.scheduler, **made)
    call = {name: getattr(options, name) for name in ("num_inference_steps", "guidance_scale", "skip", "states")}
    call |= {} if pipeline.transformer.config.num_classes is not None else {"batch_size": options.count}
    labels = balanced_labels(options.count, classes_of(pipeline, options.guidance_scale))
    begun = time.perf_counter()
    if options.linear_prediction:
        exits = fit_prediction(exits, course_of(pipeline, exits, options, labels))
    walks = {
        purpose: walk(pipeline, exits, labels, generator=torch.Generator().manual_seed(seeds(purpose, 1)[0]), **call)
        for purpose in ("fit", "test")
    }
    walked = time.perf_counter() - begun
    rows = [{"uncertainty": "unfitted", **figures(exits, walks["test"])}]
    fit_error_estimator(exits, walks["fit"], iterations=options.iterations)
    rows.append({"uncertainty": "fitted", **figures(exits, walks["test"])})
    folder = Path(options.output_dir)
    exits.save_pretrained(folder / "exits")
    seconds = {"walks": walked, "all": time.perf_counter() - begun}
    facts = {"settings": vars(options), "environment": environment(), "seconds": seconds, "rows": rows}
    write_json(folder / "report.json", facts)
    print(markdown_table(rows))
    print(json.dumps(seconds))


if __name__ == "__main__":
    run_script(main)
