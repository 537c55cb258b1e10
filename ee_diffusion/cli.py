"""The command line: `ee-diffusion calibrate | edge | cloud`. Here: the flags of calibrate. Not here: the work, other commands' flags."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers.utils.logging import tqdm

from ee_diffusion.checkpoints import checkpoint
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.risk import certified, in_expectation, upper_bound
from ee_diffusion.diffusion.certify import Live, live_losses, marked
from ee_diffusion.diffusion.courses import record
from ee_diffusion.diffusion.gains import influence, step_gains
from ee_diffusion.diffusion.generation import SAMPLERS, use_sampler
from ee_diffusion.diffusion.memory_exits import MemoryExits
from ee_diffusion.diffusion.methods import budgeted, deediff, remembered, searched
from ee_diffusion.diffusion.pipeline import EarlyExitPipeline
from ee_diffusion.diffusion.search import gap_prices, nearest, search
from ee_diffusion.diffusion.solver import step_sensitivity
from ee_diffusion.measure.paired import relative_squared_error
from ee_diffusion.measure.splits import balanced_labels, seeds

VALUES = {  # candidates, the safest first
    "deediff": (0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.25),
    "remembered": (0.0002, 0.0004, 0.0008, 0.0012, 0.0018, 0.003, 0.006),
    "budgeted": (0.0004, 0.0008, 0.0016, 0.0032, 0.0048, 0.0064, 0.0096),
    "searched": (0.4, 0.5, 0.6, 0.66, 0.72, 0.78),  # share of the steps that memory answers
}

POWERS = {"budgeted": 0.5, "searched": 1.0}  # how far measured gains are trusted: what was best on calibration seeds

try:
    from ee_diffusion.decoding.cloud import commands as cloud
except ModuleNotFoundError as missing:  # the extra is not installed: its commands say so
    cloud, MISSING = None, missing.name


def parser() -> argparse.ArgumentParser:
    """The flags of all commands that can run here."""
    made = argparse.ArgumentParser(prog="ee-diffusion", description="Early exit for transformers.")
    commands = made.add_subparsers(dest="command", required=True)
    _calibrate_flags(commands)
    if cloud is None:
        made.epilog = f"The commands edge and cloud need the extra `cloud` ({MISSING} is not installed)."
    else:
        cloud.register(commands)
    return made


def _calibrate_flags(commands) -> None:
    flags = commands.add_parser("calibrate", help="Find a policy for a budget or a risk, by live runs, and write it.")
    flags.add_argument("--model", help="Pipeline folder; none: the checkpoint that comes with the package.")
    flags.add_argument(
        "--memory", help="Folder of fitted exits that remember; none: those beside the model, or unfitted."
    )
    flags.add_argument("--kind", choices=sorted(VALUES), default="budgeted", help="The policy whose number is sought.")
    flags.add_argument(
        "--values", type=float, nargs="+", help="Candidates, the safest first; none: a grid of the kind."
    )
    flags.add_argument("--output", required=True, help="The policy file to write.")
    goal = flags.add_mutually_exclusive_group(required=True)
    goal.add_argument("--budget", type=float, help="Share of the blocks to execute: the safest candidate within it.")
    goal.add_argument("--risk", type=float, help="Largest expected loss: the boldest candidate that keeps it.")
    flags.add_argument("--delta", type=float, help="Certify with probability 1 - delta; none: in expectation.")
    flags.add_argument("--cap", type=float, help="Relative squared error that counts as loss 1 (with --risk).")
    flags.add_argument("--count", type=int, default=128, help="Calibration images.")
    flags.add_argument("--sampler", choices=sorted(SAMPLERS), default="ddim", help="Scheduler.")
    flags.add_argument("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    flags.add_argument("--guidance_scale", type=float, default=4.0, help="Classifier-free guidance.")
    flags.add_argument("--batch_size", type=int, default=64, help="Images per forward.")
    flags.add_argument("--decay", type=float, default=0.7, help="Of `budgeted`: what a step leaves of the error.")
    flags.add_argument("--power", type=float, help="Trust in the gains; none: 0.5 for `budgeted`, 1 for `searched`.")
    flags.add_argument("--search_count", type=int, default=16, help="Of `searched`: fitting images of the search.")
    flags.add_argument("--dry_run", "--dry-run", action="store_true", help="Print the resolved flags and exit.")
    flags.set_defaults(run=calibrate)


def main(words: Sequence[str] | None = None) -> int:
    """The program. Returns its exit status: 0, or 1 if nothing could be certified."""
    options = parser().parse_args(words)
    return options.run(options) or 0


def calibrate(options: argparse.Namespace) -> int:
    """Run the candidates live on calibration seeds and write the one that is asked for, or say that there is none."""
    values = tuple(options.values or VALUES[options.kind])
    _check(options, values)
    if options.dry_run:
        print(json.dumps({name: value for name, value in vars(options).items() if name != "run"} | {"values": values}))
        return 0
    pipeline = EarlyExitPipeline.from_pretrained(options.model or checkpoint())
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    use_sampler(pipeline, options.sampler)
    settings = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    policies = [make(value) for make in [maker(pipeline, options)] for value in values]
    cap = options.cap or 1.0
    live = live_losses(
        pipeline,
        policies,
        seeds("calibrate", options.count),
        class_labels=balanced_labels(options.count, pipeline.transformer.config.null_class),
        loss=lambda images, full: (relative_squared_error(images, full) / cap).clamp(max=1),
        batch_size=options.batch_size,
        progress=partial(tqdm, desc="candidates"),
        **settings,
    )
    for value, own, cost in zip(values, live.losses, live.costs.tolist(), strict=True):
        bound = "" if options.delta is None else f", at most {upper_bound(own, options.delta):.4g}"
        print(f"{options.kind} {value}: {cost:.3f} of the blocks, loss {own.mean():.4g}{bound}")
    chosen = choice(live, options)
    if chosen is None:
        print("none certified: no candidate keeps to what was asked; nothing written")
        return 1
    marked(policies[chosen], pipeline, **settings).save(options.output)
    print(f"wrote {options.output}: {options.kind} {values[chosen]}, {float(live.costs[chosen]):.3f} of the blocks")
    return 0


def maker(pipeline: EarlyExitPipeline, options: argparse.Namespace) -> Callable[[float], Policy]:
    """Number -> policy of the kind asked for; gives the pipeline exits that remember where the kind needs them."""
    if options.kind == "deediff":
        return deediff
    beside = Path(options.model or checkpoint()) / "memory"
    folder = options.memory or (beside if beside.is_dir() else None)
    transformer, scheduler, steps = pipeline.transformer, pipeline.scheduler, options.num_inference_steps
    exits = MemoryExits.from_pretrained(folder) if folder else MemoryExits.for_pipeline(transformer, scheduler)
    pipeline.exits = exits.to(transformer.device)
    sensitivity = step_sensitivity(pipeline.exits, scheduler, steps)
    if options.kind == "remembered":
        return partial(remembered, sensitivity=sensitivity)
    labels = balanced_labels(8, transformer.config.null_class)
    generator = torch.Generator().manual_seed(seeds("fit", 1)[0])
    call = {"num_inference_steps": steps, "guidance_scale": options.guidance_scale}
    gains = step_gains(pipeline, pipeline.exits, labels, every=4, generator=generator, **call)
    power = POWERS[options.kind] if options.power is None else options.power
    weights = influence(sensitivity, gains, power=power)
    if options.kind == "budgeted":
        return partial(budgeted, weights=weights, decay=options.decay)
    labels = balanced_labels(options.search_count, transformer.config.null_class)
    course = record(pipeline, pipeline.exits, seeds("fit", options.search_count), labels, **call)
    found = search(gap_prices(pipeline.exits, course, weights), steps)
    layers = len(transformer.transformer_blocks)

    def schedule(value: float) -> Policy:
        best = nearest(found, steps * (1 - value))
        return searched(best.full, num_steps=steps, num_layers=layers)

    return schedule


def choice(live: Live, options: argparse.Namespace) -> int | None:
    """The candidate asked for, None if there is none."""
    if options.budget is not None:
        within = (live.costs <= options.budget).nonzero()[:, 0]
        return int(within[0]) if len(within) else None
    if options.delta is None:
        return in_expectation(live.losses, risk=options.risk)
    good = certified(live.losses, risk=options.risk, delta=options.delta).nonzero()[:, 0]
    return int(good[-1]) if len(good) else None


def _check(options: argparse.Namespace, values: tuple[float, ...]) -> None:
    if list(values) != sorted(set(values)) or values[0] <= 0:
        raise ValueError(f"values {values}, expected positive numbers, ascending: the safest first")
    if options.kind == "searched" and (values[-1] >= 1 or options.search_count < 1):
        raise ValueError(
            f"values {values}, search_count={options.search_count}: expected shares below 1, 1 image or more"
        )
    if options.budget is not None and not 0 < options.budget <= 1:
        raise ValueError(f"budget={options.budget}, expected a share of the blocks in (0, 1]")
    if options.risk is not None and (options.cap is None or not 0 < options.risk < 1 or not options.cap > 0):
        raise ValueError(f"risk={options.risk}, cap={options.cap}, expected a risk in (0, 1) and a positive cap")
    if options.delta is not None and (options.risk is None or not 0 < options.delta < 1):
        raise ValueError(f"delta={options.delta}, expected a probability in (0, 1), with --risk")
    if options.count < 1 or options.batch_size < 1 or options.num_inference_steps < 1:
        raise ValueError("count, batch_size and num_inference_steps, expected at least 1 each")
