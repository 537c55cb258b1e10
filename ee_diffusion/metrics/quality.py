"""A Judge: all cheap quality figures of one set of images against the full model's images at the same seeds.

Here: which figures there are. Not here: the figures themselves (image.py, perceptual.py, distribution.py, reference_models.py).
n images, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor, nn

from ee_diffusion.metrics.distribution import Statistics, frechet_distance
from ee_diffusion.metrics.features import extract
from ee_diffusion.metrics.files import to_bytes
from ee_diffusion.metrics.image import psnr, ssim, summary
from ee_diffusion.metrics.perceptual import LPIPS, lpips
from ee_diffusion.metrics.reference_models import class_accuracy

COLUMNS = ("psnr", "ssim", "lpips", "fd", "accuracy")


class Judge:
    """Paired PSNR and SSIM; LPIPS, FD and class accuracy where their networks are given.

    Args:
        perceptual: the LPIPS network. features, reference: a feature network and the statistics of the real images under it.
        reference_name: what these images are, for the table. classifier: maps images to class logits.
        left_out: figure -> why it is not computed, for the table; of those that need no network only "ssim" (images below 11 pixels).
    """

    def __init__(
        self,
        *,
        perceptual: LPIPS | None = None,
        features: nn.Module | None = None,
        reference: Statistics | None = None,
        reference_name: str | None = None,
        classifier: nn.Module | None = None,
        left_out: Mapping[str, str] | None = None,
    ):
        if (features is None) != (reference is None) or (features is None) != (reference_name is None):
            raise ValueError("features, reference and reference_name: give all or none")
        self.perceptual, self.features, self.reference, self.classifier = perceptual, features, reference, classifier
        self.reference_name, self.left_out = reference_name, dict(left_out or {})

    def __call__(self, images: Tensor, full: Tensor, labels: Tensor | None) -> dict[str, dict]:
        """images and full (n, C, H, W) in [0, 1], labels (n,) -> figure name -> its facts, sample counts among them."""
        found = {"psnr": asdict(summary(psnr(images, full)))}
        if "ssim" not in self.left_out:
            found["ssim"] = asdict(summary(ssim(images, full)))
        if self.perceptual is not None:
            found["lpips"] = asdict(summary(lpips(self.perceptual, images, full)))
        if self.features is not None:
            seen = extract(self.features, to_bytes(images), batch_size=256)  # as from files: in bytes
            found["fd"] = asdict(frechet_distance(seen, self.reference)) | {"reference": self.reference_name}
        if self.classifier is not None and labels is not None:
            found["accuracy"] = asdict(class_accuracy(self.classifier, to_bytes(images), labels))
        return found

    def note(self) -> str:
        """What the figures are against and which are left out, a line for under the table."""
        said = ["PSNR, SSIM and LPIPS: against the full model's images of the same seeds."]
        if self.reference is not None:
            count = "an unknown number of" if self.reference.count is None else self.reference.count
            said.append(f"FD: against {self.reference_name}, {count} real images.")
        if self.classifier is not None:
            said.append("Accuracy: of CIFAR-10's classes.")
        return " ".join([*said, *(f"No {name}: {reason}." for name, reason in self.left_out.items())])


def flat(found: dict[str, dict]) -> dict[str, float]:
    """The one number of each figure, by name, for a table."""
    return {name: found[name].get("mean", found[name].get("value")) for name in COLUMNS if name in found}
