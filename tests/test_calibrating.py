"""What `ee-diffusion calibrate` hands to what does its work: seeds, trust in the gains, solvers that ask twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import pipeline

from ee_diffusion.cli import calibrate as calibrating
from ee_diffusion.cli.main import main
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.pipelines.sampling import use_sampler
from ee_diffusion.metrics.splits import balanced_labels, seeds, shuffled_labels


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipeline().save_pretrained(folder)
    return folder


def words(model: Path, output: Path, *more: object) -> list[str]:
    settings = ["--num_inference_steps", 6, "--guidance_scale", 2.0, "--count", 3, "--batch_size", 4]
    searching = (
        [] if "accumulated_error_budget" in more or "per_step_error_threshold" in more else ["--search_count", 2]
    )
    goal = ["--budget", 1.0, *searching, *more]
    return [str(word) for word in ("calibrate", "--model", model, "--output", output, *settings, *goal)]


def test_what_is_searched_and_what_is_judged_share_no_seed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: dict[str, list[int]] = {}
    for name, place in (("live_losses", 2), ("record", 2)):
        work = getattr(calibrating, name)

        def watched(*args, name=name, place=place, work=work, **call):
            drawn[name] = list(args[place])
            return work(*args, **call)

        monkeypatch.setattr(calibrating, name, watched)
    assert main(words(model, tmp_path / "policy.json", "--values", 0.5)) == 0
    assert drawn == {"live_losses": seeds("calibrate", 3, first=1000), "record": seeds("fit", 2)}


def test_fewer_images_than_classes_show_no_particular_ones(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is certified speaks for every class, so the first few of them must not stand for all."""
    given: list[int] = []
    work = calibrating.live_losses

    def watched(*args, class_labels, **call):
        given.extend(class_labels)
        return work(*args, class_labels=class_labels, **call)

    monkeypatch.setattr(calibrating, "live_losses", watched)
    assert main(words(model, tmp_path / "policy.json", "--kind", "accumulated_error_budget", "--values", 0.01)) == 0
    assert len(set(given)) == 3
    assert given != [0, 1, 2]
    labels = shuffled_labels(30, 10, seed=4)
    assert labels == shuffled_labels(30, 10, seed=4) != shuffled_labels(30, 10, seed=5)
    assert sorted(labels) == sorted(balanced_labels(30, 10)), "as often as before"
    means = [sum(shuffled_labels(10, 1000, seed=seed)) / 10 for seed in range(40)]
    assert abs(sum(means) / 40 - 499.5) < 4 * 288.7 / 20, "every class alike"


@pytest.mark.parametrize(
    ("more", "power"),
    [
        (["--kind", "accumulated_error_budget", "--values", 0.01], 0.5),
        (["--kind", "static_cache_schedule", "--values", 0.5], 1.0),
        (["--kind", "static_cache_schedule", "--values", 0.5, "--power", 0.3], 0.3),
    ],
)
def test_gains_are_trusted_as_the_kind_has_it(
    more: list, power: float, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given: list[float] = []
    error_weights = calibrating.error_weights

    def watched(*args, power):
        given.append(power)
        return error_weights(*args, power=power)

    monkeypatch.setattr(calibrating, "error_weights", watched)
    assert main(words(model, tmp_path / "policy.json", *more)) == 0
    assert given == [power]


@pytest.mark.parametrize("kind", ["accumulated_error_budget", "per_step_error_threshold"])
def test_a_solver_that_asks_twice_is_calibrated(kind: str, model: Path, tmp_path: Path):
    output = tmp_path / "policy.json"
    assert main(words(model, output, "--kind", kind, "--values", 0.01, "--sampler", "heun")) == 0
    pipe = pipeline()
    use_sampler(pipe, "heun")
    pipe.exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    trace = pipe([1], 6, 2.0, exit_policy=Policy.load(output), output_type="pt").trace
    assert len(trace.depths) == 11


@pytest.mark.parametrize("more", [[], ["--fit_cache", "memory"]])
def test_no_schedule_is_searched_for_a_solver_that_asks_twice(
    more: list, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    for name in ("local_error_gain", "error_amplification", "record"):
        monkeypatch.setattr(calibrating, name, lambda *_, **__: pytest.fail("work has begun"))
    assert main(words(model, tmp_path / "policy.json", "--values", 0.5, "--sampler", "heun", *more)) == 2
    assert "asks the model 11 times in 6 steps, at times that repeat" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
