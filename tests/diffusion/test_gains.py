"""Gains are what a run that took one answer from memory shows at its end, found here run by run; error_weights takes them in."""

from __future__ import annotations

import math

import pytest
import torch
from factories import pipeline

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import DepthPerStep
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.methods import accumulated_error_budget
from ee_diffusion.diffusion.pipelines.sampling import SAMPLERS, sampler, use_sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_propagation import between, error_amplification, error_weights, gain_of
from ee_diffusion.diffusion.step_cache.solver import local_error_gain

STEPS, CALL = 9, {"num_inference_steps": 9, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe() -> EarlyExitPipeline:
    made = pipeline()
    made.exits = CachedOutputExits.for_pipeline(made.transformer, made.scheduler)
    return made


def gains(pipe: EarlyExitPipeline, every: int, labels: list[int]) -> tuple[float, ...]:
    return error_amplification(
        pipe, pipe.exits, labels, every=every, generator=torch.Generator().manual_seed(5), **CALL
    )


def final(pipe: EarlyExitPipeline, skipped: int | None) -> torch.Tensor:
    """The sample of one image, memory answering at one step; the range of pixels is not cut."""
    layers, seen = len(pipe.transformer.transformer_blocks), []
    depths = [0 if step == skipped else layers for step in range(STEPS)]
    policy = Policy(schedule=DepthPerStep(tuple(depths)), exits=(0,))

    def keep(pipe, index, time, values):
        seen.append(values["latents"])
        return values

    pipe([1], exit_policy=policy, generator=torch.Generator().manual_seed(5), callback_on_step_end=keep, **CALL)
    return seen[-1]


def sampling(name: str) -> EarlyExitPipeline:
    """`sde`: DPM-Solver++ that draws noise."""
    pipe = pipeline()
    pipe.exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    changes = {"algorithm_type": "sde-dpmsolver++"} if name == "sde" else {}
    pipe.scheduler = sampler("dpm" if name == "sde" else name, like=pipe.scheduler, **changes)
    return pipe


@pytest.mark.parametrize("name", ["ddim", "dpm", "euler", "ddpm", "sde"])
def test_a_gain_is_the_final_distance_over_the_first(name: str):
    """Under a solver's noise too: the run that took the answer and the one that did not draw the same."""
    pipe = sampling(name)
    found = gains(pipe, 1, [1])
    sensitivity = local_error_gain(pipe.exits, pipe.scheduler, STEPS)
    plain, errors = final(pipe, None), true_errors(pipe)
    for step in (3, 5, 8):
        moved = (final(pipe, step) - plain).square().mean().sqrt().item()
        assert found[step] == pytest.approx(moved / (sensitivity[step] * errors[step]), rel=1e-3)
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize("name", ["ddpm", "sde"])
def test_gains_under_noise_are_those_of_the_generator_alone(name: str):
    pipe, found = sampling(name), []
    for disturbed in (1, 2):
        torch.manual_seed(disturbed)
        found.append(gains(pipe, 3, [0, 1]))
    assert found[0] == found[1]


def test_there_is_a_gain_for_every_question_of_a_solver_that_asks_twice():
    pipe = sampling("heun")
    found = gains(pipe, 2, [0, 1])
    sensitivity = local_error_gain(pipe.exits, pipe.scheduler, STEPS)
    assert len(found) == len(sensitivity) == 2 * STEPS - 1
    assert all(value > 0 for value in found)
    policy = accumulated_error_budget(1.0, weights=error_weights(sensitivity, found, power=0.5), decay=0.7)
    assert len(pipe([0], exit_policy=policy, output_type="pt", **CALL).trace.depths) == 2 * STEPS - 1


def true_errors(pipe: EarlyExitPipeline) -> dict[int, float]:
    """Root mean square error of the extrapolated clean image at each step of a full run, mean over the two rows of guidance."""
    exits, memory, errors = pipe.exits, None, {}

    def look(module, args, kwargs, output):
        nonlocal memory
        sample, timestep = args[0], args[1]
        if memory is not None:
            extrapolated = exits.extrapolate(memory, sample, timestep)["extrapolated"]
            wrong = exits.clean_of(sample, extrapolated, timestep) - exits.clean_of(sample, output.sample, timestep)
            errors[len(errors) + 1] = wrong.flatten(1).square().mean(1).sqrt().mean().item()
        memory = exits.append(memory, torch.arange(2), sample=sample, timestep=timestep, output=output.sample)

    hook = pipe.transformer.register_forward_hook(look, with_kwargs=True)
    try:
        pipe([1], generator=torch.Generator().manual_seed(5), **CALL)
    finally:
        hook.remove()
    return errors


def test_between_measured_steps_gains_are_log_linear(pipe: EarlyExitPipeline):
    every, some = gains(pipe, 1, [0, 2]), gains(pipe, 4, [0, 2])
    assert some[3] == pytest.approx(every[3], rel=1e-4)
    assert some[7] == pytest.approx(every[7], rel=1e-4)
    assert some[5] == pytest.approx((every[3] * every[7]) ** 0.5, rel=1e-4)
    assert some[8] == some[7]


def test_nothing_is_left_on_the_scheduler(pipe: EarlyExitPipeline):
    before = dict(pipe.scheduler.__dict__)
    gains(pipe, 3, [0])
    assert pipe.scheduler.__dict__ == before


def test_error_weights_and_bad_input(pipe: EarlyExitPipeline):
    assert error_weights((0.1, 0.2), (4.0, 9.0), power=0.5) == pytest.approx((0.2, 0.6))
    assert error_weights((0.1, 0.2), (4.0, 9.0), power=0) == (0.1, 0.2)
    for sensitivity, power in (((0.1,), 0.5), ((0.1, 0.2), 1.5)):
        with pytest.raises(ValueError, match="expected as many, and a power in"):
            error_weights(sensitivity, (4.0, 9.0), power=power)
    for wrong in (float("nan"), -0.1, float("inf")):
        with pytest.raises(ValueError, match=r"amplification=.*expected finite numbers, none below 0"):
            error_weights((0.1, 0.2), (4.0, wrong), power=0.5)
        with pytest.raises(ValueError, match=r"local_gains=.*expected finite numbers, none below 0"):
            error_weights((wrong, 0.2), (4.0, 9.0), power=0.5)
    with pytest.raises(ValueError, match="every=0"):
        gains(pipe, 0, [0])
    with pytest.raises(ValueError, match="more than 3 steps"):
        error_amplification(
            pipe, pipe.exits, [0], num_inference_steps=3, guidance_scale=2.0, every=1, generator=torch.Generator()
        )


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_budget_spends_what_it_has(pipe: EarlyExitPipeline, name: str):
    """Larger budgets answer more steps from memory; the sum never passes the budget."""
    made = pipeline()
    made.exits = CachedOutputExits.for_pipeline(made.transformer, made.scheduler)
    use_sampler(made, name)
    made.scheduler.set_timesteps(12)
    weights = (0.5,) * len(made.scheduler.timesteps)
    shares = []
    for budget in (0.05, 0.2, 1.0):
        trace = made(
            [0, 1, 2],
            12,
            2.0,
            exit_policy=accumulated_error_budget(budget, weights=weights, decay=0.7),
            generator=torch.Generator().manual_seed(0),
        ).trace
        shares.append((trace.depths == 0).float().mean().item())
        spent = torch.zeros(3)
        for depths, scores in zip(trace.depths, trace.scores[:, 0], strict=True):
            spent = 0.7 * spent + torch.where(depths == 0, 0.5 * (1 - scores), 0.0)
            assert (spent <= budget * 1.0001).all()
    assert shares == sorted(shares)
    assert shares[-1] > shares[0]


def test_a_gain_of_nothing_is_of_its_own_step_alone():
    assert gain_of(0.0, 0.0) == 0
    assert gain_of(0.0, 0.5) == 0
    assert gain_of(1.0, 0.5) == 2
    assert math.isnan(gain_of(1.0, math.nan))
    assert between({1: 0.0, 3: 4.0, 5: 1.0}, 6) == pytest.approx((4.0, 0.0, 4.0, 4.0, 2.0, 1.0))
    assert between({1: 0.0}, 3) == (0.0, 0.0, 0.0)
