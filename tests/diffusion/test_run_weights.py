"""All answers of a run weighed together: against least squares in numpy, which runs they hold for, that they keep runs nearer to the full
model's, files, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import pipeline
from stock import dit_pipeline

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import DepthPerStep, FullDepth, Periodic, PiecewiseDepth, Schedule
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.linear_predictor import ALONE, LinearPrediction
from ee_diffusion.diffusion.fingerprint import fingerprint
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.methods import periodic_cache, static_cache_schedule
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.recording import record, record_call
from ee_diffusion.diffusion.step_cache.trajectories import Trajectory, fit_prediction
from ee_diffusion.metrics.splits import seeds

STEPS, FULL, LAYERS = 8, [0, 1, 4, 6], 4
CALL = {"num_inference_steps": STEPS, "guidance_scale": 2.0}
WORTH = [0.0, 0.3, 0.5, 0.2, 1.0, 0.7, 0.4, 2.0]
ANSWERED = {2: [1, 0], 3: [1, 0], 5: [4, 1], 7: [6, 4]}  # step -> the steps whose values it weighs


@pytest.fixture(scope="module")
def pipe() -> EarlyExitPipeline:
    return pipeline()


@pytest.fixture(scope="module")
def exits(pipe: EarlyExitPipeline) -> CachedOutputExits:
    return CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type="epsilon")


@pytest.fixture(scope="module")
def trajectory(pipe: EarlyExitPipeline, exits: CachedOutputExits) -> Trajectory:
    return record(pipe, exits, seeds("fit", 2), [0, 1], **CALL)


def fitted(worth: list[float] = WORTH) -> tuple[LinearPrediction, torch.Tensor]:
    """A prediction and the values it saw: walks that drift, so that misses of several steps point the same way."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(STEPS, 2, 300, generator=generator).cumsum(0) + 3 * torch.randn(2, 300, generator=generator)
    made = LinearPrediction(STEPS, joint=True)
    made.fit(torch.linspace(900, 40, STEPS, dtype=torch.float64), values, torch.tensor(worth))
    return made, values.flatten(1).double()


def by_least_squares(values: torch.Tensor, worth: list[float], alone: float) -> dict[int, np.ndarray]:
    """The same by rows of one large system: the misses' sum, then sqrt(alone) times each."""
    columns = [(step, place) for step, places in ANSWERED.items() for place in places]
    told, numbers = values.numpy(), values.shape[1]
    matrix, wanted = np.zeros((numbers * (1 + len(ANSWERED)), len(columns))), np.zeros(numbers * (1 + len(ANSWERED)))
    for block, step in enumerate(ANSWERED, 1):
        rows = slice(block * numbers, (block + 1) * numbers)
        wanted[rows] = alone**0.5 * worth[step] * told[step]
        wanted[:numbers] += worth[step] * told[step]
        for place, (at, said) in enumerate(columns):
            if at == step:
                matrix[rows, place] = alone**0.5 * worth[step] * told[said]
                matrix[:numbers, place] = worth[step] * told[said]
    found = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
    return {step: found[[at == step for at, _ in columns]] for step in ANSWERED}


def test_the_weights_of_a_run_are_those_of_least_squares():
    prediction, values = fitted()
    run = prediction.joint_weights(FULL, 2)
    for step, wanted in by_least_squares(values, WORTH, ALONE).items():
        assert run.places[step].tolist() == ANSWERED[step]
        np.testing.assert_allclose(run.weights[step].numpy(), wanted, rtol=1e-3, atol=1e-3)
    assert bool(run.weights[FULL].isnan().all())
    assert bool((run.places[FULL] == -1).all())
    times = prediction.times.double()
    own = {step: prediction.weights(times[places][None], times[[step]])[0] for step, places in ANSWERED.items()}

    def missed(weights: dict[int, torch.Tensor]) -> tuple[float, float]:
        misses = [
            WORTH[step]
            * (sum(w * values[place] for w, place in zip(weights[step], places, strict=True)) - values[step])
            for step, places in ANSWERED.items()
        ]
        return float(sum(misses).square().mean()), float(sum(one.square().mean() for one in misses))

    together, apart = missed({step: run.weights[step] for step in ANSWERED}), missed(own)
    assert together[0] < 0.95 * apart[0], "their sum is smaller"
    assert together[1] > apart[1], "which each pays for"


