"""train/fit_tracking.py from the command line on a tiny pipeline: exits that load and are nearer than memory, figures of every depth."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from factories import pipeline
from tree import ROOT

from ee_diffusion.diffusion.exits.tracking_exits import TrackingExits
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline

sys.path.insert(0, str(ROOT / "train"))  # as it is when a script runs

import fit_tracking


@pytest.mark.parametrize("variant", ["learned", "residual"])
def test_the_fit_is_written_with_its_figures(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = pipeline()
    made.save_pretrained(tmp_path / "model")
    depth = next(depth for depth in made.exits.depths if depth)
    words = [
        "--model",
        tmp_path / "model",
        "--output_dir",
        tmp_path / "out",
        "--num_inference_steps",
        8,
        "--deeper",
        depth,
    ]
    words += ["--count", 4, "--test_count", 2, "--walk_batch_size", 2, "--guidance_scale", 2.0, "--iterations", 60]
    words += ["--train_batch_size", 8, "--variant", variant, "--skip", 0.4]
    monkeypatch.setattr(sys, "argv", ["fit_tracking.py", *map(str, words)])
    fit_tracking.main()
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [row["depth"] for row in rows] == [0, depth]
    assert rows[0]["part 3"] == pytest.approx(1.0)
    assert rows[1]["part 3"] != pytest.approx(1.0)
    assert all(row["factor"] >= 1 for row in rows)
    TrackingExits.from_pretrained(tmp_path / "out" / "exits").check_fits(made.transformer)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--walk_batch_size", 0], "--walk_batch_size 0, expected at least 1$"),
        (["--iterations", 0], "--iterations 0, expected at least 1$"),
        (["--count", 0], "--count 0, expected at least 1$"),
        (["--test_count", 0], "--test_count 0, expected at least 1$"),
        (["--train_batch_size", 0], "--train_batch_size 0, expected at least 1$"),
        (
            ["--num_inference_steps", 3],
            "--num_inference_steps 3, expected at least 4: memory of 2 is first put to the test at step 4",
        ),
        (["--count", 1, "--num_inference_steps", 6, "--train_batch_size", 7], "7, expected at most the 6 moments"),
        (
            ["--count", 1, "--num_inference_steps", 6, "--train_batch_size", 4, "--guidance_scale", 1.0],
            "expected at most the 3 moments",
        ),
        (["--skip", -0.1], "--skip -0.1 .*, expected a probability below 1"),
        (["--guidance_scale", "inf"], "--guidance_scale inf, expected .* a finite number"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_work(
    words: list, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(EarlyExitPipeline, "from_pretrained", lambda *_, **__: pytest.fail("work has begun"))
    words = ["fit_tracking.py", "--output_dir", tmp_path / "out", "--deeper", 2, *words]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(ValueError, match=message):
        fit_tracking.main()


@pytest.mark.parametrize(("guidance", "moments"), [(1.0, 6), (2.0, 12)])
def test_a_batch_of_all_moments_is_taken(
    guidance: float, moments: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pipeline().save_pretrained(tmp_path / "model")
    words = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--deeper", 2, "--count", 2]
    words += ["--test_count", 1, "--num_inference_steps", 6, "--guidance_scale", guidance, "--iterations", 5]
    monkeypatch.setattr(
        sys, "argv", ["fit_tracking.py", *map(str, words), "--train_batch_size", str(moments), "--skip", "0.5"]
    )
    fit_tracking.main()
    assert (tmp_path / "out" / "report.json").is_file()
