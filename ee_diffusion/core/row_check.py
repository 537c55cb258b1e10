"""What the checks of the sides' family tables share: arguments that follow the rows, and tensors that are alike.

Here: comparing. Not here: what is run and concluded (diffusion/model_check.py, classification/model_check.py, decoding/model_specs.py).
R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

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
