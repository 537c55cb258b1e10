"""Rows of a batch and the elements they belong to: index bookkeeping, on the CPU. Not here: who leaves (session.py).

E elements, R rows, r running rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Departure:
    """Rows that leave after an exit: `exit` among the heads; `leave` and `keep`: positions among the rows that were running;
    `rows`: the leaving rows' places in the whole batch."""

    exit: int
    leave: Tensor
    keep: Tensor
    rows: Tensor


def repeats_of(rows: Tensor, num_elements: int) -> int:
    """n if rows (R,) are the elements in order, n times over (one row each, or guidance); else 0."""
    times, rest = divmod(len(rows), num_elements)
    return 0 if rest or not torch.equal(rows, torch.arange(num_elements).repeat(times)) else times
