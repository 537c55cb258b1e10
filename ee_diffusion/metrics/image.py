"""Image by image against a reference of equal seed: PSNR, SSIM, relative squared error, and the summary of any such values.

Here: values per image, (B,) float64. Not here: LPIPS (perceptual.py), distances between distributions (distribution.py).
B images, C channels, H x W pixels, all in [0, 1] unless said otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ee_diffusion.metrics.files import check_images

# Images of 8 bits that differ at all stay below 20 log10(255) + 10 log10(C H W): 83 dB at 3x32x32. So the cap means "identical" there.
PSNR_CAP = 100.0
SSIM_WINDOW = 11
_CHUNK = 256
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Summary:
    """Mean of `count` values and its 95 % interval, `mean -+ 1.96 s / sqrt(count)` (normal); one value has none (None)."""

    mean: float
    low: float | None
    high: float | None
    count: int


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """`10 log10(1 / mean squared error)` per image in dB, data range 1.0, capped at PSNR_CAP = 100 dB; identical images get the cap.

    (B, C, H, W) twice -> (B,) float64.

    Raises:
        ValueError: shapes that differ, no images, values outside [0, 1], NaN.
    """
    images, reference = _pair(images, reference)
    values = peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))  # (B,)
    return values.clamp(max=PSNR_CAP)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity per image (Wang et al., IEEE TIP 2004, equation 13): Gaussian window 11x11 of sigma 1.5, data range 1.0.

    (B, C, H, W) twice, H and W at least 11, -> (B,) float64 in [-1, 1].

    Raises:
        ValueError: shapes that differ, no images, images below 11 pixels, values outside [0, 1], NaN.
    """
    images, reference = _pair(images, reference)
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"images are {tuple(images.shape)}, expected at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels")
    values = [
        structural_similarity_index_measure(left, right, data_range=1.0, reduction="none").reshape(-1)
        for left, right in zip(images.split(_CHUNK), reference.split(_CHUNK), strict=True)
    ]
    return torch.cat(values)


def relative_squared_error(values: Tensor, reference: Tensor) -> Tensor:
    """`|x - r|^2 / |r|^2` per sample; for images, latents and predictions of any range.

    (B, ...) twice -> (B,) float64.

    Raises:
        ValueError: shapes that differ, no samples, NaN, a reference that is zero everywhere.
    """
    _same_shape(values, reference)
    values, reference = values.double().flatten(1), reference.double().flatten(1)  # (B, n)
    norms = reference.square().sum(dim=1)  # (B,)
    if not (norms > 0).all():
        raise ValueError(
            f"reference {int((norms > 0).logical_not().nonzero()[0])} is zero or NaN, its relative error is not defined"
        )
    errors = (values - reference).square().sum(dim=1) / norms  # (B,)
    if errors.isnan().any():
        raise ValueError("values hold NaN")
    return errors


def summary(values: Tensor) -> Summary:
    """Mean and normal 95 % interval of values (B,).

    Raises:
        ValueError: no values, another shape, NaN or infinity.
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values are {tuple(values.shape)}, expected (B,) with B >= 1")
    values = values.double()
    if not values.isfinite().all():
        raise ValueError(f"{int((~values.isfinite()).sum())} of {len(values)} values are NaN or infinite")
    mean, count = values.mean().item(), len(values)
    if count == 1:
        return Summary(mean, None, None, 1)
    half = _NORMAL_95 * values.std(correction=1).item() / math.sqrt(count)
    return Summary(mean, mean - half, mean + half, count)


def _same_shape(values: Tensor, reference: Tensor) -> None:
    if values.shape != reference.shape or values.ndim < 2 or not len(values):
        raise ValueError(
            f"{tuple(values.shape)} against {tuple(reference.shape)}, expected equal shapes (B, ...) with B >= 1"
        )


def _pair(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    _same_shape(images, reference)
    for name, given in (("images", images), ("reference", reference)):
        if given.ndim != 4 or not given.is_floating_point():
            raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}, expected float (B, C, H, W)")
        check_images(given, name)
    return images.double(), reference.double()
