"""train/fit_memory.py from the command line on a tiny pipeline: it writes exits that load, and figures beside the unfitted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from factories import pipeline
from tree import ROOT

from ee_diffusion.diffusion.memory_exits import MemoryExits

sys.path.insert(0, str(ROOT / "train"))  # as it is when a script runs

import fit_memory


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["fit_memory.py", *(str(word) for word in words)])
    fit_memory.main()


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
    exits = MemoryExits.from_pretrained(tmp_path / "out" / "exits")
    exits.check_fits(made.transformer)
    assert exits.gauge[2].weight.abs().sum() > 0


def test_a_trust_is_learned_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipeline().save_pretrained(tmp_path / "model")
    words = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--num_inference_steps", 8]
    call(monkeypatch, *words, "--count", 2, "--guidance_scale", 2.0, "--iterations", 20, "--learn_trust")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["trust"] > 0
    assert MemoryExits.from_pretrained(tmp_path / "out" / "exits").trust[2].weight.abs().sum() > 0


def test_a_model_without_a_null_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipeline("unconditional").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="expected a transformer with a null class"):
        call(monkeypatch, "--model", tmp_path / "model", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
