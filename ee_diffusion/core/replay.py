"""Choosing numbers from stored scores: replay a policy offline, and find the threshold that meets a budget.

A replay drives the very same sessions as a live run. It is exact for the policy that made the trace, and for other rules only within a
step and from a trace recorded with `record_all`: a bolder exit changes every later state, so a live run has the last word.
S steps, E samples, K exits, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_diffusion.core.criteria import DepthTable
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.session import StepSession, begin
from ee_diffusion.core.trace import Trace


def replay(trace: Trace, policy: Policy) -> Tensor:
    """Depths (S, E) at which `policy` stops the samples of a trace, decided from its stored scores; -1: absent from the step.

    Raises:
        ValueError: a policy other than the trace's own, on a trace that was not recorded with `record_all`; exits that it lacks.
    """
    if not trace.recorded_all and policy.to_dict() != trace.policy:
        raise ValueError("another policy can only be replayed on a trace recorded with record_all=True")
    num_samples, num_layers = len(trace.samples), trace.planned.shape[1]
    session = begin(
        policy,
        num_layers,
        tuple(trace.exits.tolist()),
        rows=torch.arange(num_samples),
        num_steps=len(trace.times),
        samples=trace.samples,
    )
    needs_scores = policy.criterion is not None and not isinstance(policy.criterion, DepthTable)
    if needs_scores and not bool(trace.measured.any()):
        raise ValueError(
            "no score was measured in this trace: a criterion that looks at scores cannot be replayed on it"
        )
    for index, time in enumerate(trace.times.tolist()):
        step = session.step(index, time, absent=trace.depths[index] < 0)
        stored = trace.scores[index]  # (K, E)
        for depth in range(num_layers):

            def measure(exit: int, stored: Tensor = stored, step: StepSession = step) -> Tensor | None:
                return stored[exit][step.rows] if needs_scores else None

            step.offer(depth, measure)
            step.look(depth, measure)
        step.close()
    return torch.stack([step.depths for step in session.finished])  # (S, E)


@dataclass(frozen=True)
class BudgetChoice:
    """A number found for a budget, and the mean fraction of blocks that the replay says it costs."""

    value: float
    fraction: float


def value_for_budget(
    trace: Trace, policy_for: Callable[[float], Policy], *, budget: float, low: float, high: float
) -> BudgetChoice:
    """The safest number whose replayed mean depth is at most `budget` of the model's blocks, by bisection.

    `policy_for(value)`: the policy to judge; a larger value must not cost less (thresholds on scores are so). Search in [low, high].

    Raises:
        ValueError: a budget outside (0, 1], or one that even `low` does not meet; ends that are no range, or of which `high` costs less.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget={budget}, expected a fraction of the blocks in (0, 1]")
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"low={low}, high={high}, expected low <= high, both finite")
    num_layers = trace.planned.shape[1]

    def fraction(value: float) -> float:
        depths = replay(trace, policy_for(value))
        return depths[depths >= 0].float().mean().item() / num_layers

    cost, most = fraction(low), fraction(high)
    if most < cost:
        raise ValueError(f"{low} costs {cost:.3f} and {high} costs {most:.3f}, expected a larger value to be safer")
    if cost > budget:
        raise ValueError(f"no value in [{low}, {high}] meets budget {budget}: the boldest, {low}, costs {cost:.3f}")
    if most <= budget:
        return BudgetChoice(high, most)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fraction(middle) <= budget else (low, middle)
    return BudgetChoice(low, fraction(low))


def static_depths(depths: Tensor, exits: tuple[int, ...], *, num_layers: int) -> tuple[int, ...]:
    """A static schedule with a policy's own mean depth per step: depths (S, E) -> S depths out of the exits and L.

    What rounding takes from one step it gives to the next, so that the total is kept as closely as the exits allow.

    Raises:
        ValueError: a step in which no sample took part.
    """
    empty = (depths < 0).all(1).nonzero()[:, 0].tolist()
    if empty or not len(depths):
        raise ValueError(
            f"of depths {tuple(depths.shape)} nobody took part in steps {empty}, expected at least one sample in each"
        )
    allowed = torch.tensor([*exits, num_layers], dtype=torch.float64)
    carried, chosen = 0.0, []
    for row in depths:
        wanted = row[row >= 0].double().mean().item() + carried
        depth = int(allowed[(allowed - wanted).abs().argmin()])
        carried = wanted - depth
        chosen.append(depth)
    return tuple(chosen)


def shuffled_per_step(depths: Tensor, generator: torch.Generator) -> Tensor:
    """Random exits with the per-step histogram: at each step the depths (S, E) dealt out anew among the samples."""
    return torch.stack([row[torch.randperm(len(row), generator=generator)] for row in depths])


def shuffled_overall(depths: Tensor, generator: torch.Generator) -> Tensor:
    """Random exits with the overall histogram: all depths (S, E) dealt out anew among steps and samples."""
    flat = depths.flatten()
    return flat[torch.randperm(len(flat), generator=generator)].reshape(depths.shape)
