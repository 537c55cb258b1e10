"""For `DiffusionPipeline.from_pretrained(dir, custom_pipeline=custom_pipeline("EarlyExitSD3Pipeline"), trust_remote_code=True)`."""

from ee_diffusion.diffusion.pipelines.stock import EarlyExitSD3Pipeline

__all__ = ["EarlyExitSD3Pipeline"]
