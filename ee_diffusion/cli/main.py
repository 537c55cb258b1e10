"""The command line: `ee-diffusion calibrate | edge | cloud`. Here: flags of calibrate, errors. Not here: the work, flags of the others.

Nothing here loads a model library: help and refusals come at once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name

from ee_diffusion import __version__
from ee_diffusion.cli.errors import said_in_one_line
from ee_diffusion.diffusion.exits.saved_names import CLASSES
from ee_diffusion.edge_cloud import flags as cloud

VALUES = {  # candidates, the safest first
    "deediff": (0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.25),
    "per_step_error_threshold": (0.0002, 0.0004, 0.0008, 0.0012, 0.0018, 0.003, 0.006),
    "accumulated_error_budget": (0.0004, 0.0008, 0.0016, 0.0032, 0.0048, 0.0064, 0.0096),
    "static_cache_schedule": (0.4, 0.5, 0.6, 0.66, 0.72, 0.78),  # share of the steps that memory answers
}
NAMED = {  # flags that mean something to these kinds alone, and what they are where they are not given
    "cache": (("per_step_error_threshold", "accumulated_error_budget", "static_cache_schedule"), None),
    "cached_type": (("per_step_error_threshold", "accumulated_error_budget", "static_cache_schedule"), None),
    "power": (("accumulated_error_budget", "static_cache_schedule"), None),
    "decay": (("accumulated_error_budget",), 0.7),
    "fit_cache": (("static_cache_schedule",), None),
    "search_count": (("static_cache_schedule",), 16),
}
SAMPLERS = ("ddim", "ddpm", "dpm", "euler", "heun", "unipc")  # the names in diffusion/pipelines/sampling.py
EXTRAS = {"calibrate": "eval", "edge": "cloud", "cloud": "cloud"}  # what a command's work needs


def parser() -> argparse.ArgumentParser:
    """The flags of all commands."""
    made = argparse.ArgumentParser(prog="ee-diffusion", description="Early exit for transformers.")
    made.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = made.add_subparsers(dest="command", required=True)
    _calibrate_flags(commands)
    cloud.register(commands)
    return made


def _calibrate_flags(commands) -> None:
    about = "Find a policy for a budget or a risk, by live runs, and write it."
    defaults = argparse.ArgumentDefaultsHelpFormatter
    flags = commands.add_parser("calibrate", help=about, description=about, formatter_class=defaults)
    flags.add_argument("--model", help="Pipeline folder; none: the checkpoint that comes with the package.")
    flags.add_argument("--cache", help="Folder of fitted cached exits; none: those beside the model, or unfitted.")
    flags.add_argument(
        "--fit_cache",
        help="Of `static_cache_schedule`: fit the extrapolation to the searched trajectories and write those exits to this folder.",
    )
    flags.add_argument(
        "--cached_type",
        choices=("sample", "epsilon"),
        help="What is cached; none: as in --cache, else sample, with --fit_cache epsilon.",
    )
    flags.add_argument(
        "--kind", choices=sorted(VALUES), default="static_cache_schedule", help="The policy whose number is sought."
    )
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
    flags.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="Scheduler.")
    flags.add_argument("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    flags.add_argument("--guidance_scale", type=float, default=4.0, help="Classifier-free guidance.")
    flags.add_argument("--batch_size", type=int, default=64, help="Images per forward.")
    flags.add_argument(
        "--decay", type=float, help="Of `accumulated_error_budget`: what a step leaves of the error; none: 0.7."
    )
    flags.add_argument(
        "--power",
        type=float,
        help="Of the error amplification; none: 0.5 for `accumulated_error_budget`, 1 for `static_cache_schedule`.",
    )
    flags.add_argument(
        "--search_count", type=int, help="Of `static_cache_schedule`: fitting images of the search; none: 16."
    )
    flags.add_argument("--dry_run", "--dry-run", action="store_true", help="Print the resolved flags and exit.")
    flags.set_defaults(work="ee_diffusion.cli.calibrate:calibrate")


def main(words: Sequence[str] | None = None) -> int:
    """The program. Returns its exit status: 0; 1 if no policy keeps to what was asked; 2 for an error, said in one line on stderr."""
    options = parser().parse_args(words)
    return said_in_one_line(f"ee-diffusion {options.command}", lambda: run(options))


def run(options: argparse.Namespace) -> int | None:
    """The command's work, loaded now."""
    if options.command == "calibrate":
        options.values = tuple(options.values or VALUES[options.kind])
        _resolve(options)
        _check(options)
        if options.dry_run:
            print(json.dumps({name: value for name, value in vars(options).items() if name != "work"}))
            return 0
    try:
        work = resolve_name(options.work)
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("ee_diffusion"):  # ours to mend
            raise
        extra = EXTRAS[options.command]
        raise ValueError(
            f"needs the extra `{extra}`, {missing.name} is not installed: pip install 'ee-diffusion[{extra}]'"
        ) from missing
    return work(options)


