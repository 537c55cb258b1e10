"""Reference statistics of a real image set, computed once and kept on disk under a fingerprint.

Here: `reference`, its file. Not here: features (features.py), distances (frechet.py).
M images in the set, F features, R features kept one by one (KID needs samples, not moments).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ee_diffusion.measure.classifiers import Progress
from ee_diffusion.measure.features import InceptionFeatures, ResNetFeatures, extract, fingerprint
from ee_diffusion.measure.files import digest, write_tensors
from ee_diffusion.measure.frechet import Statistics

FORMAT = "ee_diffusion.reference.1"
_TENSORS = ("mean", "covariance", "features")


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of all M images, `features` (R, F) float32 of the first R, the fingerprint; `origin`: 'cache', or why it was computed."""

    statistics: Statistics
    features: Tensor
    fingerprint: str
    origin: str


class _Unusable(Exception):
    """Why a cached file is not used."""


def reference(
    path: str | os.PathLike,
    images: Tensor,
    network: ResNetFeatures | InceptionFeatures,
    *,
    keep: int,
    batch_size: int,
    progress: Progress | None = None,
) -> Reference:
    """Read the statistics of an image set from `path`, or compute them and write them there (beside, then renamed).

    images (M, 3, H, W) uint8. `keep`: features of the first so many images are kept for KID (0: none). The file is used only if its
    fingerprint (images, count, weights, preprocessing) and its own digest are right and it keeps enough features; otherwise it is
    computed anew, and `origin` says why.

    Raises:
        ValueError: `keep` is not in 0..M, images that are not uint8, fewer than two.
    """
    if not 0 <= keep <= len(images):
        raise ValueError(f"keep={keep}, expected 0..{len(images)} (the images)")
    expected = fingerprint(images, network)
    try:
        return _read(Path(path), expected, keep)
    except _Unusable as reason:
        origin = f"computed: {reason}"
    features = extract(network, images, batch_size=batch_size, progress=progress)  # (M, F)
    statistics = Statistics.of(features)
    found = Reference(statistics, features[:keep].float().contiguous(), expected, origin)
    _write(Path(path), found)
    return found


def _write(path: Path, found: Reference) -> None:
    tensors = {
        "mean": found.statistics.mean,
        "covariance": found.statistics.covariance,
        "features": found.features,
    }
    facts = {"format": FORMAT, "fingerprint": found.fingerprint, "count": str(found.statistics.count)}
    write_tensors(path, tensors, facts | {"digest": digest(tensors)})


def _read(path: Path, expected: str, keep: int) -> Reference:
    if not path.is_file():
        raise _Unusable(f"no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORMAT:
                raise _Unusable(f"{path} has format {facts.get('format')!r}, expected {FORMAT!r}")
            if facts.get("fingerprint") != expected:
                raise _Unusable(f"{path} belongs to other images, weights or preprocessing")
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
    except SafetensorError as error:
        raise _Unusable(f"{path} is damaged ({error})") from error
    if digest(tensors) != facts.get("digest"):
        raise _Unusable(f"{path} is damaged (its digest differs)")
    if len(tensors["features"]) < keep:
        raise _Unusable(f"{path} keeps {len(tensors['features'])} features, {keep} are asked for")
    statistics = Statistics(tensors["mean"], tensors["covariance"], int(facts["count"]))
    return Reference(statistics, tensors["features"][:keep].clone(), expected, "cache")


def reference_path(folder: str | os.PathLike, name: str, network: torch.nn.Module) -> Path:
    """Where the statistics of the set `name` lie: one file per set and kind of network."""
    return Path(folder) / f"{name}-{type(network).__name__}.safetensors"
