"""Early exit for transformers. Public names are imported when first used: `import ee_diffusion` loads no model library."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOMES = {
    "checkpoint_path": "checkpoints",
    "custom_pipeline": "custom_pipelines",
    "ErrorBudget": "core.criteria",
    "Criterion": "core.criteria",
    "QExit": "core.criteria",
    "DecayingThreshold": "core.criteria",
    "GatedExit": "core.criteria",
    "Patience": "core.criteria",
    "DepthTable": "core.criteria",
    "SampledExit": "core.criteria",
    "Threshold": "core.criteria",
    "Policy": "core.policy",
    "JointDecision": "core.distributed",
    "gather_traces": "core.distributed",
    "Session": "core.session",
    "DepthPerStep": "core.schedules",
    "FixedDepth": "core.schedules",
    "FixedLayers": "core.schedules",
    "FullDepth": "core.schedules",
    "LinearDecay": "core.schedules",
    "Periodic": "core.schedules",
    "PiecewiseDepth": "core.schedules",
    "PowerDecay": "core.schedules",
    "Schedule": "core.schedules",
    "Report": "core.trace",
    "Trace": "core.trace",
    "AdapterExits": "diffusion.exits.adapter",
    "attach_exits": "diffusion.hooks.attach",
    "detach_exits": "diffusion.hooks.attach",
    "set_attention": "diffusion.hooks.attention",
    "truncate": "diffusion.hooks.truncate",
    "early_exit_generate": "decoding.generate",
    "LearnedExits": "decoding.heads",
    "self_speculative_generate": "decoding.self_speculative",
    "calm": "decoding.methods",
    "d3": "decoding.methods",
    "depth_per_request": "decoding.methods",
    "early_termination": "decoding.methods",
    "skipdecode": "decoding.methods",
    "uniform_skipping": "decoding.methods",
    "exit_summary": "diffusion.hooks.attach",
    "ModelSpec": "diffusion.model_specs",
    "register_model": "diffusion.model_specs",
    "DenoisingExits": "diffusion.exits.deediff",
    "CachedOutputExits": "diffusion.exits.cached",
    "influence": "diffusion.step_cache.error_propagation",
    "error_amplification": "diffusion.step_cache.error_propagation",
    "ase": "diffusion.methods",
    "budgeted": "diffusion.methods",
    "deediff": "diffusion.methods",
    "deediff_released": "diffusion.methods",
    "duodiff": "diffusion.methods",
    "periodic_cache": "diffusion.methods",
    "remembered": "diffusion.methods",
    "searched": "diffusion.methods",
    "fit_schedules": "diffusion.step_cache.fit",
    "local_error_gain": "diffusion.step_cache.solver",
    "EarlyExitPipeline": "diffusion.pipelines.uvit",
    "EarlyExitDiTPipeline": "diffusion.pipelines.stock",
    "EarlyExitFluxPipeline": "diffusion.pipelines.stock",
    "EarlyExitPixArtPipeline": "diffusion.pipelines.stock",
    "EarlyExitSD3Pipeline": "diffusion.pipelines.stock",
    "EarlyExitTextPipeline": "diffusion.pipelines.text_to_image",
    "UViTTransformer2DModel": "diffusion.models.uvit",
    "EarlyExitClassifier": "classification.classifier",
    "ClassifierExits": "classification.exits",
    "berxit": "classification.methods.berxit",
    "confidence": "classification.methods.confidence",
    "deebert": "classification.methods.deebert",
    "fastbert": "classification.methods.fastbert",
    "jei_dnn": "classification.methods.jei_dnn",
    "pabee": "classification.methods.pabee",
    "palbert": "classification.methods.palbert",
    "pondernet": "classification.methods.palbert",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:  # the same table for type checkers and editors
    from ee_diffusion.checkpoints import checkpoint_path
    from ee_diffusion.classification.classifier import EarlyExitClassifier
    from ee_diffusion.classification.exits import ClassifierExits
    from ee_diffusion.classification.methods.berxit import berxit
    from ee_diffusion.classification.methods.confidence import confidence
    from ee_diffusion.classification.methods.deebert import deebert
    from ee_diffusion.classification.methods.fastbert import fastbert
    from ee_diffusion.classification.methods.jei_dnn import jei_dnn
    from ee_diffusion.classification.methods.pabee import pabee
    from ee_diffusion.classification.methods.palbert import palbert, pondernet
    from ee_diffusion.core.criteria import (
        Criterion,
        DecayingThreshold,
        DepthTable,
        ErrorBudget,
        GatedExit,
        Patience,
        QExit,
        SampledExit,
        Threshold,
    )
    from ee_diffusion.core.distributed import JointDecision, gather_traces
    from ee_diffusion.core.policy import Policy
    from ee_diffusion.core.schedules import (
        DepthPerStep,
        FixedDepth,
        FixedLayers,
        FullDepth,
        LinearDecay,
        Periodic,
        PiecewiseDepth,
        PowerDecay,
        Schedule,
    )
    from ee_diffusion.core.session import Session
    from ee_diffusion.core.trace import Report, Trace
    from ee_diffusion.custom_pipelines import custom_pipeline
    from ee_diffusion.decoding.generate import early_exit_generate
    from ee_diffusion.decoding.heads import LearnedExits
    from ee_diffusion.decoding.methods import (
        calm,
        d3,
        depth_per_request,
        early_termination,
        skipdecode,
        uniform_skipping,
    )
    from ee_diffusion.decoding.self_speculative import self_speculative_generate
    from ee_diffusion.diffusion.exits.adapter import AdapterExits
    from ee_diffusion.diffusion.exits.cached import CachedOutputExits
    from ee_diffusion.diffusion.exits.deediff import DenoisingExits
    from ee_diffusion.diffusion.hooks.attach import attach_exits, detach_exits, exit_summary
    from ee_diffusion.diffusion.hooks.attention import set_attention
    from ee_diffusion.diffusion.hooks.truncate import truncate
    from ee_diffusion.diffusion.methods import (
        ase,
        budgeted,
        deediff,
        deediff_released,
        duodiff,
        periodic_cache,
        remembered,
        searched,
    )
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
    from ee_diffusion.diffusion.step_cache.error_propagation import error_amplification, influence
    from ee_diffusion.diffusion.step_cache.fit import fit_schedules
    from ee_diffusion.diffusion.step_cache.solver import local_error_gain


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
