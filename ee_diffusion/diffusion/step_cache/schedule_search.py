"""Which steps to compute: the best static schedule by the full model's own trajectories, found exactly by dynamic programming.

Here: the price of a schedule and the search. Not here: trajectories (trajectories.py), policies (methods.py). B images, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_diffusion.core.history import OutputHistory, weighted
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.step_cache.trajectories import LONGEST, Trajectory, values_of

Prices = dict[tuple[int, int, int], float]


@dataclass(frozen=True)
class Found:
    """The best schedule with so many full steps: their places, and its price."""

    full: tuple[int, ...]
    price: float


def gap_prices(exits: CachedOutputExits, trajectory: Trajectory, weights: Sequence[float]) -> Prices:
    """(a, b, c) -> what it costs to answer the steps between full steps b and c from memory of a and b:

        mean over images and values of (sum_t w_t (recalled_t - said_t))^2.

    Errors within a gap point the same way, so they add up before they are squared. c = S: to the end of the run.

    Raises:
        ValueError: weights for another number of steps or that are not finite; exits that cache another number of predictions than
            two.
    """
    num_steps = len(trajectory.times)
    if len(weights) != num_steps or exits.config.length != 2:
        raise ValueError(
            f"{len(weights)} weights, {num_steps} steps, length={exits.config.length}: expected as many, and 2 predictions"
        )
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights {tuple(weights)}, expected finite numbers")
    values = values_of(exits, trajectory)  # (S, B, ...)
    prices: Prices = {}
    for b in range(1, num_steps):
        for a in range(max(0, b - LONGEST), b):
            total: Tensor | float = 0.0
            prices[a, b, b + 1] = 0.0
            for t in range(b + 1, min(num_steps, b + LONGEST)):
                total = total + weights[t] * _missed(exits, trajectory, values, (a, b, t))
                prices[a, b, t + 1] = float(total.square().mean())
    return prices


@torch.no_grad()
def _missed(exits: CachedOutputExits, trajectory: Trajectory, values: Tensor, moment: tuple[int, int, int]) -> Tensor:
    """The extrapolated clean image minus the model's, as the solver sees them (B, ...); values (S, B, ...) as the exits cache them."""
    a, b, t = moment
    known = trajectory.times.to(values.device)
    times, time = known[[b, a]][None], known[t][None]
    memory = OutputHistory(
        values[[b, a]][None], times, torch.full((1,), torch.nan, dtype=torch.float64, device=values.device)
    )
    extrapolated = weighted(memory.values, exits.weights_of(memory, time))[0]  # (B, ...)
    extrapolated = exits.clean_from(trajectory.samples[t], extrapolated, time.expand(len(extrapolated)))
    return trajectory.clipped(extrapolated) - trajectory.clipped(trajectory.clean[t])


def price_of(full: Sequence[int], prices: Prices, num_steps: int) -> float:
    """The price of a schedule with full steps at these places. inf: a gap too long, or not two full steps at the start."""
    places = [*full, num_steps]
    if list(full[:2]) != [0, 1]:
        return math.inf
    return sum(prices.get(gap, math.inf) for gap in zip(places, places[1:], places[2:], strict=False))


def search(prices: Prices, num_steps: int, *, last_full: bool = False) -> dict[int, Found]:
    """Number of full steps -> the schedule of the lowest price with so many, the first two among them. Numbers too small for any are
    absent. Exact: the price of a gap depends on its ends and the full step before it alone.

    last_full: the last step is a full one. For runs in half precision: the model removes what rounding left in earlier answers, of the
    last one nothing does, and memory carries more of it than a full step.

    Raises:
        ValueError: fewer than three steps, prices of another number of steps or of some gaps alone.
    """
    if num_steps < 3:
        raise ValueError(f"num_steps={num_steps}, expected at least 3: two full steps come first")
    priced = max((end for _, _, end in prices), default=0)
    if priced != num_steps:
        raise ValueError(f"prices of {priced} steps, num_steps={num_steps}, expected as many")
    reached: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 1): (0.0, (0, 1))}
    found: dict[int, Found] = {}
    while reached:
        further: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (a, b), (paid, full) in reached.items():
            for c in range(b + 1, min(num_steps, b + LONGEST) + 1):
                if last_full and c == num_steps > b + 1:
                    continue
                if (a, b, c) not in prices:
                    raise ValueError(f"no price for the gap {a, b, c}, expected one for all up to {LONGEST} steps long")
                total, count = paid + prices[a, b, c], len(full)
                if c == num_steps:
                    if count not in found or total < found[count].price:
                        found[count] = Found(full, total)
                elif (b, c) not in further or total < further[b, c][0]:
                    further[b, c] = (total, (*full, c))
        reached = further
    return found


def nearest(found: Mapping[int, Found], count: float) -> Found:
    """The schedule whose number of full steps is nearest to `count`, of two the one with more.

    Raises:
        ValueError: no schedules, a count that is not finite.
    """
    if not math.isfinite(count):
        raise ValueError(f"count={count}, expected a finite number of full steps")
    if not found:
        raise ValueError("no schedule was found: the run is shorter than three steps or its gaps are too long")
    return found[min(found, key=lambda k: (abs(k - count), -k))]
