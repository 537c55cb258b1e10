"""What each candidate draws with, and on which seeds it was fitted and measured: never on those it is tested on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import pipeline

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import DepthPerStep
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.pipelines.sampling import Generated
from ee_diffusion.diffusion.step_cache.recording import record
from ee_diffusion.diffusion.step_cache.schedule_search import gap_prices, search
from ee_diffusion.metrics.splits import SEEDS
from eval.harness import baselines, drawing, step_caches
from eval.harness.candidates import MAKERS, candidates_of, check_kinds, controls
from eval.harness.interleave import Candidate
from eval.harness.options import CandidateOptions, SamplingOptions
from eval.harness.pipeline import load

STEPS = 6
SAMPLING = SamplingOptions(num_inference_steps=STEPS, guidance_scale=2.0, batch_size=2)
OPTIONS = CandidateOptions(search_count=2, amplification_images=2, calibration_count=2)
POLICY = Policy(schedule=DepthPerStep((0,) * STEPS), exits=(0,))


def measured(pipe, folder: Path, sampling: SamplingOptions = SAMPLING, **changes) -> step_caches.Measured:
    return step_caches.Measured(pipe, sampling, replace(OPTIONS, **changes), folder=folder, known={})


def test_every_candidate_and_its_controls_draw_with_the_exits_of_their_kind(tmp_path: Path, monkeypatch):
    pipe, seen = pipeline(), []
    pipe.save_pretrained(tmp_path / "model")
    CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler).save_pretrained(tmp_path / "other")
    released = DenoisingExits.for_transformer(pipe.transformer, pipe.exits.depths, variant="released")
    released.save_pretrained(tmp_path / "released")
    lists = {"error_thresholds": [0.05], "error_budgets": [0.05], "whole_batch": [0.05], "deediff": [0.5]}
    lists |= {"searched": [0.5], "searched_epsilon": [0.5], "searched_fitted": [0.5], "searched_joint": [0.5]}
    lists |= {"cache_intervals": [2], "deediff_shares": [0.6], "released": str(tmp_path / "released")}
    own = measured(pipe, tmp_path, **lists, other_caches=[f"mine={tmp_path / 'other'}"])
    found = {one.kind: one for one in candidates_of(own.setup(), own.options)}
    draw = drawing.drawer(pipe, SAMPLING, own.exits)
    trace = draw(found["error_threshold"], [1, 2], [0, 1], 0).trace
    found |= {one.kind: one for one in controls(found["error_threshold"], trace, seed=0)}
    expected = dict.fromkeys(("error_threshold", "error_budget", "whole_batch", "searched", "periodic_cache"), "cache")
    expected |= {"searched_epsilon": "epsilon", "searched_fitted": "fitted", "searched_joint": "joint"}
    expected |= {"periodic_fitted": "fitted", "periodic_joint": "joint", "error_budget, mine": "mine"}
    expected |= {"deediff": "model", "deediff_share": "model", "released": "released", "released_threshold": "released"}
    expected |= {f"{kind} of error_threshold": "cache" for kind in ("static", "random_per_step", "random_overall")}
    assert {kind: one.exits for kind, one in found.items()} == expected | {"full": None}
    monkeypatch.setattr(
        drawing, "generate", lambda own, *_, **__: seen.append(own.exits) or Generated(torch.zeros(1), None, (1.0,))
    )
    for candidate in found.values():
        draw(candidate, [1, 2], [0, 1], 0)
        assert seen[-1] is own.exits[candidate.exits], candidate
    assert own.exits["epsilon"].config.cached_type == "epsilon"
    assert own.exits["released"].config.variant == "released"
    different = [own.exits[name] for name in ("model", "cache", "epsilon", "fitted", "joint", "mine", "released")]
    assert len({id(one) for one in different}) == len(different)


def test_exits_that_are_not_there_are_refused(tmp_path: Path):
    exits = step_caches.NamedExits(pipeline(), OPTIONS, tmp_path)
    with pytest.raises(ValueError, match="has no folder joint, expected what its candidates were drawn with"):
        _ = exits["joint"]
    with pytest.raises(ValueError, match=r"exits 'nobody', expected one of \['cache'"):
        _ = exits["nobody"]


def test_kinds_that_are_not_known_here_or_none_are_refused():
    check_kinds(CandidateOptions(searched=[0.5]), MAKERS)
    with pytest.raises(ValueError, match=r"candidates \[\], expected some of error_budgets"):
        check_kinds(CandidateOptions(), MAKERS)
    with pytest.raises(ValueError, match=r"candidates \['searched', 'db_cache'\], expected some of searched;"):
        check_kinds(CandidateOptions(searched=[0.5], db_cache=[0.1]), ["searched"])


def test_fewer_steps_take_the_time_of_the_policy_and_branches_apart_have_no_random_control(tmp_path: Path):
    pipe = pipeline()
    own = measured(pipe, tmp_path, deediff_shares=[0.6])
    (candidate,) = candidates_of(own.setup(), own.options)[1:]
    trace = drawing.drawer(pipe, SAMPLING, own.exits)(candidate, [1, 2], [0, 1], 0).trace
    name = "deediff at 0.6 of the blocks"
    made = controls(candidate, trace, seed=0, time=0.5)
    kinds = ("static", "random per step", "random overall", "fewer steps")
    assert [one.name for one in made] == [f"{kind} of {name}" for kind in kinds]
    assert (made[-1].steps, made[-1].policy) == (STEPS // 2, None)
    apart = replace(candidate, policy=replace(candidate.policy, cfg_exit="separate"))
    assert [one.name for one in controls(apart, trace, seed=0)] == [f"static of {name}"]


def test_an_oracles_seconds_are_without_its_shadows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe = pipeline()

    def drawn(drawing, chosen, labels, **call) -> Generated:
        assert drawing.exits.seconds == 0
        drawing.exits.seconds += 3.0
        return Generated(torch.zeros(len(chosen), 3, 16, 16), None, (5.0,))

    monkeypatch.setattr(drawing, "generate", drawn)
    draw = drawing.drawer(pipe, SAMPLING, step_caches.NamedExits(pipe, OPTIONS, tmp_path))
    oracle = Candidate("oracle 1", "oracle", 1.0, POLICY, STEPS, "oracle")
    assert [draw(oracle, [1, 2], [0, 1], 0).seconds for _ in range(2)] == [(2.0,), (2.0,)]


def noted_seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the trajectories that are recorded from now on."""
    seen: list[int] = []

    def noting(pipe, exits, seeds, labels, **call):
        seen.extend(seeds)
        return record(pipe, exits, seeds, labels, **call)

    monkeypatch.setattr(step_caches, "record", noting)
    return seen


