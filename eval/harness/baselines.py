"""Baselines: diffusers' own caches (FirstBlockCache, TaylorSeer, MagCache), and cache-dit's DBCache. They decide for whole batches.

Each works on a copy of the transformer, so that hooks do not meet. What is not set here is as the library has it by default.
tests/eval/test_baselines_readings.py holds them against slow readings of what was published. Not here: candidates (candidates.py).
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import io
from collections.abc import Iterator, Sequence

from diffusers import DiTPipeline
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
from torch import nn

from ee_diffusion.diffusion.model_specs import blocks_of, model_spec_of
from ee_diffusion.diffusion.models.uvit import UViTBlock
from ee_diffusion.diffusion.pipelines.sampling import Generated, classes_of, generate, joined
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.splits import balanced_labels, seeds

try:
    import cache_dit
except ModuleNotFoundError:  # the extra `peers`: `db_cache` raises
    cache_dit = None

CONTEXT = "both branches"  # guidance comes in one batch: one state

WARM_UP = 3  # compute steps before DBCache takes anything from the cache

# The caches know blocks by a list that third parties add to (as for external models in diffusers' own documents of FirstBlockCache).
TransformerBlockRegistry.register(
    UViTBlock, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
)


# What TaylorSeer predicts: the last module of a forward, behind which nothing but the order of pixels changes. Not every class's last
# child is that (PixArt's is an embedder), and what predicts an earlier one would predict from blocks that did not run.
LAST_MODULES = {"UViTTransformer2DModel": "conv_out", "DiTTransformer2DModel": "proj_out_2"}


class CachedPipeline:
    """A pipeline whose transformer has one of diffusers' caches on it. Its state is reset before every batch.

    Raises:
        ValueError: a transformer of one block: diffusers' caches want a first and a last one (MagCache would lose count of its steps).
    """

    def __init__(self, pipeline: EarlyExitPipeline):
        blocks = len(blocks_of(pipeline.transformer))
        if blocks < 2:
            raise ValueError(f"a transformer of {blocks} block, expected at least 2 for diffusers' caches")
        self.pipeline = EarlyExitPipeline(copy.deepcopy(pipeline.transformer), pipeline.scheduler, None)
        self.pipeline.set_progress_bar_config(disable=True)

    def generate(
        self,
        chosen: Sequence[int],
        labels: Sequence[int] | None,
        *,
        batch_size: int,
        first_id: int = 0,
        **call,
    ) -> Generated:
        """As `generate`, with the cache on."""
        transformer, parts = self.pipeline.transformer, []
        for start in range(0, len(chosen), batch_size):
            HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks()
            batch = slice(start, start + batch_size)
            with CacheMixin.cache_context(transformer, CONTEXT):
                own = {"batch_size": batch_size, "first_id": first_id + start, **call}
                parts.append(generate(self.pipeline, chosen[batch], labels and labels[batch], **own))
        return joined(parts)


def first_block_cache(
    pipeline: EarlyExitPipeline, value: float, *, num_steps: int, guidance_scale: float
) -> CachedPipeline:
    """FirstBlockCache: all blocks run where the first one's residual has changed by more than `value`, relative, over the whole batch.

    Set: `threshold`, the only number it has.
    """
    made = CachedPipeline(pipeline)
    apply_first_block_cache(made.pipeline.transformer, FirstBlockCacheConfig(threshold=value))
    return made


def taylorseer(
    pipeline: EarlyExitPipeline, value: float, *, num_steps: int, guidance_scale: float, order: int = 1
) -> CachedPipeline:
    """TaylorSeer on the model's output, every `value`-th step in full: in between no block runs. Full are three steps at the beginning,
    the fifth, and from there every `value`-th.

    order: of the expansion, 1 (diffusers' default) or more.
    """
    made = CachedPipeline(pipeline)
    apply_taylorseer(made.pipeline.transformer, int(value), order=order)
    return made


def apply_taylorseer(transformer: nn.Module, interval: int, *, order: int) -> None:
    """Put TaylorSeer on a transformer.

    Set: `cache_interval`; `max_order`; which modules are predicted (the last) and which then do nothing (the blocks), as diffusers' lite
    mode has it for models whose names it knows: its default predicts every attention and runs all else, which saves less time; and the
    factors' dtype, the model's own: in bfloat16, the default, a float32 model's output would be rounded to 8 bits at predicted steps.

    Raises:
        ValueError: a class whose last module is not known here; an order below 1.
    """
    name = type(transformer).__name__
    if name not in LAST_MODULES:
        raise ValueError(
            f"TaylorSeer on a {name}, whose last module is not known: expected one of {sorted(LAST_MODULES)}"
        )
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(f"TaylorSeer of order={order!r}, expected an integer of at least 1")
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        taylor_factors_dtype=transformer.dtype,
        skip_predict_identifiers=[rf"{model_spec_of(transformer).blocks}\.\d+"],
        cache_identifiers=[LAST_MODULES[name]],
    )
    apply_taylorseer_cache(transformer, config)


def mag_cache(pipeline: EarlyExitPipeline, value: float, *, num_steps: int, guidance_scale: float) -> CachedPipeline:
    """MagCache with accumulated error `value`; its ratios are measured first, by its own calibration on eight fitting seeds.

    Set: `threshold`, `mag_ratios`, and `num_inference_steps`, the number of times that the model is called: Heun's method calls it twice
    a step. By default it runs the first fifth of the steps in full and then skips at most three in a row. Unlike in the authors' code
    both branches of guidance have one count and one mean ratio, for they come in one batch.
    """
    made = CachedPipeline(pipeline)
    ratios = ratios_of(pipeline, num_steps=num_steps, guidance_scale=guidance_scale)
    config = MagCacheConfig(threshold=value, mag_ratios=ratios, num_inference_steps=len(ratios))
    apply_mag_cache(made.pipeline.transformer, config)
    return made


def ratios_of(pipeline: EarlyExitPipeline, *, num_steps: int, guidance_scale: float) -> list[float]:
    """MagCache's ratio of each call of the model in a run: the mean over rows and tokens of how long the residual of all blocks is
    beside that of the call before."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(num_steps)
    measured = CachedPipeline(pipeline)
    config = MagCacheConfig(calibrate=True, num_inference_steps=len(scheduler.timesteps))
    apply_mag_cache(measured.pipeline.transformer, config)
    call = {"batch_size": 8, "num_inference_steps": num_steps, "guidance_scale": guidance_scale}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # it prints its ratios and keeps them nowhere
        measured.generate(seeds("fit", 8), balanced_labels(8, classes_of(pipeline, guidance_scale)), **call)
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[") and "MagCache" not in line]
    return ast.literal_eval(lines[-1])


BASELINES = {
    "first_block": first_block_cache,
    "taylor": taylorseer,
    "taylor_second_order": functools.partial(taylorseer, order=2),
    "mag": mag_cache,
}


@contextlib.contextmanager
def db_cache(pipe: DiTPipeline, threshold: float, *, num_steps: int, taylor_order: int = 0) -> Iterator[DiTPipeline]:
    """A copy of the pipeline for one call with DBCache (F1B0: the first block decides for the whole batch, the rest is cached), its state
    fresh. A copy, for cache-dit leaves modules behind in the transformer that it worked on.

    threshold: relative change of the first block's residual above which all blocks run. taylor_order: of TaylorSeer, which predicts what is
    cached; 0: it is taken as it is.

    Raises:
        ValueError: cache-dit is not installed.
    """
    if cache_dit is None:
        raise ValueError("cache-dit is not installed, expected the extra `peers`: pip install -e '.[peers]'")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=WARM_UP,
        num_inference_steps=num_steps,
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=taylor_order) if taylor_order else None
    cached = DiTPipeline(copy.deepcopy(pipe.transformer), pipe.vae, copy.deepcopy(pipe.scheduler))
    cached.set_progress_bar_config(disable=True)
    cache_dit.enable_cache(cached, cache_config=config, calibrator_config=calibrator)
    try:
        yield cached
    finally:
        cache_dit.disable_cache(cached)
