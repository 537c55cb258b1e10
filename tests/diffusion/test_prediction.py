"""The best linear prediction: weights against least squares in numpy, where it holds and where the line does, files, refusals."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import pipeline

from ee_diffusion.core.history import OutputHistory
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.linear_predictor import LinearPrediction
from ee_diffusion.diffusion.methods import static_cache_schedule
from ee_diffusion.diffusion.pipelines.sampling import use_sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.recording import record
from ee_diffusion.diffusion.step_cache.schedule_search import gap_prices, nearest, search
from ee_diffusion.diffusion.step_cache.trajectories import Trajectory, fit_prediction, values_of
from ee_diffusion.metrics.splits import seeds

STEPS = 8
CALL = {"num_inference_steps": STEPS, "guidance_scale": 2.0}
NOTHING = torch.nan


@pytest.fixture(scope="module")
def pipe() -> EarlyExitPipeline:
    return pipeline()


@pytest.fixture(scope="module")
def exits(pipe: EarlyExitPipeline) -> CachedOutputExits:
    return CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type="epsilon")


@pytest.fixture(scope="module")
def trajectory(pipe: EarlyExitPipeline, exits: CachedOutputExits) -> Trajectory:
    return record(pipe, exits, seeds("fit", 2), [0, 1], **CALL)


def least_squares(values: torch.Tensor, places: list[int], now: int) -> np.ndarray:
    columns = [values[place].double().numpy().ravel() for place in places]
    return np.linalg.lstsq(np.stack(columns, 1), values[now].double().numpy().ravel(), rcond=None)[0]


def test_the_weights_are_those_of_least_squares():
    values = torch.randn(STEPS, 2, 400, generator=torch.Generator().manual_seed(0)).cumsum(0)
    times, prediction = torch.linspace(900, 40, STEPS, dtype=torch.float64), LinearPrediction(STEPS)
    prediction.fit(times, values)
    remembered = torch.stack([times[[4, 2, 1]], times[[6, 5, 3]], times[[1, 0, 0]]])
    remembered[2, 2] = NOTHING  # only two are remembered
    weights = prediction.weights(remembered, times[[5, 7, 2]])
    for row, (places, place) in enumerate([([4, 2, 1], 5), ([6, 5, 3], 7), ([1, 0], 2)]):
        wanted = least_squares(values, places, place)
        np.testing.assert_allclose(weights[row, : len(places)].numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert weights[2, 2] == 0


@pytest.mark.parametrize("cached_type", ["sample", "epsilon"])
def test_exits_miss_a_trajectory_by_no_more_than_least_squares(
    cached_type: str, pipe: EarlyExitPipeline, trajectory: Trajectory
):
    """Of what they cache, under guidance: here nearly the same at every step, so that weights are free, misses not."""
    made = fit_prediction(
        CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type=cached_type), trajectory
    )
    times, values = trajectory.times, values_of(made, trajectory).double()
    for places, now in (([3, 2], 5), ([6, 5], 7), ([1, 0], 4)):
        weights = made.prediction.weights(times[places][None], times[[now]])[0]
        missed = [
            float((values[now] - torch.einsum("m,m...->...", w, values[places])).square().mean())
            for w in (weights, torch.from_numpy(least_squares(values, places, now)))
        ]
        assert missed[0] == pytest.approx(missed[1], rel=0.02)
    time = times[5].expand(2)
    signal = pipe.scheduler.alphas_cumprod.double()[int(times[5])] ** 0.5
    noise = (1 - signal**2) ** 0.5
    wanted = (
        trajectory.clean[5]
        if cached_type == "sample"
        else (trajectory.samples[5] - signal * trajectory.clean[5]) / noise
    )
    torch.testing.assert_close(values[5].float(), wanted.float(), rtol=1e-3, atol=1e-3)
    assert made.value_of(trajectory.samples[5], trajectory.clean[5], time).shape == values[5].shape


def test_it_holds_at_the_times_of_the_trajectory_and_the_line_elsewhere(
    exits: CachedOutputExits, trajectory: Trajectory
):
    made = fit_prediction(exits, trajectory)
    times = torch.stack(
        [trajectory.times[[3, 2]], trajectory.times[[3, 2]], trajectory.times[[3, 2]] + 0.01, trajectory.times[[3, 2]]]
    )
    times[3] = NOTHING
    now = torch.stack([trajectory.times[5], trajectory.times[5] + 0.01, trajectory.times[5], trajectory.times[5]])
    memory = OutputHistory(torch.randn(4, 2, 3, 8, 8), times, torch.full((4,), NOTHING))
    weights, line = made.weights_of(memory, now), memory.weights(now)
    assert torch.equal(weights[1:], line[1:]), "another time now, other times then, no memory"
    assert not torch.allclose(weights[0], line[0], atol=1e-3)


def test_a_searched_run_answers_by_it(pipe: EarlyExitPipeline, exits: CachedOutputExits, trajectory: Trajectory):
    """Image by image nearer to the full model than the line, and the search knows the prices of what is drawn."""
    made, layers = fit_prediction(exits, trajectory), len(pipe.transformer.transformer_blocks)
    policy = static_cache_schedule([0, 1, 3, 5], num_steps=STEPS, num_layers=layers)

    def drawn(heads: CachedOutputExits | None) -> torch.Tensor:
        pipe.exits = exits if heads is None else heads
        call = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds("fit", 2)], "output_type": "pt"}
        return pipe([0, 1], exit_policy=None if heads is None else policy, **call, **CALL).images

    full, by_line, by_prediction = drawn(None), drawn(exits), drawn(made)
    missed = [(images - full).square().mean() for images in (by_line, by_prediction)]
    assert 0 < missed[1] < missed[0]
    weights = (1.0,) * STEPS
    prices = [gap_prices(heads, trajectory, weights) for heads in (exits, made)]
    assert prices[1][1, 3, 5] < prices[0][1, 3, 5], "one step from memory: no weights miss less"
    assert nearest(search(prices[1], STEPS), 5).price < nearest(search(prices[0], STEPS), 5).price


def test_files_and_half_precision_keep_it(exits: CachedOutputExits, trajectory: Trajectory, tmp_path: Path):
    made = fit_prediction(exits, trajectory)
    made.save_pretrained(tmp_path)
    times, now = trajectory.times[[3, 2]][None], trajectory.times[[5]]
    wanted = made.prediction.weights(times, now)
    for kind in (None, torch.float16, torch.bfloat16):
        loaded = CachedOutputExits.from_pretrained(tmp_path, torch_dtype=kind)
        assert loaded.config.fitted_steps == STEPS
        assert torch.equal(loaded.prediction.weights(times, now), wanted)
        assert torch.equal(loaded.to(kind or torch.float32).prediction.weights(times, now), wanted)


def test_fitting_changes_nothing_of_the_exits_given(exits: CachedOutputExits, trajectory: Trajectory):
    before = {name: value.clone() for name, value in exits.state_dict().items()}
    made = fit_prediction(exits, trajectory)
    assert exits.prediction is None
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in before.items())


def test_another_trajectory_takes_the_place_of_the_first(
    pipe: EarlyExitPipeline, exits: CachedOutputExits, trajectory: Trajectory
):
    shorter = record(pipe, exits, seeds("fit", 2), [0, 1], **CALL | {"num_inference_steps": 5})
    again, once = fit_prediction(fit_prediction(exits, trajectory), shorter), fit_prediction(exits, shorter)
    assert again.config.fitted_steps == 5
    assert all(torch.equal(value, once.state_dict()[name]) for name, value in again.state_dict().items())


def test_refused(pipe: EarlyExitPipeline, exits: CachedOutputExits, trajectory: Trajectory):
    with pytest.raises(ValueError, match="know no trajectory"):
        CachedOutputExits.from_config(exits.config, fitted_steps=STEPS).check_fits(pipe.transformer)
    with pytest.raises(ValueError, match="fitted_steps=-1"):
        CachedOutputExits(fitted_steps=-1)
    with pytest.raises(ValueError, match="expected distinct ones"):
        fit_prediction(exits, replace(trajectory, times=trajectory.times[[0, 0, *range(2, STEPS)]]))
    broken = trajectory.clean.clone()
    broken[2, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="all finite"):
        fit_prediction(exits, replace(trajectory, clean=broken))
    with pytest.raises(ValueError, match="expected 3 of both"):
        LinearPrediction(3).fit(trajectory.times, values_of(exits, trajectory))


def test_a_run_that_the_weights_are_not_for_is_told(exits: CachedOutputExits, trajectory: Trajectory, tmp_path: Path):
    pipe = pipeline()
    fit_prediction(exits, trajectory).save_pretrained(tmp_path)
    pipe.exits = CachedOutputExits.from_pretrained(tmp_path)
    policy = static_cache_schedule((0, 1, 3), num_steps=STEPS, num_layers=len(pipe.transformer.transformer_blocks))
    shorter = static_cache_schedule((0, 1, 3), num_steps=STEPS - 1, num_layers=len(pipe.transformer.transformer_blocks))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe([0], exit_policy=policy, **CALL)
        pipe([0], **CALL | {"guidance_scale": 3.0})  # off: nothing is remembered
    weighed = f"weighed for DDIMScheduler, {STEPS} steps, guidance 2.0; this run has"
    with pytest.warns(UserWarning, match=f"{weighed} DDIMScheduler, {STEPS} steps, guidance 3.0"):
        pipe([0], exit_policy=policy, **CALL | {"guidance_scale": 3.0})
    with pytest.warns(UserWarning, match=f"{weighed} DDIMScheduler, {STEPS - 1} steps"):
        pipe([0], exit_policy=shorter, **CALL | {"num_inference_steps": STEPS - 1})
    use_sampler(pipe, "dpm")
    with pytest.warns(UserWarning, match=f"{weighed} DPMSolverMultistepScheduler, {STEPS} steps"):
        pipe([0], exit_policy=policy, **CALL)
