"""`train/train_classifier.py`: settings resolve, a tiny run goes from fine-tuning to exits on it, its folder loads in a pipeline."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    ViTConfig,
    pipeline,
)

# Its own module: `from transformers import AutoImageProcessor` asks for torchvision below 5.18, the class does not.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.exits import ClassifierExits
from ee_diffusion.classification.methods import confidence, jei_dnn
from train import train_classifier
from train.work.classifier import build_objective

SHORT = "--train_batch_size 4 --max_train_steps 3 --logging_steps 1 --lr_warmup_steps 0 --max_length 8"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_classifier.py", *(part for word in words for part in str(word).split())])
    train_classifier.main()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny BERT with its tokeniser, and texts.tsv beside it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(**sizes, vocab_size=len(words), max_position_embeddings=16)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "base")
    rows = [f"w{i} w{2 * i} w{i}\t{i % 2}" for i in range(10)]
    (tmp_path / "texts.tsv").write_text("\n".join(["text\tlabel", *rows]))
    return tmp_path


def test_fine_tuned_then_exits_on_the_frozen_model(base: Path, monkeypatch):
    data = f"--text_files {base}/texts.tsv {SHORT}"
    call(monkeypatch, f"--method plain --init_from {base}/base --output_dir {base}/plain", data)
    jei = "--method jei_dnn --trade_off 0.5 --warm_up 1 --phase 1"
    call(monkeypatch, jei, f"--init_from {base}/plain/model --output_dir {base}/jei", data)
    plain, trained = (EarlyExitClassifier.from_pretrained(base / name / "model") for name in ("plain", "jei"))
    for name, value in plain.model.state_dict().items():
        assert torch.equal(trained.model.state_dict()[name], value), name
    assert trained.exits.depths == (1, 2)
    report = json.loads((base / "jei" / "report.json").read_text())
    assert report["finished"]
    assert json.loads((base / "jei" / "config.json").read_text())["method"] == "jei_dnn"
    trained.policy = jei_dnn(0.5)
    tokenizer = AutoTokenizer.from_pretrained(base / "jei" / "model")
    found = pipeline("text-classification", model=trained, tokenizer=tokenizer)(["w1 w2", "w3"], batch_size=2)
    assert len(found) == 2


def test_exits_on_stored_states_are_those_on_the_live_model(base: Path, monkeypatch):
    data = f"--text_files {base}/texts.tsv {SHORT} --init_from {base}/base --method fastbert"
    monkeypatch.setattr(ClassifierExits, "for_model", functools.partial(ClassifierExits.for_model, dropout=0.0))
    for name, more in (("live", ""), ("made", f"--states {base}/states"), ("read", f"--states {base}/states")):
        call(monkeypatch, data, more, f"--output_dir {base}/{name}")
    live, *others = (EarlyExitClassifier.from_pretrained(base / name / "model") for name in ("live", "made", "read"))
    for other in others:
        for name, value in live.exits.state_dict().items():
            torch.testing.assert_close(other.exits.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected"):
        call(monkeypatch, data, f"--states {base}/states --max_texts 8 --output_dir {base}/other")


def test_exits_of_the_mean_are_saved_and_not_resumed_as_others(base: Path, monkeypatch):
    words = f"--text_files {base}/texts.tsv {SHORT} --init_from {base}/base --method fastbert --checkpointing_steps 2"
    call(monkeypatch, words, f"--pooling mean --states {base}/states --output_dir {base}/mean")
    trained = EarlyExitClassifier.from_pretrained(base / "mean" / "model")
    assert trained.exits.pooling == "mean"
    trained.policy = confidence(0.0)
    tokenizer = AutoTokenizer.from_pretrained(base / "mean" / "model")
    classify = pipeline("text-classification", model=trained, tokenizer=tokenizer)
    texts = ["w1 w2 w3 w4", "w3"]
    together, alone = classify(texts, batch_size=2), [classify(text)[0] for text in texts]
    assert [one["score"] for one in together] == pytest.approx([one["score"] for one in alone], abs=1e-5)
    with pytest.raises(ValueError, match="pooling=first"):
        call(monkeypatch, words, f"--states {base}/states --output_dir {base}/first")
    with pytest.raises(ValueError, match="pooling: came 'first', the checkpoint has 'mean'"):
        call(monkeypatch, words, f"--resume_from_checkpoint latest --output_dir {base}/mean")


def test_thresholds_begin_on_the_line_asked_for(base: Path):
    numbers = {"mask_weight": 0.1, "temperature": 0.01, "bottom_threshold": 0.01, "top_threshold": 0.03}
    config = train_classifier.ClassifierConfig(method="magic_soft", init_from=str(base / "base"), **numbers)
    assert build_objective(config).token_gates.thresholds.tolist() == pytest.approx([0.01, 0.02, 0.03])


def test_a_truncated_control(base: Path, monkeypatch):
    data = f"--text_files {base}/texts.tsv {SHORT} --init_from {base}/base"
    call(monkeypatch, data, f"--num_layers 2 --length_parts 2 --output_dir {base}/cut")
    trained = EarlyExitClassifier.from_pretrained(base / "cut" / "model")
    assert trained.model.config.num_hidden_layers == 2


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve tiny images of two classes, and the configuration of a tiny ViT."""
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(12)]
    table = datasets.Dataset.from_dict({"img": pictures, "label": [i % 2 for i in range(12)]})
    table = table.cast_column("img", datasets.Image())
    table.to_parquet(str(tmp_path / "images.parquet"))
    table.select(range(0, 12, 2)).to_parquet(str(tmp_path / "one_class.parquet"))
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    ViTConfig(**sizes, image_size=8, patch_size=4, architectures=["ViTForImageClassification"]).save_pretrained(
        tmp_path / "vit"
    )
    return tmp_path


