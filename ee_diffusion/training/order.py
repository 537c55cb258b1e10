"""Which sample is seen when: a pure function of (seed, step), so that a resumed run needs nothing but its step number.

Here: positions in the endless stream of samples and the permutation of each epoch. Not here: draws (rng.py), data (datasets.py). B samples.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ee_diffusion.training.rng import Stream, scalar_key


class Order:
    """Sample p of the endless stream is `permutation_e[p mod size]`, e = p // size; step s takes p = s * G .. s * G + G - 1.

    The G samples of a step are split by micro-step, then by rank: two ranks of B and one rank of 2 B see the same step.

    Args:
        size: samples in the data set. batch: samples per rank and micro-step.

    Raises:
        ValueError: an empty data set, or a batch, rank count or number of micro-steps below 1.
    """

    def __init__(self, size: int, seed: int, batch: int, *, ranks: int = 1, micro_steps: int = 1):
        if min(size, batch, ranks, micro_steps) < 1:
            raise ValueError(
                f"size={size}, batch={batch}, ranks={ranks}, micro_steps={micro_steps}: each must be at least 1"
            )
        self.size, self.seed, self.batch, self.ranks, self.micro_steps = size, seed, batch, ranks, micro_steps
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)

    @property
    def global_batch(self) -> int:
        return self.batch * self.ranks * self.micro_steps

    def positions(self, step: int, micro_step: int, rank: int) -> Tensor:
        """(B,) int64: where in the stream this rank's samples of this micro-step stand."""
        first = step * self.global_batch + (micro_step * self.ranks + rank) * self.batch
        return torch.arange(first, first + self.batch)

    def indices(self, positions: Tensor) -> Tensor:
        """positions (B,) -> indices (B,) into the data set; a batch may span epochs."""
        epochs, offsets = positions // self.size, positions % self.size
        indices = torch.empty_like(offsets)
        for epoch in epochs.unique().tolist():
            chosen = epochs == epoch
            indices[chosen] = self._permutation(epoch)[offsets[chosen]]
        return indices

    def _make_permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(scalar_key(self.seed, Stream.EPOCH, epoch))
        return torch.randperm(self.size, generator=generator)