def _resolve(options: argparse.Namespace) -> None:
    """Refuse flags that the kind knows nothing of, and fill in those that were not given."""
    for name, (kinds, default) in NAMED.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.kind not in kinds:
            raise ValueError(f"--{name} with --kind {options.kind}, expected it with {' or '.join(kinds)}")


def _check(options: argparse.Namespace) -> None:
    values = options.values
    if not all(map(math.isfinite, values)) or list(values) != sorted(set(values)) or values[0] <= 0:
        raise ValueError(f"values {values}, expected positive numbers, ascending: the safest first")
    if options.kind == "static_cache_schedule" and (values[-1] >= 1 or options.search_count < 1):
        raise ValueError(
            f"values {values}, search_count={options.search_count}: expected shares below 1, 1 image or more"
        )
    for name in ("model", "cache"):
        _check_there(name, getattr(options, name))
    if options.decay is not None and not 0 <= options.decay <= 1:
        raise ValueError(f"decay={options.decay}, expected a share in [0, 1]")
    if options.power is not None and not 0 <= options.power <= 1:
        raise ValueError(f"power={options.power}, expected a number in [0, 1]")
    if options.fit_cache is not None:
        _check_folder(Path(options.fit_cache))
    if options.budget is not None and not 0 < options.budget <= 1:
        raise ValueError(f"budget={options.budget}, expected a share of the blocks in (0, 1]")
    if options.risk is not None and options.cap is None:
        raise ValueError("--risk needs --cap, the relative squared error that counts as loss 1")
    if options.budget is not None and options.cap is not None:
        raise ValueError(f"--cap {options.cap} with --budget, expected it with --risk: a budget asks for no loss")
    if options.risk is not None and not (0 < options.risk < 1 and 0 < options.cap < math.inf):
        raise ValueError(f"risk={options.risk}, cap={options.cap}, expected a risk in (0, 1) and a positive cap")
    if options.delta is not None and (options.risk is None or not 0 < options.delta < 1):
        raise ValueError(f"delta={options.delta}, expected a probability in (0, 1), with --risk")
    if not math.isfinite(options.guidance_scale):
        raise ValueError(f"guidance_scale={options.guidance_scale}, expected a finite number")
    if options.count < 1 or options.batch_size < 1 or options.num_inference_steps < 1:
        raise ValueError("count, batch_size and num_inference_steps, expected at least 1 each")
    if options.delta is not None and (1 - options.risk) ** options.count > options.delta:
        least = math.ceil(math.log(options.delta) / math.log(1 - options.risk))
        raise ValueError(
            f"{options.count} images cannot vouch for a risk of {options.risk} at delta {options.delta}, not even without any loss: "
            f"expected --count {least} or more"
        )
    if Path(options.output).is_dir():
        raise ValueError(f"output={options.output} is a folder, expected the name of a file")
    if not Path(options.output).absolute().parent.is_dir():
        raise ValueError(f"output={options.output}: there is no folder {Path(options.output).absolute().parent}")


def _check_there(name: str, place: str | None) -> None:
    """A place that can be no name on a hub (`owner/name`) must be a folder."""
    hub = place is None or (place.count("/") == 1 and place[0] not in "./~")
    if not hub and not Path(place).is_dir():
        raise ValueError(f"{name}={place}, expected a folder that is there, or a name on the Hub")


def _check_folder(folder: Path) -> None:
    """Where fitted exits may be written: nothing there yet, or cached exits."""
    if folder.is_file():
        raise ValueError(f"fit_cache={folder} is a file, expected the name of a folder")
    if (folder / "model_index.json").is_file():
        raise ValueError(f"fit_cache={folder} is a pipeline, expected a folder of its own for exits")
    config = folder / "config.json"
    kind = json.loads(config.read_text()).get("_class_name") if config.is_file() else "CachedOutputExits"
    if CLASSES.get(kind, kind) != "CachedOutputExits":
        raise ValueError(f"fit_cache={folder} holds a {kind}, expected a folder of its own for exits")


if __name__ == "__main__":
    sys.exit(main())
