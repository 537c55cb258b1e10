"""The script `train/classifier.py`: settings resolve, a tiny run goes from fine-tuning to exits on it, its folder loads in a pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertTokenizer, pipeline
from tree import ROOT

from ee_diffusion.encoder.classifier import EarlyExitClassifier
from ee_diffusion.encoder.methods import jei_dnn

sys.path.insert(0, str(ROOT / "train"))  # as it is when the script runs

import classifier

SHORT = "--train_batch_size 4 --max_train_steps 3 --logging_steps 1 --lr_warmup_steps 0 --max_length 8"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["classifier.py", *(part for word in words for part in str(word).split())])
    classifier.main()


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny BERT with its tokeniser, and texts.tsv beside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
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


def test_dry_run(monkeypatch, capsys):
    call(monkeypatch, "--method palbert --prior_rate 0.2 --text_files a.tsv --dry-run")
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["method"], resolved["prior_rate"], resolved["text_columns"]) == ("palbert", 0.2, ["text"])


@pytest.mark.parametrize(
    "words, error",
    [
        ("--method cat", "method='cat'"),
        ("--num_labels 0", "num_labels=0"),
        ("--method palbert", "init_from=None"),
        ("--init_from {base}/base --max_length 17", "max_length=17, expected at most the model's 16"),
        ("--init_from {base}/base --method jei_dnn", "trade_off"),
        ("--init_from {base}/base --method palbert --exit_depths 3", r"takes 0\.\.2"),
        ("--init_from {base}/base --text_files {base}/texts.tsv --max_length 8", "output_dir=None"),
    ],
)
def test_bad_settings_end_in_words(base: Path, monkeypatch, words: str, error: str):
    with pytest.raises(ValueError, match=error):
        call(monkeypatch, words.format(base=base))
