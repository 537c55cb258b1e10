"""What was drawn or is dear to make, kept in files by what it depends on: a run that was stopped goes on where it was.

Here: files and their names. Not here: drawing (candidates.py), times, which are never kept (interleave.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import ConfigMixin
from safetensors.torch import load_file
from torch import nn

from ee_diffusion.core.io import write_tensors, write_text
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.linear_predictor import ALONE, FLOOR
from ee_diffusion.diffusion.fingerprint import fingerprint, settings_of
from ee_diffusion.diffusion.pipelines.sampling import Generated
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from eval.harness.interleave import Candidate, Draw


def contents(pipeline: EarlyExitPipeline, exits: nn.Module | None) -> dict:
    """What images depend on beside their settings: weights and configs (not the folders they came from), versions, the type of device."""
    scheduler = pipeline.scheduler
    return {
        "transformer": [fingerprint(pipeline.transformer), _config(pipeline.transformer)],
        "exits": exits and [type(exits).__name__, fingerprint(exits), _config(exits), *_together(exits)],
        "scheduler": [type(scheduler).__name__, _config(scheduler)],
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "device": pipeline.transformer.device.type,
    }


def kept(draw: Draw, folder: Path, settings: dict, made_with: Callable[[Candidate], dict]) -> Draw:
    """The same, but images and traces that were drawn before are read from `folder`: `seconds` are none, for a time is of its own run.

    settings: of the sampling. made_with: the `contents` that a candidate draws with.
    """

    def again(candidate: Candidate, chosen: list[int], labels: list[int], first: int) -> Generated:
        name = name_of([settings, made_with(candidate), candidate.to_dict(), chosen, labels, first])
        path, trace = folder / f"{name}.safetensors", folder / f"{name}.trace.safetensors"
        if path.exists():
            return Generated(load_file(path)["images"], Trace.load(trace) if trace.exists() else None, ())
        drawn = draw(candidate, chosen, labels, first)
        if drawn.trace is not None:
            drawn.trace.save(trace)
        write_tensors(path, {"images": drawn.images})
        return Generated(drawn.images.cpu(), drawn.trace, ())

    folder.mkdir(parents=True, exist_ok=True)
    return again


def noted(folder: Path, what: list, make: Callable[[], object]) -> object:
    """A plain value that is dear to make, by what it depends on: read from `folder` if it was made before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name_of(what)}.json"
    if not path.exists():
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text())


def name_of(what: list) -> str:
    """The name of a file for what depends on `what`."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _config(module: object) -> dict:
    """Settings that are no weights, without versions and folders (`_...`)."""
    return settings_of(module.config) if isinstance(module, ConfigMixin) else {}


def _together(exits: nn.Module) -> list[float]:
    """How answers are weighed together, where they are: that is worked out anew in every run."""
    return [ALONE, FLOOR] if isinstance(exits, CachedOutputExits) and exits.config.joint else []
