"""train/fit_tracking.py from the command line on a tiny pipeline: exits that load and are nearer than memory, figures of every depth."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from factories import pipeline
from tree import ROOT

from ee_diffusion.diffusion.tracking_exits import TrackingExits

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