def test_a_step_whose_misses_are_worth_nothing_is_left_to_itself():
    worth = [*WORTH[:5], 0.0, *WORTH[6:]]
    run = fitted(worth)[0].joint_weights(FULL, 2)
    assert bool(run.weights[5].isnan().all())
    assert not run.weights[[2, 3, 7]].isnan().any()
    huge = fitted([1e12, *worth[1:]])[0].joint_weights(
        FULL, 2
    )  # as flow matching's first step is, which always runs in full
    assert torch.equal(huge.weights.nan_to_num(), run.weights.nan_to_num())
    nothing = fitted([0.0] * STEPS)[0].joint_weights(FULL, 2)
    assert bool(nothing.weights.isnan().all())


def test_a_step_that_is_worth_little_is_not_given_over_to_the_misses_of_others():
    """Down to nothing its answer goes over into the one that is best by itself."""
    misses = []
    for worth in (1e-2, 1e-4, 1e-6, 1e-8, 1e-12):
        prediction, values = fitted([1.0, 1.0, 1.0, worth, 1.0, 1.0, 1.0, 1.0])
        times = prediction.times.double()
        own = prediction.weights(times[[1, 0]][None], times[[3]])[0]
        weights = prediction.joint_weights(FULL, 2).weights[3].nan_to_num(float(own[0]))
        misses.append(float((weights @ values[[1, 0]] - values[3]).square().mean().sqrt()))
        alone = float((own @ values[[1, 0]] - values[3]).square().mean().sqrt())
    assert max(misses) < 60 * alone
    assert misses[2] < 1.1 * alone
    assert misses[3] == pytest.approx(alone, rel=1e-3)


def test_steps_that_lie_near_one_another_are_told_apart():
    """Values that hardly change in a run: what tells one step from another is below what float32 holds of their moments."""
    steps = 60
    time = torch.linspace(0, 1, steps, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    shapes = torch.randn(4, 2, 200, generator=generator, dtype=torch.float64)
    values = sum((1e-3 * time**power if power else time**0)[:, None, None] * s for power, s in enumerate(shapes))
    values = values + 1e-7 * torch.randn(steps, 2, 200, generator=generator, dtype=torch.float64)
    prediction = LinearPrediction(steps, joint=True)
    prediction.fit(torch.linspace(900, 40, steps, dtype=torch.float64), values, torch.ones(steps))
    full = [0, *range(1, steps, 3)]
    run = prediction.joint_weights(full, 2)
    flat, asked = values.flatten(1), [step for step in range(steps) if step not in full]
    columns = [(step, place) for step in asked for place in run.places[step].tolist() if place >= 0]
    gram = flat @ flat.T / flat.shape[1]
    places, at = (torch.tensor([column[one] for column in columns]) for one in (1, 0))
    matrix = gram[places][:, places] * (1 + ALONE * (at[:, None] == at))
    wanted = gram[places][:, asked].sum(1) + ALONE * gram[places, at]
    best = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]

    def sum_of_squares(weights: torch.Tensor) -> float:
        misses = torch.zeros(steps, flat.shape[1], dtype=torch.float64)
        misses = misses.index_add(0, at, weights[:, None] * flat[places])[asked] - flat[asked]
        return float(misses.sum(0).square().mean() + ALONE * misses.square().mean(1).sum())

    found = torch.stack([run.weights[step, run.places[step].tolist().index(place)] for step, place in columns])
    assert sum_of_squares(found) < 1.2 * sum_of_squares(best)
    assert ALONE == 1.0, "as documented: the sum and each alike"


