"""eval/metrics.py from the command line: on real images, and how it refuses what it cannot do."""

from __future__ import annotations

import glob
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ee_diffusion.core.io import write_tensors

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object, data: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"EE_DIFFUSION_DATA": str(data)} if data else {})
    command = [sys.executable, "-m", "eval.metrics", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment, cwd=ROOT)


@pytest.mark.slow
def test_dry_run_prints_the_options_and_bad_ones_are_refused(tmp_path: Path):
    done = run("--images", "a.npz", "--metrics", "fd", "kid", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"] == ["fd", "kid"]
    done = run("--images", "a.npz", "--output_dir", tmp_path / "out", "--metrics", "fd", "clip")
    assert done.returncode != 0
    assert "expected some of ('fd', 'fid', 'kid', 'accuracy')" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.data
def test_test_images_against_test_images(tmp_path: Path, data_folder: Path):
    datasets = pytest.importorskip("datasets")
    files = sorted(glob.glob(str(data_folder / "cifar10" / "test-*.parquet")))
    table = datasets.Dataset.from_parquet(files).cast_column("img", datasets.Image(decode=False))[:120]
    pixels = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in table["img"]]
    path = tmp_path / "real.safetensors"
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    write_tensors(path, {"images": images, "labels": torch.tensor(table["label"])})
    common = [
        "--images",
        path,
        "--output_dir",
        tmp_path / "out",
        "--cache_dir",
        tmp_path / "cache",
        "--reference",
        "test",
    ]
    for expected in ("computed: no file", "cache"):
        done = run(*common, "--reference_count", 120, "--max_images", 100, "--device", "cpu", data=data_folder)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["fd"]["count"], report["fd"]["reference_count"]) == (100, 120)
    assert 0 <= report["fd"]["value"] < 2  # 100 of the same 120 images
    assert report["accuracy"]["count"] == 100
    assert report["accuracy"]["value"] > 0.85
    assert report["environment"]["device"] == "cpu"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_images"] == 100
    table = (tmp_path / "out" / "metrics.md").read_text()
    assert "| accuracy |" in table
    assert "CIFAR-10 test" in table
