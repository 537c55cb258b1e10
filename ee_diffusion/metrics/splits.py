"""Which seeds and which held-out images serve what. Fitting, calibrating and testing never share one.

Generation seeds are one number per image; held-out images are positions in a data set's test split.
"""

from __future__ import annotations

import torch

SEEDS: dict[str, range] = {
    "fit": range(1_000_000),
    "calibrate": range(1_000_000, 2_000_000),
    "test": range(2_000_000, 3_000_000),
    "demo": range(3_000_000, 4_000_000),
}
HELD_OUT: dict[str, range] = {"calibrate": range(5_000), "test": range(5_000, 10_000)}


def seeds(purpose: str, count: int, *, first: int = 0) -> list[int]:
    """`count` seeds for a purpose, from its `first` on.

    Raises:
        ValueError: an unknown purpose, or more than there are.
    """
    if purpose not in SEEDS:
        raise ValueError(f"purpose={purpose!r}, expected one of {sorted(SEEDS)}")
    chosen = SEEDS[purpose][first : first + count]
    if count < 1 or first < 0 or len(chosen) < count:
        raise ValueError(
            f"{count} seeds from {first} on, expected at least 1 and at most {len(SEEDS[purpose])} for {purpose!r}"
        )
    return list(chosen)


def balanced_labels(count: int, num_classes: int | None) -> list[int] | None:
    """Class i % num_classes for image i: every class equally often, and the same classes for the same seeds. None of an unconditional
    model, which has None."""
    return None if num_classes is None else [index % num_classes for index in range(count)]


def shuffled(count: int, *, seed: int) -> list[int]:
    """The places 0..count-1 in a seeded order. Whatever is split so that one part speaks for another goes through it first: files are often
    sorted, by class or by length."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def shuffled_labels(count: int, num_classes: int | None, *, seed: int) -> list[int] | None:
    """As `balanced_labels`, the classes in a seeded order: fewer images than classes show no particular ones."""
    if num_classes is None:
        return None
    order = shuffled(num_classes, seed=seed)
    return [order[label] for label in balanced_labels(count, num_classes)]
