"""Tables on disk in parts: each part is one safetensors file, whole or absent, and says what it was made from. A killed run goes on.

Here: files. Not here: what the tensors mean (dataset.py, latents.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ee_diffusion.core.io import write_tensors

_FORMAT = "ee_diffusion.parts.1"


class Parts:
    """`count` files in `folder`, made from what `identity` (JSON values) says.

    Raises:
        ValueError: a count below 1.
    """

    def __init__(self, folder: str | os.PathLike, identity: Mapping[str, Any], *, count: int):
        if count < 1:
            raise ValueError(f"count={count}, expected at least 1 part")
        self.folder, self.count = Path(folder), count
        self.identity = json.loads(json.dumps({**identity, "parts": count}, default=str))

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there yet.

        Raises:
            ValueError: a part that is not readable, or was made from something else (every difference is named).
        """
        there = [number for number in range(self.count) if self._path(number).exists()]
        for number in there:
            self._check(number)
        return [number for number in range(self.count) if number not in there]

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one part, whole or not at all.

        Raises:
            ValueError: a number out of range.
        """
        metadata = {
            _FORMAT: json.dumps(self.identity, sort_keys=True)
        }  # one entry: the order of several is left to chance
        write_tensors(self._path(number), tensors, metadata)

    def read(self) -> list[dict[str, Tensor]]:
        """All parts in order.

        Raises:
            ValueError: a part is missing, not readable, or was made from something else.
        """
        if absent := self.missing():
            raise ValueError(f"{self.folder} lacks parts {absent} of {self.count}")
        return [self._tensors(number) for number in range(self.count)]

    @property
    def nbytes(self) -> int:
        """Bytes on disk of the parts that are there."""
        paths = [self._path(number) for number in range(self.count)]
        return sum(path.stat().st_size for path in paths if path.exists())

    def _path(self, number: int) -> Path:
        if not 0 <= number < self.count:
            raise ValueError(f"part {number}, expected 0..{self.count - 1}")
        return self.folder / f"part-{number:05d}.safetensors"

    def _check(self, number: int) -> None:
        path = self._path(number)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable part: {error}") from error
        if _FORMAT not in metadata:
            raise ValueError(f"{path} is no part of a table: its metadata has {sorted(metadata)}, expected {_FORMAT!r}")
        theirs, ours = json.loads(metadata[_FORMAT]), self.identity
        differ = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
        if differ:
            told = "; ".join(f"{name}: came {ours.get(name)!r}, the part has {theirs.get(name)!r}" for name in differ)
            raise ValueError(f"{path} was made from something else: {told}. Name another folder, or delete this one")

    def _tensors(self, number: int) -> dict[str, Tensor]:
        with safe_open(self._path(number), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
