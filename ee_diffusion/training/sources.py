"""Sources that are not images: tables in memory, keys alone, and a source seen through a function.

Here: how they become batches of the loop. Not here: where tables and functions come from (a side, a script). B samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ee_diffusion.training.config import ImageDataConfig
from ee_diffusion.training.datasets import Source, load_image_source
from ee_diffusion.training.rng import Stream, normals, uniforms


class Table(Protocol):
    """Samples in memory: `table[samples]` with samples (B,) gives named tensors with leading B."""

    def __len__(self) -> int: ...

    def __getitem__(self, samples: Tensor) -> dict[str, Tensor]: ...


class TableSource(Source):
    """The samples of a table and their keys. `name` identifies the table: a run resumes only on the same name."""

    def __init__(self, table: Table, name: str):
        self.table, self.name = table, name

    def __len__(self) -> int:
        return len(self.table)

    def batch(self, indices: Tensor, keys: Tensor) -> dict[str, Tensor]:
        picked = self.table[indices]
        return {name: value.to(keys.device) for name, value in picked.items()} | {"key": keys}

    def fingerprint(self) -> str:
        return self.name


class LatentSource(Source):
    """Encoded images (M, C, H, W) with integer labels (M,), with all that a denoising objective draws.

    Raises:
        ValueError: no latents, or tensors that do not fit together.
    """

    def __init__(self, latents: Tensor, labels: Tensor, name: str):
        if latents.ndim != 4 or not len(latents) or labels.shape != latents.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"latents {tuple(latents.shape)} and labels {labels.dtype} {tuple(labels.shape)}, "
                "expected (M, C, H, W) and integers (M,) with M >= 1"
            )
        self.latents, self.labels, self.name = latents, labels, name

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """`images` (the latents) and `noise` (B, C, H, W) float32; `uniform`, `label_drop` (B,) in [0, 1); `class_labels` (B,); `key`."""
        return {
            "images": self.latents[indices].to(keys.device).float(),
            "noise": normals(keys, Stream.NOISE, tuple(self.latents.shape[1:])),
            "uniform": uniforms(keys, Stream.TIMESTEP),
            "class_labels": self.labels[indices].to(keys.device),
            "label_drop": uniforms(keys, Stream.LABEL_DROP),
            "key": keys,
        }

    def fingerprint(self) -> str:
        return self.name


class KeySource(Source):
    """Nothing but keys: for what is made from a key alone. An epoch is `size` samples long.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"size={size}, expected at least 1")
        self.size = size

    def __len__(self) -> int:
        return self.size

    def batch(self, indices: Tensor, keys: Tensor) -> dict[str, Tensor]:
        return {"key": keys}

    def fingerprint(self) -> str:
        return f"keys {self.size}"


class MappedSource(Source):
    """A source whose batches go through `function(batch) -> batch`, on the device that trains. `name` describes the function."""

    def __init__(self, source: Source, function: Callable[[dict[str, Tensor]], dict[str, Tensor]], name: str):
        self.source, self.function, self.name = source, function, name

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: Tensor, keys: Tensor) -> dict[str, Tensor]:
        made = self.function(self.source.batch(indices, keys))
        return {name: value.to(keys.device) for name, value in made.items()}

    def fingerprint(self) -> str:
        return f"{self.name} of {self.source.fingerprint()}"


def load_labeled_images(config: ImageDataConfig, *, num_labels: int) -> MappedSource:
    """Images to classify: `pixel_values` (B, C, H, W) in [-1, 1], `labels` (B,) and `key`.

    Raises:
        ValueError: as `load_image_source`; no column of labels, labels of one class only.
    """
    if config.label_column is None:
        raise ValueError("label_column=None, expected the column of the classes")
    source = load_image_source(config, num_labels)
    if bool((source.labels == source.labels[0]).all()):
        raise ValueError(
            f"every label in column {config.label_column!r} is {int(source.labels[0])}: one class is nothing to learn"
        )
    names = {"images": "pixel_values", "class_labels": "labels", "key": "key"}
    return MappedSource(
        source, lambda batch: {new: batch[old] for old, new in names.items()}, "labelled images"
    )  # a name on disk
