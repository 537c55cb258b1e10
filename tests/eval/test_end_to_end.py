"""A stock DiT end to end, and latency at the shape of DiT-XL/2, both at tiny size: they run, and their reports hold what they promise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from stock import dit_pipeline
from tiny_families import exits_for

from ee_diffusion.diffusion.pipelines.stock import EarlyExitDiTPipeline
from ee_diffusion.metrics.splits import SEEDS
from eval import end_to_end, latency
from eval.end_to_end import EndToEndOptions
from eval.work import end_to_end as work


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
def test_end_to_end(folders, tmp_path, monkeypatch):
    words = "--num_inference_steps 5 --count 6 --calibration_count 4 --batch_size 3 --num_classes 3 --judged_size 16"
    words += " --error_thresholds 0.5 --searched_fitted 0.2 0.4 --searched_joint 0.2 --fewer_steps 0.8"
    call(monkeypatch, end_to_end, flags(folders), words, "--output_dir", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for row in report["tables"]["candidates"]}
    kinds = {row["kind"] for row in rows.values()}
    assert {"full", "deediff_share", "error_threshold", "periodic_cache", "fewer_steps", "searched_joint"} <= kinds
    for name, computed in {
        "searched fitted 4 computed": 4,
        "searched fitted 3 computed": 3,
        "periodic fitted 2": 3,
    }.items():
        assert rows[name]["executed"] == pytest.approx(4 * computed / 5)
    assert rows["periodic fitted 2"]["psnr"] != rows["periodic cache 2"]["psnr"]
    assert rows["4 steps"]["steps"] == 4
    for one in ("deediff at 0.6 of the blocks", "error threshold 0.5"):
        assert {f"{kind} of {one}" for kind in ("static", "random per step", "random overall", "fewer steps")} <= set(
            rows
        )
        for kind in ("random per step", "random overall"):
            assert rows[f"{kind} of {one}"]["executed"] == pytest.approx(rows[one]["executed"])
    assert rows["full"]["psnr"] == 100
    assert report["tables"]["calibration"][0]["replayed"] <= 0.6
    assert report["tables"]["loaded in a new process"] == [
        {"images": 3, "largest_difference": 0.0, "same_depths": True}
    ]
    assert EarlyExitDiTPipeline.from_pretrained(tmp_path / "pipeline").exits.depths == (0, 1, 2, 3)
    assert "random overall" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "words, told",
    [
        ("--searched_fitted 0", "searched_fitted="),
        ("--searched_joint 1", "searched_joint="),
        ("--fewer_steps 0", "fewer_steps="),
        ("--fit_count 0", "fit_count="),
        ("--mag 0.1", r"candidates .*'mag'.*, expected some of deediff_shares"),
    ],
)
def test_bad_settings(words: str, told: str, monkeypatch):
    monkeypatch.setattr(work, "DiTPipeline", None)  # no work
    with pytest.raises(ValueError, match=told):
        call(monkeypatch, end_to_end, "--model a --exits b --output_dir c", words)


def test_the_step_cache_is_fitted_on_fitting_seeds_at_the_same_guidance(monkeypatch):
    seen = {}
    options = EndToEndOptions(
        model="a", exits="b", output_dir="c", num_inference_steps=5, fit_count=3, guidance_scale=2.5
    )

    def pipe(labels, *, generator, **call):
        seen.update(call, seeds=[one.initial_seed() for one in generator], labels=labels)

    monkeypatch.setattr(work, "fit_schedules", lambda pipe, call: call())
    work.fitted_cache(pipe, options)
    assert len(seen["seeds"]) == len(seen["labels"]) == 3
    assert all(seed in SEEDS["fit"] for seed in seen["seeds"])
    assert (seen["num_inference_steps"], seen["guidance_scale"]) == (5, 2.5)


@pytest.mark.slow
def test_synthetic_latency(tmp_path, monkeypatch):
    small = (
        "--num_layers 4 --num_attention_heads 2 --attention_head_dim 8 --sample_size 8 --batch_sizes 1 2 --repeats 2"
    )
    call(
        monkeypatch,
        latency,
        "synthetic",
        small,
        "--dtype float32 --compile_backend eager --device cpu --fractions 0.25 0.75 --output_dir",
        tmp_path,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["mode"], row["batch"]) for row in report["tables"]["forward"]] == [
        (mode, rows) for mode in ("eager", "compiled") for rows in (1, 2)
    ]
    for row in report["tables"]["forward"]:
        assert min(row[f"{kind} at {part}"] for kind in ("time", "realised") for part in (0.25, 0.75)) > 0
        assert row["off"] > 0


@pytest.mark.parametrize(
    "words, told",
    [
        ("", "model=None, expected"),
        ("--model m", "exits=None, expected"),
        ("--model m --exits e", "output_dir=None, expected"),
        ("--model m --exits e --output_dir o --count 0", "count=0, expected"),
        ("--model m --exits e --output_dir o --deediff_shares 1.5", "deediff_shares=.1.5., expected"),
    ],
)
def test_missing_folders_and_numbers_out_of_range(words, told, monkeypatch):
    with pytest.raises(ValueError, match=told):
        call(monkeypatch, end_to_end, words)


def test_exits_of_another_kind_end_in_words(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "CachedOutputExits"}')
    with pytest.raises(ValueError, match="holds CachedOutputExits, expected one of"):
        work.load_exits(tmp_path)


@pytest.mark.parametrize(
    "words, told",
    [
        ("", "output_dir=None, expected"),
        ("--output_dir o --dtype int3", "dtype='int3', expected"),
        ("--output_dir o --modes fast", "expected eager, compiled"),
        ("--output_dir o --fractions 1.5", "fractions="),
        ("--output_dir o --repeats 0", "repeats="),
    ],
)
def test_bad_settings_of_synthetic_latency(words, told, monkeypatch):
    with pytest.raises(ValueError, match=told):
        call(monkeypatch, latency, "synthetic", words)


def test_dry_runs(monkeypatch, capsys):
    for script, words in ((end_to_end, "--model m --exits e --output_dir o"), (latency, "synthetic --output_dir o")):
        with pytest.raises(SystemExit) as stopped:
            call(monkeypatch, script, words, "--dry-run --seed 7")
        assert stopped.value.code == 0
        assert json.loads(capsys.readouterr().out)["seed"] == 7
