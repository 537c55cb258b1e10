"""Early exit for transformers. Public names are imported when first used: `import ee_diffusion` loads no model library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ee_diffusion.lazy import lazy_names

__version__ = "0.1.0"

# Public name -> the module that it is: `criteria.Threshold(0.5)`, `schedules.FixedDepth(7)`, `methods.deediff(0.2)`.
NAMESPACES = {"criteria": "core.criteria", "methods": "methods", "schedules": "core.schedules"}
# Public name -> the module that defines it.
HOMES = {
    "checkpoint_path": "checkpoints",
    "custom_pipeline": "custom_pipelines",
    "Policy": "core.policy",
    "Report": "core.trace",
    "Trace": "core.trace",
    # diffusion
    "AdapterExits": "diffusion.exits.adapter",
    "CachedOutputExits": "diffusion.exits.cached",
    "DenoisingExits": "diffusion.exits.deediff",
    "attach_exits": "diffusion.hooks.attach",
    "detach_exits": "diffusion.hooks.attach",
    "exit_summary": "diffusion.hooks.attach",
    "set_attention": "diffusion.hooks.attention",
    "ModelSpec": "diffusion.model_specs",
    "register_model": "diffusion.model_specs",
    "UViTTransformer2DModel": "diffusion.models.uvit",
    "EarlyExitDiTPipeline": "diffusion.pipelines.stock",
    "EarlyExitFluxPipeline": "diffusion.pipelines.stock",
    "EarlyExitPixArtPipeline": "diffusion.pipelines.stock",
    "EarlyExitSD3Pipeline": "diffusion.pipelines.stock",
    "EarlyExitTextPipeline": "diffusion.pipelines.text_to_image",
    "EarlyExitPipeline": "diffusion.pipelines.uvit",
    "fit_schedules": "diffusion.step_cache.fit",
    # decoding
    "early_exit_generate": "decoding.generate",
    "LearnedExits": "decoding.heads",
    "self_speculative_generate": "decoding.self_speculative",
    # classification
    "EarlyExitClassifier": "classification.classifier",
    "ClassifierExits": "classification.exits",
}

__all__ = ["__version__", *sorted({*HOMES, *NAMESPACES})]
__getattr__, __dir__ = lazy_names(__name__, HOMES, NAMESPACES)

if TYPE_CHECKING:  # the same tables for type checkers and editors
    from ee_diffusion import methods
    from ee_diffusion.checkpoints import checkpoint_path
    from ee_diffusion.classification.classifier import EarlyExitClassifier
    from ee_diffusion.classification.exits import ClassifierExits
    from ee_diffusion.core import criteria, schedules
    from ee_diffusion.core.policy import Policy
    from ee_diffusion.core.trace import Report, Trace
    from ee_diffusion.custom_pipelines import custom_pipeline
    from ee_diffusion.decoding.generate import early_exit_generate
    from ee_diffusion.decoding.heads import LearnedExits
    from ee_diffusion.decoding.self_speculative import self_speculative_generate
    from ee_diffusion.diffusion.exits.adapter import AdapterExits
    from ee_diffusion.diffusion.exits.cached import CachedOutputExits
    from ee_diffusion.diffusion.exits.deediff import DenoisingExits
    from ee_diffusion.diffusion.hooks.attach import attach_exits, detach_exits, exit_summary
    from ee_diffusion.diffusion.hooks.attention import set_attention
    from ee_diffusion.diffusion.model_specs import ModelSpec, register_model
    from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel
    from ee_diffusion.diffusion.pipelines.stock import (
        EarlyExitDiTPipeline,
        EarlyExitFluxPipeline,
        EarlyExitPixArtPipeline,
        EarlyExitSD3Pipeline,
    )
    from ee_diffusion.diffusion.pipelines.text_to_image import EarlyExitTextPipeline
    from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
    from ee_diffusion.diffusion.step_cache.fit import fit_schedules
