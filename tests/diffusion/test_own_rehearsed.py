"""The project's own pipelines where a stock one is expected: attached to, rehearsed and fitted by `fit_schedules`, at every guidance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from factories import pipeline
from tiny_texts import text_pipeline

from ee_diffusion import attach_exits, fit_schedules
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.methods import periodic_cache
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.recording import record, record_call

STEPS, SEEDS, LABELS = 9, (1, 2, 3), (0, 1, 2)
CASES = {"class": (1.0, 2.0), "unconditional": (1.0,), "text": (1.0, 3.0)}
GUIDED = [(kind, scale) for kind, scales in CASES.items() for scale in scales]


def made(kind: str) -> EarlyExitPipeline:
    pipe = text_pipeline() if kind == "text" else pipeline(kind)
    pipe.exits = None
    return pipe


def call_of(pipe: EarlyExitPipeline, kind: str, scale: float, **more) -> Callable[[], torch.Tensor]:
    """A call for three images, its last sample (B, C, H, W) in [0, 1]."""
    asked = {"class": list(LABELS), "text": ["red apple", "a blue car", "green hat"]}.get(kind)
    size = {"batch_size": len(SEEDS)} if kind == "unconditional" else {}

    def call() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        return pipe(asked, STEPS, scale, generator=generators, output_type="pt", **size, **more).images

    return call


@pytest.mark.parametrize(("kind", "scale"), GUIDED)
def test_attached_exits_draw_what_the_call_draws_with_them(kind: str, scale: float):
    pipe, policy = made(kind), periodic_cache(2, warmup_steps=2)
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    with attach_exits(pipe, exits, policy) as attachment:
        attached = call_of(pipe, kind, scale)()
        assert attachment.trace.rows.unique().tolist() == [2 if scale > 1 else 1]
    pipe.exits = exits
    torch.testing.assert_close(attached, call_of(pipe, kind, scale, exit_policy=policy)(), rtol=0, atol=0)


def test_two_calls_of_other_guidance_have_rows_of_their_own():
    pipe = made("class")
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    with attach_exits(pipe, exits, periodic_cache(2, warmup_steps=2)) as attachment:
        for scale, rows in ((2.0, 2), (1.0, 1), (3.0, 2)):
            call_of(pipe, "class", scale)()
            assert attachment.trace.rows.unique().tolist() == [rows]


def test_a_call_says_its_guidance_as_pipelines_of_diffusers_do():
    pipe = made("class")
    assert (pipe.guidance_scale, pipe.do_classifier_free_guidance) == (1.0, False)
    call_of(pipe, "class", 2.0)()
    assert (pipe.guidance_scale, pipe.do_classifier_free_guidance) == (2.0, True)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_rehearsal_finds_the_trajectory_that_a_walk_records(scale: float):
    pipe = made("class")
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type="epsilon")
    walked = record(pipe, exits, SEEDS, LABELS, num_inference_steps=STEPS, guidance_scale=scale)
    trajectory = record_call(pipe, exits, call_of(pipe, "class", scale)).trajectory
    torch.testing.assert_close(trajectory.times, walked.times)
    torch.testing.assert_close(trajectory.samples, walked.samples, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trajectory.clean, walked.clean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "scale"), GUIDED)
def test_schedules_are_fitted_and_run(kind: str, scale: float):
    """Nearer to the full model than the line through the last two clean images, attached or given to the call."""
    pipe = made(kind)
    full = call_of(pipe, kind, scale)()
    exits, policies = fit_schedules(pipe, call_of(pipe, kind, scale), every=3)
    assert torch.equal(call_of(pipe, kind, scale)(), full)
    apart = []
    for chosen in (exits, CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)):
        with attach_exits(pipe, chosen, policies[5]) as attachment:
            drawn = call_of(pipe, kind, scale)()
            assert attachment.report.mean_executed == pytest.approx(7 * 5 / STEPS)
        apart.append(float((drawn - full).square().mean()))
        pipe.exits = chosen
        assert torch.equal(call_of(pipe, kind, scale, exit_policy=policies[5])(), drawn)
        pipe.exits = None
    assert 0 < apart[0] < apart[1]
