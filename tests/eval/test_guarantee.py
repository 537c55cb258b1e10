"""Does the script that counts broken promises count right: losses by hand, and end to end on a tiny pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from factories import pipeline
from safetensors.torch import load_file, save_file
from tree import ROOT

from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from eval import guarantee, write_results


def call(monkeypatch: pytest.MonkeyPatch, script, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *(str(word) for word in words)])
    script.main()


@pytest.fixture
def words(tmp_path: Path) -> list:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "model")
    CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler).save_pretrained(tmp_path / "memory")
    made = ["--model", tmp_path / "model", "--memory", tmp_path / "memory", "--output_dir", tmp_path, "--count", 40]
    made += ["--batch_size", 20, "--calibration_count", 10, "--resamplings", 50, "--num_inference_steps", 8]
    return [*made, "--values", 0.001, 0.02, 0.5, "--cap", 0.001, "--delta", 0.2]


def test_guarantee_and_results(words: list, tmp_path: Path, monkeypatch, capsys):
    call(monkeypatch, guarantee, *words, "--risks", 0.4)
    report = json.loads((tmp_path / "guarantee.json").read_text())
    rows = {row["rule"]: row for row in report["rows"]}
    assert rows["learn then test"]["missed"] <= report["allowed"]
    assert rows["conformal risk control"]["mean true risk"] <= 0.4
    assert rows["naive mean"]["none certified"] <= rows["learn then test"]["none certified"]
    costs = [row["share of blocks"] for row in report["candidates"]]
    assert costs == sorted(costs, reverse=True)
    losses = tmp_path / "losses.safetensors"
    assert load_file(losses)["losses"].shape == (3, 40)
    with monkeypatch.context() as patch:
        patch.setattr(guarantee, "live_losses", None)  # nothing is drawn
        call(patch, guarantee, *words, "--risks", 0.4, 0.6, "--losses", losses)
    again = json.loads((tmp_path / "guarantee.json").read_text())["rows"]
    assert again[:3] == report["rows"]
    assert [row["risk"] for row in again] == [0.4] * 3 + [0.6] * 3
    call(monkeypatch, write_results, "--reports", tmp_path, "--output", tmp_path / "RESULTS.md")
    assert "conformal risk control" in (tmp_path / "RESULTS.md").read_text()
    with pytest.raises(ValueError, match=r"train-1-backbone-adamw\.json is of format 'ee_diffusion\.report\.1'"):
        call(monkeypatch, write_results, "--reports", ROOT / "results", "--output", tmp_path / "RESULTS.md")
    with pytest.raises(ValueError, match=r"missing .'delta'.*expected all"):
        call(monkeypatch, guarantee, *words[:-2], "--risks", 0.4)


def test_losses_drawn_under_something_else_are_refused(words: list, tmp_path: Path, monkeypatch, capsys):
    losses = tmp_path / "kept.safetensors"
    call(monkeypatch, guarantee, *words, "--risks", 0.4)
    (tmp_path / "losses.safetensors").rename(losses)
    monkeypatch.setattr(guarantee, "live_losses", None)  # nothing is drawn
    words = [*words, "--risks", 0.4, "--losses", losses]
    others = {"cap": 0.002, "decay": 0.5, "guidance_scale": 3.0, "num_inference_steps": 9}
    for name, value in (*others.items(), ("count", 41)):
        with pytest.raises(ValueError, match=f"drawn under {name}"):
            call(monkeypatch, guarantee, *words, f"--{name}", value)
    with pytest.raises(ValueError, match="drawn under scheduler "):
        call(monkeypatch, guarantee, *words, "--sampler", "dpm")
    with pytest.raises(ValueError, match=r"values \[0.001, 0.02, 0.5\], expected \[0.001, 0.02, 0.4\]"):
        call(monkeypatch, guarantee, *words, "--values", 0.001, 0.02, 0.4)
    exits = CachedOutputExits.from_pretrained(tmp_path / "memory")
    torch.nn.init.ones_(exits.error_estimator[2].bias)
    exits.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="drawn under weights"):
        call(monkeypatch, guarantee, *words, "--memory", tmp_path / "other")
    save_file(load_file(losses), losses)
    with pytest.raises(ValueError, match=r"does not say what it was drawn under.*run once without --losses"):
        call(monkeypatch, guarantee, *words)


def test_the_risk_of_conformal_control_is_that_of_the_largest_loss_so_far():
    even = (torch.arange(40) % 2 == 0).float()
    losses = 0.1 * torch.stack([even, 1 - even])  # the bolder is wrong where the safer is right
    options = guarantee.GuaranteeOptions(calibration_count=10, resamplings=5, values=[1.0, 2.0], delta=0.1)
    found = guarantee.calibrations(losses, options, risk=0.9, seed=0)
    assert [choice for choice, _ in found["conformal risk control"]] == [1] * 5
    assert [risk for _, risk in found["conformal risk control"]] == pytest.approx([0.1] * 5)
    assert [risk for _, risk in found["naive mean"]] == pytest.approx([0.05] * 5)


@pytest.mark.parametrize(
    "words",
    [
        ["--delta", "nan"],
        ["--delta", 1],
        ["--risks", 0.2, 2],
        ["--risks", 0],
        ["--cap", -1],
        ["--cap", "inf"],
        ["--resamplings", 0],
        ["--values", 0.2, 0.1],
        ["--values", 0.1, 0.1],
        ["--values", 0, 0.1],
        ["--values", "nan"],
        ["--decay", 2],
    ],
)
def test_numbers_out_of_range_are_refused_before_the_pool_is_drawn(words: list, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(guarantee, "load", None)  # no work
    with pytest.raises(ValueError, match=f"{words[0].strip('-')}=.*expected"):
        call(monkeypatch, guarantee, "--output_dir", tmp_path, *words)


def test_a_model_without_a_null_class_is_refused_before_anything_is_drawn(words: list, tmp_path: Path, monkeypatch):
    pipe = pipeline()
    pipe.transformer.register_to_config(null_class=None)
    monkeypatch.setattr(guarantee, "load", lambda sampling: pipe)
    monkeypatch.setattr(guarantee, "live_losses", None)
    with pytest.raises(ValueError, match="null_class=None, expected one trained with a null class"):
        call(monkeypatch, guarantee, *words, "--risks", 0.4)
