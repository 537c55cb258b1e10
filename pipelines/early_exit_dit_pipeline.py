"""For `DiffusionPipeline.from_pretrained(dir, custom_pipeline="pipelines/early_exit_dit_pipeline.py", trust_remote_code=True)`."""

from ee_diffusion.diffusion.pipelines import EarlyExitDiTPipeline

__all__ = ["EarlyExitDiTPipeline"]
