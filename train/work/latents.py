"""Images through the tiny autoencoder once, in files on disk, shared by the processes.

Not here: the autoencoder (ee_diffusion.diffusion.latents), the files (ee_diffusion.diffusion.distillation.shards), models.
M images, B of a batch, C, H, W pixels; h, w latents.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderTiny
from torch import Tensor

from ee_diffusion.diffusion.distillation.collect import fingerprint
from ee_diffusion.diffusion.distillation.shards import Parts
from ee_diffusion.diffusion.latents import encode_bytes, load_taesd
from ee_diffusion.training.config import LatentConfig
from ee_diffusion.training.datasets import ImageSource, find_data_files
from train.work.report import process_state


def load_vae(config: LatentConfig) -> AutoencoderTiny:
    """TAESD on this process's device. Raises ValueError where no such files are."""
    vae = load_taesd(find_data_files(config.vae)[0])
    return vae.to(process_state().device, memory_format=torch.channels_last)


def encoded_once(
    config: LatentConfig, source: ImageSource, vae: AutoencoderTiny, *, folder: Path, mirrored: bool, bf16: bool = False
) -> tuple[Tensor, dict, dict]:
    """Every rank encodes its share of the missing files; then all read all of them. `mirrored`: mirror images follow the images;
    `bf16`: autocast.

    Returns latents (M or 2M, 4, h, w) float16, what they were made from, and what it cost (JSON values).

    Raises:
        ValueError: files in `folder` that were made from something else.
    """
    state, started = PartialState(), time.perf_counter()
    images, size = source.images, config.part_size
    count = len(images) * (2 if mirrored else 1)
    what = {"images": source.fingerprint(), "vae": fingerprint(vae), "size": config.image_size}
    what |= {"mirrored": mirrored} | ({"encoder": "bfloat16"} if bf16 else {})
    parts = Parts(folder, what | {"images_per_part": size}, count=-(-count // size))
    missing = parts.missing()
    state.wait_for_everyone()
    for number in missing[state.process_index :: state.num_processes]:
        places = torch.arange(number * size, min(count, (number + 1) * size))
        batches = places.split(config.encode_batch_size)
        encoded = [encode_bytes(vae, _pixels(images, batch), config.image_size, bf16=bf16) for batch in batches]
        parts.write(number, {"latents": torch.cat(encoded).cpu().half()})
    state.wait_for_everyone()
    latents = torch.cat([part["latents"] for part in parts.read()])  # (M, 4, h, w) float16
    cost = {"encode_seconds": round(time.perf_counter() - started, 2), "latents": len(latents), "bytes": parts.nbytes}
    return latents, parts.identity, cost


def _pixels(images: Tensor, places: Tensor) -> Tensor:
    """Images by place; places from M on are mirror images."""
    found = images[places % len(images)]  # (B, C, H, W)
    return torch.where((places >= len(images))[:, None, None, None], found.flip(-1), found)
