"""How an evaluation starts: flags, over a YAML file, over defaults, become frozen options; then the work is loaded by its name.

Nothing here loads torch: `--help`, `--dry-run` and refused options come at once. Not here: the work (eval/work/).
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml
from transformers import HfArgumentParser

DTYPES = ("bfloat16", "float16", "float32")
CLOCK = ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
OTHERS = ("reference_dir", "reference_files", "reference_statistics")


def flag(help: str, default=None):
    """A field of a script's options."""
    return field(default=default, metadata={"help": help})


def numbers(help: str, *values: float):
    """A field that holds a list."""
    return field(default_factory=lambda: list(values), metadata={"help": help})


@dataclass(frozen=True)
class SamplingOptions:
    """What is sampled, and how.

    Raises:
        ValueError: an unknown dtype.
    """

    model: str | None = flag("Pipeline folder; none: the checkpoint that comes with the package.")
    output_dir: str | None = flag("Folder for the results.")
    sampler: str = flag("ddim, ddpm, dpm, unipc, euler or heun.", "ddim")
    num_inference_steps: int = flag("Denoising steps.", 50)
    guidance_scale: float = flag("Classifier-free guidance.", 4.0)
    batch_size: int = flag("Images per forward (twice the rows under guidance).", 64)
    dtype: str = flag("float32, bfloat16 or float16.", "float32")
    device: str | None = flag("cpu, cuda, ...; none: cuda if there is one.")
    seed: int = flag("Seed of what the script draws itself (not of the images: those have their own).", 0)

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}, expected one of {DTYPES}")


@dataclass(frozen=True)
class ReferenceOptions:
    """Real images to compare with: CIFAR-10's, unless others are named.

    Raises:
        ValueError: several references, an unknown split, too few images.
    """

    reference: str = flag("CIFAR-10 split to compare with: train or test.", "train")
    reference_dir: str | None = flag(
        "Folder of real images, in CIFAR-10's place; resized to the size of the generated ones."
    )
    reference_files: list[str] = numbers("Parquet files of real images, in CIFAR-10's place; resized, too.")
    reference_column: str = flag("Column of the images in these files.", "image")
    reference_statistics: str | None = flag(
        "File of statistics of real images, in CIFAR-10's place: a .safetensors out of --cache_dir, or an .npz with mu and sigma (FID)."
    )
    reference_count: int | None = flag("Use only the first so many real images; none: all.", 10_000)
    data: str | None = flag("Data folder (CIFAR-10, small networks); none: what EE_DIFFUSION_DATA names.")
    cache_dir: str = flag("Folder for reference statistics.", "runs/references")

    def __post_init__(self):
        others = [name for name in OTHERS if getattr(self, name)]
        if len(others) > 1 or (others and self.reference != "train"):
            raise ValueError(f"references {others}, CIFAR-10's split {self.reference!r}: expected one of them")
        if self.reference not in ("train", "test"):
            raise ValueError(f"reference={self.reference!r}, expected train or test")
        if self.reference_count is not None and self.reference_count < 2:
            raise ValueError(f"reference_count={self.reference_count}, expected at least 2, or none")

    @property
    def is_cifar(self) -> bool:
        """Whether the reference is CIFAR-10."""
        return not any(getattr(self, name) for name in OTHERS)

    @property
    def name(self) -> str:
        """The reference in a table: of paths their last parts."""
        if self.is_cifar:
            return f"CIFAR-10 {self.reference}"
        return ", ".join(
            Path(given).name for given in self.reference_files or [self.reference_dir or self.reference_statistics]
        )


SHARE = (lambda x: 0 < x < 1, "between 0 and 1")
PART = (lambda x: 0 < x <= 1, "above 0, at most 1")
POSITIVE = (lambda x: 0 < x < math.inf, "positive and finite")
COUNT = (lambda x: x >= 1, "at least 1")
TRUST = (lambda x: 0 <= x <= 1, "from 0 to 1")


