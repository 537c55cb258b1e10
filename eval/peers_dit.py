"""cache-dit on a stock DiTPipeline: DBCache, with and without TaylorSeer. Without the extra `peers` it says so when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import DiTPipeline

try:
    import cache_dit
except ModuleNotFoundError:
    cache_dit = None

WARM_UP = 3  # full steps before anything is taken from the cache


@contextmanager
def db_cache(pipe: DiTPipeline, threshold: float, *, num_steps: int, taylor: bool) -> Iterator[None]:
    """One call of the pipeline with DBCache (F1B0: the first block decides for the whole batch, the rest is cached), its state fresh.

    threshold: relative change of the first block's residual above which all blocks run. taylor: predict what is cached, order 1.

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
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)
