"""The script `eval/classify.py`: a tiny classifier's report holds every rule and control; bad settings end in words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pytest
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
from tree import ROOT

from ee_diffusion.encoder.classifier import EarlyExitClassifier
from ee_diffusion.encoder.exits import ClassifierExits
from ee_diffusion.encoder.methods import EXITS

sys.path.insert(0, str(ROOT / "eval"))  # as it is when the script runs

import classify


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["classify.py", *(part for word in words for part in str(word).split())])
    classify.main()


def made(folder: Path, method: str, *, num_labels: int = 2) -> Path:
    """A tiny untrained classifier with its tokeniser, and texts.tsv beside it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20))]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=len(words), num_labels=num_labels))
    head, judge = EXITS[method]
    exits = ClassifierExits.for_model(model, head=head, judge=judge)
    EarlyExitClassifier.from_classifier(model, exits).save_pretrained(folder / "model")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    rows = [f"{' '.join(f'w{j}' for j in range(i % 7 + 1))}\t{i % 2}" for i in range(40)]
    (folder / "texts.tsv").write_text("\n".join(["text\tlabel", *rows]))
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "method, rules",
    [
        ("palbert", {"palbert"}),
        pytest.param("jei_dnn", {"jei_dnn"}, marks=pytest.mark.slow),
        pytest.param("pabee", set(), marks=pytest.mark.slow),
    ],
)
def test_a_report_holds_every_rule_and_control(tmp_path: Path, monkeypatch, method: str, rules: set[str]):
    made(tmp_path, method)
    call(
        monkeypatch,
        f"--model {tmp_path}/model --text_files {tmp_path}/texts.tsv --output_dir {tmp_path}/out --points 4 --draws 2",
        "--budget 0.9 --timed_texts 4 --timed_runs 1",
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["texts"], report["test_texts"], report["depths"]) == (40, 20, [1, 2, 3, 4])
    assert set(report["rules"]) == {"confidence", "fastbert"} | rules
    for curve in report["rules"].values():
        layers = [point["layers"] for point in curve]
        assert layers == sorted(layers), "a larger value is safer"
        for point in curve:
            assert 0 <= point["accuracy"] <= 1
            assert 1 <= point["set_size"] <= 2
            assert 0 < point["flops_fraction"] < 3  # judges of a model this tiny weigh much
    constant = report["controls"]["constant_depth"]
    assert [point["layers"] for point in constant] == [1, 2, 3, 4]
    assert constant[-1]["flops_fraction"] == pytest.approx(1)
    best = max(point["accuracy"] for point in constant)
    assert report["controls"]["oracle"]["accuracy"] >= best
    assert len(report["controls"].get("sampled", [])) == (2 if method == "palbert" else 0)
    assert report["budgeted"]["fraction"] <= 0.9
    assert report["budgeted"]["seconds"]["batch_8"]["full"] > 0


@pytest.mark.parametrize(
    "words, error",
    [
        ("", "model=None"),
        ("--points 0", "points=0"),
        ("--miss_rate 1", "miss_rate=1.0"),
        ("--model {0}/model --output_dir {0}/out --text_files {0}/none.tsv", "no data files match"),
    ],
)
def test_bad_settings_end_in_words(tmp_path: Path, monkeypatch, words: str, error: str):
    if "{0}" in words:
        made(tmp_path, "pabee")
    with pytest.raises(ValueError, match=error):
        call(monkeypatch, words.format(tmp_path))


def test_a_regression_is_refused(tmp_path: Path, monkeypatch):
    made(tmp_path, "pabee", num_labels=1)
    with pytest.raises(ValueError, match="regression"):
        call(monkeypatch, f"--model {tmp_path}/model --output_dir {tmp_path}/out --text_files {tmp_path}/texts.tsv")
