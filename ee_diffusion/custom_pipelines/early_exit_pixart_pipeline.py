"""For `DiffusionPipeline.from_pretrained(dir, custom_pipeline=custom_pipeline("EarlyExitPixArtPipeline"), trust_remote_code=True)`."""

from ee_diffusion.diffusion.pipelines.stock import EarlyExitPixArtPipeline

__all__ = ["EarlyExitPixArtPipeline"]
