"""Tiny pipelines of diffusers' own classes, as users load them. Not here: our own pipeline (factories.py)."""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from factories import SIZE, randomise

LATENT_CHANNELS = 4


def tiny_vae() -> AutoencoderTiny:
    """Twice down: images of 2 x SIZE become latents of SIZE."""
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


def dit_pipeline(num_layers: int = 4) -> DiTPipeline:
    """A stock DiTPipeline; its null class is 1000, as it is written into that class."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=num_layers,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    made = DiTPipeline(randomise(transformer, seed=2).eval(), tiny_vae(), DDIMScheduler(clip_sample=False))
    made.set_progress_bar_config(disable=True)
    return made
