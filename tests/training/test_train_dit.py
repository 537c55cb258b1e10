"""The script `train/train_dit.py`: latents are encoded once, a tiny run writes a stock pipeline that generates, bad input is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline
from PIL import Image
from stock import tiny_vae

from ee_diffusion.diffusion.distillation.deediff_objective import DiffusionObjective
from ee_diffusion.diffusion.latents import encode, enlarged
from ee_diffusion.training.config import LatentConfig
from ee_diffusion.training.datasets import ImageSource
from train import train_dit
from train.work import dit
from train.work.latents import encoded_once

TINY = "--image_size 16 --resolution 8 --num_classes 2 --num_layers 2 --num_attention_heads 1 --attention_head_dim 8"
SHORT = "--train_batch_size 4 --max_train_steps 3 --logging_steps 1 --checkpointing_steps 2 --lr_warmup_steps 0"
PARTS = "--part_size 5 --encode_batch_size 2"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_dit.py", *(part for word in words for part in str(word).split())])
    train_dit.main()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_vae(times=3).save_pretrained(tmp_path / "vae")
    draw, rows = np.random.default_rng(0), {"img": [], "label": []}
    for number in range(8):
        rows["img"].append(Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)))
        rows["label"].append(number % 2)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "part.parquet")
    return f"--vae {tmp_path / 'vae'} --train_data_files {tmp_path / 'part.parquet'} {TINY} {SHORT} {PARTS}"


def test_a_stock_pipeline_comes_out_and_a_resumed_run_is_the_same(tmp_path, data, monkeypatch):
    call(monkeypatch, data, "--output_dir", tmp_path / "one")
    common = f"{data} --latents_dir {tmp_path / 'one' / 'latents'} --lr_scheduler constant --output_dir"
    call(monkeypatch, common, tmp_path / "straight")
    call(monkeypatch, common, tmp_path / "two", "--max_train_steps 2")
    call(monkeypatch, common, tmp_path / "two", "--resume_from_checkpoint latest")
    straight, two = (DiTPipeline.from_pretrained(tmp_path / name) for name in ("straight", "two"))
    assert all(map(torch.equal, straight.transformer.parameters(), two.transformer.parameters()))
    assert not (tmp_path / "two" / "latents").exists()
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["latents"]["latents"] == 16, "eight images and their mirror images"
    assert len(list((tmp_path / "one" / "latents").glob("*.safetensors"))) == 4
    assert {"psnr_16px", "psnr_8px", "encode_seconds", "bytes"} <= report["latents"].keys()
    pipe = DiTPipeline.from_pretrained(tmp_path / "one")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config.num_embeds_ada_norm == 1000
    assert not pipe.scheduler.config.clip_sample
    images = pipe([0, 1], num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()


def test_latents_stand_in_order_and_mirrored(tmp_path):
    config = LatentConfig(image_size=16, part_size=5, encode_batch_size=2)
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    source, vae = ImageSource(images, torch.arange(8), random_flip=False), tiny_vae(times=3)
    found, made_from, cost = encoded_once(config, source, vae, folder=tmp_path / "latents", mirrored=True)
    pixels = enlarged(torch.cat([images, images.flip(-1)]).float() / 127.5 - 1, 16)
    torch.testing.assert_close(found.float(), encode(vae, pixels), rtol=1e-2, atol=1e-2)
    assert (cost["latents"], made_from["mirrored"]) == (16, True)
    other = ImageSource(images.flip(0), torch.arange(8), random_flip=False)
    with pytest.raises(ValueError, match="something else: images: came"):
        encoded_once(config, other, vae, folder=tmp_path / "latents", mirrored=True)


def test_the_model_begins_at_zero_and_drops_no_labels_itself():
    config = train_dit.DiTConfig(num_layers=2, num_attention_heads=1, attention_head_dim=8)
    transformer = dit.build_transformer(config, 32).train()
    labels, times = torch.tensor([3, 4]), torch.tensor([10, 20])
    sample = torch.randn(2, 4, 4, 4)
    assert not transformer(sample, times, class_labels=labels).sample.any()
    emb = transformer.transformer_blocks[0].norm1.emb.class_embedder
    assert all(torch.equal(emb(labels), emb.embedding_table(labels)) for _ in range(20))
    objective = DiffusionObjective(transformer, None, DDPMScheduler(), mode="backbone", class_drop=0.1)
    seen = []
    emb.embedding_table.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    draws = {"uniform": torch.tensor([0.1, 0.6]), "label_drop": torch.tensor([0.05, 0.5]), "class_labels": labels}
    loss = objective({"images": sample, "noise": torch.randn(2, 4, 4, 4)} | draws)["loss"]
    assert seen[0] == [1000, 4]
    loss.backward()
    assert transformer.proj_out_2.weight.grad.any()
    with pytest.raises(ValueError, match="mode='frozen' with a DiT"):
        DiffusionObjective(transformer, object(), DDPMScheduler(), mode="frozen")


@pytest.mark.parametrize(
    "words, told",
    [
        ("", "output_dir=None, vae=None, expected"),
        ("--image_size 20 --dry_run", "image_size=20, expected a multiple of 16"),
        ("--num_classes 1001", r"num_classes=1001, expected 1\.\.1000"),
        ("--part_size 0", "part_size=0"),
        ("--class_drop 2", "class_drop=2.0"),
        ("--vae none-such --output_dir x", "no data files match none-such"),
    ],
)
def test_bad_settings_end_in_words(words, told, monkeypatch):
    with pytest.raises(ValueError, match=told):
        call(monkeypatch, words)


def test_dry_run(monkeypatch, capsys):
    call(monkeypatch, "--dry_run --num_layers 5")
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["num_layers"], resolved["lr_scheduler"]) == (5, "cosine")
