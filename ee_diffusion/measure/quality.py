"""A Judge: all cheap quality figures of one set of images against the full model's images at the same seeds.

Here: which figures there are. Not here: the figures themselves (paired.py, perceptual.py, frechet.py, classifiers.py).
n images, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor, nn

from ee_diffusion.measure.classifiers import class_accuracy
from ee_diffusion.measure.features import extract
from ee_diffusion.measure.files import to_bytes
from ee_diffusion.measure.frechet import Statistics, frechet_distance
from ee_diffusion.measure.paired import psnr, ssim, summary
from ee_diffusion.measure.perceptual import LPIPS, lpips

COLUMNS = ("psnr", "ssim", "lpips", "fd", "accuracy")


class Judge:
    """Paired PSNR and SSIM always; LPIPS, FD and class accuracy where their networks are given.

    Args:
        perceptual: the LPIPS network. features, reference: a feature network and the statistics of the real images under it.
        classifier: maps images to class logits.
    """

    def __init__(
        self,
        *,
        perceptual: LPIPS | None = None,
        features: nn.Module | None = None,
        reference: Statistics | None = None,
        classifier: nn.Module | None = None,
    ):
        if (features is None) != (reference is None):
            raise ValueError("features and reference: give both or neither")
        self.perceptual, self.features, self.reference, self.classifier = perceptual, features, reference, classifier

    def __call__(self, images: Tensor, full: Tensor, labels: Tensor | None) -> dict[str, dict]:
        """images and full (n, C, H, W) in [0, 1], labels (n,) -> figure name -> its facts, sample counts among them."""
        found = {"psnr": asdict(summary(psnr(images, full))), "ssim": asdict(summary(ssim(images, full)))}
        if self.perceptual is not None:
            found["lpips"] = asdict(summary(lpips(self.perceptual, images, full)))
        if self.features is not None:
            seen = extract(self.features, to_bytes(images), batch_size=256)  # as from files: in bytes
            found["fd"] = asdict(frechet_distance(seen, self.reference))
        if self.classifier is not None and labels is not None:
            found["accuracy"] = asdict(class_accuracy(self.classifier, to_bytes(images), labels))
        return found


def flat(found: dict[str, dict]) -> dict[str, float]:
    """The one number of each figure, by name, for a table."""
    return {name: found[name].get("mean", found[name].get("value")) for name in COLUMNS if name in found}