def test_schedules_are_searched_on_fitting_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own, seen = measured(pipeline(), tmp_path), noted_seeds(monkeypatch)
    assert [len(steps) for steps in own.schedules("cache", [0.5])] == [3]
    assert len(seen) == 2
    assert all(seed in SEEDS["fit"] for seed in seen)
    again = measured(pipeline(), tmp_path)
    assert again.schedules("cache", [0.5]) == own.schedules("cache", [0.5])
    assert len(seen) == 2, "found once"


def test_thresholds_are_found_on_calibration_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own, seen, generate = measured(pipeline(), tmp_path), [], step_caches.generate
    monkeypatch.setattr(step_caches, "generate", lambda *a, **b: seen.extend(a[1]) or generate(*a, **b))
    found = own.thresholds("model", [0.9, 0.5])
    assert list(found) == [0.9, 0.5]
    assert found[0.9].criterion.threshold >= found[0.5].criterion.threshold
    assert len(seen) == 2
    assert all(seed in SEEDS["calibrate"] for seed in seen)


def fitted(pipe, folder: Path, sampling: SamplingOptions = SAMPLING, weights=None) -> CachedOutputExits:
    return step_caches.fitted_cache(pipe, sampling, 2, folder, weights)


def test_step_caches_are_fitted_on_fitting_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe, seen = pipeline(), noted_seeds(monkeypatch)
    made = fitted(pipe, tmp_path / "fitted")
    assert isinstance(made, CachedOutputExits)
    assert len(seen) == 2
    assert all(seed in SEEDS["fit"] for seed in seen)
    again = fitted(pipe, tmp_path / "fitted")
    assert len(seen) == 2, "fitted once"
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), made.parameters(), strict=True))


