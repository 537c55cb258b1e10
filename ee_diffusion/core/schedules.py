"""Schedules: which layers may run at a step, known before the step begins and the same for every sample.

L layers, S steps. A schedule without holes runs the first d layers and answers at depth d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from ee_diffusion.core.fields import check_fields

__all__ = [
    "DepthPerStep",
    "FixedDepth",
    "FixedLayers",
    "FullDepth",
    "LinearDecay",
    "Periodic",
    "PiecewiseDepth",
    "PowerDecay",
    "Schedule",
    "depth_of",
    "full_steps_of",
    "last_steps",
]


@dataclass(frozen=True)
class Schedule(ABC):
    """Says which of L layers may run at a step. One with a `__post_init__` of its own calls this one first."""

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def layers(self, step: int, time: float, *, num_steps: int, num_layers: int) -> tuple[bool, ...]:
        """For each of L layers whether it may run at a step."""

    @abstractmethod
    def plans(self, *, num_steps: int, num_layers: int) -> list[tuple[bool, ...]]:
        """Every answer that `layers` can give in a run. Raises ValueError where the schedule does not fit L or S."""


@dataclass(frozen=True)
class FullDepth(Schedule):
    """Every layer, at every step."""

    def layers(self, step: int, time: float, *, num_steps: int, num_layers: int) -> tuple[bool, ...]:
        return (True,) * num_layers

    def plans(self, *, num_steps: int, num_layers: int) -> list[tuple[bool, ...]]:
        return [(True,) * num_layers]


@dataclass(frozen=True)
class FixedDepth(Schedule):
    """The first `depth` layers, at every step."""

    depth: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_0("depth", self.depth)

    def layers(self, step: int, time: float, *, num_steps: int, num_layers: int) -> tuple[bool, ...]:
        return _first(self.depth, num_layers)

    def plans(self, *, num_steps: int, num_layers: int) -> list[tuple[bool, ...]]:
        return [_first(self.depth, num_layers)]


@dataclass(frozen=True)
class DepthPerStep(Schedule):
    """The first `depths[step]` layers: a static schedule by denoising step."""

    depths: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depths:
            raise ValueError("depths=(), expected one for each step")
        _at_least_0("depths", *self.depths)

    def layers(self, step: int, time: float, *, num_steps: int, num_layers: int) -> tuple[bool, ...]:
        return _first(self.depths[step], num_layers)

    def plans(self, *, num_steps: int, num_layers: int) -> list[tuple[bool, ...]]:
        if len(self.depths) != num_steps:
            raise ValueError(f"the schedule has {len(self.depths)} depths, this run has {num_steps} steps")
        return [_first(depth, num_layers) for depth in set(self.depths)]


@dataclass(frozen=True)
class PiecewiseDepth(Schedule):
    """Depth by time: `depths[j]` where `edges[j-1] <= time < edges[j]` (ASE, ICML 2024; DuoDiff, arXiv 2410.09633).

    `edges`: ascending, in the scheduler's units of time (timestep or sigma); one depth more than edges.
    """

    edges: tuple[float, ...]
    depths: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_0("depths", *self.depths)
        if len(self.depths) != len(self.edges) + 1 or list(self.edges) != sorted(self.edges):
            raise ValueError(
                f"{len(self.depths)} depths for edges {self.edges}, expected ascending edges and one depth more"
            )

    def layers(self, step: int, time: float, *, num_steps: int, num_layers: int) -> tuple[bool, ...]:
        return _first(self.depths[bisect_right(self.edges, time)], num_layers)

    def plans(self, *, num_steps: int, num_layers: int) -> list[tuple[bool, ...]]:
        return [_first(depth, num_layers) for depth in set(self.depths)]


@dataclass(frozen=True)
class Periodic(Schedule):
    """Every layer at the first `warm_up` steps and then at every `period`-th step; the first `depth` layers at the others.

    With cached exits and depth 0 this is a cache with a fixed period; with `depth` > 0 it is interleaved early exit.
    """

    period: int
    warm_up: int
    depth: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_0("depth", self.depth)
        if self.period < 1 or self.warm_up < 0:
            raise ValueError(f"period={self.period}, warm_up={self.warm_up}, expected at least 1 and at least 0")

    def layers(self, step: int, time: float, *, num_steps: int, num_layers: int) -> tuple[bool, ...]:
        full = step < self.warm_up or (step - self.warm_up + 1) % self.period == 0
        return _first(num_layers if full else self.depth, num_layers)

    def plans(self, *, num_steps: int, num_layers: int) -> list[tuple[bool, ...]]:
        return [_first(num_layers, num_layers), _first(self.depth, num_layers)]


@dataclass(frozen=True)
class FixedLayers(Schedule):
    """A fixed set of layers, holes allowed (Unified Layer Skipping, arXiv 2404.06954). A layer left out passes its input on.

    `of`: the layers of the model that they were chosen for; None: any model that has them.
    """

    keep: tuple[int, ...]
    of: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_0("keep", *self.keep)
        if self.of is not None and max(self.keep, default=-1) >= self.of:
            raise ValueError(f"keep={self.keep} of={self.of} layers, expected layers within 0..{self.of - 1}")

    def layers(self, step: int, time: float, *, num_steps: int, num_layers: int) -> tuple[bool, ...]:
        return tuple(layer in self.keep for layer in range(num_layers))

    def plans(self, *, num_steps: int, num_layers: int) -> list[tuple[bool, ...]]:
        if self.of not in (None, num_layers):
            raise ValueError(f"layers chosen for a model of {self.of}, this one has {num_layers}")
        if any(not 0 <= layer < num_layers for layer in self.keep):
            raise ValueError(f"layers {self.keep}, expected within 0..{num_layers - 1}")
        return [tuple(layer in self.keep for layer in range(num_layers))]


@dataclass(frozen=True)
class LinearDecay(Schedule):
    """A number of layers that falls linearly with the step (SkipDecode, arXiv 2307.02628, sec. 3):

    `n(t) = round(most - (most - least) * min(t, T - 1) / (T - 1))`, T = `horizon`, halves rounded up.
    `bottom`: W, the first W layers and the last n - W run, the middle is skipped; None: the first n layers run.
    A layer that does not run at a step runs at no later one.
    """

    most: int
    least: int
    horizon: int
    bottom: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_0("least", self.least)
        if self.horizon < 2:
            raise ValueError(f"horizon={self.horizon}, expected at least 2 steps from the most layers to the least")
        if self.least > self.most:
            raise ValueError(f"least={self.least} layers and most={self.most}, expected least <= most")
        _check_bottom(self.bottom, self.least)

    def layers(self, step: int, time: float, *, num_steps: int, num_layers: int) -> tuple[bool, ...]:
        span = self.horizon - 1
        # round half up, in integers: no platform rounds otherwise
        gone = (2 * (self.most - self.least) * min(step, span) + span - 1) // (2 * span)
        return _without_middle(self.most - gone, self.bottom, num_layers)

    def plans(self, *, num_steps: int, num_layers: int) -> list[tuple[bool, ...]]:
        return [layers for _, layers in _stretches(self, num_steps, num_layers)]


@dataclass(frozen=True)
class PowerDecay(Schedule):
    """A number of layers that falls as a power of the step (D3, arXiv 2503.08524): `n(t) = max(least, floor(L * alpha^t))`.

    `bottom`: as in `LinearDecay`. A layer that does not run at a step runs at no later one.
    """

    alpha: float
    least: int
    bottom: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_0("least", self.least)
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r}, expected a number in (0, 1]")
        _check_bottom(self.bottom, self.least)

    def layers(self, step: int, time: float, *, num_steps: int, num_layers: int) -> tuple[bool, ...]:
        if self.least > num_layers:
            raise ValueError(f"least={self.least} layers, expected within 0..{num_layers} (the model has {num_layers})")
        count = int(num_layers * self.alpha**step + 1e-9)  # 50 * 0.58 is 28.999999999999996
        return _without_middle(max(self.least, count), self.bottom, num_layers)

    def plans(self, *, num_steps: int, num_layers: int) -> list[tuple[bool, ...]]:
        return [layers for _, layers in _stretches(self, num_steps, num_layers)]


SCHEDULES: dict[str, type[Schedule]] = {
    kind.__name__: kind
    for kind in (FullDepth, FixedDepth, DepthPerStep, PiecewiseDepth, Periodic, FixedLayers, LinearDecay, PowerDecay)
}


def full_steps_of(schedule: Schedule, times: Sequence[float], *, num_layers: int) -> tuple[int, ...] | None:
    """The steps of a run at `times` (S,) that run all layers, where all others run none; None where some run a part of them.

    Raises:
        ValueError: a schedule that does not fit the run.
    """
    schedule.plans(num_steps=len(times), num_layers=num_layers)
    runs = [schedule.layers(step, time, num_steps=len(times), num_layers=num_layers) for step, time in enumerate(times)]
    if any(any(layers) != all(layers) for layers in runs):
        return None
    return tuple(step for step, layers in enumerate(runs) if all(layers))


def last_steps(schedule: Schedule, *, num_steps: int, num_layers: int) -> list[int]:
    """(L,) the last step that may run each layer, -1: none, in a run whose times are its steps (tokens). A long run is not walked through.

    Raises:
        ValueError: a schedule that does not fit the run.
    """
    plans = schedule.plans(num_steps=num_steps, num_layers=num_layers)
    last, unseen = [-1] * num_layers, {layer for plan in plans for layer in range(num_layers) if plan[layer]}
    for step in _ends(schedule, num_steps, num_layers):
        runs = schedule.layers(step, float(step), num_steps=num_steps, num_layers=num_layers)
        for layer in [layer for layer in unseen if runs[layer]]:
            last[layer] = step
            unseen.remove(layer)
        if not unseen:
            break
    return last


def _ends(schedule: Schedule, num_steps: int, num_layers: int) -> Iterable[int]:
    """Steps, the last one first, among them the last of every stretch of steps that run the same layers."""
    if isinstance(schedule, PiecewiseDepth):
        ends = {num_steps, *(ceil(max(edge, 1)) for edge in schedule.edges if edge < num_steps)}
        return sorted((end - 1 for end in ends), reverse=True)
    if isinstance(schedule, LinearDecay | PowerDecay):
        return [end - 1 for end, _ in reversed(_stretches(schedule, num_steps, num_layers))]
    return range(num_steps - 1, -1, -1)


def depth_of(layers: tuple[bool, ...]) -> int | None:
    """The depth a schedule without holes stops at, or None if it has holes."""
    depth = sum(layers)
    return depth if all(layers[:depth]) else None


def _at_least_0(name: str, *values: int) -> None:
    if min(values, default=0) < 0:
        raise ValueError(f"{min(values)} among {name}, expected numbers of layers, at least 0")


def _first(depth: int, num_layers: int) -> tuple[bool, ...]:
    if not 0 <= depth <= num_layers:
        raise ValueError(f"depth {depth}, expected within 0..{num_layers} (the model has {num_layers} blocks)")
    return tuple(layer < depth for layer in range(num_layers))


def _check_bottom(bottom: int | None, least: int) -> None:
    if bottom is not None and not 1 <= bottom < least:
        raise ValueError(f"bottom={bottom} warm-up layers and least={least}, expected 1 <= bottom < least")


def _without_middle(count: int, bottom: int | None, num_layers: int) -> tuple[bool, ...]:
    """The first `bottom` layers and the last `count - bottom`; with no bottom the first `count`."""
    first = _first(count, num_layers)
    if bottom is None:
        return first
    return tuple(layer < bottom or layer >= num_layers - (count - bottom) for layer in range(num_layers))


def _stretches(schedule: Schedule, num_steps: int, num_layers: int) -> list[tuple[int, tuple[bool, ...]]]:
    """The steps of a run in stretches that run the same layers: (end, layers) of each. For schedules that run fewer and fewer layers."""

    def said(step: int) -> tuple[bool, ...]:
        return schedule.layers(step, 0.0, num_steps=num_steps, num_layers=num_layers)

    stretches: list[tuple[int, tuple[bool, ...]]] = []
    end = 0
    while end < num_steps:
        layers = said(end)
        end = bisect_right(range(num_steps), -sum(layers), lo=end, key=lambda step: -sum(said(step)))
        stretches.append((end, layers))
    return stretches
