"""For `DiffusionPipeline.from_pretrained(dir, custom_pipeline=custom_pipeline("EarlyExitPipeline"), trust_remote_code=True)`."""

from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline

__all__ = ["EarlyExitPipeline"]
