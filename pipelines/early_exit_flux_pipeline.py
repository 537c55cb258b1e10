"""For `DiffusionPipeline.from_pretrained(dir, custom_pipeline=custom_pipeline("EarlyExitFluxPipeline"), trust_remote_code=True)`."""

from ee_diffusion.diffusion.pipelines.stock import EarlyExitFluxPipeline

__all__ = ["EarlyExitFluxPipeline"]
