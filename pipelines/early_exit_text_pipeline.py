"""For `DiffusionPipeline.from_pretrained(dir, custom_pipeline="pipelines/early_exit_text_pipeline.py", trust_remote_code=True)`."""

from ee_diffusion.diffusion.text_pipeline import EarlyExitTextPipeline

__all__ = ["EarlyExitTextPipeline"]
