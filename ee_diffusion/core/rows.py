"""Rows of a batch: the samples they belong to, and which arguments follow them. On the host. Not here: who leaves (session.py).

E samples, R rows, r running rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar

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


def least_of(scores: list[float], samples: list[int], *, num_samples: int) -> list[float]:
    """Each sample's least safe row: scores (r,) of rows of samples (r,) -> (E,), NaN for a sample without a row (or with a NaN row)."""
    least: dict[int, float] = {}
    for sample, score in zip(samples, scores, strict=True):
        before = least.get(sample, math.inf)
        least[sample] = (
            score if score < before or score != score else before
        )  # a NaN stays: no comparison with it is true
    return [least.get(sample, math.nan) for sample in range(num_samples)]


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


ROWS, FEWER = [0, 1, 2, 3, 4, 5], [0, 1, 2, 3]  # batches whose arguments are compared


def lengths_of(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Dotted names and lengths of the tensors, tuples and lists in arguments."""
    for name, value in values.items():
        if isinstance(value, tuple | list | dict):
            if not isinstance(value, dict):
                yield f"{name}.len", len(value)
            inside = value.items() if isinstance(value, dict) else enumerate(value)
            yield from lengths_of({f"{name}.{key}": one for key, one in inside})
        elif isinstance(value, Tensor) and value.ndim:
            yield name, len(value)


def following(many: Mapping[str, int], few: Mapping[str, int]) -> list[str]:
    """Those of `lengths_of` that follow the rows: with ROWS and with FEWER rows the same multiple of their number."""
    return [path for path, length in many.items() if _follows(length, few.get(path, 0))]


def _follows(many: int, few: int) -> bool:
    times, rest = divmod(many, len(ROWS))
    return times > 0 and not rest and few == times * len(FEWER)


def alike(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding in float32: batches of another size add up in another order."""
    return apart(one, other) <= 1e-4 * max(1e-3, float(other.abs().max()))


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference; infinite where shapes differ."""
    return float((one - other).abs().max()) if one.shape == other.shape else math.inf
