"""For `DiffusionPipeline.from_pretrained(dir, custom_pipeline="pipelines/early_exit_sd3_pipeline.py", trust_remote_code=True)`."""

from ee_diffusion.diffusion.pipelines import EarlyExitSD3Pipeline

__all__ = ["EarlyExitSD3Pipeline"]
