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

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.splits import balanced_labels, seeds
from eval import demo, frontier, generate, guarantee, latency, metrics, uncertainty
from eval.work import latency as latency_work
from eval.work import profile


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
    Policy(Threshold(0.5)).save(folder / "policies" / "blocks-50.json")
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


def reported(folder: Path) -> tuple[dict[str, dict], dict[str, dict]]:
    """The rows of a frontier by name, and the reports of their traces."""
    rows = json.loads((folder / "report.json").read_text())["tables"]["candidates"]
    kept = json.loads((folder / "candidates.json").read_text())["candidates"]
    return {row["name"]: row for row in rows}, {row["name"]: row["report"] for row in kept}


def test_shares_of_the_blocks_beside_their_controls(model, tmp_path, monkeypatch, capsys):
    words = ["--model", model, "--output_dir", tmp_path, "--count", 6, "--calibration_count", 4, "--batch_size", 3]
    call(monkeypatch, frontier, *words, "--num_inference_steps", 5, "--deediff_shares", 0.7, 0.5)
    rows, reports = reported(tmp_path)
    assert len(rows) == 1 + 2 * 5
    assert rows["full"]["time"] == 1
    assert rows["full"]["psnr"] == 100
    for share in (0.7, 0.5):
        name = f"deediff at {share} of the blocks"
        own = reports[name]
        assert reports[f"random overall of {name}"]["mean_executed"] == pytest.approx(own["mean_executed"])
        random = reports[f"random per step of {name}"]["executed_per_step"]
        assert random == pytest.approx(own["executed_per_step"])
        static = reports[f"static of {name}"]
        assert static["mean_executed"] == pytest.approx(own["mean_executed"], abs=0.2)
        assert set(static["spread_per_step"]) == {0}
        assert rows[f"fewer steps of {name}"]["steps"] == max(1, round(5 * rows[name]["time"]))
    assert (tmp_path / "frontier.png").stat().st_size > 1000
    text = (tmp_path / "report.md").read_text()
    assert "random per step of deediff at 0.5" in text
    assert str(tmp_path) not in text


def test_every_kind_on_the_frontier(model, tmp_path, monkeypatch, capsys):
    words = ["--model", model, "--output_dir", tmp_path, "--count", 6, "--batch_size", 3, "--num_inference_steps", 8]
    words += [
        "--error_thresholds",
        "0.02",
        "--error_budgets",
        "0.05",
        "--amplification_images",
        "2",
        "--cache_intervals",
        "2",
    ]
    words += [
        "--fewer_steps",
        "0.5",
        "--deediff",
        "0.5",
        "--searched",
        "0.5",
        "--searched_epsilon",
        "0.4",
        "--searched_fitted",
        "0.4",
    ]
    words += ["--search_count", "2", "--oracles", "0.02", "--first_block", "0.3", "--taylor", "2", "--mag", "0.5"]
    call(monkeypatch, frontier, *words)
    rows, reports = reported(tmp_path)
    ours = reports["error threshold 0.02"]
    assert 0 < ours["mean_executed"] < 5
    assert ours["executed_per_step"][:2] == [5, 5]
    of_ours = {
        kind: reports[f"{kind} of error threshold 0.02"] for kind in ("random per step", "random overall", "static")
    }
    assert of_ours["random per step"]["executed_per_step"] == pytest.approx(ours["executed_per_step"])
    assert of_ours["random overall"]["mean_executed"] == pytest.approx(ours["mean_executed"])
    assert of_ours["static"]["mean_executed"] == pytest.approx(ours["mean_executed"], abs=5 / 8)
    assert reports["periodic cache 2"]["executed_per_step"] == [5, 5, 0, 5, 0, 5, 0, 5]
    assert rows["4 steps"]["steps"] == 4
    assert {"deediff 0.5", "error budget 0.05", "static of error budget 0.05", "first block 0.3", "mag 0.5"} <= set(
        rows
    )
    for name, computed in {"searched 4": 4, "searched epsilon 5": 5, "searched fitted 5": 5}.items():
        assert sorted(reports[f"{name} computed"]["executed_per_step"]) == [0] * (8 - computed) + [5] * computed
    fitted = CachedOutputExits.from_pretrained(tmp_path / "fitted")
    assert (fitted.config.fitted_steps, fitted.config.cached_type) == (8, "epsilon")
    assert reports["periodic fitted 2"]["executed_per_step"] == [5, 5, 0, 5, 0, 5, 0, 5]
    assert rows["periodic fitted 2"]["psnr"] != rows["periodic cache 2"]["psnr"]
    assert reports["oracle 0.02"]["executed_per_step"][:2] == [5, 5]
    assert rows["taylor 2"]["psnr"] < 100
    assert "error threshold 0.02" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds exits fitted under"):
        call(monkeypatch, frontier, *words, "--search_count", 3)


