"""Distances between two sets of features: Fréchet (FD on resnet20, FID on Inception) and kernel (KID), by torchmetrics in float64.

Here: the distances and the statistics they need. Not here: features (features.py), cached references (references.py).
M samples, F features. Sample counts are part of every result: both distances depend on them, the Fréchet distance strongly.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

CHUNK = 4096
NORMAL_95 = 1.959964


@dataclass(frozen=True, eq=False)
class Statistics:
    """mean (F,) and unbiased covariance (F, F) in float64 of `count` samples; None: nobody said of how many.

    Raises:
        ValueError: other shapes, NaN or infinity, fewer than two samples.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None

    def __post_init__(self):
        mean, covariance = self.mean, self.covariance
        if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean {tuple(mean.shape)} and covariance {tuple(covariance.shape)}, expected (F,) and (F, F)"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mean or covariance hold NaN or infinity")
        if self.count is not None and self.count < 2:
            raise ValueError(f"statistics of {self.count} samples, expected at least two")

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """features (M, F), M >= 2.

        Raises:
            ValueError: another shape, fewer than two samples, NaN or infinity.
        """
        _check(features)
        features = features.double()
        mean = features.mean(dim=0)  # (F,)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))


@dataclass(frozen=True)
class FrechetDistance:
    """`value`, and how many samples and reference samples it was computed from (None: the reference does not say)."""

    value: float
    count: int
    reference_count: int | None
    num_features: int


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over `subsets` random subsets of `subset_size` samples, out of `count` and `reference_count`."""

    mean: float
    std: float
    subsets: int
    subset_size: int
    count: int
    reference_count: int


class _Given(nn.Module):
    """Features that are already computed, handed through: torchmetrics asks for a feature network."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Statistics) -> FrechetDistance:
    """`|m_1 - m_2|^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))` (Heusel et al., NeurIPS 2017, equation 6), in float64.

    features (M, F), M >= 2, against a reference with the same F. 2048 features take under a minute on two cores.

    Raises:
        ValueError: another shape, fewer than two samples, another F, NaN or infinity.
    """
    _check(features)
    width = len(reference.mean)
    if features.shape[1] != width:
        raise ValueError(f"features are {tuple(features.shape)}, expected (M, {width}) as the reference")
    metric = FrechetInceptionDistance(feature=_Given(width), normalize=True).set_dtype(torch.float64)
    for part in features.cpu().double().split(CHUNK):
        metric.update(part, real=False)
    # torchmetrics keeps sums; the reference is kept as mean and covariance, which say the same, of whatever count
    count, mean = reference.count or 2, reference.mean.cpu().double()
    metric.real_features_sum = mean * count
    metric.real_features_cov_sum = reference.covariance.cpu().double() * (count - 1) + count * torch.outer(mean, mean)
    metric.real_features_num_samples = torch.tensor(count)
    return FrechetDistance(metric.compute().item(), len(features), reference.count, width)


def frechet_interval(
    features: Tensor, reference: Statistics, *, resamples: int, seed: int
) -> tuple[FrechetDistance, float, float]:
    """The distance and its 95 % bootstrap interval: `FD -+ 1.96 s`, s the standard deviation over resamples of features (M, F).

    Not the percentiles: a resample repeats samples, which adds a bias of its own to every resampled distance. For the distance of M samples
    to this very reference: neither the bias of M nor the draw of the reference is in it, and no certificate follows from it. `seed` draws
    the resamples; the global generator is left as it was.

    Raises:
        ValueError: fewer than 2 resamples; as `frechet_distance`.
    """
    if resamples < 2:
        raise ValueError(f"resamples={resamples}, expected at least 2")
    found, generator = frechet_distance(features, reference), torch.Generator().manual_seed(seed)
    count = len(features)
    draws = (torch.randint(count, (count,), generator=generator) for _ in range(resamples))
    values = [frechet_distance(features.cpu()[draw], reference).value for draw in draws]
    half = NORMAL_95 * torch.tensor(values, dtype=torch.float64).std().item()
    return found, found.value - half, found.value + half


def paired_difference(
    features: Tensor, others: Tensor, reference: Statistics, *, resamples: int, seed: int
) -> tuple[float, float]:
    """The 95 % bootstrap interval of FD(features) - FD(others), both (M, F), sample i of the one from the seed of sample i of the other.

    `difference -+ 1.96 s`, s the standard deviation over resamples of the pairs; as `frechet_interval`, but what the two share (a sample
    that is drawn or not, the bias of M) cancels.

    Raises:
        ValueError: shapes that differ, fewer than 2 resamples; as `frechet_distance`.
    """
    if features.shape != others.shape:
        raise ValueError(f"features {tuple(features.shape)} and {tuple(others.shape)}, expected pairs")
    if resamples < 2:
        raise ValueError(f"resamples={resamples}, expected at least 2")

    def difference(draw: Tensor | slice) -> float:
        return frechet_distance(features[draw], reference).value - frechet_distance(others[draw], reference).value

    found, generator, count = difference(slice(None)), torch.Generator().manual_seed(seed), len(features)
    values = [difference(torch.randint(count, (count,), generator=generator)) for _ in range(resamples)]
    half = NORMAL_95 * torch.tensor(values, dtype=torch.float64).std().item()
    return found - half, found + half


def kernel_distance(
    features: Tensor, reference: Tensor, *, subsets: int, subset_size: int, seed: int
) -> KernelDistance:
    """KID: the unbiased squared MMD under `k(x, y) = (x.y / F + 1)^3`, averaged over random subsets
    (Binkowski et al., "Demystifying MMD GANs", ICLR 2018, section 4), in float64.

    features (M, F), reference (R, F). `seed` draws the subsets; the global generator is left as it was.

    Raises:
        ValueError: shapes that do not fit, fewer samples than `subset_size`, NaN or infinity.
    """
    _check(features)
    _check(reference)
    smallest = min(len(features), len(reference))
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features are {tuple(features.shape)}, reference {tuple(reference.shape)}: F differs")
    if subsets < 1 or not 2 <= subset_size <= smallest:
        raise ValueError(f"{subsets} subsets of {subset_size}, expected at least 1 of 2..{smallest} samples")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features", category=UserWarning)
        metric = KernelInceptionDistance(_Given(features.shape[1]), subsets=subsets, subset_size=subset_size)
    metric.update(reference.cpu().double(), real=True)
    metric.update(features.cpu().double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return KernelDistance(mean.item(), std.item(), subsets, subset_size, len(features), len(reference))


def _check(features: Tensor) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features are {tuple(features.shape)}, expected (M, F) with M >= 2")
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinity")
