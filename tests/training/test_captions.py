"""Captioned images: the split is by caption alone, batches belong to their keys, `train/train_text_to_image.py` from data to pipeline."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from stock import tiny_vae
from tiny_texts import CAPTIONS, TOKENS, WIDTH, save_encoder, tiny_encoder, tiny_tokenizer

from ee_diffusion.diffusion.pipelines.prompts import encode_prompts
from ee_diffusion.diffusion.pipelines.text_to_image import EarlyExitTextPipeline
from ee_diffusion.metrics.retrieval import load_tower
from ee_diffusion.training.captions import CaptionSource, names_skin_tone, split_of, subject
from ee_diffusion.training.config import CaptionConfig, ImageDataConfig, LatentConfig
from ee_diffusion.training.order import Order
from ee_diffusion.training.rng import sample_keys
from train import train_retrieval_tower, train_text_to_image
from train.work.text_to_image import load_source

SHARES = {"validation": 0.05, "test": 0.1, "seed": 0}


@pytest.mark.parametrize(
    "caption, expected, toned",
    [
        ("Waving hand: medium-light skin tone", "waving hand", True),
        ("waving hand medium light", "waving hand", True),
        ("waving hand default", "waving hand", False),
        ("handshake: dark skin tone, light skin tone", "handshake", True),
        ("light bulb", "light bulb", False),
        ("keycap: #", "keycap #", False),
        ("couple with heart: woman, man", "couple with heart woman man", False),
    ],
)
def test_a_subject_is_what_sets_share(caption: str, expected: str, toned: bool):
    assert (subject(caption), names_skin_tone(caption)) == (expected, toned)


def test_the_split_is_a_function_of_the_subject_with_the_shares_asked_for():
    captions = [f"thing {number}" for number in range(20_000)]
    found = [split_of(caption, **SHARES) for caption in captions]
    for name, share in {"test": 0.1, "validation": 0.05, "train": 0.85}.items():
        assert abs(found.count(name) / len(found) - share) < 0.01
    shuffled = random.Random(0).sample(captions, len(captions))
    assert {caption: split_of(caption, **SHARES) for caption in shuffled} == dict(zip(captions, found, strict=True))
    assert all(
        split_of(f"{caption}: dark skin tone", **SHARES) == split
        for caption, split in zip(captions, found, strict=True)
    )
    other = [split_of(caption, **(SHARES | {"seed": 1})) for caption in captions]
    assert other != found
    with pytest.raises(ValueError, match=r"validation=0\.5, test=0\.5, expected shares"):
        split_of("a", validation=0.5, test=0.5, seed=0)


@pytest.mark.data
def test_no_subject_of_the_real_captions_is_on_both_sides(data_folder: Path):
    table = datasets.load_dataset("parquet", data_files=str(data_folder / "emoji64" / "*.parquet"), split="train")
    sides: dict[str, set[str]] = {}
    for caption in table["text"]:
        sides.setdefault(split_of(caption, **SHARES), set()).add(caption)
    assert {name: len(captions) > 100 for name, captions in sides.items()} == dict.fromkeys(sides, True)
    assert sides.keys() == {"train", "validation", "test"}
    assert not sides["train"] & sides["test"], "a caption on both sides"
    subjects = {name: {subject(caption) for caption in captions} for name, captions in sides.items()}
    assert not subjects["train"] & (subjects["test"] | subjects["validation"])
    assert not subjects["test"] & subjects["validation"]


def source(drop: float = 0.3) -> CaptionSource:
    draw = torch.Generator().manual_seed(0)
    latents, texts = torch.randn(9, 4, 2, 2, generator=draw), torch.randn(3, TOKENS, WIDTH, generator=draw)
    captions = torch.arange(9) % 3
    return CaptionSource(
        latents, captions, texts=texts, empty=torch.zeros(TOKENS, WIDTH), caption_drop=drop, name="nine"
    )


def test_batches_carry_their_captions_and_drop_some_by_key():
    tiny, positions = source(), torch.arange(4000)
    indices, keys = Order(9, 0, 4000, ranks=1, micro_steps=1).indices(positions), sample_keys(positions, 0)
    batch = tiny.batch(indices, keys)
    empty = (batch["encoder_hidden_states"] == 0).flatten(1).all(1)
    assert abs(empty.float().mean() - 0.3) < 0.03
    expected = tiny.texts[tiny.captions[indices]]
    assert torch.equal(batch["encoder_hidden_states"][~empty], expected[~empty])
    assert torch.equal(batch["images"], tiny.latents[indices])
    some = torch.tensor([7, 3, 999])
    again = tiny.batch(indices[some], keys[some])
    assert all(torch.equal(again[name], batch[name][some]) for name in batch)
    assert not (source(0.0).batch(indices, keys)["encoder_hidden_states"] == 0).flatten(1).all(1).any()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"latents": torch.zeros(9, 4)}, "expected .M, C, H, W."),
        ({"captions": torch.zeros(9)}, "captions torch.float32"),
        ({"captions": torch.full((9,), 3)}, r"captions span 3\.\.3, expected 0\.\.2"),
        ({"empty": torch.zeros(1, WIDTH)}, "empty"),
        ({"caption_drop": 2.0}, r"caption_drop=2\.0"),
    ],
)
def test_what_does_not_fit_is_refused(change, told):
    tiny = source()
    parts = {name: getattr(tiny, name) for name in ("latents", "captions", "texts", "empty", "caption_drop", "name")}
    with pytest.raises(ValueError, match=told):
        CaptionSource(**(parts | change))


# --- train/train_text_to_image.py

TINY = (
    "--image_size 32 --resolution 32 --num_layers 3 --num_attention_heads 1 --attention_head_dim 8 --num_text_tokens 4"
)
SHORT = "--train_batch_size 4 --max_train_steps 3 --logging_steps 1 --checkpointing_steps 2 --lr_warmup_steps 0"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(
        sys, "argv", ["train_text_to_image.py", *(part for word in words for part in str(word).split())]
    )
    train_text_to_image.main()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_vae(times=3).save_pretrained(tmp_path / "vae")
    save_encoder(tmp_path / "encoder")
    draw, rows = np.random.default_rng(0), {"image": [], "text": []}
    for number in range(3 * len(CAPTIONS)):
        rows["image"].append(Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)))
        rows["text"].append(CAPTIONS[number % len(CAPTIONS)])
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "part.parquet")
    files = (
        f"--train_data_files {tmp_path / 'part.parquet'} --vae {tmp_path / 'vae'} --text_encoder {tmp_path / 'encoder'}"
    )
    return f"{files} {TINY} {SHORT} --test_share 0.4"


def test_backbone_then_exits_then_pictures_and_a_resumed_run_is_the_same(tmp_path, data, monkeypatch):
    call(monkeypatch, data, "--output_dir", tmp_path / "straight")
    common = f"{data} --latents_dir {tmp_path / 'straight' / 'latents'} --output_dir"
    call(monkeypatch, common, tmp_path / "two", "--max_train_steps 2")
    call(monkeypatch, common, tmp_path / "two", "--resume_from_checkpoint latest")
    straight, two = (EarlyExitTextPipeline.from_pretrained(tmp_path / name) for name in ("straight", "two"))
    assert all(map(torch.equal, straight.transformer.parameters(), two.transformer.parameters()))
    report = json.loads((tmp_path / "straight" / "report.json").read_text())["data"]
    held_out = [caption for caption in CAPTIONS if split_of(caption, **(SHARES | {"test": 0.4})) == "test"]
    assert report["images_per_split"]["test"] == 3 * len(held_out)
    assert report["latents"] == report["images_per_split"]["train"] < 3 * len(CAPTIONS)
    assert report["captions"] == report["latents"] // 3
    call(monkeypatch, common, tmp_path / "exits", "--mode joint --init_from", tmp_path / "straight")
    words = {"text_encoder": tiny_encoder(), "tokenizer": tiny_tokenizer(), "vae": tiny_vae(times=3)}
    pipe = EarlyExitTextPipeline.from_pretrained(tmp_path / "exits", **words)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.exits.depths, pipe.scheduler.config.prediction_type) == ((1, 2), "v_prediction")
    with pytest.raises(ValueError, match="num_layers: 3, the flags say 5"):
        call(monkeypatch, common, tmp_path / "other", "--num_layers 5 --init_from", tmp_path / "straight")
    images = pipe(held_out[:2], 2, 2.0, exit_threshold=0.9, output_type="pt").images
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all()


def test_only_training_captions_are_encoded_in_the_order_of_their_images(tmp_path, data, monkeypatch):
    model = train_text_to_image.TextToImageConfig(text_encoder=str(tmp_path / "encoder"))
    latents = LatentConfig(vae=str(tmp_path / "vae"), image_size=32)
    files = {"train_data_files": [str(tmp_path / "part.parquet")], "resolution": 32, "random_flip": False}
    captions = CaptionConfig(test_share=0.4)
    made, _ = load_source(model, latents, ImageDataConfig(**files), captions, folder=tmp_path / "run")
    kept = [caption for caption in CAPTIONS * 3 if split_of(caption, **(SHARES | {"test": 0.4})) == "train"]
    texts = encode_prompts(tiny_tokenizer(), tiny_encoder(), [*kept, ""], num_tokens=4)
    torch.testing.assert_close(made.texts[made.captions].float(), texts[:-1], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(made.empty.float(), texts[-1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "words, told",
    [
        ("", "output_dir=None, vae=None, text_encoder=None, expected a value for each"),
        ("--mode sideways", "mode='sideways'"),
        ("--mode frozen", "frozen needs a trained backbone"),
        ("--num_text_tokens 0", "num_text_tokens=0"),
        ("--output_dir x --vae none-such --text_encoder y", "no data files match none-such"),
    ],
)
def test_bad_settings_end_in_words(words, told, monkeypatch):
    with pytest.raises(ValueError, match=told):
        call(monkeypatch, words)


def test_a_tower_is_trained_on_training_captions_alone(tmp_path, data, monkeypatch):
    flags = f"--train_data_files {tmp_path / 'part.parquet'} --text_encoder {tmp_path / 'encoder'} --test_share 0.4 --resolution 32"
    words = f"train_retrieval_tower.py {flags} {SHORT} --widths 4 8 --output_dir {tmp_path / 'tower'}"
    monkeypatch.setattr(sys, "argv", words.split())
    train_retrieval_tower.main()
    tower, facts = load_tower(tmp_path / "tower" / "tower.safetensors")
    kept = sorted({caption for caption in CAPTIONS if split_of(caption, **(SHARES | {"test": 0.4})) == "train"})
    assert (facts["captions"], facts["images"], facts["text_encoder"]) == (len(kept), 3 * len(kept), "encoder")
    texts = encode_prompts(tiny_tokenizer(), tiny_encoder(), kept, num_tokens=1)[:, 0]
    torch.testing.assert_close(tower.centre, texts.mean(dim=0))
    assert tower(torch.rand(2, 3, 32, 32)).shape == (2, WIDTH)
    monkeypatch.setattr(sys, "argv", ["train_retrieval_tower.py"])
    with pytest.raises(ValueError, match="output_dir=None, text_encoder=None, expected a value for each"):
        train_retrieval_tower.main()


def test_dry_run(monkeypatch, capsys):
    call(monkeypatch, "--dry_run --num_layers 5")
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["num_layers"], resolved["caption_drop"]) == (5, 0.1)