def test_images_from_nothing_to_a_pipeline(images: Path, monkeypatch):
    data = f"--train_data_files {images}/images.parquet --image_column img --resolution 8 {SHORT}"
    begun = f"--init_from {images}/vit --random_weights true --num_labels 2"
    call(monkeypatch, begun, data, f"--output_dir {images}/plain")
    jei = "--method jei_dnn --trade_off 0.5 --warm_up 1 --phase 1"
    call(monkeypatch, jei, data, f"--init_from {images}/plain/model --states {images}/states --output_dir {images}/jei")
    trained = EarlyExitClassifier.from_pretrained(images / "jei" / "model")
    trained.policy = jei_dnn(0.5)
    processor = AutoImageProcessor.from_pretrained(images / "jei" / "model", use_fast=False)
    picture = datasets.load_dataset("parquet", data_files=f"{images}/images.parquet", split="train")["img"][0]
    found = pipeline("image-classification", model=trained, image_processor=processor)(picture)
    assert {entry["label"] for entry in found} == {"LABEL_0", "LABEL_1"}
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(processor(picture, return_tensors="pt")["pixel_values"], pixels, rtol=0, atol=1e-5)


def test_images_of_one_class_are_refused(images: Path, monkeypatch):
    words = f"--train_data_files {images}/one_class.parquet --image_column img --resolution 8 {SHORT} --output_dir {images}/out"
    with pytest.raises(ValueError, match="one class is nothing to learn"):
        call(monkeypatch, words, f"--init_from {images}/vit --random_weights true")


def test_tokens_of_images_are_not_removed(images: Path, monkeypatch):
    words = f"--train_data_files {images}/*.parquet --image_column img --resolution 8 {SHORT} --output_dir {images}/out"
    soft = "--method magic_soft --mask_weight 0.1 --temperature 0.01 --top_threshold 0.01"
    with pytest.raises(ValueError, match="tokens of a ViTForImageClassification cannot be removed"):
        call(monkeypatch, words, soft, f"--init_from {images}/vit --random_weights true")


def test_as_many_labels_as_the_model_has(base: Path, monkeypatch):
    config = BertConfig.from_pretrained(base / "base", num_labels=3)
    BertForSequenceClassification(config).save_pretrained(base / "three")
    AutoTokenizer.from_pretrained(base / "base").save_pretrained(base / "three")
    call(monkeypatch, f"--init_from {base}/three --text_files {base}/texts.tsv --output_dir {base}/out", SHORT)
    assert json.loads((base / "out" / "config.json").read_text())["num_labels"] == 3
    call(
        monkeypatch,
        f"--init_from {base}/out/model --method pabee --text_files {base}/texts.tsv --output_dir {base}/two",
        SHORT,
    )
    assert EarlyExitClassifier.from_pretrained(base / "two" / "model").config.num_labels == 3
    with pytest.raises(ValueError, match="two holds no model itself"):
        EarlyExitClassifier.from_pretrained(base / "two")


def test_dry_run(monkeypatch, capsys):
    call(monkeypatch, "--method palbert --prior_rate 0.2 --text_files a.tsv --dry-run")
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["method"], resolved["prior_rate"], resolved["text_columns"]) == ("palbert", 0.2, ["text"])


@pytest.mark.parametrize(
    "words, error",
    [
        ("--method cat --init_from x --output_dir y", "method='cat'"),
        ("--num_labels 0", "num_labels=0"),
        ("--method palbert", "init_from=None"),
        ("--output_dir y --init_from {base}/base --max_length 17", "max_length=17, expected at most the model's 16"),
        ("--output_dir y --init_from {base}/base --method jei_dnn", "trade_off"),
        (
            "--output_dir y --init_from {base}/base --method jei_dnn --trade_off 1 --warm_up 3 --max_train_steps 3",
            "gates would not be trained",
        ),
        (
            "--output_dir y --init_from {base}/base --method magic_soft --temperature 1",
            "needs mask_weight, top_threshold",
        ),
        ("--method plain --pooling mean --init_from x --output_dir y", "pooling=mean: method plain does not use it"),
        ("--method palbert --warm_up 5 --init_from x --output_dir y", "warm_up=5: method palbert does not use it"),
        ("--method pabee --states f --init_from x --output_dir y", "states=f: method pabee does not use it"),
        ("--output_dir y --init_from {base}/run", "run holds no model itself, expected .*run/model"),
        ("--output_dir y --init_from {base}/base --method palbert --exit_depths 3", r"takes 0\.\.2"),
        ("--init_from {base}/base --text_files {base}/texts.tsv --max_length 8", "output_dir=None"),
    ],
)
def test_bad_settings_end_in_words(base: Path, monkeypatch, words: str, error: str):
    BertConfig().save_pretrained(base / "run" / "model")
    with pytest.raises(ValueError, match=error):
        call(monkeypatch, words.format(base=base))