def test_one_value_where_one_is_remembered():
    prediction, _ = fitted()
    run = prediction.joint_weights([0, 4], 2)
    assert run.places[:, 1].tolist() == [-1, -1, -1, -1, -1, 0, 0, 0]
    assert run.weights[1:4, 1].tolist() == [0.0] * 3
    assert not run.weights[1:4, 0].isnan().any()
    assert prediction.joint_weights([0], 3).places[5].tolist() == [0, -1, -1]
    longer = prediction.joint_weights(FULL, 3)
    assert longer.places[5].tolist() == [4, 1, 0]
    assert prediction.joint_weights(range(STEPS), 2).weights.isnan().all()


def test_they_hold_for_rows_that_ran_in_full_as_planned():
    prediction, _ = fitted()
    times = prediction.times.double()
    run = prediction.joint_weights(FULL, 2)
    remembered = torch.stack([times[[4, 1]], times[[4, 0]], times[[1, 0]], times[[4, 1]]])
    remembered[3, 1] = torch.nan
    now = times[[5, 5, 5, 5]]
    weights, own = prediction.weights(remembered, now, run), prediction.weights(remembered, now)
    assert torch.equal(weights[1:], own[1:]), "other steps, or one of two"
    assert torch.equal(weights[0], run.weights[5])
    assert not torch.allclose(weights[0], own[0], atol=1e-3)
    early = prediction.joint_weights([0, 4], 2)
    only = torch.stack([times[[0, 0]], times[[0, 0]]])
    only[0, 1] = torch.nan
    at = prediction.weights(only, times[[2, 2]], early)
    assert torch.equal(at[0], early.weights[2]), "one value, as planned"
    assert not torch.equal(at[1], early.weights[2]), "two where one was planned"
    full = prediction.weights(times[[1, 0]][None], times[[4]], run)
    assert torch.equal(full, prediction.weights(times[[1, 0]][None], times[[4]])), "a step that is planned in full"


