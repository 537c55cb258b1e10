"""FD of a frontier's finalists, at tiny size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel
from ee_diffusion.diffusion.pipelines.sampling import generate
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.distribution import Statistics, frechet_distance
from ee_diffusion.metrics.files import to_bytes
from ee_diffusion.metrics.references import Reference
from ee_diffusion.metrics.splits import balanced_labels, seeds
from eval import finalists, frontier
from eval.harness import drawing
from eval.work import finalists as work

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline and exits of every kind beside it."""
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "patch_size": 4, "num_layers": 5, "num_attention_heads": 2, "attention_head_dim": 8}
    transformer = UViTTransformer2DModel(**sizes, num_classes=4, null_class=3)
    exits = DenoisingExits.for_transformer(transformer, (1, 2, 3, 4))
    made, where = EarlyExitPipeline(transformer, DDIMScheduler(), exits), tmp_path_factory.mktemp("ablation")
    made.save_pretrained(where / "model")
    return where


def call(monkeypatch: pytest.MonkeyPatch, script, *words: object) -> None:
    monkeypatch.delenv("EE_DIFFUSION_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["script", *(str(word) for word in words)])
    script.main()


class Corners(torch.nn.Module):
    """A feature network at hand: (B, 3, 16, 16) in [0, 1] -> (B, 12)."""

    num_features, preprocessing = 12, "means of quarters"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def test_finalists_are_judged_on_seeds_of_their_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = [
        "--model",
        folder / "model",
        "--output_dir",
        tmp_path,
        "--count",
        4,
        "--batch_size",
        2,
        "--cache_intervals",
        2,
    ]
    words += ["--num_inference_steps", STEPS, "--searched", 0.5, "--searched_fitted", 0.5, "--search_count", 2]
    call(monkeypatch, frontier, *words, "--amplification_images", 2, "--fewer_steps", 0.5, "--error_thresholds", 0.05)
    real = Statistics.of(torch.rand(50, 12, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(work, "resnet20_features", lambda _: Corners())
    monkeypatch.setattr(work, "known_reference", lambda *_, **__: Reference(real, torch.empty(0, 12), "", "given"))
    monkeypatch.setattr(work, "unfit", lambda *_, **__: None)  # 16x16 pixels fit this network
    monkeypatch.setattr(work, "PART", 7)
    asked = [
        "--report",
        tmp_path / "candidates.json",
        "--count",
        18,
        "--resamples",
        20,
        "--output_dir",
        tmp_path / "out",
    ]
    names = ["searched fitted 4 computed", "4 steps"]
    call(monkeypatch, finalists, *asked, "--names", *names)
    rows_before = json.loads((tmp_path / "out" / "report.json").read_text())["tables"]["candidates"]
    rows = {row["name"]: row for row in rows_before}
    assert list(rows) == ["full", *names]
    pipe = EarlyExitPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    features = []
    for steps in (STEPS, 4):
        call_ = {"num_inference_steps": steps, "guidance_scale": 4.0, "batch_size": 18}
        drawn = generate(pipe, seeds("test", 18, first=4), balanced_labels(18, 3), **call_)
        features.append(Corners()(to_bytes(drawn.images).float() / 255))
    full, fewer = (frechet_distance(one, real).value for one in features)
    assert rows["full"]["fd"] == pytest.approx(full, rel=1e-3)
    assert rows["4 steps"]["difference"] == pytest.approx(fewer - full, rel=0.05)
    assert rows["4 steps"]["relative"] == pytest.approx(fewer / full - 1, rel=0.05)
    assert rows["4 steps"]["low"] < rows["4 steps"]["difference"] < rows["4 steps"]["high"]
    last = [frechet_distance(one[12:], real).value for one in features]
    assert rows["4 steps"]["block_3"] == pytest.approx(last[1] - last[0], rel=0.05)
    assert 0 < abs(rows[names[0]]["difference"]) < abs(rows["4 steps"]["difference"])
    monkeypatch.setattr(drawing, "generate", None)  # nothing is left to draw
    call(monkeypatch, finalists, *asked, "--names", *names)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["tables"]["candidates"] == rows_before
    text = (tmp_path / "out" / "report.md").read_text()
    assert "searched fitted 4 computed" in text
    assert "FD: against CIFAR-10 train." in text
    with pytest.raises(ValueError, match=r"no candidates \['5 steps'\], expected some of"):
        call(monkeypatch, finalists, *asked, "--names", "5 steps")
    with pytest.raises(ValueError, match="deal exits out to the frontier's own images"):
        call(monkeypatch, finalists, *asked, "--names", "random overall of error threshold 0.05")
    with pytest.raises(ValueError, match=r"names=\[\]"):
        call(monkeypatch, finalists, *asked)
