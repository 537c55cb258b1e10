"""For `DiffusionPipeline.from_pretrained(dir, custom_pipeline=custom_pipeline("EarlyExitDiTPipeline"), trust_remote_code=True)`."""

from ee_diffusion.diffusion.pipelines.stock import EarlyExitDiTPipeline

__all__ = ["EarlyExitDiTPipeline"]
