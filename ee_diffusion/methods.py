"""Published methods and ours, each a function that returns a Policy: `methods.deediff(0.2)`. Imported when first used.

Diffusion: DeeDiff, ASE, DuoDiff, step caching. Decoding: CALM, SkipDecode, D3. Classification: PALBERT, PABEE, DeeBERT, JEI-DNN and others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ee_diffusion.lazy import lazy_names

# Public name -> the module that defines it.
HOMES = {
    "accumulated_error_budget": "diffusion.methods",
    "ase": "diffusion.methods",
    "deediff": "diffusion.methods",
    "deediff_released": "diffusion.methods",
    "duodiff": "diffusion.methods",
    "periodic_cache": "diffusion.methods",
    "per_step_error_threshold": "diffusion.methods",
    "static_cache_schedule": "diffusion.methods",
    "calm": "decoding.methods",
    "d3": "decoding.methods",
    "depth_per_request": "decoding.methods",
    "early_termination": "decoding.methods",
    "skipdecode": "decoding.methods",
    "uniform_skipping": "decoding.methods",
    "berxit": "classification.methods.berxit",
    "confidence": "classification.methods.confidence",
    "deebert": "classification.methods.deebert",
    "fastbert": "classification.methods.fastbert",
    "jei_dnn": "classification.methods.jei_dnn",
    "pabee": "classification.methods.pabee",
    "pabee_regression": "classification.methods.pabee",
    "palbert": "classification.methods.palbert",
    "pondernet": "classification.methods.palbert",
}

__all__ = sorted(HOMES)
__getattr__, __dir__ = lazy_names(__name__, HOMES)

if TYPE_CHECKING:  # the same table for type checkers and editors
    from ee_diffusion.classification.methods.berxit import berxit
    from ee_diffusion.classification.methods.confidence import confidence
    from ee_diffusion.classification.methods.deebert import deebert
    from ee_diffusion.classification.methods.fastbert import fastbert
    from ee_diffusion.classification.methods.jei_dnn import jei_dnn
    from ee_diffusion.classification.methods.pabee import pabee, pabee_regression
    from ee_diffusion.classification.methods.palbert import palbert, pondernet
    from ee_diffusion.decoding.methods import (
        calm,
        d3,
        depth_per_request,
        early_termination,
        skipdecode,
        uniform_skipping,
    )
    from ee_diffusion.diffusion.methods import (
        accumulated_error_budget,
        ase,
        deediff,
        deediff_released,
        duodiff,
        per_step_error_threshold,
        periodic_cache,
        static_cache_schedule,
    )
