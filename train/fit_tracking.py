"""Fit exits that remember at several depths to a U-ViT, along its own trajectories; no data needed.

python train/fit_tracking.py --deeper 1 2 4 --output_dir runs/tracking

Walks with the full model at every step, of fitting seeds and of test seeds; fits the corrections (`--variant learned`; `residual` takes
the pipeline's own output heads), then the uncertainty of every exit. Writes the component `exits/` (TrackingExits.from_pretrained) and
report.json: per part of the run and per exit the error of its clean image over that of depth 0, and what its uncertainty is worth.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from walk_flags import check_walk

from ee_diffusion.checkpoints import checkpoint
from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.devices import device_named
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.tracking_exits import VARIANTS, TrackingExits
from ee_diffusion.diffusion.exits.tracking_fit import Moments, errors_of, fit_corrections, fit_gauges, walk_tracks
from ee_diffusion.diffusion.guidance import is_guided
from ee_diffusion.diffusion.pipelines.sampling import classes_of
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_estimator import STATES
from ee_diffusion.metrics.gauges import gauge_figures
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import environment, markdown_table, write_json

PARTS = 5  # of the run, for the table
FIRST = 3  # steps until memory was put to the test: two fill it, the third tests it


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Pipeline folder; none: the checkpoint that comes with the package.")
    parser.add_argument("--memory", help="Fitted exits at depth 0; none: those of the checkpoint, or unfitted.")
    parser.add_argument("--output_dir", required=True, help="Where exits/ and report.json go.")
    parser.add_argument("--deeper", type=int, nargs="+", required=True, help="Depths of the exits below depth 0.")
    parser.add_argument("--variant", choices=VARIANTS, default="learned", help="How a deeper exit corrects memory.")
    parser.add_argument("--states", choices=STATES, default="exited", help="Whose trajectories are walked.")
    parser.add_argument("--skip", type=float, default=0.6, help="Probability that a step is answered by an exit.")
    parser.add_argument("--count", type=int, default=64, help="Images of the fitting walk.")
    parser.add_argument("--test_count", type=int, default=16, help="Images of the test walk.")
    parser.add_argument("--walk_batch_size", type=int, default=8, help="Images walked at once.")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="Classifier-free guidance.")
    parser.add_argument("--iterations", type=int, default=2000, help="Optimiser steps of the corrections.")
    parser.add_argument("--train_batch_size", type=int, default=32, help="Moments of a step.")
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for flags out of range, or more moments in a batch than the walk has."""
    counts = ("count", "test_count", "walk_batch_size", "iterations", "train_batch_size")
    check_walk(options, dict.fromkeys(counts, 1), length=FIRST - 1)
    rows = options.count * (2 if is_guided(options.guidance_scale) else 1)
    moments = rows * (options.num_inference_steps - FIRST)
    if options.variant == "learned" and options.train_batch_size > moments:
        raise ValueError(
            f"--train_batch_size {options.train_batch_size}, expected at most the {moments} moments of the walk"
        )


def walked(pipeline: EarlyExitPipeline, exits: TrackingExits, options: argparse.Namespace, purpose: str) -> Moments:
    """The moments of all images of a purpose, some at a time."""
    count = options.count if purpose == "fit" else options.test_count
    labels = balanced_labels(count, classes_of(pipeline, options.guidance_scale))
    call = {name: getattr(options, name) for name in ("num_inference_steps", "guidance_scale", "skip", "states")}
    chosen, parts = seeds(purpose, count), []
    for start in range(0, count, options.walk_batch_size):
        some = slice(start, start + options.walk_batch_size)
        generator = torch.Generator().manual_seed(chosen[start])
        parts.append(walk_tracks(pipeline, exits, chosen[some], labels and labels[some], generator=generator, **call))
    return Moments.concatenate(parts)


@torch.no_grad()
def table(exits: TrackingExits, seen: Moments, num_steps: int) -> list[dict]:
    """One row for each exit: geometric mean of (its error / that of depth 0) in each part of the run, and its uncertainty's worth."""
    errors, rows = errors_of(exits, seen), []
    part = (seen.steps * PARTS).div(num_steps, rounding_mode="floor")
    for exit, depth in enumerate(exits.depths):
        ratio = (errors[exit] / errors[0]).clamp(min=1e-6).log()
        parts = {f"part {p + 1}": ratio[part == p].mean().exp().item() for p in range(PARTS) if bool((part == p).any())}
        features = seen.known if exit == 0 else seen.features[:, exit - 1]
        said = exits.expected_error(exit, features)
        rows.append({"depth": depth, **parts, **gauge_figures(said, errors[exit], groups=seen.steps)})
    return rows


def main() -> None:
    options = flags()
    check(options)
    device = device_named(None)
    pipeline = EarlyExitPipeline.from_pretrained(options.model or checkpoint()).to(device)
    beside = options.memory or (None if options.model else checkpoint() / "memory")
    memory = None if beside is None else CachedOutputExits.from_pretrained(beside)
    heads = pipeline.exits if options.variant == "residual" else None
    call = {"deeper": tuple(options.deeper), "memory": memory, "heads": heads}
    exits = TrackingExits.for_pipeline(pipeline.transformer, pipeline.scheduler, **call)
    begun = time.perf_counter()
    fit, test = (walked(pipeline, exits, options, purpose) for purpose in ("fit", "test"))
    seconds = {"walks": time.perf_counter() - begun}
    if options.variant == "learned":
        generator = torch.Generator().manual_seed(0)
        sizes = {"iterations": options.iterations, "batch_size": options.train_batch_size}
        fit_corrections(exits, fit, generator=generator, **sizes)
    fit_gauges(exits, fit, iterations=500)
    seconds["all"] = time.perf_counter() - begun
    folder = Path(options.output_dir)
    exits.save_pretrained(folder / "exits")
    rows = table(exits, test, options.num_inference_steps)
    facts = {"settings": vars(options), "environment": environment(), "seconds": seconds, "rows": rows}
    write_json(folder / "report.json", facts)
    print(markdown_table(rows))


if __name__ == "__main__":
    run_script(main)