def test_joint_least_squares_are_for_one_set_of_error_weights(tmp_path: Path):
    pipe, folder = pipeline(), tmp_path / "joint"
    made = fitted(pipe, folder, weights=(0.5,) * STEPS)
    assert made.config.joint is True
    assert fitted(pipe, tmp_path / "fitted").config.joint is None
    again = fitted(pipe, folder, weights=(0.5,) * STEPS)
    assert torch.equal(again.prediction.error_weights, made.prediction.error_weights)
    for other in ((0.4,) * STEPS, None):
        with pytest.raises(ValueError, match="holds exits fitted under"):
            fitted(pipe, folder, weights=other)


def test_step_caches_are_fitted_in_float32_whatever_is_drawn_in(tmp_path: Path):
    pipeline().save_pretrained(tmp_path / "model")
    made = []
    for dtype in ("float32", "bfloat16"):
        sampling = replace(SAMPLING, model=str(tmp_path / "model"), dtype=dtype)
        made.append(fitted(load(sampling), tmp_path / dtype, sampling))
    assert torch.equal(made[0].prediction.moments, made[1].prediction.moments)
    again = fitted(load(sampling), tmp_path / "float32", sampling)
    assert torch.equal(made[0].prediction.moments, again.prediction.moments), "taken for a run in half precision"


def test_amplification_and_schedules_are_found_in_float32_whatever_is_drawn_in(tmp_path: Path, monkeypatch):
    """Not as the half-precision pipeline has them, and not by changing it."""
    pipeline().save_pretrained(tmp_path / "model")
    seen: list[torch.dtype] = []

    def noting(pipe, *rest, **call):
        seen.append(pipe.transformer.dtype)
        return record(pipe, *rest, **call)

    monkeypatch.setattr(step_caches, "record", noting)
    found, amplification = [], []
    for dtype in ("float32", "bfloat16"):
        sampling = replace(SAMPLING, model=str(tmp_path / "model"), dtype=dtype)
        pipe = load(sampling)
        own = measured(pipe, tmp_path / dtype, sampling)
        amplification.append(own.amplification)
        monkeypatch.setattr(own, "weights", lambda power: (1.0,) * STEPS)
        found += own.schedules("epsilon", [0.5])
        assert str(pipe.transformer.dtype) == f"torch.{dtype}"
        call = {"num_inference_steps": STEPS, "guidance_scale": 2.0}
        whole = load(replace(sampling, dtype="float32"))
        trajectory = record(whole, own.exits["epsilon"], SEEDS["fit"][:2], [0, 1], **call)
        best = search(
            gap_prices(own.exits["epsilon"], trajectory, (1.0,) * STEPS), STEPS, last_full=dtype == "bfloat16"
        )
        assert found[-1] == list(best[3].full)
    assert amplification[0] == amplification[1]
    assert seen == [torch.float32] * 2


def test_error_amplification_is_measured_on_fitting_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own, seen = measured(pipeline(), tmp_path), []
    monkeypatch.setattr(
        step_caches, "error_amplification", lambda *_, generator, **__: seen.append(generator.initial_seed()) or [1.0]
    )
    assert own.amplification == (1.0,)
    assert len(seen) == 1
    assert seen[0] in SEEDS["fit"]


def test_mag_caches_ratios_are_measured_on_fitting_seeds(monkeypatch: pytest.MonkeyPatch):
    seen, generate = [], baselines.CachedPipeline.generate
    monkeypatch.setattr(
        baselines.CachedPipeline,
        "generate",
        lambda own, chosen, *a, **b: seen.extend(chosen) or generate(own, chosen, *a, **b),
    )
    baselines.BASELINES["mag"](pipeline(), 0.1, num_steps=STEPS, guidance_scale=2.0)
    assert len(seen) == 8
    assert all(seed in SEEDS["fit"] for seed in seen)
