"""Between pixels and what a transformer sees: encoding through a pipeline's VAE, the tiny autoencoder from its two files, noised data.

Here: tensors in, tensors out. Not here: data sets, files of latents (shards.py). B images, C, H, W pixels; c, h, w latents.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ee_diffusion.diffusion.distillation.deediff_objective import null_class_of
from ee_diffusion.diffusion.pipelines.sampling import sampler

TAESD_FILES = {"encoder": "taesd_encoder.safetensors", "decoder": "taesd_decoder.safetensors"}
# The decoder's file counts its clamp as layer 0; AutoencoderTiny clamps in its forward.
_SHIFT = {"encoder": 0, "decoder": 1}


def load_taesd(folder: str | Path) -> AutoencoderTiny:
    """The tiny autoencoder for Stable Diffusion's latents (github.com/madebyollin/taesd): 8x down, 4 channels, MIT.

    `folder`: one with the two files of the original release, or one in diffusers layout (config.json).

    Raises:
        ValueError: files are missing, unreadable or of another model.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return AutoencoderTiny.from_pretrained(folder).eval()
    missing = [name for name in TAESD_FILES.values() if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {missing}, expected {sorted(TAESD_FILES.values())} or a diffusers folder")
    vae = AutoencoderTiny()
    try:
        for part, name in TAESD_FILES.items():
            getattr(vae, part).load_state_dict(_renumbered(load_file(folder / name), _SHIFT[part]))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder} holds no TAESD: {error}") from error
    return vae.eval()


def _renumbered(state: dict[str, Tensor], shift: int) -> dict[str, Tensor]:
    return {
        re.sub(r"^(\d+)", lambda match: f"layers.{int(match[1]) - shift}", name): value for name, value in state.items()
    }


@torch.no_grad()
def encode(vae: nn.Module, images: Tensor) -> Tensor:
    """images (B, C, H, W) in [-1, 1] -> latents (B, c, h, w) as the transformer of the same pipeline sees them, without sampling.

    Raises:
        ValueError: a VAE that is neither AutoencoderTiny nor AutoencoderKL.
    """
    if not isinstance(vae, AutoencoderTiny | AutoencoderKL):
        raise ValueError(f"{type(vae).__name__}, expected AutoencoderTiny or AutoencoderKL")
    encoded = vae.encode(images.to(vae.dtype))
    latents = encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mode()
    return latents * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """latents (B, c, h, w) -> images (B, C, H, W), clamped to [-1, 1]."""
    return vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)


def enlarged(images: Tensor, size: int) -> Tensor:
    """images (B, C, H, W) in [-1, 1] -> (B, C, size, size), bicubic, clamped."""
    return nn.functional.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1], twice -> (B,) `10 log10(2^2 / mean squared difference)` in decibel."""
    return 10 * (4 / (images - others).square().flatten(1).mean(1)).log10()


def encode_bytes(vae: nn.Module, images: Tensor, size: int, *, bf16: bool = False) -> Tensor:
    """images (B, C, H, W) uint8, enlarged to `size` pixels -> latents (B, c, h, w) float32; bf16: autocast."""
    return _encode(vae, enlarged(images.to(vae.device).float() / 127.5 - 1, size), bf16=bf16)


def round_trip(
    vae: nn.Module, images: Tensor, size: int, *, batch_size: int, bf16: bool = False
) -> dict[str, float | int]:
    """Mean PSNR in decibels of decode(encode(image)), at `size` pixels and back at H, over the first 256 images (M, C, H, W) uint8."""
    rows, small, images = [], images.shape[-1], images[:256]
    for batch in images.split(batch_size):
        pixels = batch.to(vae.device).float() / 127.5 - 1
        large = enlarged(pixels, size)
        back = decode(vae, _encode(vae, large, bf16=bf16))
        shrunk = nn.functional.interpolate(back, size=(small, small), mode="area")
        rows.append(torch.stack([psnr(large, back), psnr(pixels, shrunk)]))
    large_db, small_db = torch.cat(rows, dim=1).mean(1).tolist()
    decibels = {f"psnr_{size}px": round(large_db, 2), f"psnr_{small}px": round(small_db, 2)}
    return decibels | {"psnr_images": len(images)}


def _encode(vae: nn.Module, pixels: Tensor, *, bf16: bool) -> Tensor:
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        return encode(vae, pixels.contiguous(memory_format=torch.channels_last)).float().contiguous()


class NoisedStates:
    """States from a data set instead of trajectories: a batch of an image source -> noised inputs (B, 1, ...) of the transformer.

    Args:
        class_drop: probability that a label becomes the null class.

    Raises:
        ValueError: class_drop outside [0, 1] or without a null class.
    """

    def __init__(self, pipeline: DiffusionPipeline, *, class_drop: float):
        self.scheduler = sampler("ddpm", like=pipeline.scheduler)
        self.vae = pipeline.components.get("vae")
        self.null_class, self.class_drop = null_class_of(pipeline.transformer), class_drop
        if not 0 <= class_drop <= 1 or (class_drop and self.null_class is None):
            raise ValueError(
                f"class_drop={class_drop}, null class {self.null_class}: expected a probability, 0 without"
            )

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        clean = batch["images"] if self.vae is None else encode(self.vae, batch["images"]).float()
        noise = batch["noise"].flatten(1)[:, : clean[0].numel()].reshape(clean.shape)  # latents are fewer than pixels
        timestep = (batch["uniform"] * self.scheduler.config.num_train_timesteps).long()  # (B,)
        inputs = {"hidden_states": self.scheduler.add_noise(clean, noise, timestep), "timestep": timestep}
        if "class_labels" in batch:
            dropped = batch["label_drop"] < self.class_drop
            inputs["class_labels"] = torch.where(dropped, self.null_class or 0, batch["class_labels"])
        return {name: value[:, None] for name, value in inputs.items()} | {"key": batch["key"]}
