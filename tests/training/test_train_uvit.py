"""The script `train/train_uvit.py`: presets resolve, bad settings end in words, and a tiny run writes a pipeline that loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tree import ROOT

from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from train import train_uvit
from train.presets import PRESETS

TINY = "--num_layers 3 --patch_size 4 --num_attention_heads 1 --attention_head_dim 8 --resolution 8 --num_classes 2"
SHORT = "--train_batch_size 4 --max_train_steps 3 --logging_steps 1 --checkpointing_steps 2 --lr_warmup_steps 0"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_uvit.py", *(part for word in words for part in str(word).split())])
    train_uvit.main()


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    for number in range(8):
        folder = tmp_path / f"images/class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_resolves(preset, monkeypatch, capsys):
    call(monkeypatch, "--preset", preset, "--dry-run --learning_rate 0.125 --no_random_flip")
    resolved = json.loads(capsys.readouterr().out)
    expected = PRESETS[preset] | {"learning_rate": 0.125, "random_flip": False}
    assert {name: resolved[name] for name in expected} == expected


def test_dry_run_as_a_command():
    command = [sys.executable, "-m", "train.train_uvit", "--preset", "cpu_backbone", "--dry_run"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT), "PATH": ""}
    )
    assert json.loads(done.stdout)["mode"] == "backbone", done.stderr


def test_backbone_then_exits_then_frozen(tmp_path, images, monkeypatch):
    """Three stages from two folders; each writes a pipeline, its settings, its report; frozen leaves the transformer alone."""
    common = f"--train_data_dir {images} {TINY} {SHORT}"
    drawing = "--validation_steps 2 --validation_images 2 --validation_inference_steps 2 --validation_threshold 0.9"
    backbone, joint, frozen = (tmp_path / name for name in ("backbone", "joint", "frozen"))
    call(monkeypatch, "--mode backbone", common, "--output_dir", backbone)
    call(monkeypatch, "--mode joint --init_from", backbone, common, drawing, "--output_dir", joint)
    call(monkeypatch, "--mode frozen --init_from", joint, common, "--output_dir", frozen)
    drawn = sorted(path.name for path in (joint / "validation").iterdir())
    assert drawn == [f"step-000002-{name}.png" for name in ("exit-map", "exits", "full")]
    for folder in (backbone, joint, frozen):
        assert json.loads((folder / "report.json").read_text())["samples"] == 12
        assert json.loads((folder / "config.json").read_text())["output_dir"] == str(folder)
    pipelines = [EarlyExitPipeline.from_pretrained(folder) for folder in (backbone, joint, frozen)]
    assert pipelines[0].exits is None
    assert pipelines[1].exits.depths == (1, 2)
    first, second, third = ([*pipeline.transformer.parameters()] for pipeline in pipelines)
    assert not all(map(torch.equal, first, second))
    assert all(map(torch.equal, second, third))
    assert not all(map(torch.equal, pipelines[1].exits.parameters(), pipelines[2].exits.parameters()))


@pytest.mark.parametrize(
    "words, told",
    [
        ("", "output_dir=None, expected"),
        ("--mode sideways", "mode='sideways', expected"),
        ("--mode frozen", "without init_from"),
        ("--mode backbone --exit_depths 1", "trains no exits"),
        ("--mode joint --exit_depths 9 --output_dir x", r"depths \(9,\), expected"),
        ("--class_drop 2", "class_drop=2.0, expected"),
        ("--train_batch_size 0", "train_batch_size=0, expected"),
    ],
)
def test_bad_settings_end_in_words(words, told, monkeypatch):
    with pytest.raises(ValueError, match=told):
        call(monkeypatch, TINY, words)


def test_flags_that_contradict_what_is_loaded(tmp_path, images, monkeypatch):
    common = f"--train_data_dir {images} {TINY} {SHORT}"
    call(monkeypatch, "--mode joint --exit_depths 2", common, "--output_dir", tmp_path / "a")
    start = f"--mode joint --init_from {tmp_path / 'a'} --output_dir {tmp_path / 'b'}"
    contradictions = {
        "--num_layers 5": "num_layers: 3, the flags say 5",
        "--exit_depths 1": "depths",
        "--beta_schedule scaled_linear": "beta",
    }
    for words, told in contradictions.items():
        with pytest.raises(ValueError, match=f"of init_from has other settings: {told}"):
            call(monkeypatch, common, start, words)
    assert not (tmp_path / "b").exists()
