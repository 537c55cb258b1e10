"""LPIPS v0.1 on AlexNet, without torchvision: a perceptual distance between two images.

Here: the network and its loading. Not here: other paired values (image.py).
B images, C channels, H x W pixels, h x w positions of a feature map.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ee_diffusion.metrics.files import check_images
from ee_diffusion.metrics.reference_models import data_folder, load_weights

LPIPS_FILE = "perceptual/lpips_alexnet.safetensors"
SMALLEST = 31
_WIDTHS = (64, 192, 384, 256, 256)
# Kernel, stride and padding of AlexNet's convolutions; a 3x3 max pool of stride 2 stands before the second and the third.
_CONVOLUTIONS = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
_POOLED_BEFORE = (1, 2)
_EPSILON = 1e-10


class LPIPS(nn.Module):
    """`sum_l mean_{h,w} sum_c w_lc (y_lc / |y_l| - z_lc / |z_l|)^2` over the five activations of AlexNet
    (Zhang et al., "The Unreasonable Effectiveness of Deep Features", CVPR 2018, equation 1; `lpips` 0.1, net="alex").

    Small images are taken as they are: at 32x32 the activations are 7, 3, 1, 1 and 1 pixels wide. Compare numbers at one size only.

    Args:
        widths: channels of the five convolutions; other than AlexNet's only for tests.
    """

    def __init__(self, widths: Sequence[int] = _WIDTHS):
        super().__init__()
        for index, (width, (kernel, stride, padding)) in enumerate(zip(widths, _CONVOLUTIONS, strict=True)):
            before = 3 if index == 0 else widths[index - 1]
            self.add_module(f"conv{index}", nn.Conv2d(before, width, kernel, stride=stride, padding=padding))
            self.add_module(f"lin{index}", nn.Conv2d(width, 1, 1, bias=False))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1] twice, H and W at least 31, -> (B,).

        Raises:
            ValueError: shapes that differ, too small images, values outside [0, 1], NaN.
        """
        for name, given in (("images", images), ("reference", reference)):
            if given.ndim != 4 or given.shape[1] != 3 or min(given.shape[2:]) < SMALLEST or given.shape != images.shape:
                came, size = tuple(given.shape), f"{SMALLEST}x{SMALLEST}"
                raise ValueError(f"{name} is {came}, expected two equal shapes (B, 3, H, W) of at least {size}")
            _check_floats(given, name)
        total = images.new_zeros(len(images))  # (B,)
        pairs = zip(self._activations(images), self._activations(reference), strict=True)
        for index, (left, right) in enumerate(pairs):
            difference = (_unit(left) - _unit(right)).square()  # (B, C, h, w)
            weighted = self.get_submodule(f"lin{index}")(difference)  # (B, 1, h, w)
            total = total + weighted.mean(dim=(1, 2, 3))
        return total

    def _activations(self, images: Tensor) -> list[Tensor]:
        hidden = (2 * images - 1 - self.shift) / self.scale
        found = []
        for index in range(len(_CONVOLUTIONS)):
            if index in _POOLED_BEFORE:
                hidden = functional.max_pool2d(hidden, 3, stride=2)
            hidden = functional.relu(self.get_submodule(f"conv{index}")(hidden))  # (B, C, h, w)
            found.append(hidden)
        return found


def load_lpips(folder: str | os.PathLike | None = None) -> LPIPS:
    """LPIPS with its published weights, from the data folder (None: what EE_DIFFUSION_DATA names).

    Raises:
        ValueError: no data folder, no such file, or a file that does not fit.
    """
    network = LPIPS()
    load_weights(network, data_folder(folder) / LPIPS_FILE)
    return network.eval().requires_grad_(False)


def lpips(network: LPIPS, images: Tensor, reference: Tensor, *, batch_size: int = 256) -> Tensor:
    """LPIPS of many pairs, batch by batch on the network's device, without gradients or TF32: (B, 3, H, W) twice -> (B,) float64, CPU.

    Raises:
        ValueError: no images, shapes that differ, a batch size below one, images that are not floating point in [0, 1], NaN.
    """
    if images.shape != reference.shape or not len(images) or batch_size < 1:
        came = f"{tuple(images.shape)} and {tuple(reference.shape)} in batches of {batch_size}"
        raise ValueError(f"{came}, expected two equal shapes with at least one image each")
    for name, given in (("images", images), ("reference", reference)):
        _check_floats(given, name)
    like = next(network.parameters())
    found = []
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for left, right in zip(images.split(batch_size), reference.split(batch_size), strict=True):
            found.append(network(left.to(like), right.to(like)).cpu().double())
    return torch.cat(found)


def _check_floats(images: Tensor, name: str) -> None:
    if not images.is_floating_point():
        raise ValueError(f"{name} are {images.dtype}, expected floating point in [0, 1]")
    check_images(images, name)


def _unit(activations: Tensor) -> Tensor:
    """Every position's channels divided by their Euclidean length."""
    return activations / (activations.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON)
