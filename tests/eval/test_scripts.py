"""The evaluation scripts, end to end on a tiny pipeline: they run, their reports hold what they promise, processes make no difference."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from tree import ROOT

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.splits import balanced_labels, seeds
from eval import (
    demo,
    frontier,
    generate,
    guarantee,
    hot_path,
    metrics,
    speed,
    tradeoff,
    training_step,
    uncertainty,
    write_results,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny pipeline on disk, with policies beside it as a shipped checkpoint has them."""
    torch.manual_seed(0)
    transformer = UViTTransformer2DModel(
        sample_size=16,
        patch_size=4,
        num_layers=5,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=4,
        null_class=3,
    )
    exits = DenoisingExits.for_transformer(transformer, (1, 2, 3, 4))
    for module in exits.uncertainty_modules:
        torch.nn.init.normal_(module.weight, std=1.0)
    folder = tmp_path_factory.mktemp("model")
    EarlyExitPipeline(transformer, DDIMScheduler(), exits).save_pretrained(folder)
    (folder / "policies").mkdir()
    tradeoff.Policy(tradeoff.Threshold(0.5)).save(folder / "policies" / "blocks-50.json")
    return folder


def call(monkeypatch, script, *words: object) -> None:
    monkeypatch.delenv("EE_DIFFUSION_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["script", *(str(word) for word in words)])
    script.main()


def generate_with(model: Path, output: Path, *words: str, processes: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    command = [sys.executable, *launcher, "-m", "eval.generate"]
    options = [
        "--model",
        model,
        "--output_dir",
        output,
        "--num_inference_steps",
        "4",
        "--batch_size",
        "2",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, options), *words], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_generation_on_two_processes_is_that_on_one(model, tmp_path):
    words = ["--count", "5", "--exit_policy", str(model / "policies" / "blocks-50.json")]
    generate_with(model, tmp_path / "one", *words, processes=1)
    generate_with(model, tmp_path / "two", *words, processes=2)
    one, two = (load_file(tmp_path / name / "samples.safetensors") for name in ("one", "two"))
    assert one["seeds"].tolist() == two["seeds"].tolist() == seeds("test", 5)
    assert one["labels"].tolist() == balanced_labels(5, 3)
    assert (one["images"].int() - two["images"].int()).abs().max() <= 1  # bytes; batches differ, float32 sums with them
    traces = [Trace.load(tmp_path / name / "trace.safetensors") for name in ("one", "two")]
    assert torch.equal(traces[0].depths, traces[1].depths)
    assert traces[0].samples.tolist() == traces[1].samples.tolist() == [0, 1, 2, 3, 4]
    assert json.loads((tmp_path / "two" / "report.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_process_without_an_image_reports_nothing(model, tmp_path):
    generate_with(model, tmp_path, "--count", "1", "--exit_policy", str(model / "policies/blocks-50.json"), processes=2)
    assert json.loads((tmp_path / "report.json").read_text())["count"] == 1
    assert Trace.load(tmp_path / "trace.safetensors").samples.tolist() == [0]


def test_tradeoff_and_results(model, tmp_path, monkeypatch, capsys):
    words = ["--model", model, "--output_dir", tmp_path, "--count", 6, "--calibration_count", 4, "--batch_size", 3]
    call(monkeypatch, tradeoff, *words, "--num_inference_steps", 5, "--budgets", 0.7, 0.5)
    report = json.loads((tmp_path / "tradeoff.json").read_text())
    kinds = [row["kind"] for row in report["rows"]]
    assert sorted(set(kinds)) == ["deediff", "fewer_steps", "full", "random_overall", "random_per_step", "static"]
    assert len(kinds) == 1 + 2 * 5
    by_name = {row["name"]: row for row in report["rows"]}
    assert by_name["full"]["time"] == 1
    assert by_name["full"]["psnr"]["mean"] == 100
    for budget in (0.7, 0.5):
        mean = by_name[f"deediff {budget}"]["report"]["mean_executed"]
        assert by_name[f"random_overall {budget}"]["report"]["mean_executed"] == pytest.approx(mean)
        own, random = (
            by_name[f"{kind} {budget}"]["report"]["executed_per_step"] for kind in ("deediff", "random_per_step")
        )
        assert random == pytest.approx(own)
        static = by_name[f"static {budget}"]["report"]
        assert static["mean_executed"] == pytest.approx(mean, abs=0.2)
        assert set(static["spread_per_step"]) == {0}
    assert (tmp_path / "tradeoff.png").stat().st_size > 1000
    call(monkeypatch, write_results, "--reports", tmp_path, "--output", tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "random_per_step 0.5" in text
    assert str(tmp_path) not in text


def test_frontier_and_results(model, tmp_path, monkeypatch, capsys):
    words = ["--model", model, "--output_dir", tmp_path, "--count", 6, "--batch_size", 3, "--num_inference_steps", 8]
    words += [
        "--errors",
        0.02,
        "--budgets",
        0.05,
        "--gain_images",
        2,
        "--periods",
        2,
        "--fractions",
        0.5,
        "--thresholds",
        0.5,
        "--shares",
        0.5,
        "--noise_shares",
        0.4,
        "--fitted_shares",
        0.4,
        "--search_count",
        2,
        "--oracles",
        0.02,
        "--first_block",
        0.3,
        "--taylor",
        2,
        "--mag",
        0.5,
    ]
    call(monkeypatch, frontier, *words)
    rows = {row["name"]: row for row in json.loads((tmp_path / "frontier.json").read_text())["rows"]}
    ours = rows["remembered 0.02"]["report"]
    assert 0 < ours["mean_executed"] < 5
    assert ours["executed_per_step"][:2] == [5, 5]
    assert rows["random_per_step of remembered 0.02"]["report"]["executed_per_step"] == pytest.approx(
        ours["executed_per_step"]
    )
    assert rows["random_overall of remembered 0.02"]["report"]["mean_executed"] == pytest.approx(ours["mean_executed"])
    assert rows["static of remembered 0.02"]["report"]["mean_executed"] == pytest.approx(
        ours["mean_executed"], abs=5 / 8
    )
    assert rows["periodic cache 2"]["report"]["executed_per_step"] == [5, 5, 0, 5, 0, 5, 0, 5]
    assert rows["4 steps"]["steps"] == 4
    assert {"deediff 0.5", "budgeted 0.05", "static of budgeted 0.05", "first block 0.3", "mag 0.5"} <= set(rows)
    assert sorted(rows["searched 4 full"]["report"]["executed_per_step"]) == [0, 0, 0, 0, 5, 5, 5, 5]
    assert sorted(rows["searched noise 5 full"]["report"]["executed_per_step"]) == [0, 0, 0, 5, 5, 5, 5, 5]
    assert sorted(rows["searched fitted 5 full"]["report"]["executed_per_step"]) == [0, 0, 0, 5, 5, 5, 5, 5]
    fitted = CachedOutputExits.from_pretrained(tmp_path / "fitted")
    assert (fitted.config.fitted_steps, fitted.config.cached_type) == (8, "epsilon")
    assert rows["periodic fitted 2"]["report"]["executed_per_step"] == [5, 5, 0, 5, 0, 5, 0, 5]
    assert rows["periodic fitted 2"]["psnr"]["mean"] != rows["periodic cache 2"]["psnr"]["mean"]
    assert rows["oracle 0.02"]["report"]["executed_per_step"][:2] == [5, 5]
    assert rows["taylor 2"]["psnr"]["mean"] < 100
    assert "remembered 0.02" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds exits fitted under"):
        call(monkeypatch, frontier, *words, "--search_count", 3)
    call(monkeypatch, write_results, "--reports", tmp_path, "--output", tmp_path / "RESULTS.md")
    assert "periodic cache 2" in (tmp_path / "RESULTS.md").read_text()


def test_speed(model, tmp_path, monkeypatch, capsys):
    words = [
        "--model",
        model,
        "--output_dir",
        tmp_path,
        "--batch_sizes",
        1,
        3,
        "--repeats",
        1,
        "--steps",
        2,
    ]
    call(monkeypatch, speed, *words, "--mean_depths", 0.6)
    report = json.loads((tmp_path / "speed.json").read_text())
    assert [row["batch"] for row in report["overhead"]] == [1, 3]
    assert all(row["off"] > 0 and row["never"] > 0 and row["delayed"] > 0 for row in report["overhead"])
    assert all(0 < row["mean_depth"] < 1 and row["realised_over_ideal"] > 0 for row in report["realised"])
    assert all(row["alone_ms"] > 0 for row in report["realised"])
    calls = {row["policy"]: row for row in report["pipeline"]}
    assert list(calls) == ["off", "never", "0.6 of the blocks"]
    assert (calls["off"]["time_over_off"], calls["off"]["executed"], calls["never"]["executed"]) == (1.0, 1.0, 1.0)
    assert 0 < calls["0.6 of the blocks"]["executed"] < 1


def test_hot_path(model, tmp_path, monkeypatch, capsys):
    words = ["--num_inference_steps", 2, "--batch_size", 2, "--device", "cpu", "--thresholds", 0, 1]
    call(monkeypatch, hot_path, "--model", model, "--output_dir", tmp_path, *words)
    rows = json.loads((tmp_path / "hot-path.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["no exits", "deediff 0", "deediff 1"]
    kinds = ("operations", "model", "exits", "torch", "diffusers", "other")
    for row in rows:
        assert sum(row[kind] for kind in kinds) == pytest.approx(1)
        assert 0 < row["largest_share"] < row["exits"] < 1
        assert row["model"] > 0
    assert all("/" in row["largest"] for row in rows)
    assert hot_path.kind_of("~") == "operations"
    assert hot_path.kind_of("/somewhere/ee_diffusion/core/active_batch.py") == "exits"
    assert "largest_share" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_step(model, tmp_path, monkeypatch, precision):
    words = ["--model", model, "--output_dir", tmp_path, "--train_batch_size", 2, "--repeats", 1]
    call(monkeypatch, training_step, *words, "--mixed_precision", precision)
    report = json.loads((tmp_path / "training-step.json").read_text())
    assert [row["batch"] for row in report["rows"]] == [2]
    assert report["rows"][0]["joint_over_backbone"] > 0
    with pytest.raises(ValueError, match="expected 'no' or 'bf16'"):
        call(monkeypatch, training_step, *words, "--mixed_precision", "fp8")


def test_thresholds_reach_the_depth_asked_for(model):
    pipeline = EarlyExitPipeline.from_pretrained(model)
    with speed.attach_exits(pipeline.transformer, pipeline.exits) as attachment:
        recorded = speed.Forward(pipeline, 200, 0).under(attachment, Policy(speed.Threshold(1.0), record_all=True))
        for fraction in (0.75, 0.4):
            found = speed.thresholds_for(recorded.scores[0], recorded.exits.tolist(), 5, fraction)
            policy = Policy(speed.Threshold(found))
            trace = speed.Forward(pipeline, 200, 0).under(attachment, policy)
            assert trace.report().fraction_executed == pytest.approx(fraction, abs=0.05)
            assert len(trace.depths.unique()) > 2


def test_demo(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "checkpoint_path", lambda: model)
    call(monkeypatch, demo, "--output_dir", tmp_path, "--count", 4, "--batch_size", 2, "--num_inference_steps", 3)
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["full", "blocks-50", "memory"]
    assert rows[0]["executed blocks"] == 5
    assert rows[1]["executed blocks"] < 5
    assert {path.name for path in tmp_path.iterdir()} == {
        "full.png",
        "blocks-50.png",
        "blocks-50-exit-map.png",
        "memory.png",
        "memory-exit-map.png",
        "report.json",
    }
    assert "wall-clock ratio" in capsys.readouterr().out


@pytest.mark.parametrize("script", [frontier, generate, guarantee, metrics, speed, tradeoff, uncertainty])
def test_dry_run_prints_the_options(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, script, "--dry-run", "--seed", 7)
    assert stopped.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["seed"] == 7
    assert "output_dir" in printed
