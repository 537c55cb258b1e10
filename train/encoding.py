"""What the latent training scripts share: images through the tiny autoencoder once, in parts on disk, and what the round trip costs.

Here: loops over images. Not here: the autoencoder (ee_diffusion.diffusion.latents), files (ee_diffusion.diffusion.distillation.shards),
models. M images, B of a chunk, C, H, W pixels; h, w latents.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderTiny
from torch import Tensor

from ee_diffusion.diffusion.distillation.collect import fingerprint
from ee_diffusion.diffusion.distillation.shards import Parts
from ee_diffusion.diffusion.latents import decode, encode, enlarged, psnr
from ee_diffusion.training.datasets import ImageSource

PSNR_IMAGES = 256


@dataclass(frozen=True)
class Encoding:
    """Images are enlarged to `size` pixels, `part_size` per file, `batch_size` per forward; `bf16`: autocast; `mirrored`: these too."""

    size: int
    part_size: int
    batch_size: int
    bf16: bool
    mirrored: bool


def encoded_once(
    encoding: Encoding, source: ImageSource, vae: AutoencoderTiny, *, folder: Path
) -> tuple[Tensor, dict, dict]:
    """Every rank encodes the parts that are its own and not there yet; then all read all of them. Mirror images follow the images.

    Returns latents (M or 2M, 4, h, w) float16, what they were made from (JSON values), and what it cost.

    Raises:
        ValueError: parts in `folder` that were made from something else.
    """
    state, begun = PartialState(), time.perf_counter()
    images, size = source.images, encoding.part_size
    count = len(images) * (2 if encoding.mirrored else 1)
    what = {"images": source.fingerprint(), "vae": fingerprint(vae), "size": encoding.size}
    what |= {"mirrored": encoding.mirrored} | ({"encoder": "bfloat16"} if encoding.bf16 else {})
    parts = Parts(folder, what | {"images_per_part": size}, count=-(-count // size))
    missing = parts.missing()
    state.wait_for_everyone()
    for number in missing[state.process_index :: state.num_processes]:
        places = torch.arange(number * size, min(count, (number + 1) * size))
        chunks = [_encoded(encoding, images, vae, some) for some in places.split(encoding.batch_size)]
        parts.write(number, {"latents": torch.cat(chunks)})
    state.wait_for_everyone()
    latents = torch.cat([part["latents"] for part in parts.read()])  # (M, 4, h, w) float16
    cost = {"encode_seconds": round(time.perf_counter() - begun, 2), "latents": len(latents), "bytes": parts.nbytes}
    return latents, parts.identity, cost


def round_trip(encoding: Encoding, images: Tensor, vae: AutoencoderTiny) -> dict[str, float]:
    """Mean PSNR in decibel of decode(encode(image)): at the size it is encoded, and back at the size of the data."""
    sizes, small = [], images.shape[-1]
    for some in images[:PSNR_IMAGES].split(encoding.batch_size):
        pixels = some.to(vae.device).float() / 127.5 - 1
        large = enlarged(pixels, encoding.size)
        back = decode(vae, _latents(encoding, vae, large))
        shrunk = torch.nn.functional.interpolate(back, size=(small, small), mode="area")
        sizes.append(torch.stack([psnr(large, back), psnr(pixels, shrunk)]))
    large_db, small_db = torch.cat(sizes, dim=1).mean(1).tolist()
    count = min(PSNR_IMAGES, len(images))
    return {
        f"psnr_{encoding.size}px": round(large_db, 2),
        f"psnr_{small}px": round(small_db, 2),
        "psnr_images": count,
    }


def _encoded(encoding: Encoding, images: Tensor, vae: AutoencoderTiny, places: Tensor) -> Tensor:
    pixels = images[places % len(images)].to(vae.device).float() / 127.5 - 1  # (B, C, H, W)
    turned = (places >= len(images)).to(vae.device)[:, None, None, None]
    pixels = torch.where(turned, pixels.flip(-1), pixels)
    return _latents(encoding, vae, enlarged(pixels, encoding.size)).cpu().half()


def _latents(encoding: Encoding, vae: AutoencoderTiny, pixels: Tensor) -> Tensor:
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=encoding.bf16):
        return encode(vae, pixels.contiguous(memory_format=torch.channels_last)).float().contiguous()