SCHEDULES = {
    "depths": DepthPerStep((LAYERS, LAYERS, 0, 0, LAYERS, 0, LAYERS, 0)),
    "period": Periodic(2, 2),
    "time": PiecewiseDepth((500.0,), (0, LAYERS)),
}
NO_PLAN = {
    "a deeper exit": DepthPerStep((LAYERS, LAYERS, 0, 0, 2, 0, LAYERS, 0)),
    "no first step": DepthPerStep((0, LAYERS, 0, 0, LAYERS, 0, LAYERS, 0)),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_exits_go_along_with_static_schedules(schedule: Schedule, exits: CachedOutputExits, trajectory: Trajectory):
    made = fit_prediction(exits, trajectory, (1.0,) * STEPS)
    along = made.along(schedule, num_steps=STEPS, num_layers=LAYERS)
    ran = [
        all(schedule.layers(step, float(time), num_steps=STEPS, num_layers=LAYERS))
        for step, time in enumerate(trajectory.times)
    ]
    wanted = made.prediction.joint_weights([step for step, full in enumerate(ran) if full], 2)
    assert torch.equal(along._run.places, wanted.places)
    assert torch.equal(along._run.weights.isnan(), wanted.weights.isnan())
    assert made._run is None, "nothing of the run stays in the exits"
    assert along.prediction is made.prediction


def test_without_a_plan_they_stay_as_they_are(exits: CachedOutputExits, trajectory: Trajectory):
    made, alone = fit_prediction(exits, trajectory, (1.0,) * STEPS), fit_prediction(exits, trajectory)
    for schedule in NO_PLAN.values():
        assert made.along(schedule, num_steps=STEPS, num_layers=LAYERS) is made
    shorter = DepthPerStep((LAYERS, LAYERS, 0, 0, LAYERS, 0, 0))
    assert made.along(shorter, num_steps=STEPS - 1, num_layers=LAYERS) is made
    for other in (exits, alone):
        assert other.along(SCHEDULES["depths"], num_steps=STEPS, num_layers=LAYERS) is other
    assert made.along(FullDepth(), num_steps=STEPS, num_layers=LAYERS)._run.weights.isnan().all()


def test_a_miss_is_worth_what_it_does_to_the_clean_image(pipe: EarlyExitPipeline, trajectory: Trajectory):
    weights = tuple(0.1 * (step + 1) for step in range(STEPS))
    for cached_type in ("sample", "epsilon"):
        own = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type=cached_type)
        made = fit_prediction(own, trajectory, weights)
        signal = pipe.scheduler.alphas_cumprod.double()[trajectory.times.long()] ** 0.5
        moved = torch.ones(STEPS, dtype=torch.float64) if cached_type == "sample" else (1 - signal**2) ** 0.5 / signal
        torch.testing.assert_close(
            made.prediction.error_weights.double(), torch.tensor(weights) * moved, rtol=1e-3, atol=1e-6
        )
    flow = CachedOutputExits(num_train_timesteps=1000, prediction_type="flow", cached_type="epsilon")
    found = flow.clean_per_value(torch.tensor([500.0, 250.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([1.0, 1 / 3], dtype=torch.float64))


@pytest.mark.parametrize("full", [(0, 1, 3, 5), None], ids=["searched", "period"])
def test_a_run_under_a_schedule_answers_by_them(full: tuple | None, pipe: EarlyExitPipeline, trajectory: Trajectory):
    """Nearer to the full model, image by image in any batch, and not where the policy decides by itself."""
    layers = len(pipe.transformer.transformer_blocks)
    policy = (
        periodic_cache(3, warmup_steps=2)
        if full is None
        else static_cache_schedule(full, num_steps=STEPS, num_layers=layers)
    )
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type="epsilon")
    apart, together = fit_prediction(exits, trajectory), fit_prediction(exits, trajectory, (1.0,) * STEPS)

    def drawn(heads: CachedOutputExits, chosen: Policy | None, images: tuple[int, ...] = (0, 1)) -> torch.Tensor:
        pipe.exits = heads
        call = {"generator": [torch.Generator().manual_seed(seeds("fit", 2)[image]) for image in images]}
        return pipe(list(images), exit_policy=chosen, output_type="pt", **call, **CALL).images

    plain = drawn(exits, None)
    missed = [float((drawn(heads, policy) - plain).square().mean()) for heads in (apart, together)]
    assert 0 < missed[1] < missed[0]
    torch.testing.assert_close(drawn(together, policy, (1,)), drawn(together, policy)[1:], rtol=0, atol=1e-5)
    assert together._run is None
    deciding = replace(policy, criterion=Threshold(0.0))  # leaves wherever it may
    assert torch.equal(drawn(together, deciding), drawn(apart, deciding))


def test_three_remembered_values_are_weighed_together_too(pipe: EarlyExitPipeline, trajectory: Trajectory):
    longer = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type="epsilon", length=3)
    made = fit_prediction(longer, trajectory, (1.0,) * STEPS).along(
        SCHEDULES["depths"], num_steps=STEPS, num_layers=LAYERS
    )
    assert made._run.places[5].tolist() == [4, 1, 0]


@pytest.mark.filterwarnings("ignore:what these exits remember is weighed for")
def test_a_plan_is_of_its_run_alone():
    """One attachment, one policy that fits any number of steps: the second run is another one, and is drawn as if it were the first."""
    pipe = dit_pipeline()
    own = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type="epsilon")
    period = periodic_cache(2, warmup_steps=2)

    def drawn(steps: int) -> np.ndarray:
        return pipe(
            [0, 1], generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np"
        ).images

    made = fit_prediction(own, record_call(pipe, own, lambda: drawn(STEPS)).trajectory, (1.0,) * STEPS)
    alone = []
    for steps in (STEPS, 6):
        with attach_exits(pipe, made, period):
            alone.append(drawn(steps))
    with attach_exits(pipe, made, period):
        together = [drawn(steps) for steps in (STEPS, 6, STEPS)]
    for images, wanted in zip(together, [*alone, alone[0]], strict=True):
        np.testing.assert_array_equal(images, wanted)


