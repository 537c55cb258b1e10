"""The best static schedule: prices against a slow loop in float64, the search against all subsets, trajectories against the pipeline."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import pipeline

from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.methods import periodic_cache, static_cache_schedule
from ee_diffusion.diffusion.pipelines.sampling import generate, use_sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.recording import record
from ee_diffusion.diffusion.step_cache.schedule_search import gap_prices, nearest, price_of, search
from ee_diffusion.diffusion.step_cache.trajectories import LONGEST, Trajectory
from ee_diffusion.metrics.splits import seeds

STEPS = 8
CALL = {"num_inference_steps": STEPS, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe() -> EarlyExitPipeline:
    made = pipeline()
    made.exits = CachedOutputExits.for_pipeline(made.transformer, made.scheduler)
    return made


@pytest.fixture(scope="module")
def trajectory(pipe: EarlyExitPipeline) -> Trajectory:
    return record(pipe, pipe.exits, seeds("fit", 2), [0, 1], **CALL)


@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_a_full_run_ends_in_the_images_of_the_pipeline(name: str):
    pipe = pipeline()
    use_sampler(pipe, name)
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    last = record(pipe, exits, seeds("test", 2), [0, 1], **CALL).clean[-1]  # where the last step ends
    drawn = generate(pipe, seeds("test", 2), [0, 1], batch_size=2, **CALL).images
    torch.testing.assert_close((last.clamp(-1, 1) / 2 + 0.5), drawn, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("cached_type", ["sample", "epsilon"])
def test_prices_are_those_of_a_slow_loop(cached_type: str, pipe: EarlyExitPipeline, trajectory: Trajectory):
    weights = tuple(np.random.default_rng(0).uniform(0.5, 2.0, STEPS))
    trajectory = replace(trajectory, clip=1.0)
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type=cached_type)
    prices = gap_prices(exits, trajectory, weights)
    clean, times, asked = (
        trajectory.clean.double().numpy(),
        trajectory.times.numpy(),
        trajectory.samples.double().numpy(),
    )
    alphas = pipe.scheduler.alphas_cumprod.double().numpy()[times.astype(int)]
    signal, noise = np.sqrt(alphas), np.sqrt(1 - alphas)
    scaled = signal[:, None, None, None, None]
    values = clean if cached_type == "sample" else (asked - scaled * clean) / noise[:, None, None, None, None]
    assert np.abs(clean).max() > 1  # so that clipping shows
    for (a, b, c), price in prices.items():
        total = np.zeros(clean.shape[1:])
        for t in range(b + 1, c):
            line = values[b] + (times[t] - times[b]) / (times[b] - times[a]) * (values[b] - values[a])
            line = line if cached_type == "sample" else (asked[t] - noise[t] * line) / signal[t]
            total += weights[t] * (np.clip(line, -1, 1) - np.clip(clean[t], -1, 1))
        assert price == pytest.approx((total**2).mean(), rel=1e-3, abs=1e-7)
    assert prices[0, 1, 2] == 0
    assert prices[0, 1, STEPS] > 0


def test_what_the_solver_clips_is_known_by_its_class(pipe: EarlyExitPipeline):
    own = pipeline()
    own.scheduler.register_to_config(clip_sample=True, clip_sample_range=2.0)
    assert record(own, pipe.exits, [0], [0], **CALL).clip == 2.0
    use_sampler(own, "dpm")  # which does not clip, whatever the config it was made of says
    assert record(own, pipe.exits, [0], [0], **CALL).clip is None


def test_the_search_finds_the_best_of_all_schedules():
    generator = np.random.default_rng(1)
    size = 9
    gaps = [(a, b, c) for a, b, c in itertools.combinations(range(size + 1), 3)]
    prices = {gap: float(generator.uniform()) for gap in gaps}
    found = search(prices, size)
    assert sorted(found) == list(range(2, size + 1))
    for count, best in found.items():
        rest = itertools.combinations(range(2, size), count - 2)
        cheapest = min(price_of((0, 1, *chosen), prices, size) for chosen in rest)
        assert best.price == pytest.approx(cheapest)
        assert best.price == pytest.approx(price_of(best.full, prices, size))
        assert len(best.full) == count
    assert price_of((0, 2, 3), prices, size) == math.inf
    assert nearest(found, 4.5).full == found[5].full
    assert nearest(found, 4.4).full == found[4].full
    with pytest.raises(ValueError, match="no schedule was found"):
        nearest({}, 3)


def test_with_the_last_step_in_full_the_best_of_those_schedules_is_found():
    generator = np.random.default_rng(2)
    size = 8
    prices = {gap: float(generator.uniform()) for gap in itertools.combinations(range(size + 1), 3)}
    free, found = search(prices, size), search(prices, size, last_full=True)
    assert sorted(found) == list(range(3, size + 1))
    for count, best in found.items():
        rest = itertools.combinations(range(2, size - 1), count - 3)
        cheapest = min(price_of((0, 1, *chosen, size - 1), prices, size) for chosen in rest)
        assert best.full[-1] == size - 1
        assert best.price == pytest.approx(cheapest)
    assert any(free[count].full != best.full for count, best in found.items())


def test_a_long_run_has_no_schedule_with_gaps_that_were_not_priced():
    size = 3 * LONGEST
    prices = {(a, b, c): 1.0 for a, b, c in itertools.combinations(range(size + 1), 3) if c - b <= LONGEST >= b - a}
    assert min(search(prices, size)) == 2 + math.ceil((size - 1) / LONGEST) - 1


def test_searched_runs_the_steps_it_names(pipe: EarlyExitPipeline, trajectory: Trajectory):
    best = search(gap_prices(pipe.exits, trajectory, (1.0,) * STEPS), STEPS)[4]
    layers = len(pipe.transformer.transformer_blocks)
    drawn = generate(
        pipe,
        seeds("test", 2),
        [0, 1],
        batch_size=2,
        exit_policy=static_cache_schedule(best.full, num_steps=STEPS, num_layers=layers),
        **CALL,
    )
    trace: Trace = drawn.trace
    ran = [step for step in range(STEPS) if bool((trace.depths[step] == layers).all())]
    assert tuple(ran) == best.full
    assert trace.measured.sum() == 0
    regular = generate(
        pipe, seeds("test", 2), [0, 1], batch_size=2, exit_policy=periodic_cache(3, warmup_steps=2), **CALL
    )
    same = static_cache_schedule((0, 1, 4, 7), num_steps=STEPS, num_layers=layers)
    again = generate(pipe, seeds("test", 2), [0, 1], batch_size=2, exit_policy=same, **CALL)
    assert torch.equal(regular.images, again.images)


@pytest.mark.parametrize("full", [(), (1, 2), (0, 2, 2), (0, 3, 2), (0, STEPS)])
def test_schedules_that_make_no_sense_are_refused(full: tuple[int, ...]):
    with pytest.raises(ValueError, match="expected ascending places"):
        static_cache_schedule(full, num_steps=STEPS, num_layers=3)


def test_unfit_input_is_refused(pipe: EarlyExitPipeline, trajectory: Trajectory):
    with pytest.raises(ValueError, match="weights"):
        gap_prices(pipe.exits, trajectory, (1.0,) * (STEPS - 1))
    short = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, length=1)
    with pytest.raises(ValueError, match="2 predictions"):
        gap_prices(short, trajectory, (1.0,) * STEPS)
    with pytest.raises(ValueError, match="at least 3"):
        search({}, 2)
    with pytest.raises(ValueError, match=r"weights .*nan.*, expected finite numbers"):
        gap_prices(pipe.exits, trajectory, (1.0, math.nan, *(1.0,) * (STEPS - 2)))
    prices = gap_prices(pipe.exits, trajectory, (1.0,) * STEPS)
    for wrong in (STEPS - 1, STEPS + 1):
        with pytest.raises(ValueError, match=f"prices of {STEPS} steps, num_steps={wrong}, expected as many"):
            search(prices, wrong)
    with pytest.raises(ValueError, match=r"no price for the gap \(0, 1, 3\)"):
        search({gap: price for gap, price in prices.items() if gap != (0, 1, 3)}, STEPS)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"count={wrong}, expected a finite number"):
            nearest(search(prices, STEPS), wrong)
    with pytest.raises(ValueError, match="2 seeds, 1 labels"):
        record(pipe, pipe.exits, [1, 2], [0], **CALL)
