"""For `DiffusionPipeline.from_pretrained(dir, custom_pipeline="pipelines/early_exit_pixart_pipeline.py", trust_remote_code=True)`."""

from ee_diffusion.diffusion.pipelines import EarlyExitPixArtPipeline

__all__ = ["EarlyExitPixArtPipeline"]