@dataclass(frozen=True)
class CandidateOptions:
    """Who is compared with the full model: of each kind (harness/candidates.py) the points of its curve, none by default.

    Raises:
        ValueError: numbers out of range, or twice in a list.
    """

    step_cache: str | None = flag("Folder of a fitted step cache (train.fit_step_cache); none: unfitted.")
    error_thresholds: list[float] = numbers("Step cache, per step and image: errors allowed (rms, data in [-1, 1]).")
    error_budgets: list[float] = numbers("Step cache, per image: budgets of accumulated error.")
    whole_batch: list[float] = numbers("The same budgets, decided for the whole batch by its worst image.")
    other_caches: list[str] = numbers("NAME=FOLDER of other fitted step caches: the same budgets with each.")
    oracles: list[float] = numbers("Errors allowed per step where the true error is known.")
    cache_intervals: list[int] = numbers("Periodic cache: every so many steps are computed.")
    searched: list[float] = numbers("Searched schedules: shares of the steps that are cached.")
    searched_epsilon: list[float] = numbers("The same where the noise is extrapolated.")
    searched_fitted: list[float] = numbers("The same with least squares at each step.")
    searched_joint: list[float] = numbers("The same with joint least squares.")
    fewer_steps: list[float] = numbers("The full model at fractions of the steps.")
    deediff: list[float] = numbers("DeeDiff's thresholds on u.")
    deediff_shares: list[float] = numbers("DeeDiff at thresholds for shares of the blocks, found by replay.")
    released: str | None = flag("Folder of exits of variant 'released' for the same transformer; none: go without.")
    released_threshold: float = flag("Certainty above which DeeDiff's authors' code exits on CIFAR-10.", 0.92)
    first_block: list[float] = numbers("Thresholds of diffusers' FirstBlockCache.")
    taylor: list[int] = numbers("Intervals of diffusers' TaylorSeer.")
    taylor_second_order: list[int] = numbers("The same where it expands to the second order.")
    mag: list[float] = numbers("Thresholds of diffusers' MagCache.")
    db_cache: list[float] = numbers("Thresholds of cache-dit's DBCache (stock DiT pipelines).")
    db_cache_taylor: list[float] = numbers("The same with TaylorSeer.")
    decay: float = flag("How much of the accumulated error a step leaves.", 0.7)
    power: float = flag("How far budgets trust the measured error amplification, 0 to 1.", 0.5)
    search_power: float = flag("How far the search trusts it, 0 to 1.", 1.0)
    search_count: int = flag("Images whose trajectories are searched and fitted (fitting seeds).", 16)
    amplification_images: int = flag("Images on which error amplification is measured (fitting seeds).", 8)
    amplification_every: int = flag("It is measured at every so many steps.", 4)
    calibration_count: int = flag("Calibration images of --deediff_shares and --released.", 64)
    controls: bool = flag("Static and random controls made of the traces of policies that decide.", True)

    def __post_init__(self):
        check_numbers(self, SHARE, "searched", "searched_epsilon", "searched_fitted", "searched_joint")
        check_numbers(self, PART, "fewer_steps", "deediff", "deediff_shares", "released_threshold")
        check_numbers(self, POSITIVE, "error_thresholds", "error_budgets", "whole_batch", "oracles", "first_block")
        check_numbers(self, POSITIVE, "mag", "db_cache", "db_cache_taylor")
        check_numbers(self, COUNT, "cache_intervals", "taylor", "taylor_second_order", "search_count")
        check_numbers(self, COUNT, "amplification_images", "amplification_every", "calibration_count")
        check_numbers(self, TRUST, "decay", "power", "search_power")
        if not all(name and folder for name, _, folder in (one.partition("=") for one in self.other_caches)):
            raise ValueError(f"other_caches={self.other_caches}, expected NAME=FOLDER of each")


def check_numbers(options: object, within: tuple[Callable[[float], bool], str], *names: str) -> None:
    """Raises ValueError for fields that hold a number, or a list with one, out of range, or twice the same in a list."""
    fits, expected = within
    for name in names:
        value = getattr(options, name)
        values = value if isinstance(value, list) else [value]
        if not all(fits(one) for one in values) or len(set(values)) < len(values):
            raise ValueError(f"{name}={value}, expected numbers {expected}, each once")


class Explaining(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help with the whole docstring, its lines as they are, and every default."""


def parse(*kinds: type, description: str, words: Sequence[str] | None = None, **defaults: object) -> tuple:
    """Flags, over --config (a YAML file of flags), over `defaults`, over the fields' own, as frozen dataclasses.

    With --dry-run they are printed as JSON, and the process ends.

    Raises:
        ValueError: a config with names that are no flags; what a dataclass refuses.
    """
    parser = HfArgumentParser(kinds, description=description, formatter_class=Explaining)
    parser.add_argument("--config", help="YAML file of flags (eval/configs/); flags that are given win.")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="Print the options as JSON and exit.")
    parser.set_defaults(**defaults)
    config = parser.parse_known_args(words)[0].config
    if config is not None:
        parser.set_defaults(**_read_config(Path(config), {action.dest for action in parser._actions}))
    *options, rest = parser.parse_args_into_dataclasses(words)
    if rest.dry_run:
        print(json.dumps(merged(*options), indent=2))
        raise SystemExit(0)
    return tuple(options)


def _read_config(path: Path, known: set[str]) -> dict[str, Any]:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or settings.keys() - known:
        unknown = sorted(settings.keys() - known) if isinstance(settings, dict) else settings
        raise ValueError(f"{path} sets {unknown}, expected flags of this script, as NAME: VALUE")
    return settings


def launch(about: str, work: str, *kinds: type, **defaults: object) -> None:
    """Parse the flags of one script and call its work, "module:function", with one object of each kind."""
    options = parse(*kinds, description=about, **defaults)
    resolve_name(work)(*options)


def launch_one_of(about: str, **commands: tuple[str, tuple[type, ...], dict[str, object]]) -> None:
    """As `launch`, for a script with several commands: the first word names one. commands: name -> (work, kinds, defaults).

    Raises:
        SystemExit: no command, or an unknown one; with --help status 0.
    """
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first not in commands:
        print(f"{about}\nCommands: {', '.join(commands)}. Each has its own --help.")
        raise SystemExit(0 if first in ("-h", "--help") else 2)
    work, kinds, defaults = commands[first]
    options = parse(*kinds, description=about, words=sys.argv[2:], **defaults)
    resolve_name(work)(*options)


def merged(*options: Any) -> dict[str, Any]:
    """All fields of the options in one table: a report's settings."""
    return {name: value for option in options for name, value in asdict(option).items()}


def command() -> str:
    """This script's command line, as a reader would type it in the repository's root, with what the clock depends on before it.

    Of absolute paths, which are of one machine, the last part is kept."""
    before = [f"{name}={os.environ[name]}" for name in CLOCK if name in os.environ]
    words = [f".../{Path(word).name}" if Path(word).is_absolute() else word for word in map(str, sys.argv[1:])]
    return shlex.join([*before, "python", "-m", f"eval.{Path(sys.argv[0]).stem}", *words])


def results_folder(output_dir: str | None) -> Path:
    """The folder that --output_dir names, made. Raises ValueError if there is none."""
    if not output_dir:
        raise ValueError("--output_dir is missing, expected a folder for the results")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
