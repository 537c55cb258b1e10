"""Reference statistics of a real image set: computed once and kept on disk under a fingerprint, or read from a file that came with them.

Here: `reference`, its file, `read_statistics`. Not here: features (features.py), distances (distribution.py).
M images in the set, F features, R features kept one by one (KID needs samples, not moments).
"""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ee_diffusion.core.io import write_tensors
from ee_diffusion.metrics.distribution import Statistics
from ee_diffusion.metrics.features import InceptionFeatures, ResNetFeatures, extract, fingerprint, network_fingerprint
from ee_diffusion.metrics.files import digest
from ee_diffusion.metrics.reference_models import Progress

FORMAT = "ee_diffusion.reference.1"
_TENSORS = ("mean", "covariance", "features")


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of all M images, `features` (R, F) float32 of the first R, the fingerprint; `origin`: 'cache', why it was computed, or the
    file that it was read from."""

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
    _write(Path(path), found, network)
    return found


def read_statistics(
    path: str | os.PathLike, network: ResNetFeatures | InceptionFeatures, *, keep: int = 0
) -> Reference:
    """Statistics under this very network, from a file that came with them.

    Either a .safetensors that `reference` wrote, or an .npz as other FID programs write it: `mu` (2048,) and `sigma` (2048, 2048) of the
    FID Inception network, perhaps `count`; that it was this network, only its width tells. `keep`: as for `reference`.

    Raises:
        ValueError: no such file, a damaged one, another network's, fewer features than `keep`.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz") or not path.is_file():
        raise ValueError(f"reference statistics {str(path)!r}, expected an existing .safetensors or .npz")
    found = _read_npz(path, network) if path.suffix == ".npz" else _read_written(path, network)
    if len(found.features) < keep:
        raise ValueError(
            f"{path} keeps {len(found.features)} features one by one, expected {keep}, or the images themselves"
        )
    return found


def _read_written(path: Path, network: ResNetFeatures | InceptionFeatures) -> Reference:
    try:
        facts, tensors = _contents(path)
    except _Unusable as reason:
        raise ValueError(f"{reason}") from reason
    if facts.get("network") != network_fingerprint(network):
        raise ValueError(
            f"{path} is not said to be of {type(network).__name__} with these weights, expected its statistics"
        )
    statistics = Statistics(tensors["mean"], tensors["covariance"], int(facts["count"]))
    return Reference(statistics, tensors["features"], facts.get("fingerprint", ""), path.name)


def _read_npz(path: Path, network: ResNetFeatures | InceptionFeatures) -> Reference:
    if not isinstance(network, InceptionFeatures):
        raise ValueError(
            f"{path} is of the Inception network (FID), expected a .safetensors of {type(network).__name__}"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {
                name: torch.from_numpy(np.asarray(arrays[name])) for name in ("mu", "sigma", "count") if name in arrays
            }
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .npz file of arrays: {error}") from error
    if not {"mu", "sigma"} <= set(found) or found["mu"].shape != (network.num_features,):
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        raise ValueError(f"{path} holds {shapes}, expected 'mu' ({network.num_features},) and 'sigma'")
    count = int(found["count"]) if "count" in found else None
    statistics = Statistics(found["mu"].double(), found["sigma"].double(), count)
    return Reference(statistics, torch.empty(0, network.num_features), "", path.name)


def _write(path: Path, found: Reference, network: ResNetFeatures | InceptionFeatures) -> None:
    tensors = {
        "mean": found.statistics.mean,
        "covariance": found.statistics.covariance,
        "features": found.features,
    }
    facts = {"format": FORMAT, "fingerprint": found.fingerprint, "count": str(found.statistics.count)}
    facts |= {"network": network_fingerprint(network)}
    write_tensors(path, tensors, facts | {"digest": digest(tensors)})


def _read(path: Path, expected: str, keep: int) -> Reference:
    facts, tensors = _contents(path)
    if facts.get("fingerprint") != expected:
        raise _Unusable(f"{path} belongs to other images, weights or preprocessing")
    if len(tensors["features"]) < keep:
        raise _Unusable(f"{path} keeps {len(tensors['features'])} features, {keep} are asked for")
    statistics = Statistics(tensors["mean"], tensors["covariance"], int(facts["count"]))
    return Reference(statistics, tensors["features"][:keep].clone(), expected, "cache")


def _contents(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What stands in a file of `_write`: its metadata and tensors, if they are whole."""
    if not path.is_file():
        raise _Unusable(f"no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORMAT:
                raise _Unusable(f"{path} has format {facts.get('format')!r}, expected {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
    except SafetensorError as error:
        raise _Unusable(f"{path} is damaged ({error})") from error
    if digest(tensors) != facts.get("digest"):
        raise _Unusable(f"{path} is damaged (its digest differs)")
    return facts, tensors


def reference_path(folder: str | os.PathLike, name: str, network: torch.nn.Module) -> Path:
    """Where the statistics of the set `name` lie: one file per set and kind of network."""
    return Path(folder) / f"{name}-{type(network).__name__}.safetensors"
