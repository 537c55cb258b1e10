"""train/fit_step_cache.py from the command line on a tiny pipeline: it writes exits that load, and figures beside the unfitted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from factories import pipeline

from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_estimator import collect_errors
from ee_diffusion.metrics.splits import seeds
from train import fit_step_cache
from train.work import step_cache


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["fit_step_cache.py", *(str(word) for word in words)])
    fit_step_cache.main()


@pytest.mark.parametrize("count", [1, 4])
def test_the_fit_is_written_with_its_figures(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = pipeline()
    made.save_pretrained(tmp_path / "model")
    words = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--num_inference_steps", 8]
    call(monkeypatch, *words, "--count", count, "--guidance_scale", 2.0, "--iterations", 20)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["uncertainty"] for row in report["rows"]] == ["unfitted", "fitted"]
    assert all(row["factor"] >= 1 for row in report["rows"])
    assert (report["rows"][0]["rank"] is None) == (count == 1)  # two rows a step do not rank
    exits = CachedOutputExits.from_pretrained(tmp_path / "out" / "exits")
    exits.check_fits(made.transformer)
    assert exits.error_estimator[2].weight.abs().sum() > 0


def test_the_figures_are_of_seeds_that_were_not_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipeline().save_pretrained(tmp_path / "model")
    began: list[int] = []

    def watched(*args, generator, **call):
        began.append(generator.initial_seed())
        return collect_errors(*args, generator=generator, **call)

    monkeypatch.setattr(step_cache, "collect_errors", watched)
    words = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--num_inference_steps", 5]
    call(monkeypatch, *words, "--count", 1, "--iterations", 1)
    assert began == [seeds("fit", 1)[0], seeds("test", 1)[0]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--iterations", 0], "iterations=0, expected at least 1$"),
        (["--iterations", -1], "iterations=-1, expected at least 1$"),
        (["--count", 0], "count=0, expected at least 1$"),
        (["--length", 0], "length=0, expected at least 1$"),
        (["--num_inference_steps", 3], "num_inference_steps=3, expected at least 4: with 2 cached"),
        (["--num_inference_steps", 4, "--length", 3], "num_inference_steps=4, expected at least 5"),
        (["--skip", 1.0], "skip=1.0, .*, expected a probability below 1"),
        (["--guidance_scale", "nan"], "guidance_scale=nan, expected .* a finite number"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_work(
    words: list, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(EarlyExitPipeline, "from_pretrained", lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match=message):
        call(monkeypatch, "--output_dir", tmp_path / "out", *words)


def test_a_model_without_a_null_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipeline("unconditional").save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match="null_class=None, expected one trained with a null class, or guidance_scale=1"
    ):
        call(monkeypatch, "--model", tmp_path / "model", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