def test_latency_of_a_forward(model, tmp_path, monkeypatch, capsys):
    words = ["--model", model, "--output_dir", tmp_path, "--batch_sizes", 1, 3, "--repeats", 1, "--steps", 2]
    call(monkeypatch, latency, "forward", *words, "--mean_depths", 0.6)
    tables = json.loads((tmp_path / "report.json").read_text())["tables"]
    assert [row["batch"] for row in tables["overhead"]] == [1, 3]
    assert all(row["off"] > 0 and row["never"] > 0 and row["delayed"] > 0 for row in tables["overhead"])
    realised = tables["realised over ideal"]
    assert all(0 < row["mean_depth"] < 1 and row["realised_over_ideal"] > 0 for row in realised)
    assert all(row["alone_ms"] > 0 for row in realised)
    calls = {row["policy"]: row for row in tables["whole call, one image"]}
    assert list(calls) == ["off", "never", "0.6 of the blocks"]
    assert (calls["off"]["time_over_off"], calls["off"]["executed"], calls["never"]["executed"]) == (1.0, 1.0, 1.0)
    assert 0 < calls["0.6 of the blocks"]["executed"] < 1


def test_profile(model, tmp_path, monkeypatch, capsys):
    words = ["--num_inference_steps", 2, "--batch_size", 2, "--device", "cpu", "--thresholds", 0, 1]
    call(monkeypatch, latency, "profile", "--model", model, "--output_dir", tmp_path, *words)
    (rows,) = json.loads((tmp_path / "report.json").read_text())["tables"].values()
    assert [row["name"] for row in rows] == ["no exits", "deediff 0", "deediff 1"]
    kinds = ("operations", "model", "exits", "torch", "diffusers", "other")
    for row in rows:
        assert sum(row[kind] for kind in kinds) == pytest.approx(1, abs=1e-4)
        assert 0 < row["largest_share"] < row["exits"] < 1
        assert row["model"] > 0
    assert all("/" in row["largest"] for row in rows)
    assert profile.kind_of("~") == "operations"
    assert profile.kind_of("/somewhere/ee_diffusion/core/active_batch.py") == "exits"
    assert "largest_share" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_step(model, tmp_path, monkeypatch, precision):
    words = ["--model", model, "--output_dir", tmp_path, "--train_batch_size", 2, "--repeats", 1]
    call(monkeypatch, latency, "training", *words, "--mixed_precision", precision)
    (rows,) = json.loads((tmp_path / "report.json").read_text())["tables"].values()
    assert [row["batch"] for row in rows] == [2]
    assert rows[0]["joint_over_backbone"] > 0
    with pytest.raises(ValueError, match="expected 'no' or 'bf16'"):
        call(monkeypatch, latency, "training", *words, "--mixed_precision", "fp8")


def test_thresholds_reach_the_depth_asked_for(model):
    pipeline = EarlyExitPipeline.from_pretrained(model)
    with latency_work.attach_exits(pipeline.transformer, pipeline.exits) as attachment:
        recorded = latency_work.Forward(pipeline, 200, 0).under(attachment, Policy(Threshold(1.0), record_all=True))
        for fraction in (0.75, 0.4):
            found = latency_work.thresholds_for(recorded.scores[0], recorded.exits.tolist(), 5, fraction)
            policy = Policy(Threshold(found))
            trace = latency_work.Forward(pipeline, 200, 0).under(attachment, policy)
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


@pytest.mark.parametrize("script", [frontier, generate, guarantee, metrics, uncertainty])
def test_dry_run_prints_the_options(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, script, "--dry-run", "--seed", 7)
    assert stopped.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["seed"] == 7
    assert "output_dir" in printed
