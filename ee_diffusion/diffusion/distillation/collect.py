"""Trajectories: a pipeline generates, and what its transformer is called with is kept as data to fit exits on.

Here: walking a pipeline, along its own or the exited model's trajectories. Not here: the states (dataset.py), learning (objective.py).
T trajectories (one an image), J calls of the transformer on each, G rows of an image in a call (2 under guidance), R = G * T rows.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ee_diffusion.core.patch import ForwardPatch
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.session import Session
from ee_diffusion.diffusion.distillation.dataset import States, row_inputs
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.hooks.transformer_hook import TransformerHook
from ee_diffusion.diffusion.protocols import DenoiserHeads

Conditions = Sequence[int] | Sequence[str] | None


@dataclass(frozen=True, eq=False)
class Exited:
    """Follow the exited model: `exits` under `policy`.

    Raises:
        ValueError: a policy that is off; something else than a policy and exits.
    """

    policy: Policy
    exits: DenoiserHeads

    def __post_init__(self):
        if not isinstance(self.policy, Policy) or not isinstance(self.exits, DenoiserHeads):
            raise ValueError(f"policy={self.policy!r}, exits={self.exits!r}, expected a Policy and exits")
        if self.policy.is_off:
            raise ValueError("a policy that is off has no exited trajectories: give a criterion or a schedule")


def walk(
    pipeline: DiffusionPipeline,
    seeds: Sequence[int],
    conditions: Conditions,
    *,
    exited: Exited | None = None,
    **call: Any,
) -> States:
    """Generate one image per seed and keep what the transformer was called with.

    Args:
        conditions: class labels or prompts, one per seed; None: unconditional.
        exited: follow the exited model instead of the full one. Its pipeline calls the transformer once a step.
        call: further arguments of the pipeline's call (num_inference_steps, guidance_scale, ...).

    Raises:
        ValueError: whatever does not fit, before any block runs; a transformer in train mode; an input that is not known to be per row.
    """
    arguments = _call_arguments(pipeline, seeds, conditions) | call
    if pipeline.transformer.training:
        raise ValueError("the transformer is in train mode, where it may drop labels: call .eval() first")
    recorder = _Recorder(pipeline, len(seeds), exited)
    device = pipeline._execution_device
    # A scheduler that draws without the given generators must not depend on what ran before.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seeds[0])
        with recorder.recording():
            pipeline(**arguments)
    return recorder.states()


class FreshStates:
    """States on the fly: `batch` with `key` (B,) -> the states of B new trajectories, all rows of each (B, J * G, ...), and the keys.

    Seed and condition of a trajectory are functions of its key alone, so neither ranks nor history matter.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        pool: Sequence[int],
        conditions: Conditions,
        *,
        exited: Exited | None = None,
        **call: Any,
    ):
        if not pool or (conditions is not None and not conditions):
            raise ValueError("no seeds or no conditions to draw from, expected at least one of each")
        self.pipeline, self.pool, self.conditions = pipeline, pool, conditions
        self.exited, self.call = exited, call

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        keys, size = batch["key"].tolist(), len(self.pool)
        seeds = [self.pool[key % size] for key in keys]
        chosen = self.conditions and [self.conditions[key // size % len(self.conditions)] for key in keys]
        states = walk(self.pipeline, seeds, chosen, exited=self.exited, **self.call)
        return states.by_trajectory() | {"key": batch["key"]}


def identity_of(
    pipeline: DiffusionPipeline, seeds: Sequence[int], conditions: Conditions, *, exited: Exited | None, **call: Any
) -> dict[str, Any]:
    """Everything that states depend on, as plain values: the models' weights and settings, the noise schedule, seeds, conditions."""
    models = {
        name: fingerprint(component)
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and name not in ("vae", "exits")
    }
    values = {
        "pipeline": type(pipeline).__name__,
        "scheduler": [type(pipeline.scheduler).__name__, dict(pipeline.scheduler.config)],
        "seeds": _digest(list(seeds)),
        "conditions": _digest(None if conditions is None else list(conditions)),
        "trajectories": None if exited is None else [exited.policy.to_dict(), fingerprint(exited.exits)],
        "call": call,
    }
    return json.loads(json.dumps(models | values, default=str))


def fingerprint(module: nn.Module) -> str:
    """A short name of a module's class and weights: another one for other weights, whatever device they are on."""
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _call_arguments(pipeline: DiffusionPipeline, seeds: Sequence[int], conditions: Conditions) -> dict[str, Any]:
    if not isinstance(pipeline, DiffusionPipeline):
        raise ValueError(f"pipeline={pipeline!r}, expected a diffusers pipeline")
    if not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"seeds {list(seeds)}, expected whole numbers")
    if conditions is not None and not (_all_of(int, conditions) or _all_of(str, conditions)):
        raise ValueError(f"conditions {list(conditions)}, expected class labels (whole numbers) or prompts, not both")
    if not seeds or (conditions is not None and len(conditions) != len(seeds)):
        came = None if conditions is None else len(conditions)
        raise ValueError(f"{len(seeds)} seeds, {came} conditions: expected at least 1 and one condition a seed")
    if not isinstance(pipeline.components.get("transformer"), nn.Module):
        raise ValueError(f"{type(pipeline).__name__} has no transformer to follow: {sorted(pipeline.components)}")
    accepted = inspect.signature(type(pipeline).__call__).parameters
    if conditions is None:
        name, value = "batch_size", len(seeds)
    else:
        name, value = ("prompt" if isinstance(conditions[0], str) else "class_labels"), list(conditions)
    if name not in accepted:
        raise ValueError(f"{type(pipeline).__name__} takes no {name}, only {sorted(set(accepted) - {'self'})}")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    # a text pipeline need not decode what nobody looks at; the class-conditional ones always do
    return {name: value, "generator": generators, "output_type": "latent" if name == "prompt" else "pt"}


def _all_of(kind: type, values: Sequence[Any]) -> bool:
    return all(isinstance(value, kind) for value in values)


class _Recorder:
    """Keeps the inputs of every forward of a pipeline's transformer, and lets exits take part in it."""

    def __init__(self, pipeline: DiffusionPipeline, num_images: int, exited: Exited | None):
        self.pipeline, self.num_images, self.exited = pipeline, num_images, exited
        self.calls: list[dict[str, Tensor]] = []  # each (R, ...)
        self._signature = inspect.signature(type(pipeline.transformer).forward)
        self._attachment: TransformerHook | None = None
        self._session: Session | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        transformer = self.pipeline.transformer
        self._attachment = None if self.exited is None else attach_exits(transformer, self.exited.exits)
        interception = ForwardPatch(transformer, self._forward)
        try:
            yield
        finally:
            interception.restore()
            if self._attachment is not None:
                self._attachment.detach()

    def states(self) -> States:
        """The calls so far, by trajectory."""
        if not self.calls:
            raise ValueError(f"{type(self.pipeline).__name__} did not call its transformer: there are no states")
        return States.of_calls(self.calls, self.num_images)

    def _forward(self, original, *args, **kwargs):
        arguments = self._signature.bind(None, *args, **kwargs).arguments
        inputs = row_inputs(dict(list(arguments.items())[1:]))
        if len(inputs["hidden_states"]) % self.num_images:
            raise ValueError(f"{len(inputs['hidden_states'])} rows for {self.num_images} images, expected a multiple")
        self.calls.append({name: value.clone() for name, value in inputs.items()})
        if self._attachment is None:
            return original(*args, **kwargs)
        session = self._session = self._session or self._start(len(inputs["hidden_states"]))
        with self._attachment.use(session.step(len(self.calls) - 1, float(inputs["timestep"][0]))):
            return original(*args, **kwargs)

    def _start(self, num_rows: int) -> Session:
        policy = self.exited.policy
        images = torch.arange(self.num_images).repeat(num_rows // self.num_images)  # (R,)
        rows = torch.arange(num_rows) if policy.cfg_exit == "separate" else images
        return self._attachment.start(policy, rows=rows, num_steps=len(self.pipeline.scheduler.timesteps))
