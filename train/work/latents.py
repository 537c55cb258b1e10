"""Images through the tiny autoencoder once, in files on disk, and what the round trip loses.

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
from ee_diffusion.diffusion.latents import decode, encode, enlarged, load_taesd, psnr
from ee_diffusion.training.config import LatentConfig
from ee_diffusion.training.datasets import ImageSource, find_data_files
from train.work.report import process_state

PSNR_IMAGES = 256


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
    state, begun = PartialState(), time.perf_counter()
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
        chunks = [_encoded(config, images, vae, batch, bf16=bf16) for batch in batches]
        parts.write(number, {"latents": torch.cat(chunks)})
    state.wait_for_everyone()
    latents = torch.cat([part["latents"] for part in parts.read()])  # (M, 4, h, w) float16
    cost = {"encode_seconds": round(time.perf_counter() - begun, 2), "latents": len(latents), "bytes": parts.nbytes}
    return latents, parts.identity, cost


def round_trip(
    config: LatentConfig, images: Tensor, vae: AutoencoderTiny, *, bf16: bool = False
) -> dict[str, float | int]:
    """Mean PSNR in decibels of decode(encode(image)): at the size it is encoded, and back at the size of the data."""
    sizes, small = [], images.shape[-1]
    for some in images[:PSNR_IMAGES].split(config.encode_batch_size):
        pixels = some.to(vae.device).float() / 127.5 - 1
        large = enlarged(pixels, config.image_size)
        back = decode(vae, _latents(vae, large, bf16=bf16))
        shrunk = torch.nn.functional.interpolate(back, size=(small, small), mode="area")
        sizes.append(torch.stack([psnr(large, back), psnr(pixels, shrunk)]))
    large_db, small_db = torch.cat(sizes, dim=1).mean(1).tolist()
    count = min(PSNR_IMAGES, len(images))
    return {
        f"psnr_{config.image_size}px": round(large_db, 2),
        f"psnr_{small}px": round(small_db, 2),
        "psnr_images": count,
    }


def _encoded(config: LatentConfig, images: Tensor, vae: AutoencoderTiny, places: Tensor, *, bf16: bool) -> Tensor:
    pixels = images[places % len(images)].to(vae.device).float() / 127.5 - 1  # (B, C, H, W)
    mirrored = (places >= len(images)).to(vae.device)[:, None, None, None]
    pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    return _latents(vae, enlarged(pixels, config.image_size), bf16=bf16).cpu().half()


def _latents(vae: AutoencoderTiny, pixels: Tensor, *, bf16: bool) -> Tensor:
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        return encode(vae, pixels.contiguous(memory_format=torch.channels_last)).float().contiguous()
