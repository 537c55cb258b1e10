"""Teach tracking exits along the model's own trajectories: first their corrections, then how wrong each of them is.

Here: walking and fitting. Not here: the exits (tracking_exits.py). R rows, K deeper exits, P patches, D width, V values of a patch,
n moments (one row at one step, its memory full).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ee_diffusion.diffusion.distillation.objective import observe
from ee_diffusion.diffusion.exits.tracking_exits import TrackingExits, Tracks
from ee_diffusion.diffusion.guidance import cfg_labels
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_estimator import STATES
from ee_diffusion.diffusion.step_cache.trajectories import full_steps


@dataclass(frozen=True, eq=False)
class Moments:
    """What the deeper exits saw: `innovations` (n, K, P, V or D) float16, `moved` (n, P, V), `features` (n, K, F), `missed` (n, P, V) the
    model's clean image minus the recalled one, float16; `known` (n, F') the features at depth 0; `steps` (n,) where."""

    innovations: Tensor
    moved: Tensor
    features: Tensor
    missed: Tensor
    known: Tensor
    steps: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence[Moments]) -> Moments:
        """Several walks as one. Raises ValueError for none."""
        if not parts:
            raise ValueError("no walks, expected at least one")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def __getitem__(self, places: Tensor) -> Moments:
        return Moments(*(getattr(self, name)[places] for name in self.__dataclass_fields__))


@torch.no_grad()
def walk_tracks(
    pipeline: EarlyExitPipeline,
    exits: TrackingExits,
    seeds: Sequence[int],
    class_labels: Sequence[int] | None,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    skip: float,
    states: str,
    generator: torch.Generator,
) -> Moments:
    """Draw images with the full model at every step and keep what the deeper exits would have seen.

    An image remembers a step with probability 1 - `skip`; `states="exited"`: the others are answered by an exit drawn at random (all
    depths alike), so that later states are those that exits lead to; "full": all steps follow the model.

    Raises:
        ValueError: skip outside [0, 1), unknown states, exits that know another noise schedule; as `full_steps`.
    """
    if not 0 <= skip < 1 or states not in STATES:
        raise ValueError(f"skip={skip}, states={states!r}, expected a probability below 1 and one of {STATES}")
    count, memory, seen = len(seeds), None, []
    exits.check_scheduler(pipeline.scheduler)
    call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    run = full_steps(pipeline, seeds, class_labels, **call)
    device, null = pipeline.transformer.device, pipeline.transformer.config.null_class
    labels = cfg_labels(class_labels, null, guidance_scale=guidance_scale, device=device)  # (R,)
    asked = next(run)
    while asked is not None:
        timestep = asked.time.expand(len(asked.sample))
        inputs = {"hidden_states": asked.sample, "timestep": timestep, "class_labels": labels}
        hidden = dict(zip(exits.keeps, observe(pipeline.transformer, exits.keeps, inputs)[1], strict=True))
        context = exits.recall(memory, asked.sample, timestep)
        ready = context["features"][:, 0].isfinite()  # (R,)
        if bool(ready.any()):
            seen.append(_moments(exits, context, hidden, asked, ready))
        images = torch.rand(count, generator=generator) < skip  # (B,)
        skipped = images.repeat(len(asked.sample) // count).to(device) & ready  # (R,)
        facts = {"sample": asked.sample, "timestep": timestep, "output": asked.output}
        used = asked.output
        if states == "exited" and bool(skipped.any()):
            exit = int(torch.randint(len(exits.depths), (1,), generator=generator))
            states_there = hidden[exits.depths[exit]] if exit else asked.sample
            used = torch.where(skipped[:, None, None, None], exits.answer(exit, states_there, context), used)
        rows = (~skipped).nonzero()[:, 0]
        kept = {depth: value[rows] for depth, value in hidden.items()}
        memory = _remembered(exits, memory, rows, kept=kept, facts=facts)
        asked = _sent(run, used)
    return Moments.concatenate(seen)


def _sent(run, output: Tensor):
    try:
        return run.send(output)
    except StopIteration:
        return None


def _remembered(
    exits: TrackingExits, memory: Tracks | None, rows: Tensor, *, kept: Mapping[int, Tensor], facts: dict
) -> Tracks | None:
    return memory if not len(rows) else exits.remember(memory, rows, hidden=kept, **facts)


def _moments(exits: TrackingExits, context: dict, hidden: Mapping[int, Tensor], asked, ready: Tensor) -> Moments:
    """What is kept of one step, of the rows (R,) bool whose memory is ready."""
    own = {name: value[ready] for name, value in context.items()}
    innovations = [exits.innovation(k + 1, hidden[d][ready], own) for k, d in enumerate(exits.keeps)]
    said = exits.memory.clean_of(asked.sample, asked.output, own["timestep"][:1].expand(len(asked.sample)))[ready]
    return Moments(
        torch.stack(innovations, 1).half(),
        own["moved"].half(),
        torch.stack([exits.gauged(one, own) for one in innovations], 1),
        exits.patches_of(said.float() - own["clean"]).half(),
        own["features"],
        torch.full((int(ready.sum()),), asked.index),
    )


def correction_of(exits: TrackingExits, place: int, seen: Moments) -> Tensor:
    """What the deeper exit `place` adds to the recalled clean images at these moments (n, P, V)."""
    innovation = seen.innovations[:, place].float()
    if exits.config.variant == "residual":
        return innovation
    return exits.corrections[place](innovation, seen.moved.float(), seen.features[:, place].nan_to_num(0.0))


def shares_left(exits: TrackingExits, seen: Moments) -> Tensor:
    """`mean |correction - missed|^2 / |missed|^2` of every deeper exit (K,), each row by its own: of 1 for memory alone."""
    missed = seen.missed.float()
    scale = missed.square().mean((1, 2)).clamp(min=1e-8)  # (n,)
    left = [correction_of(exits, place, seen) - missed for place in range(len(exits.keeps))]
    return torch.stack([(one.square().mean((1, 2)) / scale).mean() for one in left])


def fit_corrections(
    exits: TrackingExits,
    seen: Moments,
    *,
    iterations: int,
    batch_size: int,
    generator: torch.Generator,
    learning_rate: float = 1e-3,
) -> None:
    """Train the corrections of the `learned` variant: the sum of `shares_left`, all exits at once.

    Raises:
        ValueError: another variant, fewer moments than a batch, a batch or a number of iterations below 1.
    """
    if exits.config.variant != "learned" or not 1 <= batch_size <= len(seen.steps) or iterations < 1:
        raise ValueError(
            f"variant={exits.config.variant!r}, {len(seen.steps)} moments, batch_size={batch_size}, iterations={iterations}: expected "
            "'learned', a batch of at least one moment and at most all, and at least 1 iteration"
        )
    optimizer = torch.optim.AdamW(exits.corrections.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=iterations)
    with torch.enable_grad():
        for _ in range(iterations):
            batch = seen[torch.randint(len(seen.steps), (batch_size,), generator=generator)]
            optimizer.zero_grad()
            shares_left(exits, batch).sum().backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def errors_of(exits: TrackingExits, seen: Moments, *, batch_size: int = 256) -> Tensor:
    """True root mean square error of the clean image at every depth, depth 0 first: (K + 1, n)."""
    found = []
    for places in torch.arange(len(seen.steps)).split(batch_size):
        batch = seen[places]
        missed = batch.missed.float()
        left = [missed, *(correction_of(exits, place, batch) - missed for place in range(len(exits.keeps)))]
        found.append(torch.stack([one.square().mean((1, 2)).sqrt() for one in left]))
    return torch.cat(found, 1)


def fit_gauges(exits: TrackingExits, seen: Moments, *, iterations: int, learning_rate: float = 1e-2) -> None:
    """Train the uncertainty of the deeper exits on their true errors: smooth L1 between log u and the logarithm of the error.

    Raises:
        ValueError: fewer than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}, expected at least 1")
    target = errors_of(exits, seen)[1:].clamp(min=1e-6).log()  # (K, n)
    optimizer = torch.optim.AdamW(exits.gauges.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    with torch.enable_grad():
        for _ in range(iterations):
            said = [exits.expected_error(k + 1, seen.features[:, k]).log() for k in range(len(exits.keeps))]
            loss = nn.functional.smooth_l1_loss(torch.stack(said), target, beta=0.5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
