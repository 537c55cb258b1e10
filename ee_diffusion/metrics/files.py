"""Image sets on disk, read as bytes, and the digest of tensors.

Here: `read_images`, `check_images`, `digest`. Not here: writing (core/io.py), what a report holds (tables.py), cached statistics
(references.py).
M images, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ee_diffusion.pixels import named, rgb


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hexadecimal) of names, dtypes, shapes and bytes, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_images(images: Tensor, name: str = "images") -> None:
    """Whether they are uint8, or floating point in [0, 1].

    Raises:
        ValueError: another dtype, NaN, or values outside [0, 1] (those in -1..1 and in 0..255 among them, unless they are uint8).
    """
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ValueError(f"{name} are {images.dtype}, expected uint8 or floating point in [0, 1]")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{name} span {images.min():.3g} to {images.max():.3g}, expected [0, 1] without NaN")


def to_bytes(images: Tensor) -> Tensor:
    """Float images in [0, 1] -> uint8 (round(255 x)), same shape; uint8 comes back as it is.

    Raises:
        ValueError: as `check_images`.
    """
    check_images(images)
    return images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)


def read_images(path: str | os.PathLike) -> tuple[Tensor, Tensor | None]:
    """A folder of PNGs (in the order of their names), or an .npz or .safetensors with `images` and perhaps `labels`.

    Images may lie as (M, 3, H, W) or (M, H, W, 3), in bytes. Returns (M, 3, H, W) uint8 and (M,) int64 or None.

    Raises:
        ValueError: nothing there, no images, sizes that differ, another dtype, labels that do not fit, a damaged file (named).
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path), None
    if not path.is_file():
        raise ValueError(f"{path} does not exist, expected a folder of PNGs, an .npz or a .safetensors")
    if path.suffix == ".npz":
        found = _load_npz(path)
    elif path.suffix == ".safetensors":
        found = _load(path)
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected .npz, .safetensors or a folder of PNGs")
    if "images" not in found:
        raise ValueError(f"{path} holds {sorted(found)}, expected 'images' and perhaps 'labels'")
    images = _channels_first(found["images"], path)
    labels = found.get("labels")
    if labels is not None and (labels.shape != images.shape[:1] or labels.is_floating_point()):
        raise ValueError(
            f"labels in {path} are {labels.dtype} {tuple(labels.shape)}, expected integers ({len(images)},)"
        )
    return images, None if labels is None else labels.long()


def _read_folder(folder: Path) -> Tensor:
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise ValueError(f"no *.png in {folder}")
    pixels = []
    for path in paths:
        with named(str(path)), Image.open(path) as image:
            pixels.append(np.asarray(rgb(image)))
        if pixels[-1].shape != pixels[0].shape:
            raise ValueError(f"{path} has shape {pixels[-1].shape}, expected {pixels[0].shape} as {paths[0].name}")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()  # (M, C, H, W)


def _channels_first(images: Tensor, path: Path) -> Tensor:
    if (
        images.dtype != torch.uint8
        or images.ndim != 4
        or not len(images)
        or 3 not in (images.shape[1], images.shape[3])
    ):
        came = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images in {path} are {came}, expected uint8 (M, 3, H, W) or (M, H, W, 3) with M >= 1")
    return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2).contiguous()  # (M, C, H, W)


def _load_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .npz file of arrays: {error}") from error
    return {name: torch.from_numpy(array) for name, array in found.items() if array.dtype.kind in "uif"}


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
