"""Schedules: which layers may run at a step, known before the step begins and the same for every element.

L layers, S steps. A schedule without holes runs the first d layers and answers at depth d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule(ABC):
    """Says which of L layers may run at a step."""

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

    def layers(self, step: int, time: float, *, num_steps: int, num_layers: int) -> tuple[bool, ...]:
        return _first(self.depth, num_layers)

    def plans(self, *, num_steps: int, num_layers: int) -> list[tuple[bool, ...]]:
        return [_first(self.depth, num_layers)]


@dataclass(frozen=True)
class DepthPerStep(Schedule):
    """The first `depths[step]` layers: a static schedule by denoising step."""

    depths: tuple[int, ...]

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

    With exits that remember and depth 0 this is a cache with a fixed period; with `depth` > 0 it is interleaved early exit.
    """

    period: int
    warm_up: int
    depth: int = 0

    def __post_init__(self) -> None:
        if self.period < 1 or self.warm_up < 0:
            raise ValueError(f"period={self.period}, warm_up={self.warm_up}, expected at least 1 and at least 0")

    def layers(self, step: int, time: float, *, num_steps: int, num_layers: int) -> tuple[bool, ...]:
        full = step < self.warm_up or (step - self.warm_up + 1) % self.period == 0
        return _first(num_layers if full else self.depth, num_layers)

    def plans(self, *, num_steps: int, num_layers: int) -> list[tuple[bool, ...]]:
        return [_first(num_layers, num_layers), _first(self.depth, num_layers)]


@dataclass(frozen=True)
class FixedLayers(Schedule):
    """A fixed set of layers, holes allowed (Unified Layer Skipping, arXiv 2404.06954). A layer left out passes its input on."""

    keep: tuple[int, ...]

    def layers(self, step: int, time: float, *, num_steps: int, num_layers: int) -> tuple[bool, ...]:
        return tuple(layer in self.keep for layer in range(num_layers))

    def plans(self, *, num_steps: int, num_layers: int) -> list[tuple[bool, ...]]:
        if any(not 0 <= layer < num_layers for layer in self.keep):
            raise ValueError(f"layers {self.keep}, expected within 0..{num_layers - 1}")
        return [tuple(layer in self.keep for layer in range(num_layers))]


SCHEDULES: dict[str, type[Schedule]] = {
    kind.__name__: kind for kind in (FullDepth, FixedDepth, DepthPerStep, PiecewiseDepth, Periodic, FixedLayers)
}


def depth_of(layers: tuple[bool, ...]) -> int | None:
    """The depth a schedule without holes stops at, or None if it has holes."""
    depth = sum(layers)
    return depth if all(layers[:depth]) else None


def _first(depth: int, num_layers: int) -> tuple[bool, ...]:
    if not 0 <= depth <= num_layers:
        raise ValueError(f"depth {depth}, expected within 0..{num_layers} (the model has {num_layers} blocks)")
    return tuple(layer < depth for layer in range(num_layers))
