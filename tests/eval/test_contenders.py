"""What each contender draws with, and on which seeds it was fitted: never on those it is tested on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import pipeline

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import DepthPerStep
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.pipelines.sampling import Generated
from ee_diffusion.diffusion.step_cache.recording import record
from ee_diffusion.diffusion.step_cache.schedule_search import gap_prices, search
from ee_diffusion.metrics.splits import SEEDS
from eval.harness import baselines, candidates
from eval.harness.frontier_options import FrontierOptions
from eval.harness.interleave import Candidate
from eval.harness.options import SamplingOptions
from eval.harness.pipeline import load

STEPS = 6
SAMPLING = SamplingOptions(num_inference_steps=STEPS, guidance_scale=2.0, batch_size=2)
OPTIONS = FrontierOptions(search_count=2, gain_images=2)
POLICY = Policy(schedule=DepthPerStep((0,) * STEPS), exits=(0,))


def test_every_kind_and_the_controls_made_of_it_draw_with_its_own_exits(monkeypatch: pytest.MonkeyPatch):
    pipe, seen = pipeline(), []

    def told(drawing, chosen, labels, **call) -> Generated:
        seen.append(drawing.exits)
        return Generated(torch.zeros(len(chosen), 3, 16, 16), None, (1.0,))

    monkeypatch.setattr(candidates, "generate", told)
    trained, memory, fitted = pipe.exits, candidates.load_memory(pipe, None), candidates.noise_memory(pipe)
    together = candidates.noise_memory(pipe)
    draw = candidates.drawer(pipe, SAMPLING, memory, {"fitted": fitted, "together": together})
    expected = {
        "deediff": trained,
        "remembered": memory,
        "budgeted": memory,
        "periodic_cache": memory,
        "searched": memory,
        "searched fitted": fitted,
        "periodic fitted": fitted,
        "searched together": together,
        "periodic together": together,
        "static of budgeted": memory,
        "random_per_step of remembered": memory,
        "random_overall of remembered": memory,
    }
    for kind, exits in expected.items():
        draw(Candidate(kind, kind, None, POLICY, STEPS), [1, 2], [0, 1], 0)
        assert seen[-1] is exits, kind
    draw(Candidate("noise", "searched noise", None, POLICY, STEPS), [1, 2], [0, 1], 0)
    assert seen[-1].config.cached_type == "epsilon"
    assert seen[-1] is not fitted


def test_an_oracles_seconds_are_without_its_shadows(monkeypatch: pytest.MonkeyPatch):
    pipe = pipeline()

    def told(drawing, chosen, labels, **call) -> Generated:
        assert drawing.exits.seconds == 0
        drawing.exits.seconds += 3.0
        return Generated(torch.zeros(len(chosen), 3, 16, 16), None, (5.0,))

    monkeypatch.setattr(candidates, "generate", told)
    draw = candidates.drawer(pipe, SAMPLING, candidates.load_memory(pipe, None))
    oracle = Candidate("oracle 1", "oracle", 1.0, POLICY, STEPS)
    assert [draw(oracle, [1, 2], [0, 1], 0).seconds for _ in range(2)] == [(2.0,), (2.0,)]


def noted_seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the trajectories that are recorded from now on."""
    seen: list[int] = []

    def noting(pipe, exits, seeds, labels, **call):
        seen.extend(seeds)
        return record(pipe, exits, seeds, labels, **call)

    monkeypatch.setattr(candidates, "record", noting)
    return seen


def test_schedules_are_searched_on_fitting_seeds(monkeypatch: pytest.MonkeyPatch):
    pipe, seen = pipeline(), noted_seeds(monkeypatch)
    memory = candidates.load_memory(pipe, None)
    found = candidates.schedules_of(pipe, memory, SAMPLING, OPTIONS, (1.0,) * STEPS, [0.5])
    assert [len(full) for full in found.values()] == [3]
    assert len(seen) == 2
    assert all(seed in SEEDS["fit"] for seed in seen)


def test_predictions_are_fitted_on_fitting_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe, seen = pipeline(), noted_seeds(monkeypatch)
    made = candidates.fitted_memory(pipe, SAMPLING, OPTIONS, tmp_path / "fitted")
    assert isinstance(made, CachedOutputExits)
    assert len(seen) == 2
    assert all(seed in SEEDS["fit"] for seed in seen)
    again = candidates.fitted_memory(pipe, SAMPLING, OPTIONS, tmp_path / "fitted")
    assert len(seen) == 2, "fitted once"
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), made.parameters(), strict=True))