def test_files_half_precision_and_fingerprints(exits: CachedOutputExits, trajectory: Trajectory, tmp_path: Path):
    made = fit_prediction(exits, trajectory, (1.0,) * STEPS)
    made.save_pretrained(tmp_path)
    wanted = made.prediction.joint_weights(FULL, 2).weights
    for kind in (None, torch.bfloat16):
        loaded = CachedOutputExits.from_pretrained(tmp_path, torch_dtype=kind)
        assert loaded.config.joint is True
        assert torch.equal(loaded.prediction.joint_weights(FULL, 2).weights.nan_to_num(), wanted.nan_to_num())
    moved = copy.deepcopy(made).to(torch.bfloat16)
    assert moved.prediction.error_weights.dtype == torch.float32
    assert torch.equal(moved.prediction.joint_weights(FULL, 2).weights.nan_to_num(), wanted.nan_to_num())
    assert fingerprint(made) != fingerprint(fit_prediction(exits, trajectory))
    assert "prediction.error_weights" not in fit_prediction(made, trajectory).state_dict(), "fitted again, without"
    assert fit_prediction(made, trajectory).config.joint is None


def test_refused(pipe: EarlyExitPipeline, exits: CachedOutputExits, trajectory: Trajectory):
    prediction, _ = fitted()
    for full in ([], [1, 2], [0, 3, 2], [0, 0], [0, STEPS]):
        with pytest.raises(ValueError, match="expected ascending places, the first of them 0"):
            prediction.joint_weights(full, 2)
    with pytest.raises(ValueError, match="length=0"):
        prediction.joint_weights(FULL, 0)
    for unknown in (
        LinearPrediction(STEPS),
        LinearPrediction(STEPS, joint=True),
        fit_prediction(exits, trajectory).prediction,
    ):
        with pytest.raises(ValueError, match=r"without \(all of\) its tables"):
            unknown.joint_weights(FULL, 2)
    for wrong in ((-1.0,) * STEPS, (float("nan"),) * STEPS, (float("inf"),) * STEPS, (1e300,) * STEPS):
        with pytest.raises(ValueError, match=f"expected {STEPS} finite numbers, none below 0"):
            fit_prediction(exits, trajectory, wrong)
    for wrong in ((1.0,) * (STEPS - 1), (None,) * STEPS, ("1",) * STEPS, torch.ones(STEPS)):
        with pytest.raises(ValueError, match=f"expected {STEPS} numbers, none below 0"):
            fit_prediction(exits, trajectory, wrong)
    for full, length in (([0, 1.5], 2), (FULL, 2.0), (FULL, True)):
        with pytest.raises(ValueError, match="expected whole numbers"):
            prediction.joint_weights(full, length)
    with pytest.raises(ValueError, match="all zero at a step"):
        LinearPrediction(STEPS).fit(trajectory.times, torch.zeros_like(trajectory.clean))
    with pytest.raises(ValueError, match="the schedule has 7 depths, this run has 8 steps"):
        fit_prediction(exits, trajectory, (1.0,) * STEPS).along(
            DepthPerStep((LAYERS,) * 7), num_steps=STEPS, num_layers=LAYERS
        )
    with pytest.raises(ValueError, match="joint=False, expected both or neither"):
        LinearPrediction(STEPS).fit(trajectory.times, trajectory.clean, torch.ones(STEPS))
    with pytest.raises(ValueError, match="joint=True, expected both or neither"):
        LinearPrediction(STEPS, joint=True).fit(trajectory.times, trajectory.clean)
    with pytest.raises(ValueError, match="joint=True with fitted_steps=0"):
        CachedOutputExits(joint=True)
    with pytest.raises(ValueError, match="know no trajectory"):
        CachedOutputExits.from_config(exits.config, fitted_steps=STEPS, joint=True).check_fits(pipe.transformer)
    broken = fit_prediction(exits, trajectory, (1.0,) * STEPS)
    broken.prediction.error_weights[3] = torch.nan
    with pytest.raises(ValueError, match="know no trajectory"):
        broken.check_fits(pipe.transformer)
