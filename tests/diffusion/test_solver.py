"""What a prediction's error does to a step, measured on the scheduler, equals DDIM's formula; every sampler gives one number a step."""

from __future__ import annotations

import pytest
import torch
from factories import pipeline

from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.methods import per_step_error_threshold
from ee_diffusion.diffusion.pipelines.sampling import SAMPLERS, use_sampler
from ee_diffusion.diffusion.step_cache.solver import local_error_gain


def test_ddim_is_what_its_formula_says():
    """x_s = a_s x_0 + s_s (x_t - a_t x_0) / s_t, differentiated by x_0."""
    pipe = pipeline()
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    measured = local_error_gain(exits, pipe.scheduler, 10)
    pipe.scheduler.set_timesteps(10)
    alphas = pipe.scheduler.alphas_cumprod.double()
    for time, found in zip(pipe.scheduler.timesteps.tolist(), measured, strict=True):
        now, then = alphas[time], alphas[time - 100] if time >= 100 else torch.tensor(1.0)
        slope = then.sqrt() - (1 - then).sqrt() * now.sqrt() / (1 - now).sqrt()
        assert found == pytest.approx(slope.item(), rel=2e-3)


def test_euler_is_compared_in_the_scale_the_model_sees():
    """Its samples are x_0 + sigma eps; the model sees them over sqrt(1 + sigma^2)."""
    pipe = pipeline()
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    use_sampler(pipe, "euler")
    measured = local_error_gain(exits, pipe.scheduler, 10)
    pipe.scheduler.set_timesteps(10)
    sigmas = pipe.scheduler.sigmas.double()
    for now, then, found in zip(sigmas, sigmas[1:], measured, strict=False):
        slope = (now - then) / now / (1 + then**2).sqrt()
        assert found == pytest.approx(slope.item(), rel=1e-2)


def test_clipping_of_the_clean_image_does_not_hide_the_error():
    """The probe is small and starts from zero, so that a scheduler that clips gives the numbers of one that does not."""
    pipe = pipeline()
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    clipping = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=True)
    assert local_error_gain(exits, clipping, 10) == pytest.approx(local_error_gain(exits, pipe.scheduler, 10), rel=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_a_positive_number_for_each_model_call(name: str):
    pipe = pipeline()
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    use_sampler(pipe, name)
    before = dict(pipe.scheduler.__dict__)
    measured = local_error_gain(exits, pipe.scheduler, 7)
    assert pipe.scheduler.__dict__.keys() == before.keys()
    pipe.scheduler.set_timesteps(7)
    assert len(measured) == len(pipe.scheduler.timesteps)
    assert all(0 < value < 100 for value in measured)  # Heun corrects with long strides


def test_the_policy_asks_more_certainty_where_a_step_is_sensitive():
    policy = per_step_error_threshold(0.01, local_gains=(0.001, 0.02, 0.1))
    assert policy.criterion.threshold == ((0.0,), (0.5,), (pytest.approx(0.9),))
    assert policy.exits == (0,)
    with pytest.raises(ValueError, match="all local gains finite"):
        per_step_error_threshold(0.1, local_gains=(0.1, float("nan")))
    for bad in (0.0, float("nan")):
        with pytest.raises(ValueError, match="expected a positive number"):
            per_step_error_threshold(bad, local_gains=(0.1,))
    with pytest.raises(ValueError, match="for 0 steps"):
        per_step_error_threshold(0.1, local_gains=())


def test_no_steps_have_no_sensitivity():
    pipe = pipeline()
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        local_error_gain(CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler), pipe.scheduler, 0)
