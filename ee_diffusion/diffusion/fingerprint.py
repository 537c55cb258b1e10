"""What a policy and fitted exits were made for: a fingerprint of weights, the settings of sampling. Not here: who asks for it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from torch import nn

from ee_diffusion.core.policy import Policy

# settings of exits that earlier versions did not have; None says what those meant
ADDED = ("out_channels", "course_worth")


def fingerprint(*modules: nn.Module | None) -> str:
    """SHA-256 (16 hexadecimal digits) over names, shapes and values, in the precision in which they are held."""
    digest = hashlib.sha256()
    for place, module in enumerate(modules):
        for name, tensor in {} if module is None else module.state_dict().items():
            digest.update(f"{place}/{name}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def made_for_of(
    pipeline: DiffusionPipeline, *, num_inference_steps: int | Sequence[int], guidance_scale: float, eta: float = 0.0
) -> tuple[tuple[str, str], ...]:
    """What a policy calibrated on this pipeline with these settings was made for (`Policy.made_for`).

    num_inference_steps: their number, or the timesteps themselves where they are given by hand.
    """
    return (
        ("weights", fingerprint(pipeline.transformer, pipeline.exits)),
        ("exits settings", _settings(pipeline.exits.config if isinstance(pipeline.exits, ConfigMixin) else {})),
        ("scheduler", type(pipeline.scheduler).__name__),
        ("scheduler settings", _settings(pipeline.scheduler.config)),
        ("num_inference_steps", str(num_inference_steps)),
        ("guidance_scale", str(float(guidance_scale))),
        ("eta", str(float(eta))),
    )


def check_made_for(
    policy: Policy,
    pipeline: DiffusionPipeline,
    *,
    num_inference_steps: int | Sequence[int],
    guidance_scale: float,
    eta: float = 0.0,
) -> None:
    """Raises ValueError if the policy was calibrated on something else. One made for any model costs nothing here."""
    if not policy.made_for:
        return
    call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "eta": eta}
    here = dict(made_for_of(pipeline, **call))
    differ = [(name, value) for name, value in policy.made_for if here.get(name) != value]
    if differ:
        told = "; ".join(f"{name} {value}, this run has {here.get(name)}" for name, value in differ)
        hint = " (weights are the transformer's and the exits': are pipe.exits those it was calibrated with?)"
        raise ValueError(
            f"the policy was calibrated for {told}{hint if differ[0][0] in ('weights', 'exits settings') else ''}"
        )


def warn_of_course(
    pipeline: DiffusionPipeline,
    *,
    num_inference_steps: int | Sequence[int],
    guidance_scale: float | None,
    exits: object = None,
) -> None:
    """Warns where exits that remember are weighed for courses of another solver, number of steps or guidance than this run's.

    guidance_scale: None, not known. exits: where they are not the pipeline's own.
    """
    exits = pipeline.exits if exits is None else exits
    config = exits.config if isinstance(exits, ConfigMixin) else {}
    if not config.get("course_steps"):
        return
    steps = num_inference_steps if isinstance(num_inference_steps, int) else len(num_inference_steps)
    here = {
        "course_scheduler": type(pipeline.scheduler).__name__,
        "course_steps": steps,
        "course_guidance": None if guidance_scale is None else float(guidance_scale),
    }
    known = {name: config.get(name) for name in here}
    if any(None not in (value, here[name]) and value != here[name] for name, value in known.items()):
        told = [
            f"{x['course_scheduler']}, {x['course_steps']} steps, guidance {x['course_guidance'] or 'not known'}"
            for x in (known, here)
        ]
        warnings.warn(
            f"what these exits remember is weighed for {told[0]}; this run has {told[1]}: fit them to it "
            "(ee-diffusion calibrate --kind searched --fit_memory FOLDER; for stock pipelines fit_schedules)",
            stacklevel=3,
        )


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings (a noise schedule and order, what exits remember) without versions and defaults (`_...`), and without what a later version
    added where it says nothing."""
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    return {name: value for name, value in known.items() if name not in ADDED or value is not None}


def _settings(config: Mapping[str, Any]) -> str:
    """A fingerprint of `settings_of` them."""
    return hashlib.sha256(json.dumps(settings_of(config), sort_keys=True, default=str).encode()).hexdigest()[:16]
