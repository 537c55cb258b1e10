"""Scores on their way from the device to the host. Here: the way. Not here: who stops (step_session.py).

r running rows, E elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arriving:
    """Scores (r,) of rows of `elements` (r,), measured after `depth` blocks. `ready`: passed by the device once `values` has them; None:
    reading `values` waits by itself."""

    values: Tensor
    elements: list[int]
    depth: int
    ready: torch.cuda.Event | None = None

    def read(self) -> list[float]:
        """The scores as numbers, when they are there."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.values.tolist()


def sent(scores: Tensor, elements: list[int], depth: int, *, overlapping: bool) -> Arriving:
    """Scores (r,) on the device. `overlapping`: they are copied behind what the device does until then, and the host goes on."""
    if not overlapping or not scores.is_cuda:
        return Arriving(scores, elements, depth)
    values = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
    values.copy_(scores, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(scores.device))
    return Arriving(values, elements, depth, ready)
