"""What generated images are compared with, and by which networks: one set of flags for all scripts, checked before anything is drawn.

Here: ReferenceOptions, the real images, their statistics, the Judge. Not here: the figures themselves (ee_diffusion.metrics).
M real images, H = W = size pixels of the generated ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.features import InceptionFeatures, ResNetFeatures, resnet20_features
from ee_diffusion.metrics.image import SSIM_WINDOW
from ee_diffusion.metrics.perceptual import SMALLEST, load_lpips
from ee_diffusion.metrics.quality import Judge
from ee_diffusion.metrics.reference_models import CLASSES, DATA_VARIABLE, Progress, data_folder, load_classifier
from ee_diffusion.metrics.references import Reference, read_statistics, reference, reference_path
from ee_diffusion.training.config import ImageDataConfig
from ee_diffusion.training.datasets import load_image_source
from eval.harness.options import ReferenceOptions

CIFAR_SIZE, RGB = 32, 3
CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def real_images(options: ReferenceOptions, size: int) -> Tensor:
    """(M, 3, H, W) uint8, H = W = size; CIFAR-10's as they are, 32x32.

    Raises:
        ValueError: no such images, or the reference is a file of statistics.
    """
    if options.reference_statistics is not None:
        raise ValueError(f"{options.reference_statistics} holds statistics, expected images")
    files, column = options.reference_files, options.reference_column
    if options.is_cifar:
        files, column = [str(data_folder(options.data) / "cifar10" / f"{options.reference}-*.parquet")], "img"
    config = ImageDataConfig(
        train_data_dir=options.reference_dir,
        train_data_files=files or None,
        image_column=column if files else "image",
        label_column=None,
        resolution=CIFAR_SIZE if options.is_cifar else size,
        random_flip=False,
        max_train_samples=options.reference_count,
    )
    return load_image_source(config, None).images


def known_reference(
    options: ReferenceOptions,
    network: ResNetFeatures | InceptionFeatures,
    *,
    size: int,
    keep: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Reference:
    """Statistics of the reference under a network, computed once. `keep`: so many features are needed one by one (KID); all are kept then.

    Raises:
        ValueError: as `real_images` and `read_statistics`; fewer images than `keep`.
    """
    if options.reference_statistics is not None:
        return read_statistics(options.reference_statistics, network, keep=keep)
    print(f"reading the images of {options.name}", flush=True)
    real = real_images(options, size)
    own = re.sub(r"[^\w.-]+", "-", options.name)
    name = f"cifar10-{options.reference}" if options.is_cifar else f"{own}-{size}"
    path = reference_path(options.cache_dir, f"{name}-{len(real)}", network)
    if len(real) < keep:
        raise ValueError(f"{options.name} holds {len(real)} images, expected at least {keep}")
    count = len(real) if keep else 0
    found = reference(path, real, network, keep=count, batch_size=batch_size, progress=progress)
    print(f"reference {path}: {found.origin}", flush=True)
    return found


def shape_of(pipeline: EarlyExitPipeline) -> dict[str, Any]:
    """`size` and `channels` of a pipeline's images, for `judge_of` and `unfit`."""
    config = pipeline.transformer.config
    return {"size": (config.sample_size,) * 2, "channels": config.in_channels}


def unfit(
    options: ReferenceOptions, *, size: tuple[int, int], num_classes: int | None, channels: int = RGB
) -> str | None:
    """Why resnet20's FD against the reference says nothing of a model's images; None: it does.

    num_classes: the model's; None: unconditional, or unknown.
    """
    if channels != RGB:
        return _channels(channels)
    if size != (CIFAR_SIZE, CIFAR_SIZE):
        return f"images are {size[0]}x{size[1]} and the judging network looks at {CIFAR_SIZE}x{CIFAR_SIZE}"
    if options.is_cifar and num_classes not in (None, CLASSES):
        return f"the model draws {num_classes} classes, which are not the {CLASSES} of CIFAR-10"
    return None


def judge_of(
    options: ReferenceOptions,
    *,
    size: tuple[int, int],
    num_classes: int | None,
    channels: int = RGB,
    class_names: Sequence[str] = (),
) -> Judge:
    """All figures that fit images of `channels` and `size` (H, W), of a model with `num_classes` (None: unconditional); the others are left
    out by name.

    class_names: of the model's classes, where it says them.

    Raises:
        ValueError: a reference is named that these images cannot be compared with.
    """
    left_out = _left_out(options, size, num_classes, channels, class_names)
    if not options.is_cifar and "fd" in left_out:
        raise ValueError(f"no FD against {options.name}: {left_out['fd']}")
    parts = {}
    if "lpips" not in left_out:
        parts["perceptual"] = load_lpips(options.data)
    if "fd" not in left_out:
        network = resnet20_features(options.data)
        statistics = known_reference(options, network, size=CIFAR_SIZE).statistics
        parts |= {"features": network, "reference": statistics, "reference_name": options.name}
    if "accuracy" not in left_out:
        parts["classifier"] = load_classifier("resnet56", folder=options.data)
    judge = Judge(**parts, left_out=left_out)
    print(judge.note(), flush=True)
    return judge


def _channels(channels: int) -> str | None:
    return None if channels == RGB else f"images have {channels} channels and the judging networks look at {RGB}"


def _left_out(
    options: ReferenceOptions, size: tuple[int, int], num_classes: int | None, channels: int, class_names: Sequence[str]
) -> dict[str, str]:
    """Figure -> why it says nothing of these images."""
    came = f"images are {size[0]}x{size[1]}, at least"
    absent = options.data is None and DATA_VARIABLE not in os.environ
    no_data = f"no data folder (--data, {DATA_VARIABLE})" if absent else None
    wrong, grey = unfit(options, size=size, num_classes=num_classes, channels=channels), _channels(channels)
    if options.is_cifar and class_names and tuple(name.lower() for name in class_names) != CIFAR_NAMES:
        wrong = wrong or f"the model's classes ({', '.join(class_names[:3])}, ...) are not CIFAR-10's"
    alien = None if options.is_cifar else f"the classes of {options.name} are not CIFAR-10's"
    unlabelled = "the model is unconditional" if num_classes is None else None
    reasons = {
        "ssim": f"{came} {SSIM_WINDOW}x{SSIM_WINDOW} are needed" if min(size) < SSIM_WINDOW else None,
        "lpips": no_data or grey or (f"{came} {SMALLEST}x{SMALLEST} are needed" if min(size) < SMALLEST else None),
        "fd": no_data or wrong,
        "accuracy": no_data or wrong or alien or unlabelled,
    }
    return {name: reason for name, reason in reasons.items() if reason}
