"""Tiny pipelines of diffusers' own classes, as users load them. Not here: our own pipeline (factories.py)."""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from factories import SIZE, randomise

LATENT_CHANNELS = 4


def tiny_vae(times: int = 1) -> AutoencoderTiny:
    """`times` down by two: images of 2 x SIZE become latents of SIZE."""
    torch.manual_seed(0)
    widths, blocks = (8,) * (times + 1), (1,) * (times + 1)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
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
