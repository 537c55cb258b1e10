"""Many images from seeds: the same whatever the batch, traces joined, controls made of a trace."""

from __future__ import annotations

import pytest
import torch
from factories import CLASSES, pipeline

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.pipelines.sampling import SAMPLERS, controls_of, generate, sampler, use_sampler

SEEDS, LABELS = [5, 9, 2, 7, 1], [index % CLASSES for index in range(5)]


def run(pipe, policy, batch_size: int, **more):
    return generate(
        pipe,
        SEEDS,
        LABELS,
        batch_size=batch_size,
        num_inference_steps=3,
        guidance_scale=1.5,
        exit_policy=policy,
        **more,
    )


@pytest.mark.parametrize("cfg_exit", ["joint", "separate"])
def test_the_batch_size_makes_no_difference(cfg_exit: str):
    pipe = pipeline()
    policy = Policy(Threshold(0.4), cfg_exit=cfg_exit)
    whole = run(pipe, policy, 5)
    parts = run(pipe, policy, 2)
    assert len(parts.seconds) == 3
    torch.testing.assert_close(parts.images, whole.images, rtol=1e-3, atol=1e-4)
    assert len(whole.trace.depths.unique()) >= 3
    if cfg_exit == "joint":
        assert torch.equal(parts.trace.depths, whole.trace.depths)
        assert parts.trace.samples.tolist() == [0, 1, 2, 3, 4]
    else:
        assert sorted(parts.trace.depths.flatten().tolist()) == sorted(whole.trace.depths.flatten().tolist())
    assert run(pipe, None, 3).trace is None


def test_controls_of_a_trace():
    pipe = pipeline()
    trace = run(pipe, Policy(Threshold(0.4)), 5).trace
    controls = controls_of(trace, seed=0)
    assert list(controls) == ["static", "random_per_step", "random_overall"]
    found = {name: run(pipe, policy, 2).trace.depths for name, policy in controls.items()}
    assert all(len(row.unique()) == 1 for row in found["static"])
    assert abs(float(found["static"].float().mean() - trace.depths.float().mean())) <= 1.0
    assert torch.equal(found["random_per_step"].sort(1).values, trace.depths.sort(1).values)
    assert torch.equal(found["random_overall"].flatten().sort().values, trace.depths.flatten().sort().values)
    assert not torch.equal(found["random_per_step"], trace.depths)


def test_controls_leave_the_warm_up_as_it_was():
    """Full steps before the first answer from memory: under a plain static schedule the first would fall to depth 0."""
    pipe = pipeline()
    pipe.exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    call = {"batch_size": 2, "num_inference_steps": 8, "guidance_scale": 1.5}
    trace = generate(pipe, SEEDS, LABELS, exit_policy=Policy(Threshold(0.4)), **call).trace
    layers = trace.planned.shape[1]
    assert (trace.depths == 0).any()
    for policy in controls_of(trace, seed=0, warm_up=2).values():
        depths = generate(pipe, SEEDS, LABELS, exit_policy=policy, **call).trace.depths
        assert (depths[:2] == layers).all()
        assert abs(float(depths.float().mean() - trace.depths.float().mean())) <= layers / 8
    with pytest.raises(ValueError, match="before the first full step"):
        generate(pipe, SEEDS, LABELS, exit_policy=controls_of(trace, seed=0)["random_overall"], **call)


def test_ids_begin_where_they_are_told_to():
    trace = run(pipeline(), Policy(Threshold(0.4)), 2, first_id=10).trace
    assert trace.samples.tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_by_name(name: str):
    """The noise schedule stays, also where the new scheduler's own defaults differ."""
    pipe = pipeline()
    before = pipe.scheduler.alphas_cumprod
    use_sampler(pipe, name)
    assert type(pipe.scheduler) is SAMPLERS[name]
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, before)


def test_a_setting_may_differ():
    like = pipeline().scheduler
    changed = sampler("ddim", like=like, clip_sample=not like.config.clip_sample)
    assert changed.config.clip_sample != like.config.clip_sample
    assert changed.config.beta_schedule == like.config.beta_schedule


def test_what_does_not_fit_is_refused():
    pipe = pipeline()
    with pytest.raises(ValueError, match="sampler='magic'"):
        use_sampler(pipe, "magic")
    for seeds, labels, size in (([], [], 2), ([1, 2], [0], 2), ([1], [0], 0)):
        with pytest.raises(ValueError, match="expected at least 1 and one label a seed"):
            generate(pipe, seeds, labels, batch_size=size)
