"""Courses, walks and gains ask the model what the pipeline asks it: at every guidance scale, in every dtype, under every solver's noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from factories import NULL_CLASS, pipeline
from torch import Tensor

from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.pipelines.sampling import generate, sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_estimator import walk
from ee_diffusion.diffusion.step_cache.error_propagation import error_amplification
from ee_diffusion.diffusion.step_cache.trajectories import full_steps, record

STEPS, SEEDS, LABELS = 6, [3, 4], [0, 1]
SCALES = (0.5, 1.0, 2.0)
Asked = list[tuple[Tensor, Tensor, Tensor]]


def asked(pipe: EarlyExitPipeline, run: Callable[[], object]) -> Asked:
    """What the transformer is asked in a run: sample, timestep, labels."""
    seen: Asked = []

    def look(module, args, kwargs):
        named = dict(zip(("hidden_states", "timestep", "class_labels"), args, strict=False)) | kwargs
        seen.append((named["hidden_states"], named["timestep"], named["class_labels"]))

    hook = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return seen


def same(found: Asked, expected: Asked) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert all(a.dtype == b.dtype for a, b in zip(one[:1], other[:1], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def made(dtype: torch.dtype = torch.float32) -> tuple[EarlyExitPipeline, CachedOutputExits]:
    pipe = pipeline().to(dtype)
    return pipe, CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)


def call(scale: float) -> dict:
    return {"num_inference_steps": STEPS, "guidance_scale": scale}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_run_asks_what_the_pipeline_asks(dtype: torch.dtype, scale: float):
    pipe, exits = made(dtype)
    own = asked(pipe, lambda: generate(pipe, SEEDS, LABELS, batch_size=2, **call(scale)))
    assert own[0][0].dtype == dtype
    assert len(own[0][0]) == (4 if scale > 1 else 2)
    same(asked(pipe, lambda: list(full_steps(pipe, SEEDS, LABELS, **call(scale)))), own)
    same(asked(pipe, lambda: record(pipe, exits, SEEDS, LABELS, **call(scale))), own)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_walks_and_gains_ask_what_the_pipeline_asks(dtype: torch.dtype, scale: float):
    pipe, exits = made(dtype)

    def same_noise() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    own = asked(pipe, lambda: pipe(LABELS, generator=same_noise(), output_type="pt", **call(scale)))
    walked = {"skip": 0.0, "states": "full", "generator": same_noise()}
    same(asked(pipe, lambda: walk(pipe, exits, LABELS, **walked, **call(scale))), own)
    rows = len(own[0][0])
    gained = asked(
        pipe, lambda: error_amplification(pipe, exits, LABELS, every=1, generator=same_noise(), **call(scale))
    )
    same(gained[:4], own[:4])  # no branch yet
    for found, expected in zip(gained, own, strict=True):
        assert found[0].dtype == dtype
        assert torch.equal(found[2][:rows], expected[2])
        torch.testing.assert_close(found[0][:rows].float(), expected[0].float(), rtol=0.02, atol=0.02)


def noisy(name: str) -> EarlyExitPipeline:
    pipe, _ = made()
    changes = {"algorithm_type": "sde-dpmsolver++"} if name == "dpm" else {}
    pipe.scheduler = sampler(name, like=pipe.scheduler, **changes)
    return pipe


@pytest.mark.parametrize("name", ["ddpm", "dpm"])
def test_a_solvers_noise_is_that_of_each_images_seed(name: str):
    pipe = noisy(name)

    def run(seeds: list[int], labels: list[int], disturbed: int) -> Asked:
        torch.manual_seed(disturbed)  # the global generator has no say
        return asked(pipe, lambda: list(full_steps(pipe, seeds, labels, **call(2.0))))

    both = run(SEEDS, LABELS, 1)
    same(both, asked(pipe, lambda: generate(pipe, SEEDS, LABELS, batch_size=2, **call(2.0))))
    same(run(SEEDS, LABELS, 2), both)
    for alone, together in zip(run(SEEDS[1:], LABELS[1:], 3), both, strict=True):
        torch.testing.assert_close(alone[0][0], together[0][1], rtol=1e-3, atol=1e-3)
    quiet = sampler("ddim", like=pipe.scheduler)
    pipe.scheduler = quiet
    assert not torch.allclose(run(SEEDS, LABELS, 1)[-1][0], both[-1][0], atol=0.1)  # noise there was


@pytest.mark.parametrize("scale", SCALES)
def test_a_course_holds_the_clean_images_the_solver_goes_by(scale: float):
    pipe, exits = made()
    course = record(pipe, exits, SEEDS, LABELS, **call(scale))
    for one, clean in zip(full_steps(pipe, SEEDS, LABELS, **call(scale)), course.clean, strict=True):
        alpha = pipe.scheduler.alphas_cumprod[int(one.time)].double()
        said = (one.sample.double() - (1 - alpha).sqrt() * one.output.double()) / alpha.sqrt()
        expected = said[2:] + scale * (said[:2] - said[2:]) if scale > 1 else said
        torch.testing.assert_close(clean.double(), expected, rtol=1e-3, atol=1e-2)


def test_an_output_that_is_sent_takes_the_place_of_the_models_own():
    pipe, _ = made()
    run = full_steps(pipe, SEEDS, LABELS, **call(2.0))
    first = next(run)
    given = torch.randn(first.output.shape, generator=torch.Generator().manual_seed(0))
    after = run.send(given)
    scheduler = sampler("ddim", like=pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    expected = scheduler.step(given[2:] + 2.0 * (given[:2] - given[2:]), first.time, first.sample[:2]).prev_sample
    torch.testing.assert_close(after.sample, torch.cat([expected, expected]))


def test_runs_that_cannot_be_are_refused_before_the_model_is_asked():
    pipe, exits = made()
    generator = torch.Generator()
    ways = {
        "full_steps": lambda labels, **given: next(full_steps(pipe, SEEDS[: len(labels)], labels, **given)),
        "record": lambda labels, **given: record(pipe, exits, SEEDS[: len(labels)], labels, **given),
        "walk": lambda labels, **given: walk(
            pipe, exits, labels, skip=0.5, states="full", generator=generator, **given
        ),
        "error_amplification": lambda labels, **given: error_amplification(
            pipe, exits, labels, every=1, generator=generator, **given
        ),
    }
    bad = (
        ({"num_inference_steps": 0}, LABELS, "num_inference_steps=0, expected an integer of at least 1$"),
        ({"guidance_scale": float("nan")}, LABELS, "guidance_scale=nan, expected a finite number"),
        ({}, [0, NULL_CLASS + 1], r"class_labels \[0, 6\], expected integers in"),
        ({}, [], "class_labels is empty"),
    )
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked"))
    for way in ways.values():
        for change, labels, message in bad:
            with pytest.raises(ValueError, match=message):
                way(labels, **call(2.0) | change)
    pipe.transformer.register_to_config(null_class=None)
    for way in ways.values():
        with pytest.raises(ValueError, match=r"guidance_scale=2.0 of a model with null_class=None"):
            way(LABELS, **call(2.0))


def test_a_course_of_a_solver_that_asks_twice_is_refused_before_the_model_is_asked():
    pipe, exits = made()
    pipe.scheduler = sampler("heun", like=pipe.scheduler)
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(ValueError, match=r"HeunDiscreteScheduler asks the model 11 times in 6 steps"):
        record(pipe, exits, SEEDS, LABELS, **call(2.0))
