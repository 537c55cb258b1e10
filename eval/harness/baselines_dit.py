"""cache-dit on a stock DiTPipeline: DBCache, with and without TaylorSeer. Without the extra `peers` it says so when it is asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import DiTPipeline

try:
    import cache_dit
except ModuleNotFoundError:
    cache_dit = None

WARM_UP = 3  # full steps before anything is taken from the cache


@contextmanager
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
