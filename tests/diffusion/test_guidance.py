"""All runs that are recorded call the model as the pipeline does: at every guidance scale, in every dtype, under every solver's noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from factories import NULL_CLASS, pipeline
from torch import Tensor

from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.pipelines.sampling import generate, sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_estimator import collect_errors
from ee_diffusion.diffusion.step_cache.error_propagation import error_amplification
from ee_diffusion.diffusion.step_cache.recording import outputs_through, record

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
    same(asked(pipe, lambda: record(pipe, exits, SEEDS, LABELS, **call(scale))), own)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_walks_and_gains_ask_what_the_pipeline_asks(dtype: torch.dtype, scale: float):
    pipe, exits = made(dtype)

    def same_noise() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    own = asked(pipe, lambda: pipe(LABELS, generator=same_noise(), output_type="pt", **call(scale)))
    walked = {"skip": 0.0, "states": "full", "generator": same_noise()}
    same(asked(pipe, lambda: collect_errors(pipe, exits, LABELS, **walked, **call(scale))), own)
    gained = asked(
        pipe, lambda: error_amplification(pipe, exits, LABELS, every=1, generator=same_noise(), **call(scale))
    )
    same(gained[:STEPS], own)  # the full run, then one that takes a cached output at step 3, 4, ...
    for place, cached in enumerate(range(3, STEPS), 1):
        branch = gained[place * STEPS : (place + 1) * STEPS]
        same(branch[: cached + 1], own[: cached + 1])
        assert all(torch.equal(one[2], other[2]) for one, other in zip(branch, own, strict=True))
        assert cached == STEPS - 1 or not torch.equal(branch[cached + 1][0], own[cached + 1][0])


def noisy(name: str) -> EarlyExitPipeline:
    pipe, _ = made()
    changes = {"algorithm_type": "sde-dpmsolver++"} if name == "dpm" else {}
    pipe.scheduler = sampler(name, like=pipe.scheduler, **changes)
    return pipe


@pytest.mark.parametrize("name", ["ddpm", "dpm"])
def test_a_solvers_noise_is_that_of_each_images_seed(name: str):
    pipe = noisy(name)
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)

    def run(seeds: list[int], labels: list[int], disturbed: int) -> Asked:
        torch.manual_seed(disturbed)  # the global generator has no say
        return asked(pipe, lambda: record(pipe, exits, seeds, labels, **call(2.0)))

    both = run(SEEDS, LABELS, 1)
    same(both, asked(pipe, lambda: generate(pipe, SEEDS, LABELS, batch_size=2, **call(2.0))))
    same(run(SEEDS, LABELS, 2), both)
    for alone, together in zip(run(SEEDS[1:], LABELS[1:], 3), both, strict=True):
        torch.testing.assert_close(alone[0][0], together[0][1], rtol=1e-3, atol=1e-3)
    quiet = sampler("ddim", like=pipe.scheduler)
    pipe.scheduler = quiet
    assert not torch.allclose(run(SEEDS, LABELS, 1)[-1][0], both[-1][0], atol=0.1)  # noise there was


@pytest.mark.parametrize("scale", SCALES)
def test_a_trajectory_holds_the_clean_images_the_solver_goes_by(scale: float):
    pipe, exits = made()
    outputs: list[Tensor] = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output.sample))
    trajectory = record(pipe, exits, SEEDS, LABELS, **call(scale))
    hook.remove()
    assert trajectory.guidance_scale == scale
    for time, sample, output, clean in zip(
        trajectory.times, trajectory.samples, outputs, trajectory.clean, strict=True
    ):
        alpha = pipe.scheduler.alphas_cumprod[int(time)].double()
        rows = torch.cat([sample] * (len(output) // len(sample))).double()
        said = (rows - (1 - alpha).sqrt() * output.double()) / alpha.sqrt()
        expected = said[2:] + scale * (said[:2] - said[2:]) if scale > 1 else said
        torch.testing.assert_close(clean.double(), expected, rtol=1e-3, atol=1e-2)


def test_an_output_that_is_changed_takes_the_place_of_the_models_own():
    pipe, _ = made()
    size = pipe.transformer.config.sample_size
    given = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, Tensor, Tensor]] = []

    def change(index: int, sample: Tensor, timestep: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        seen.append((index, sample, timestep))
        return given if index == 0 else forward()

    before = pipe.transformer.forward
    with outputs_through(pipe.transformer, change):
        pipe(LABELS, generator=torch.Generator().manual_seed(1), output_type="pt", **call(2.0))
    assert pipe.transformer.forward == before
    assert [index for index, _, _ in seen] == list(range(STEPS))
    scheduler = sampler("ddim", like=pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    (_, sample, time), (_, after, _) = seen[:2]
    expected = scheduler.step(given[2:] + 2.0 * (given[:2] - given[2:]), time[0], sample[:2]).prev_sample
    torch.testing.assert_close(after, torch.cat([expected, expected]))


def test_runs_that_cannot_be_are_refused_before_the_model_is_asked():
    pipe, exits = made()
    generator = torch.Generator()
    ways = {
        "record": lambda labels, **given: record(pipe, exits, SEEDS[: len(labels)], labels, **given),
        "collect_errors": lambda labels, **given: collect_errors(
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


def test_a_trajectory_of_a_solver_that_asks_twice_is_refused_before_the_model_is_asked():
    pipe, exits = made()
    pipe.scheduler = sampler("heun", like=pipe.scheduler)
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(ValueError, match=r"HeunDiscreteScheduler asks the model 11 times in 6 steps"):
        record(pipe, exits, SEEDS, LABELS, **call(2.0))
