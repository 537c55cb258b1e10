"""For `DiffusionPipeline.from_pretrained(dir, custom_pipeline=custom_pipeline("EarlyExitTextPipeline"), trust_remote_code=True)`."""

from ee_diffusion.diffusion.pipelines.text_to_image import EarlyExitTextPipeline

__all__ = ["EarlyExitTextPipeline"]
