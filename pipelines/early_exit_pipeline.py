"""For `DiffusionPipeline.from_pretrained(dir, custom_pipeline="pipelines/early_exit_pipeline.py", trust_remote_code=True)`."""

from ee_diffusion.diffusion.pipeline import EarlyExitPipeline

__all__ = ["EarlyExitPipeline"]
