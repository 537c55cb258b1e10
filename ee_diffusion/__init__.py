"""Early exit for transformers. Public names are imported when first used: `import ee_diffusion` loads no model library."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOMES = {
    "checkpoint": "checkpoints",
    "custom_pipeline": "custom_pipelines",
    "Accumulated": "core.criteria",
    "Criterion": "core.criterion",
    "Cumulative": "core.criteria",
    "DecayingThreshold": "core.criteria",
    "Gate": "core.criteria",
    "Patience": "core.criteria",
    "Planned": "core.criteria",
    "Sampled": "core.criteria",
    "Threshold": "core.criteria",
    "Policy": "core.policy",
    "Vote": "core.ranks",
    "gather_traces": "core.ranks",
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
    "AdapterExits": "diffusion.adapters",
    "attach": "diffusion.attach",
    "detach": "diffusion.attach",
    "set_attention": "diffusion.attention",
    "truncate": "diffusion.truncation",
    "early_exit_generate": "decoding.generate",
    "LearnedExits": "decoding.heads",
    "lossless_generate": "decoding.lossless",
    "calm": "decoding.methods",
    "d3": "decoding.methods",
    "depth_per_request": "decoding.methods",
    "early_termination": "decoding.methods",
    "skipdecode": "decoding.methods",
    "uniform_skipping": "decoding.methods",
    "summary": "diffusion.attach",
    "Family": "diffusion.families",
    "register_family": "diffusion.families",
    "DenoisingExits": "diffusion.heads",
    "MemoryExits": "diffusion.memory_exits",
    "influence": "diffusion.gains",
    "step_gains": "diffusion.gains",
    "ase": "diffusion.methods",
    "budgeted": "diffusion.methods",
    "deediff": "diffusion.methods",
    "deediff_released": "diffusion.methods",
    "duodiff": "diffusion.methods",
    "periodic_cache": "diffusion.methods",
    "remembered": "diffusion.methods",
    "searched": "diffusion.methods",
    "fit_schedules": "diffusion.rehearsal",
    "TrackingExits": "diffusion.tracking_exits",
    "step_sensitivity": "diffusion.solver",
    "EarlyExitPipeline": "diffusion.pipeline",
    "EarlyExitDiTPipeline": "diffusion.pipelines",
    "EarlyExitFluxPipeline": "diffusion.pipelines",
    "EarlyExitPixArtPipeline": "diffusion.pipelines",
    "EarlyExitSD3Pipeline": "diffusion.pipelines",
    "EarlyExitTextPipeline": "diffusion.text_pipeline",
    "UViTTransformer2DModel": "diffusion.uvit",
    "EarlyExitClassifier": "encoder.classifier",
    "ClassifierExits": "encoder.exits",
    "berxit": "encoder.methods",
    "confidence": "encoder.methods",
    "deebert": "encoder.methods",
    "fastbert": "encoder.methods",
    "jei_dnn": "encoder.methods",
    "pabee": "encoder.methods",
    "palbert": "encoder.methods",
    "pondernet": "encoder.methods",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:  # the same table for type checkers and editors
    from ee_diffusion.checkpoints import checkpoint
    from ee_diffusion.core.criteria import (
        Accumulated,
        Cumulative,
        DecayingThreshold,
        Gate,
        Patience,
        Planned,
        Sampled,
        Threshold,
    )
    from ee_diffusion.core.criterion import Criterion
    from ee_diffusion.core.policy import Policy
    from ee_diffusion.core.ranks import Vote, gather_traces
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
    from ee_diffusion.decoding.lossless import lossless_generate
    from ee_diffusion.decoding.methods import (
        calm,
        d3,
        depth_per_request,
        early_termination,
        skipdecode,
        uniform_skipping,
    )
    from ee_diffusion.diffusion.adapters import AdapterExits
    from ee_diffusion.diffusion.attach import attach, detach, summary
    from ee_diffusion.diffusion.attention import set_attention
    from ee_diffusion.diffusion.families import Family, register_family
    from ee_diffusion.diffusion.gains import influence, step_gains
    from ee_diffusion.diffusion.heads import DenoisingExits
    from ee_diffusion.diffusion.memory_exits import MemoryExits
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
    from ee_diffusion.diffusion.pipeline import EarlyExitPipeline
    from ee_diffusion.diffusion.pipelines import (
        EarlyExitDiTPipeline,
        EarlyExitFluxPipeline,
        EarlyExitPixArtPipeline,
        EarlyExitSD3Pipeline,
    )
    from ee_diffusion.diffusion.rehearsal import fit_schedules
    from ee_diffusion.diffusion.solver import step_sensitivity
    from ee_diffusion.diffusion.text_pipeline import EarlyExitTextPipeline
    from ee_diffusion.diffusion.tracking_exits import TrackingExits
    from ee_diffusion.diffusion.truncation import truncate
    from ee_diffusion.diffusion.uvit import UViTTransformer2DModel
    from ee_diffusion.encoder.classifier import EarlyExitClassifier
    from ee_diffusion.encoder.exits import ClassifierExits
    from ee_diffusion.encoder.methods import berxit, confidence, deebert, fastbert, jei_dnn, pabee, palbert, pondernet


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
