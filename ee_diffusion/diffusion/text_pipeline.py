"""EarlyExitTextPipeline: images from prompts."""

from __future__ import annotations

from diffusers import AutoencoderTiny, SchedulerMixin
from torch import nn

from ee_diffusion.diffusion.heads import DenoisingExits
from ee_diffusion.diffusion.pipeline import EarlyExitPipeline
from ee_diffusion.diffusion.uvit import UViTTransformer2DModel


class EarlyExitTextPipeline(EarlyExitPipeline):
    _optional_components = ["exits", "vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: UViTTransformer2DModel,
        scheduler: SchedulerMixin,
        exits: DenoisingExits | None = None,
        vae: AutoencoderTiny | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer=None,
    ):
        super(EarlyExitPipeline, self).__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            exits=exits,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
