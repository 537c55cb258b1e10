"""For `DiffusionPipeline.from_pretrained(dir, custom_pipeline="pipelines/early_exit_flux_pipeline.py", trust_remote_code=True)`."""

from ee_diffusion.diffusion.pipelines import EarlyExitFluxPipeline

__all__ = ["EarlyExitFluxPipeline"]
