"""Caches of other libraries as baselines: they skip blocks when told to, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import MagCacheConfig
from factories import pipeline
from stock import dit_pipeline

from eval.harness import baselines

STEPS = 8


def counted(transformer, name: str) -> list[int]:
    """Grows by one number at every run of that module inside a block."""
    seen: list[int] = []
    for block in transformer.transformer_blocks:
        getattr(block, name).register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("kind, bold", [("first_block", 1e3), ("taylor", 3), ("mag", 1e3)])
def test_diffusers_caches_skip_blocks_and_forget_between_batches(kind: str, bold: float):
    pipe = pipeline()
    call = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "batch_size": 2}
    cached = baselines.BASELINES[kind](pipe, bold, num_steps=STEPS, guidance_scale=2.0)
    seen = counted(cached.pipeline.transformer, "attn")
    first = cached.generate([1, 2], [0, 1], **call).images
    once, layers = len(seen), len(pipe.transformer.transformer_blocks)
    assert 3 * layers <= once < 0.8 * STEPS * layers if kind != "first_block" else once < STEPS * layers
    assert torch.equal(cached.generate([1, 2], [0, 1], **call).images, first)
    assert len(seen) == 2 * once
    plain = counted(pipe.transformer, "attn")
    baselines.generate(pipe, [1, 2], [0, 1], **call)
    assert len(plain) == STEPS * layers  # the pipeline itself was left alone


def config_of(transformer, kind: type) -> object:
    """The one config of that kind that the hooks of a transformer's blocks hold."""
    registries = [module._diffusers_hook for module in transformer.modules() if hasattr(module, "_diffusers_hook")]
    held = {
        id(hook.config): hook.config for one in registries for hook in one.hooks.values() if hasattr(hook, "config")
    }
    (config,) = held.values()
    assert isinstance(config, kind)
    return config


def test_mag_cache_has_the_threshold_asked_for_and_all_else_as_diffusers_has_it():
    cached = baselines.BASELINES["mag"](pipeline(), 0.125, num_steps=STEPS, guidance_scale=2.0)
    config = config_of(cached.pipeline.transformer, MagCacheConfig)
    default = MagCacheConfig(calibrate=True)
    assert (config.threshold, config.num_inference_steps, len(config.mag_ratios)) == (0.125, STEPS, STEPS)
    assert (
        (config.max_skip_steps, config.retention_ratio) == (default.max_skip_steps, default.retention_ratio) == (3, 0.2)
    )


def full_steps_of(cached: baselines.CachedPipeline) -> list[bool]:
    """Of each step of a run: whether attention ran, counted inside the blocks."""
    seen = counted(cached.pipeline.transformer, "attn")
    ran: list[int] = []
    cached.pipeline.transformer.register_forward_hook(lambda *_: ran.append(len(seen)))
    cached.generate([1, 2], [0, 1], num_inference_steps=STEPS, guidance_scale=2.0, batch_size=2)
    return [after > before for before, after in zip([0, *ran], ran, strict=False)]


def test_a_bold_mag_cache_skips_three_steps_in_a_row_after_a_fifth_of_them():
    cached = baselines.BASELINES["mag"](pipeline(), 1e3, num_steps=STEPS, guidance_scale=2.0)
    assert full_steps_of(cached) == [True, True, False, False, False, True, False, False]


def test_taylor_has_the_interval_asked_for_and_diffusers_warm_up_and_order():
    cached = baselines.BASELINES["taylor"](pipeline(), 4, num_steps=STEPS, guidance_scale=2.0)
    assert full_steps_of(cached) == [True, True, True, False, True, False, False, False]


def test_db_cache_skips_blocks_and_leaves_the_pipeline_alone(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("cache_dit")
    pipe = dit_pipeline()
    seen, copied, deepcopy = counted(pipe.transformer, "attn1"), [], baselines.copy.deepcopy

    def copying(module, *memo):
        made = deepcopy(module, *memo)
        if made.__class__ is pipe.transformer.__class__:
            copied.append(counted(made, "attn1"))
        return made

    def draw(drawing) -> torch.Tensor:
        generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        call = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "output_type": "np"}
        return torch.from_numpy(drawing([0, 1], generator=generator, **call).images)

    plain = draw(pipe)
    layers, names = len(pipe.transformer.transformer_blocks), list(pipe.transformer.state_dict())
    monkeypatch.setattr(baselines.copy, "deepcopy", copying)
    for order in (0, 1, 2):
        seen.clear()
        with baselines.db_cache(pipe, 1e3, num_steps=STEPS, taylor_order=order) as cached:
            draw(cached)
        assert 0 < len(copied[-1]) < STEPS * layers
    assert list(pipe.transformer.state_dict()) == names
    assert "forward" not in vars(pipe.transformer)
    seen.clear()
    assert torch.equal(draw(pipe), plain)
    assert len(seen) == STEPS * layers


def test_without_cache_dit_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(baselines, "cache_dit", None)
    with (
        pytest.raises(ValueError, match="expected the extra `peers`"),
        baselines.db_cache(None, 0.1, num_steps=4),
    ):
        pass
