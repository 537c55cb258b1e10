"""Exits that were fitted to one call say so, once, in a call of another guidance, other times, another shape or other weights."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
)
from factories import pipeline, randomise, uvit
from tiny_pipelines import STOCK, call_of, images_of, pipeline_named

from ee_diffusion import attach_exits, fit_schedules
from ee_diffusion.diffusion import fingerprint
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.fingerprint import same_weights, weights_of
from ee_diffusion.diffusion.methods import periodic_cache
from ee_diffusion.diffusion.step_cache.error_estimator import collect_errors, fit_error_estimator
from ee_diffusion.diffusion.step_cache.recording import record
from ee_diffusion.diffusion.step_cache.run_setup import RunSetup, guidance_in, setup_of, steady
from ee_diffusion.diffusion.step_cache.trajectories import fit_prediction

STEPS = 6
POLICY = periodic_cache(2, warmup_steps=2)
REFUSED = {"lumina2"}  # by fit_schedules
SIZES = {"sd3": {"height": 16, "width": 8}, "flux": {"height": 16, "width": 8}, "pixart": {"height": 16, "width": 16}}


def fitted(name: str, **more) -> tuple[DiffusionPipeline, CachedOutputExits]:
    pipe = pipeline_named(name)
    exits, _ = fit_schedules(pipe, lambda: draw(pipe, name, **more), every=STEPS)
    return pipe, exits


def draw(pipe: DiffusionPipeline, name: str, **more) -> torch.Tensor:
    return images_of(pipe, call_of(name, [0, 1], steps=STEPS, **more))


def told(pipe: DiffusionPipeline, exits: CachedOutputExits, call: Callable[[], object]) -> list[str]:
    """What a call says of where its exits were fitted."""
    with warnings.catch_warnings(record=True) as caught, attach_exits(pipe, exits, POLICY):
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if "weighed for" in str(one.message)]


@pytest.mark.parametrize("name", [name for name in STOCK if name not in REFUSED])
def test_guidance_is_read_off_every_call(name: str):
    """Of one batch in either order, of two calls, or given to the transformer: none of the pipelines needs to name it."""
    pipe, exits = fitted(name)
    (argument, scale), *_ = STOCK[name].guided.items()
    known = setup_of(exits)
    if name == "flux2":  # distilled: there is one row, and the number goes to the transformer
        assert (known.guidance_scale, known.embedded_guidance) == (1.0, scale)
    else:
        assert known.guidance_scale == pytest.approx(scale, rel=1e-3)
    assert told(pipe, exits, lambda: draw(pipe, name)) == []
    for other in (1.5, 1.0):
        (said,) = told(pipe, exits, lambda other=other: draw(pipe, name, **{argument: other}))
        if name == "flux2":
            assert f"embedded guidance {scale}; this run has" in said
            assert f"embedded guidance {other}: fit them to it" in said
        else:
            fit, here = (float(part.split("guidance ")[1].split(":")[0].split(",")[0]) for part in said.split(";")[:2])
            assert fit == pytest.approx(scale, rel=1e-3)
            assert here == pytest.approx(other, rel=1e-3)
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.transformer._forward_hooks


def test_embedded_guidance_is_told_beside_the_other():
    pipe, exits = fitted("hunyuanvideo", guidance_scale=6.0)
    assert setup_of(exits).embedded_guidance == pytest.approx(6000)  # as the transformer is given it
    (said,) = told(pipe, exits, lambda: draw(pipe, "hunyuanvideo", guidance_scale=3.0))
    assert "embedded guidance 6000.0; this run has" in said
    assert "embedded guidance 3000.0" in said


def test_guidance_that_a_callback_changes_is_told_from_there_on():
    pipe, exits = fitted("sd3")

    def change(pipeline: DiffusionPipeline, step: int, time, inputs: dict) -> dict:
        if step == 2:
            pipeline._guidance_scale = 1.5
        return inputs

    (said,) = told(pipe, exits, lambda: draw(pipe, "sd3", callback_on_step_end=change))
    assert "guidance 3.0; this run has" in said
    assert "guidance 1.5 at step 3" in said
    changed, _ = fit_schedules(pipe, lambda: draw(pipe, "sd3", callback_on_step_end=change), every=STEPS)
    assert list(changed.config.fitted_guidance) == pytest.approx([3.0] * 3 + [1.5] * 3)
    assert told(pipe, changed, lambda: draw(pipe, "sd3", callback_on_step_end=change)) == []
    (said,) = told(pipe, changed, lambda: draw(pipe, "sd3"))
    assert "guidance 1.5; this run has" in said
    assert "guidance 3.0 at step 3" in said


def test_a_call_that_broke_off_leaves_no_scheduler_unwatched():
    pipe, exits = fitted("sd3")

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    def broken_then_another() -> None:
        handle = pipe.transformer.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, "sd3")
        handle.remove()
        before, pipe.scheduler = pipe.scheduler, FlowMatchEulerDiscreteScheduler(shift=3.0)
        draw(pipe, "sd3")
        assert "step" not in vars(before)

    (said,) = told(pipe, exits, broken_then_another)
    assert "a step at time 800.2; this run has" in said


def test_what_was_said_is_not_kept_once_a_run_was_warned_of():
    pipe, exits = fitted("sd3")
    alive = []

    def count(module: torch.nn.Module, args: tuple, output: tuple) -> None:
        shape = output[0].shape
        alive.append(sum(type(one) is torch.Tensor and one.shape == shape for one in gc.get_objects()))

    def call() -> None:
        handle = pipe.transformer.register_forward_hook(count)
        draw(pipe, "sd3", guidance_scale=1.5)
        handle.remove()

    assert len(told(pipe, exits, call)) == 1
    assert alive[-1] == alive[-2], "outputs of earlier steps are gone"


def test_other_times_of_one_solver_are_told():
    pipe, exits = fitted("sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    (said,) = told(pipe, exits, lambda: draw(pipe, "sd3"))
    assert "a step at time 800.2; this run has" in said
    assert "it at 923." in said
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    by_hand = [1 - 0.9 * step / STEPS for step in range(STEPS)]
    (said,) = told(pipe, exits, lambda: draw(pipe, "sd3", sigmas=by_hand))
    assert "a step at time" in said
    pipe, exits = fitted("pixart")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    (said,) = told(pipe, exits, lambda: draw(pipe, "pixart"))
    assert "a step at time" in said


def test_times_of_an_image_to_image_call_are_those_that_it_takes():
    pipe, exits = fitted("sd3")
    made = StableDiffusion3Img2ImgPipeline(**pipe.components)
    made.set_progress_bar_config(disable=True)
    given = call_of("sd3", [0, 1], steps=2 * STEPS) | {"image": torch.rand(2, 3, 8, 8), "strength": 0.5}
    given = {name: value for name, value in given.items() if name not in ("height", "width")}
    (said,) = told(made, exits, lambda: images_of(made, given))
    taken = made.scheduler.timesteps[STEPS].item()
    assert f"a step at time 1000; this run has FlowMatchEulerDiscreteScheduler, {STEPS} steps" in said
    assert f"it at {taken:g}" in said


@pytest.mark.parametrize("name", SIZES)
def test_another_resolution_is_told(name: str):
    pipe, exits = fitted(name)
    shape = setup_of(exits).shape
    (said,) = told(pipe, exits, lambda: draw(pipe, name, **SIZES[name]))
    assert f"samples {shape}; this run has" in said


def test_a_shift_that_follows_the_resolution_is_told():
    pipe = pipeline_named("flux")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    exits, _ = fit_schedules(pipe, lambda: draw(pipe, "flux"), every=STEPS)
    assert told(pipe, exits, lambda: draw(pipe, "flux")) == []
    (said,) = told(pipe, exits, lambda: draw(pipe, "flux", **SIZES["flux"]))
    assert "a step at time" in said
    assert "samples" in said


def test_another_checkpoint_is_told_and_half_precision_is_none():
    pipe, exits = fitted("dit")
    other = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        other.transformer_blocks[1].attn1.to_q.weight[0, 0] += 0.01
    own, pipe.transformer = pipe.transformer, other
    (said,) = told(pipe, exits, lambda: draw(pipe, "dit"))
    assert f"weights {weights_of(own)}; this run has" in said
    assert f"weights {weights_of(other)}" in said
    pipe.transformer = own
    assert told(pipe, exits, lambda: draw(pipe, "dit")) == []
    for dtype in (torch.bfloat16, torch.float16):
        halved = pipeline_named("dit").to(dtype)
        assert told(halved, exits, lambda halved=halved: draw(halved, "dit")) == []


def test_weights_are_read_again_once_they_change():
    model = uvit("class")
    first = weights_of(model)
    assert weights_of(model) == first == weights_of(copy.deepcopy(model))
    with torch.no_grad():
        next(model.parameters()).view(-1)[-1] += 1.0
    assert not same_weights(weights_of(model), first)
    changed = weights_of(model)
    model.class_embed.weight.data += 0.1  # tells nobody, as merged adapters
    assert not same_weights(weights_of(model), changed)
    half = copy.deepcopy(model).half()
    assert same_weights(weights_of(half), weights_of(model))
    assert same_weights(weights_of(half.float()), weights_of(half))
    assert not same_weights(weights_of(randomise(half, seed=8)), weights_of(model))
    assert weights_of(copy.deepcopy(model).to("meta")) is None
    assert same_weights(None, first)


def linear(weight: torch.Tensor) -> torch.nn.Linear:
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data = weight
    return made


@pytest.mark.parametrize("chunk", [4, 2**22])
def test_weights_that_change_places_are_others(chunk: int, monkeypatch: pytest.MonkeyPatch):
    weight = drawn(2, 4, seed=0)
    known = weights_of(linear(weight))
    monkeypatch.setattr(fingerprint, "CHUNK", chunk)
    assert weights_of(linear(weight)) == known, "however many are read at a time"
    for other in (weight.flip(0), weight.reshape(4, 2), weight.reshape(8, 1)):
        assert not same_weights(weights_of(linear(other)), known)
    renamed = torch.nn.ModuleDict({"other": linear(weight)})
    assert not same_weights(weights_of(renamed), known)


def test_our_own_pipelines_tell_it_before_they_run():
    pipe = pipeline()
    call = {"num_inference_steps": STEPS, "guidance_scale": 2.0}
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)  # takes times by hand
    memory = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type="epsilon")
    pipe.exits = fit_prediction(memory, record(pipe, memory, [1, 2], [0, 1], **call))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe([0], exit_policy=POLICY, output_type="pt", **call)
    with pytest.warns(UserWarning, match=r"a step at time 999; this run has .* it at 900"):
        pipe([0], exit_policy=POLICY, output_type="pt", timesteps=[900, 700, 500, 300, 100, 0], **call)
    with pytest.warns(UserWarning, match=r"guidance 2.0; this run has .* guidance 3.0"):
        pipe([0], exit_policy=POLICY, output_type="pt", **call | {"guidance_scale": 3.0})
    pipe.transformer.class_embed.weight.data += 0.1
    with pytest.warns(UserWarning, match=r"weights \S+; this run has .* weights \S+: fit them to it"):
        pipe([0], exit_policy=POLICY, output_type="pt", **call)


def test_an_uncertainty_is_of_one_model_too():
    pipe, call = pipeline(), {"num_inference_steps": STEPS, "guidance_scale": 2.0}
    gauged = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    generator = torch.Generator().manual_seed(0)
    seen = collect_errors(pipe, gauged, [0, 1], skip=0.5, states="full", generator=generator, **call)
    fit_error_estimator(gauged, seen, iterations=1)
    pipe.exits = gauged
    assert setup_of(pipe.exits) == RunSetup(weights=weights_of(pipe.transformer))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe([0], exit_policy=POLICY, output_type="pt", num_inference_steps=4, guidance_scale=3.0)  # no trajectory
    pipe.transformer.class_embed.weight.data += 0.1
    with pytest.warns(UserWarning, match=r"weighed for weights \S+; this run has weights \S+: fit them to it"):
        pipe([0], exit_policy=POLICY, output_type="pt", **call)


def test_what_was_fitted_is_kept_with_the_exits(tmp_path):
    pipe, exits = fitted("sd3")
    exits.save_pretrained(tmp_path)
    again = CachedOutputExits.from_pretrained(tmp_path)
    assert setup_of(again) == setup_of(exits)
    assert setup_of(again).weights == weights_of(pipe.transformer)
    assert setup_of(CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)) == RunSetup()


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (3, 16, 5)])
def test_guidance_follows_from_what_was_said_and_what_was_used(shape: tuple[int, ...]):
    conditional, unconditional = drawn(*shape, seed=1), drawn(*shape, seed=2)
    guided = unconditional + 4.5 * (conditional - unconditional)
    assert guidance_in([torch.cat([unconditional, conditional])], guided) == pytest.approx(4.5)
    assert guidance_in([conditional, unconditional], guided) == pytest.approx(4.5)
    factor = drawn(3, *[1] * (len(shape) - 1), seed=3)
    assert guidance_in([conditional, unconditional], factor * guided) == pytest.approx(4.5), "rescaled image by image"
    assert guidance_in([torch.cat([unconditional, conditional]).bfloat16()], guided.bfloat16()) == pytest.approx(
        4.5, rel=0.02
    )
    assert guidance_in([torch.cat([guided, guided], 1)], guided) == 1.0, "one row, and a variance"
    assert guidance_in([torch.cat([unconditional, conditional])], torch.cat([guided, guided])) == pytest.approx(4.5)
    assert guidance_in([torch.cat([unconditional, conditional, guided])], guided) is None, "three rows"
    assert guidance_in([torch.cat([guided, guided])], guided) is None, "both rows alike"
    assert guidance_in([conditional[:2]], guided) is None


def test_many_numbers_are_one_where_they_agree():
    assert steady([None, None]) is None
    assert steady([2.0, None, 2.001]) == 2.001
    assert steady([2.0, None, 3.0]) == (2.0, None, 3.0)
