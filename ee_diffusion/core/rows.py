"""Rows of a batch and the elements they belong to: index bookkeeping, on the host. Not here: who leaves (session.py).

E elements, R rows, r running rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

import torch
from torch import Tensor

Shareable = TypeVar("Shareable", Tensor, tuple[Tensor, ...])  # of the rows, or the same for all


@dataclass(frozen=True)
class ExitedRows:
    """Rows that leave after an exit: `exit` among the heads; `leave` and `keep`: positions among the rows that were running;
    `rows`: the leaving rows' places in the whole batch. All ascend."""

    exit: int
    leave: list[int]
    keep: list[int]
    rows: list[int]


def least_of(scores: list[float], elements: list[int], *, num_elements: int) -> list[float]:
    """Each element's least safe row: scores (r,) of rows of elements (r,) -> (E,), NaN for an element without a row (or with a NaN row)."""
    least: dict[int, float] = {}
    for element, score in zip(elements, scores, strict=True):
        before = least.get(element, math.inf)
        least[element] = (
            score if score < before or score != score else before
        )  # a NaN stays: no comparison with it is true
    return [least.get(element, math.nan) for element in range(num_elements)]


def rows_of(values: Shareable, places: Tensor) -> Shareable:
    """The rows of values (R, ...) at places (r,) -> (r, ...). One value for all rows (`expand`, stride 0) stays one, a tuple is shared."""
    if isinstance(values, tuple):
        return values
    return values[: len(places)] if values.stride(0) == 0 else values.index_select(0, places)


def require_rows(returned: Iterable[Tensor], rows: int, *, class_name: str, row_arguments: tuple[str, ...]) -> None:
    """Raises ValueError if a block returned another number of rows than it got: broadcasting, over an argument of all rows."""
    for part in returned:
        if len(part) != rows:
            raise ValueError(
                f"a block of {class_name} returned {len(part)} rows for {rows}: an argument with one entry per row is not among "
                f"row_arguments={row_arguments} of its family; see check_model"
            )


def content_ids(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """An id for each row, made of what it holds: values (R, N, ...), of them the places where mask (R, N) is not 0 -> (R,) int64.

    Equal content has equal ids, whatever the batch, its order and its padding. Waits for the device.
    """
    rows = (values if values.is_floating_point() else values.long()).detach().cpu()
    kept = None if mask is None or mask.shape != values.shape[:2] else mask.detach().cpu() != 0
    ids = []
    for place, row in enumerate(rows):
        content = row.contiguous() if kept is None else row[kept[place]]
        digest = blake2b(content.view(torch.uint8).numpy().tobytes(), digest_size=8).digest()
        ids.append(int.from_bytes(digest, "big") >> 1)  # 63 bits: no sign
    return torch.tensor(ids, dtype=torch.int64)
