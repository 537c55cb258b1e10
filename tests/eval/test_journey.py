"""The journey of a stock DiT and the shape of DiT-XL/2, both at tiny size: they run, and their reports hold what they promise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from stock import dit_pipeline
from tiny_families import exits_for

from ee_diffusion.diffusion.pipelines.stock import EarlyExitDiTPipeline
from ee_diffusion.metrics.splits import SEEDS
from eval import journey, journey_draw, shape


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A stock pipeline and exits fitted to it."""
    pipe, folder = dit_pipeline(), tmp_path_factory.mktemp("dit")
    pipe.save_pretrained(folder / "model")
    exits_for(pipe.transformer).save_pretrained(folder / "exits")
    return {"--model": folder / "model", "--exits": folder / "exits"}


def call(monkeypatch, script, *words: object) -> None:
    monkeypatch.delenv("EE_DIFFUSION_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["script", *(part for word in words for part in str(word).split())])
    script.main()


def flags(folders: dict[str, Path]) -> str:
    return " ".join(f"{name} {folder}" for name, folder in folders.items())


@pytest.mark.slow
def test_the_journey(folders, tmp_path, monkeypatch):
    words = "--num_inference_steps 5 --count 6 --calibration_count 4 --batch_size 3 --num_classes 3 --judged_size 16"
    call(
        monkeypatch,
        journey,
        flags(folders),
        words,
        "--errors 0.5 --budget 0.6 --shares 0.2 0.4 --fewer 4 --output_dir",
        tmp_path,
    )
    report = json.loads((tmp_path / "journey.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    kinds = [row["kind"] for row in report["rows"]]
    ours = {"full", "deediff", "static", "random_per_step", "random_overall", "fewer_steps"}
    assert ours | {"remembered", "periodic_cache"} <= set(kinds)
    for name, full in {"searched fitted 4 full": 4, "searched fitted 3 full": 3, "periodic fitted 2": 3}.items():
        assert rows[name]["report"]["mean_executed"] == pytest.approx(4 * full / 5)
    assert rows["periodic fitted 2"]["psnr"] != rows["periodic cache 2"]["psnr"]
    assert rows["4 steps"]["steps"] == 4
    of_memory = [row for row in report["rows"] if row["budget"] == 0.5]
    assert len(of_memory) == 5, "remembered, its static and random controls, fewer steps"
    assert rows["full"]["psnr"]["mean"] == 100
    own, overall = rows["deediff 0.6"]["report"], rows["random_overall 0.6"]["report"]
    assert overall["mean_executed"] == pytest.approx(own["mean_executed"])
    assert rows["random_per_step 0.6"]["report"]["executed_per_step"] == pytest.approx(own["executed_per_step"])
    assert report["calibration"]["replayed"] <= 0.6
    assert report["reloaded"] == {"images": 3, "largest_difference": 0.0, "same_depths": True}
    assert EarlyExitDiTPipeline.from_pretrained(tmp_path / "pipeline").exits.depths == (0, 1, 2, 3)
    assert "random_overall" in (tmp_path / "journey.md").read_text()


@pytest.mark.parametrize(
    "wrong", [{"shares": [0.0]}, {"shares": [1.0]}, {"fewer": [0]}, {"fewer": [5]}, {"fit_count": 0}]
)
def test_bad_settings(wrong: dict):
    good = {"model": "a", "exits": "b", "output_dir": "c", "num_inference_steps": 5}
    journey.JourneyOptions(**good, shares=[0.5], fewer=[1, 4])
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        journey.JourneyOptions(**good, **wrong)


def test_memory_is_fitted_on_fitting_seeds_at_the_journeys_own_guidance(monkeypatch):
    seen = {}
    options = journey.JourneyOptions(
        model="a", exits="b", output_dir="c", num_inference_steps=5, fit_count=3, guidance_scale=2.5
    )

    def pipe(labels, *, generator, **call):
        seen.update(call, seeds=[one.initial_seed() for one in generator], labels=labels)

    monkeypatch.setattr(journey_draw, "fit_schedules", lambda pipe, call: call())
    journey_draw.fitted_memory(pipe, options)
    assert len(seen["seeds"]) == len(seen["labels"]) == 3
    assert all(seed in SEEDS["fit"] for seed in seen["seeds"])
    assert (seen["num_inference_steps"], seen["guidance_scale"]) == (5, 2.5)


@pytest.mark.slow
def test_the_shape(tmp_path, monkeypatch):
    small = (
        "--num_layers 4 --num_attention_heads 2 --attention_head_dim 8 --sample_size 8 --batch_sizes 1 2 --repeats 2"
    )
    call(
        monkeypatch,
        shape,
        small,
        "--dtype float32 --compile_backend eager --device cpu --fractions 0.25 0.75 --output_dir",
        tmp_path,
    )
    report = json.loads((tmp_path / "shape.json").read_text())
    assert [(row["mode"], row["batch"]) for row in report["rows"]] == [
        (mode, rows) for mode in ("eager", "compiled") for rows in (1, 2)
    ]
    for row in report["rows"]:
        assert min(row[f"{kind} at {part}"] for kind in ("time", "realised") for part in (0.25, 0.75)) > 0
        assert row["off"] > 0


@pytest.mark.parametrize(
    "words, told",
    [
        ("", "model=None, expected"),
        ("--model m", "exits=None, expected"),
        ("--model m --exits e", "output_dir=None, expected"),
        ("--model m --exits e --output_dir o --count 0", "count=0, expected"),
        ("--model m --exits e --output_dir o --budget 1.5", "budget=1.5, expected"),
    ],
)
def test_bad_settings_of_the_journey_end_in_words(words, told, monkeypatch):
    with pytest.raises(ValueError, match=told):
        call(monkeypatch, journey, words)


def test_exits_of_another_kind_end_in_words(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "CachedOutputExits"}')
    with pytest.raises(ValueError, match="holds CachedOutputExits, expected one of"):
        journey.load_exits(tmp_path)


@pytest.mark.parametrize(
    "words, told",
    [
        ("", "output_dir=None, expected"),
        ("--output_dir o --dtype int3", "dtype='int3', expected"),
        ("--output_dir o --modes fast", "expected eager, compiled"),
        ("--output_dir o --fractions 1.5", "parts of the depth"),
        ("--output_dir o --repeats 0", "numbers of at least 1"),
    ],
)
def test_bad_settings_of_the_shape_end_in_words(words, told, monkeypatch):
    with pytest.raises(ValueError, match=told):
        call(monkeypatch, shape, words)


def test_dry_runs(monkeypatch, capsys):
    for script, words in ((journey, "--model m --exits e --output_dir o"), (shape, "--output_dir o")):
        with pytest.raises(SystemExit) as stopped:
            call(monkeypatch, script, words, "--dry-run --seed 7")
        assert stopped.value.code == 0
        assert json.loads(capsys.readouterr().out)["seed"] == 7
