"""diffusers' own caches as contenders: FirstBlockCache, TaylorSeer, MagCache. They decide for whole batches.

Each works on a copy of the transformer, so that the hooks of one disturb nobody. What is not set here is as diffusers has it by default.
Not here: who takes part (contenders.py).
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
from collections.abc import Sequence

from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models import CacheMixin

from ee_diffusion.diffusion.families import family_of
from ee_diffusion.diffusion.generation import Generated, classes_of, generate
from ee_diffusion.diffusion.pipeline import EarlyExitPipeline
from ee_diffusion.diffusion.uvit import UViTBlock
from ee_diffusion.measure.splits import balanced_labels, seeds

CONTEXT = "both branches"  # guidance comes in one batch: one state

# The caches know blocks by a list that third parties add to (as for external models in diffusers' own documents of FirstBlockCache).
TransformerBlockRegistry.register(
    UViTBlock, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
)


class Peer:
    """A pipeline whose transformer has one of diffusers' caches on it. Its state is forgotten before every batch."""

    def __init__(self, pipeline: EarlyExitPipeline):
        self.pipeline = EarlyExitPipeline(copy.deepcopy(pipeline.transformer), pipeline.scheduler, None)
        self.pipeline.set_progress_bar_config(disable=True)

    def generate(self, chosen: Sequence[int], labels: Sequence[int] | None, **call) -> Generated:
        """As `generate`, with the cache on."""
        transformer = self.pipeline.transformer
        HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks()
        with CacheMixin.cache_context(transformer, CONTEXT):
            return generate(self.pipeline, chosen, labels, **call)


def first_block_cache(pipeline: EarlyExitPipeline, value: float, *, num_steps: int, guidance_scale: float) -> Peer:
    """FirstBlockCache: all blocks run where the first one's residual has changed by more than `value`, relative, over the whole batch.

    Set: `threshold`, the only number it has.
    """
    made = Peer(pipeline)
    apply_first_block_cache(made.pipeline.transformer, FirstBlockCacheConfig(threshold=value))
    return made


def taylorseer(pipeline: EarlyExitPipeline, value: float, *, num_steps: int, guidance_scale: float) -> Peer:
    """TaylorSeer of order 1 on the model's output, every `value`-th step in full after three at the beginning: in between no block runs.

    Set: `cache_interval`; which modules are predicted (the last) and which then do nothing (the blocks), as diffusers' lite mode has it
    for models whose names it knows: its default predicts every attention and runs all else, which saves less time; and the factors' dtype,
    the model's own: in bfloat16, the default, a float32 model's output would be rounded to 8 bits at predicted steps.
    """
    made = Peer(pipeline)
    transformer = made.pipeline.transformer
    last = [name for name, _ in transformer.named_children()][-1]
    config = TaylorSeerCacheConfig(
        cache_interval=int(value),
        taylor_factors_dtype=transformer.dtype,
        skip_predict_identifiers=[rf"{family_of(transformer).blocks}\.\d+"],
        cache_identifiers=[last],
    )
    apply_taylorseer_cache(transformer, config)
    return made


def mag_cache(pipeline: EarlyExitPipeline, value: float, *, num_steps: int, guidance_scale: float) -> Peer:
    """MagCache with accumulated error `value`; its ratios are measured first, by its own calibration on eight fitting seeds.

    Set: `threshold`, `num_inference_steps`, `mag_ratios`. By default it runs the first fifth of the steps in full and then skips at most
    three in a row.
    """
    config = {"num_inference_steps": num_steps}
    measured = Peer(pipeline)
    apply_mag_cache(measured.pipeline.transformer, MagCacheConfig(calibrate=True, **config))
    call = {"batch_size": 8, "num_inference_steps": num_steps, "guidance_scale": guidance_scale}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints its ratios and keeps them nowhere
        measured.generate(seeds("fit", 8), balanced_labels(8, classes_of(pipeline, guidance_scale)), **call)
    lines = [line for line in said.getvalue().splitlines() if line.startswith("[") and "MagCache" not in line]
    made = Peer(pipeline)
    ratios = ast.literal_eval(lines[-1])
    apply_mag_cache(made.pipeline.transformer, MagCacheConfig(threshold=value, mag_ratios=ratios, **config))
    return made


PEERS = {"first_block": first_block_cache, "taylor": taylorseer, "mag": mag_cache}
