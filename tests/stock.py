"""Tiny pipelines of diffusers' own classes, as users load them. Not here: our own pipeline (factories.py)."""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline
from factories import dit

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
    transformer = dit(num_layers, channels=LATENT_CHANNELS, classes=1000)
    made = DiTPipeline(transformer, tiny_vae(), DDIMScheduler(clip_sample=False))
    made.set_progress_bar_config(disable=True)
    return made
