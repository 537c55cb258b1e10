"""CIFAR-10 classifiers that judge images: resnet20 and resnet56 with option-A shortcuts, and the accuracy of conditional samples.

Here: the networks and accuracy. Not here: distances between feature distributions (distribution.py).
B images, C channels, H x W = 32 x 32 pixels, 10 classes, F = 64 pooled features.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ee_diffusion.metrics.files import check_images

DATA_VARIABLE = "EE_DIFFUSION_DATA"
CLASSES = 10
# Name -> blocks per stage, weights below the data folder.
NETWORKS = {
    "resnet20": (3, "classifiers/resnet20-12fca82f.safetensors"),
    "resnet56": (9, "classifiers/resnet56-4bfd9763.safetensors"),
}
Progress = Callable[[Iterable], Iterable]


def data_folder(given: str | os.PathLike | None = None) -> Path:
    """The data folder: `given`, else what EE_DIFFUSION_DATA names.

    Raises:
        ValueError: neither is set, or no such folder.
    """
    named = given if given is not None else os.environ.get(DATA_VARIABLE)
    if not named:
        raise ValueError(f"no data folder: give its path, or set the environment variable {DATA_VARIABLE}")
    if not Path(named).is_dir():
        origin = "given" if given is not None else f"from {DATA_VARIABLE}"
        raise ValueError(f"the data folder {str(named)!r} ({origin}) does not exist")
    return Path(named)


class _Block(nn.Module):
    """`relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`; option A: every second pixel, new channels are zeros on both sides."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.added = stride, width - width_in

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(images)))
        hidden = self.bn2(self.conv2(hidden))
        if self.added:
            images = images[:, :, :: self.stride, :: self.stride]
            images = functional.pad(images, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return functional.relu(hidden + images)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images (He et al., "Deep Residual Learning", CVPR 2016, section 4.2): widths 16, 32, 64, option-A shortcuts.

    Args:
        blocks: blocks per stage (3: resnet20, 9: resnet56).
    """

    num_features = 64
    preprocessing = (
        "float images in [0, 1], 32x32; (x - mean) / std, mean .485 .456 .406, std .229 .224 .225; pooled features"
    )

    def __init__(self, blocks: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, CLASSES)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1), persistent=False)

    def pooled(self, images: Tensor) -> Tensor:
        """Features averaged over pixels: (B, 3, 32, 32) float in [0, 1] -> (B, 64).

        Raises:
            ValueError: another shape or dtype, values outside [0, 1], NaN.
        """
        if images.ndim != 4 or images.shape[1:] != (3, 32, 32) or not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}, expected float (B, 3, 32, 32) in [0, 1]"
            )
        check_images(images)
        hidden = functional.relu(self.bn1(self.conv1((images - self.mean) / self.std)))  # (B, 16, 32, 32)
        hidden = self.layer3(self.layer2(self.layer1(hidden)))  # (B, 64, 8, 8)
        return hidden.mean(dim=(2, 3))  # (B, 64)

    def forward(self, images: Tensor) -> Tensor:
        """Logits: (B, 3, 32, 32) in [0, 1] -> (B, 10)."""
        return self.linear(self.pooled(images))


def load_classifier(name: str, *, folder: str | os.PathLike | None = None) -> CifarResNet:
    """A trained classifier in evaluation mode: 'resnet20' (91.73 % of the CIFAR-10 test set) or 'resnet56' (93.39 %).

    folder: the data folder; None: what EE_DIFFUSION_DATA names.

    Raises:
        ValueError: an unknown name, no data folder, no such file, or a file that does not fit.
    """
    if name not in NETWORKS:
        raise ValueError(f"classifier {name!r}, expected one of {sorted(NETWORKS)}")
    blocks, file = NETWORKS[name]
    network = CifarResNet(blocks)
    load_weights(network, data_folder(folder) / file)
    return network.eval().requires_grad_(False)


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a safetensors file into a network, every key and no other.

    Raises:
        ValueError: no such file, a truncated one, or keys and shapes of another network.
    """
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    try:
        network.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the weights of a {type(network).__name__}: {error}") from error


@dataclass(frozen=True)
class Accuracy:
    """How many images a classifier names as they were asked for. `low`, `high`: Wilson's 95 % interval; `per_class`: None if absent."""

    value: float
    low: float
    high: float
    correct: int
    count: int
    per_class: tuple[float | None, ...]


def class_accuracy(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 256, progress: Progress | None = None
) -> Accuracy:
    """The share of images that the classifier assigns to their label.

    images (B, 3, H, W), float in [0, 1] or uint8; labels (B,) integers in [0, 10). The classifier maps float images to logits.

    Raises:
        ValueError: no images, images of another dtype or range, labels of another length, dtype or range.
    """
    if not len(images):
        raise ValueError("no images, expected at least one")
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}, expected integers ({len(images)},)")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"labels span {labels.min()}..{labels.max()}, expected 0..{CLASSES - 1}")
    predicted = in_batches(classifier, images, batch_size=batch_size, progress=progress).argmax(dim=1)  # (B,)
    labels = labels.cpu()
    hits = predicted == labels
    correct, count = int(hits.sum()), len(images)
    per_class = [
        hits[labels == index].double().mean().item() if (labels == index).any() else None for index in range(CLASSES)
    ]
    low, high = wilson(correct, count)
    return Accuracy(correct / count, low, high, correct, count, tuple(per_class))


def in_batches(
    network: Callable[[Tensor], Tensor], images: Tensor, *, batch_size: int, progress: Progress | None = None
) -> Tensor:
    """Apply a network to uint8 or [0, 1] float images batch by batch, without gradients or TF32; the outputs, on the CPU.

    The images go to the network's own device. `progress` wraps the iterable of batches (`tqdm` fits).

    Raises:
        ValueError: no images, a batch size below one, images of another dtype or range (`check_images`).
    """
    if not len(images) or batch_size < 1:
        raise ValueError(f"{len(images)} images in batches of {batch_size}, expected at least one of each")
    check_images(images)
    first = next(iter(network.parameters()), None) if isinstance(network, nn.Module) else None
    device = images.device if first is None else first.device
    starts: Iterable[int] = range(0, len(images), batch_size)
    outputs = []
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for start in progress(starts) if progress is not None else starts:
            batch = images[start : start + batch_size].to(device)
            batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
            outputs.append(network(batch).cpu())
    return torch.cat(outputs)


def wilson(correct: int, count: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval for a share: `(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)` (Wilson 1927, equation 2)."""
    share, scale = correct / count, 1 + z * z / count
    centre, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _stage(width_in: int, width: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = _Block(width_in, width, stride)
    return nn.Sequential(first, *(_Block(width, width, 1) for _ in range(blocks - 1)))