def test_answers_weighed_together_are_for_one_set_of_error_weights(tmp_path: Path):
    pipe, folder = pipeline(), tmp_path / "together"
    made = candidates.fitted_memory(pipe, SAMPLING, OPTIONS, folder, (0.5,) * STEPS)
    assert made.config.joint is True
    alone = candidates.fitted_memory(pipe, SAMPLING, OPTIONS, tmp_path / "fitted")
    assert alone.config.joint is None
    again = candidates.fitted_memory(pipe, SAMPLING, OPTIONS, folder, (0.5,) * STEPS)
    assert torch.equal(again.prediction.error_weights, made.prediction.error_weights)
    for other in ((0.4,) * STEPS, None):
        with pytest.raises(ValueError, match="holds exits fitted under"):
            candidates.fitted_memory(pipe, SAMPLING, OPTIONS, folder, other)
    assert candidates.fitted_beside(pipe, tmp_path).keys() == {"fitted", "together"}
    assert candidates.fitted_beside(pipe, tmp_path / "nowhere") == {}


def test_predictions_are_fitted_in_float32_whatever_is_drawn_in(tmp_path: Path):
    pipeline().save_pretrained(tmp_path / "model")
    made = []
    for dtype in ("float32", "bfloat16"):
        sampling = replace(SAMPLING, model=str(tmp_path / "model"), dtype=dtype)
        made.append(candidates.fitted_memory(load(sampling), sampling, OPTIONS, tmp_path / dtype))
    assert torch.equal(made[0].prediction.moments, made[1].prediction.moments)
    again = candidates.fitted_memory(load(sampling), sampling, OPTIONS, tmp_path / "float32")
    assert torch.equal(made[0].prediction.moments, again.prediction.moments), "taken for a run in half precision"


def test_gains_and_schedules_are_found_in_float32_whatever_is_drawn_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not as the half-precision pipeline has them, and not by changing it."""
    pipeline().save_pretrained(tmp_path / "model")
    seen: list[torch.dtype] = []

    def noting(pipe, *rest, **call):
        seen.append(pipe.transformer.dtype)
        return record(pipe, *rest, **call)

    monkeypatch.setattr(candidates, "record", noting)
    gains, found = [], []
    for dtype in ("float32", "bfloat16"):
        sampling = replace(SAMPLING, model=str(tmp_path / "model"), dtype=dtype)
        pipe = load(sampling)
        memory = candidates.noise_memory(pipe)
        gains.append(candidates.gains_of(pipe, memory, sampling, OPTIONS))
        found.append(candidates.schedules_of(pipe, memory, sampling, OPTIONS, (1.0,) * STEPS, [0.5]))
        assert str(pipe.transformer.dtype) == f"torch.{dtype}"
        trajectory = record(
            load(replace(sampling, dtype="float32")),
            memory,
            SEEDS["fit"][:2],
            [0, 1],
            num_inference_steps=STEPS,
            guidance_scale=2.0,
        )
        prices = gap_prices(memory, trajectory, (1.0,) * STEPS)
        best = search(prices, STEPS, last_full=dtype == "bfloat16")
        assert found[-1] == {"3": list(best[3].full)}
    assert gains[0] == gains[1]
    assert seen == [torch.float32] * 2


def test_gains_are_measured_on_fitting_seeds(monkeypatch: pytest.MonkeyPatch):
    pipe, seen = pipeline(), []
    monkeypatch.setattr(
        candidates, "error_amplification", lambda *_, generator, **__: seen.append(generator.initial_seed())
    )
    candidates.gains_of(pipe, candidates.load_memory(pipe, None), SAMPLING, OPTIONS)
    assert len(seen) == 1
    assert seen[0] in SEEDS["fit"]


def test_mag_caches_ratios_are_measured_on_fitting_seeds(monkeypatch: pytest.MonkeyPatch):
    seen, generate = [], baselines.Peer.generate
    monkeypatch.setattr(
        baselines.Peer, "generate", lambda own, chosen, *a, **b: seen.extend(chosen) or generate(own, chosen, *a, **b)
    )
    baselines.PEERS["mag"](pipeline(), 0.1, num_steps=STEPS, guidance_scale=2.0)
    assert len(seen) == 8
    assert all(seed in SEEDS["fit"] for seed in seen)
