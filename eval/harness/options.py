"""Flags that the evaluation scripts share, and how they load a pipeline. Not here: what they measure."""

from __future__ import annotations

import json
import os
import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from ee_diffusion.checkpoints import checkpoint_path
from ee_diffusion.core.devices import device_named
from ee_diffusion.diffusion.pipelines.sampling import use_sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CLOCK = ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def flag(help: str, default=None):
    """A field of a script's options."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SamplingOptions:
    """What is sampled, and how."""

    model: str | None = flag("Pipeline folder; none: the checkpoint that comes with the package.")
    output_dir: str | None = flag("Where results go.")
    sampler: str = flag("ddim, ddpm, dpm, unipc, euler or heun.", "ddim")
    num_inference_steps: int = flag("Denoising steps.", 50)
    guidance_scale: float = flag("Classifier-free guidance.", 4.0)
    batch_size: int = flag("Images per forward (twice the rows under guidance).", 64)
    dtype: str = flag("float32, bfloat16 or float16.", "float32")
    device: str | None = flag("cpu, cuda, ...; none: cuda if there is one.")
    seed: int = flag("Seed of whatever the script draws itself (not of the images: those have their own).", 0)


class Explaining(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help with the whole docstring, its lines as they are, and every default."""


def parse(*kinds: type, description: str, **defaults: object) -> tuple:
    """Parse flags into frozen dataclasses; with --dry-run print them and exit. `defaults`: the script's own, in the place of a field's."""
    parser = HfArgumentParser(kinds, description=description, formatter_class=Explaining)
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="Print the resolved options as JSON and exit."
    )
    parser.set_defaults(**defaults)
    *options, rest = parser.parse_args_into_dataclasses()
    if rest.dry_run:
        print(json.dumps({name: value for option in options for name, value in asdict(option).items()}, indent=2))
        raise SystemExit(0)
    return tuple(options)


def command() -> str:
    """This script's command line, as a reader would type it in the repository's root, with what the clock depends on before it.

    Of absolute paths, which are of one machine, the last part is kept."""
    before = [f"{name}={os.environ[name]}" for name in CLOCK if name in os.environ]
    words = [f".../{Path(word).name}" if Path(word).is_absolute() else word for word in map(str, sys.argv[1:])]
    return shlex.join([*before, "python", "-m", f"eval.{Path(sys.argv[0]).stem}", *words])


def results_folder(options: SamplingOptions) -> Path:
    """The folder that --output_dir names, made. Raises ValueError if there is none."""
    if options.output_dir is None:
        raise ValueError("--output_dir is missing, expected a folder for the results")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load(options: SamplingOptions) -> EarlyExitPipeline:
    """The pipeline that the options name, on its device, in its dtype, with its sampler."""
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype={options.dtype!r}, expected one of {sorted(DTYPES)}")
    pipeline = EarlyExitPipeline.from_pretrained(options.model or checkpoint_path())
    pipeline.set_progress_bar_config(disable=True)
    use_sampler(pipeline, options.sampler)
    device = device_named(options.device)
    pipeline = pipeline.to(device)
    return pipeline if options.dtype == "float32" else pipeline.to(DTYPES[options.dtype])
