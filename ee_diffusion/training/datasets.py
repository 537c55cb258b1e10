"""Data for the loop: a Source makes a batch of indices and keys. Tables from files; images from the Hub, a folder or parquet, decoded once.

Here: reading, image sources. Not here: order and keys (order.py, rng.py), what a batch is used for (an objective).
M images in the set, B samples, C channels, H = W pixels.
"""

from __future__ import annotations

import csv
import glob
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ee_diffusion.pixels import named, rgb
from ee_diffusion.training.config import ImageDataConfig
from ee_diffusion.training.rng import Stream, normals, uniforms

DATA_VARIABLE = "EE_DIFFUSION_DATA"
READERS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}  # by extension


class Source(ABC):
    """Samples by index. Everything random about a sample must be drawn from its key: then neither ranks nor history matter."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples in the set."""

    @abstractmethod
    def batch(self, indices: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """indices (B,) on the CPU, keys (B,) int64 on the device that trains -> tensors with leading B on that device."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short name of the content: a run may only be resumed on the same."""


class ImageSource(Source):
    """Images in memory as bytes, with all that a denoising objective draws.

    Args:
        images: (M, C, H, W) uint8. labels: (M,) int64 or None.
        random_flip: mirror each image with probability one half.

    Raises:
        ValueError: no images, another dtype or shape.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, *, random_flip: bool):
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}, expected uint8 (M, C, H, W) with M >= 1"
            )
        if labels is not None and (labels.shape != images.shape[:1] or labels.dtype != torch.int64):
            raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}, expected int64 ({len(images)},)")
        self.images, self.labels, self.random_flip = images, labels, random_flip

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """`images`, `noise` (B, C, H, W) in [-1, 1] and ~ N(0, 1); `uniform`, `label_drop` (B,) in [0, 1); `key`; `class_labels` (B,)."""
        images = self.images[indices].to(keys.device).float() / 127.5 - 1  # (B, C, H, W)
        if self.random_flip:
            mirrored = uniforms(keys, Stream.FLIP) < 0.5  # (B,)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        batch = {
            "images": images,
            "noise": normals(keys, Stream.NOISE, tuple(images.shape[1:])),
            "uniform": uniforms(keys, Stream.TIMESTEP),
            "key": keys,
        }
        if self.labels is not None:
            batch["class_labels"] = self.labels[indices].to(keys.device)
            batch["label_drop"] = uniforms(keys, Stream.LABEL_DROP)
        return batch

    def fingerprint(self) -> str:
        digest = zlib.crc32(self.images.numpy())
        if self.labels is not None:
            digest = zlib.crc32(self.labels.numpy(), digest)
        return f"{tuple(self.images.shape)} flip={self.random_flip} crc32={digest:08x}"


def load_image_source(config: ImageDataConfig, num_classes: int | None) -> ImageSource:
    """Load and decode a data set (50,000 images 32x32 take about 10 s on one core), labels in [0, num_classes); None: no labels.

    Raises:
        ValueError: not exactly one origin, no such files or columns, no images, labels that are no integers or out of range, an image that
            is damaged or does not define white (named by its file, or its row).
    """
    table = _load(config)
    check_columns(table, [config.image_column, *([] if num_classes is None else [config.label_column])], "the data")
    if config.max_train_samples is not None:
        table = table.select(range(min(config.max_train_samples, len(table))))
    if not len(table):
        raise ValueError(f"the data set ({config.sources()[0]}, split {config.dataset_split!r}) has no rows")
    labels = None if num_classes is None else class_labels(table, config.label_column, num_classes)
    if not isinstance(table.features[config.image_column], datasets.Image):
        came = table.features[config.image_column]
        raise ValueError(f"column {config.image_column!r} holds {came}, expected images")
    images = np.stack(list(_decoded(table, config)))  # (M, H, W, C)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()  # (M, C, H, W)
    return ImageSource(images, labels, random_flip=config.random_flip)


def _load(config: ImageDataConfig) -> datasets.Dataset:
    given = config.sources()
    if len(given) != 1:
        raise ValueError(
            f"data from {given or 'nowhere'}, expected one of dataset_name, train_data_dir, train_data_files"
        )
    split = config.dataset_split
    if config.dataset_name:
        return datasets.load_dataset(config.dataset_name, split=split)
    if config.train_data_dir and not Path(config.train_data_dir).is_dir():
        raise ValueError(f"train_data_dir={config.train_data_dir!r} is no folder")
    if config.train_data_dir:
        return datasets.load_dataset("imagefolder", data_dir=config.train_data_dir, split=split)
    return read_table(config.train_data_files, [], kind="parquet", split=split)


def read_table(
    patterns: Sequence[str], columns: Sequence[str], *, kind: str | None = None, split: str = "train", **options
) -> datasets.Dataset:
    """The rows of files of one kind, .csv, .tsv, .json (a list of objects), .jsonl or .parquet; None: as the first is called.

    Raises:
        ValueError: another kind, no such files, no rows, no such columns.
    """
    kind = patterns[0].rsplit(".", 1)[-1] if kind is None else kind
    if kind not in READERS:
        raise ValueError(f"files {list(patterns)}, expected {', '.join(f'.{name}' for name in READERS)}")
    files = [file for pattern in patterns for file in find_data_files(pattern)]
    options = ({"sep": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}) | options
    try:
        table = datasets.load_dataset(READERS[kind], data_files={split: files}, split=split, **options)
    except ValueError as error:  # the library's message for files without rows names neither the files nor the reason
        raise ValueError(f"{list(patterns)} hold no rows that can be loaded: {error}") from error
    check_columns(table, columns, list(patterns))
    if not len(table):
        raise ValueError(f"{list(patterns)} hold no rows")
    return table


def check_columns(table: datasets.Dataset, wanted: Sequence[str], origin: object) -> None:
    """Raises ValueError for a column that the table does not have."""
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise ValueError(f"no column {missing[0]!r} in {origin}, which has {table.column_names}")


def find_data_files(pattern: str) -> list[str]:
    """Files that a path or glob pattern names, sorted: as given, else below the folder that EE_DIFFUSION_DATA names.

    Raises:
        ValueError: nothing matches.
    """
    tried = [pattern]
    if os.environ.get(DATA_VARIABLE) and not Path(pattern).is_absolute():
        tried.append(str(Path(os.environ[DATA_VARIABLE]) / pattern))
    for candidate in tried:
        if found := sorted(glob.glob(candidate)):
            return found
    raise ValueError(
        f"no data files match {' or '.join(tried)} (relative paths are also looked up below ${DATA_VARIABLE})"
    )


def _decoded(table: datasets.Dataset, config: ImageDataConfig) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 of each row, decoded one by one: what cannot be is named."""
    column, origin = config.image_column, config.sources()[0]
    feature = datasets.Image(mode=table.features[column].mode)
    for row, stored in enumerate(table.cast_column(column, datasets.Image(decode=False))[column]):
        file = "" if stored is None or not stored["path"] else f" ({stored['path']})"
        with named(f"row {row}{file} of {origin}={getattr(config, origin)!r}"):
            if stored is None:
                raise ValueError("the row is empty")
            pixels = _pixels(feature.decode_example(stored), config.resolution)
        yield pixels


def class_labels(table: datasets.Dataset, column: str, num_classes: int, *, first: int = 0) -> Tensor:
    """Integer labels first..first + num_classes - 1 -> (M,) int64, counted from 0. Raises ValueError for others."""
    values = np.asarray(table.with_format("numpy")[column])
    if values.dtype.kind not in "iu":
        raise ValueError(f"labels in column {column!r} are {values.dtype}, expected integers")
    low, high = int(values.min()), int(values.max())
    if low < first or high >= first + num_classes:
        expected = f"{first}..{first + num_classes - 1}"
        raise ValueError(f"labels in column {column!r} span {low}..{high}, expected {expected}")
    return torch.from_numpy(values.astype(np.int64) - first)


def _pixels(image: Image.Image, resolution: int) -> np.ndarray:
    """Any PIL image -> (H, W, 3) uint8 (`rgb`), shorter side resized to `resolution`, center-cropped."""
    image = rgb(image)
    if image.size != (resolution, resolution):
        scale = resolution / min(image.size)
        width, height = (max(resolution, round(side * scale)) for side in image.size)
        left, top = (width - resolution) // 2, (height - resolution) // 2
        resample = Image.Resampling.LANCZOS
        image = image.resize((width, height), resample).crop((left, top, left + resolution, top + resolution))
    return np.asarray(image)
