"""The script `eval/classify.py`: a tiny classifier's report holds every rule and control; bad settings end in words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.evaluation import ExitRecord
from ee_diffusion.classification.exits import ClassifierExits
from ee_diffusion.classification.methods import METHODS
from ee_diffusion.core.policy import Policy
from eval import classify


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["classify.py", *(part for word in words for part in str(word).split())])
    classify.main()


def made(folder: Path, method: str, *, num_labels: int = 2) -> Path:
    """A tiny untrained classifier with its tokeniser, and texts.tsv beside it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20))]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=len(words), num_labels=num_labels))
    exits = ClassifierExits.for_model(model, **METHODS[method].exits)
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
        "--budgets 0.2 0.9 1.0 --risk 0.4",
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["texts"], report["calibration_texts"], report["depths"]) == (20, 20, [1, 2, 3, 4])
    assert set(report["rules"]) == set(report["budgeted"]) == {"confidence", "fastbert"} | rules
    for curve in report["rules"].values():
        layers = [point["layers"] for point in curve]
        assert layers == sorted(layers), "a larger value is safer"
        for point in curve:
            assert 0 <= point["accuracy"] <= 1
            assert 1 <= point["set_size"] <= 2
            assert 0 < point["flops_fraction"] < 3  # judges of a model this tiny weigh much
            assert point["gain_low"] <= point["gain"] <= point["gain_high"]
    for rows in report["budgeted"].values():
        assert all(row["fraction"] <= row["budget"] for row in rows)
        assert 0.2 not in [row["budget"] for row in rows], "no exit is that shallow"
    constant = report["controls"]["constant_depth"]
    assert [point["layers"] for point in constant] == [1, 2, 3, 4]
    assert constant[-1]["flops_fraction"] == pytest.approx(1)
    assert constant[-1]["gain"] == constant[-1]["gain_high"] == 0
    best = max(point["accuracy"] for point in constant)
    assert report["controls"]["oracle"]["accuracy"] >= best
    assert len(report["controls"].get("sampled", [])) == (2 if method == "palbert" else 0)
    thirds = report["by_length"]["full depth"]
    assert [row["texts"] for row in thirds] == [7, 7, 6]
    assert [row["mean_tokens"] for row in thirds] == sorted(row["mean_tokens"] for row in thirds)
    assert {"naive", "conformal", "bound", "learn_then_test"} <= set(report["guarantee"])
    written = ExitRecord.load(tmp_path / "out" / "look.safetensors")
    assert written.is_correct(torch.full((20,), 3)).double().mean().item() == pytest.approx(constant[-1]["accuracy"])
    assert Policy.load(tmp_path / "out" / "policies" / f"{next(iter(report['budgeted']))}-1.json")


def test_texts_of_their_own_to_choose_on_and_pruning_scales(tmp_path: Path, monkeypatch):
    made(tmp_path, "pabee")
    classifier = EarlyExitClassifier.from_pretrained(tmp_path / "model")
    classifier.pruning = (0.05, 0.1, 0.15, 0.2)
    classifier.save_pretrained(tmp_path / "model")
    (tmp_path / "own.tsv").write_text("\n".join(["text\tlabel", "w1 w2\t0", "w3\t1", "w4 w5 w6\t1", "w7\t0"]))
    call(
        monkeypatch,
        f"--model {tmp_path}/model --text_files {tmp_path}/texts.tsv --calibration_files {tmp_path}/own.tsv",
        f"--output_dir {tmp_path}/out --points 2 --draws 1 --risk 0.9 --pruning_scales 1 0 0.5",
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["texts"], report["calibration_texts"]) == (40, 4)
    assert report["guarantee"]["candidates"] == 9
    assert report["guarantee"]["naive"]["pruning_scale"] in (0, 0.5, 1)
    short, _, long = report["by_length"]["full depth"]
    assert long["flops_fraction"] < short["flops_fraction"], "pruning helps long texts"


def test_a_part_of_a_sorted_file_holds_every_class(tmp_path: Path, monkeypatch):
    made(tmp_path, "pabee")
    rows = [f"w{i % 20} w{i % 7}\t{i // 20}" for i in range(40)]
    (tmp_path / "sorted.tsv").write_text("\n".join(["text\tlabel", *rows]))
    words = f"--model {tmp_path}/model --text_files {tmp_path}/sorted.tsv --calibration_files {tmp_path}/sorted.tsv"
    call(monkeypatch, words, f"--output_dir {tmp_path}/out --points 2 --draws 1 --max_texts 16 --risk 0.5")
    for name in ("look", "calibration"):
        labels = ExitRecord.load(tmp_path / "out" / f"{name}.safetensors").labels
        assert len(labels) == 16
        assert 3 <= int(labels.sum()) <= 13


def test_stored_states_give_the_report_of_a_look(tmp_path: Path, monkeypatch):
    made(tmp_path, "jei_dnn")
    words = f"--model {tmp_path}/model --text_files {tmp_path}/texts.tsv --points 3 --draws 1 --output_dir {tmp_path}"
    reports = []
    for name, more in (("live", ""), ("made", f"--states {tmp_path}/states"), ("read", f"--states {tmp_path}/states")):
        call(monkeypatch, f"{words}/{name}", more)
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    for other in reports[1:]:
        for row, expected in zip(
            other["controls"]["constant_depth"], reports[0]["controls"]["constant_depth"], strict=True
        ):
            assert row == pytest.approx(expected, abs=1e-6)
        assert [r["accuracy"] for r in other["rules"]["jei_dnn"]] == [
            r["accuracy"] for r in reports[0]["rules"]["jei_dnn"]
        ]


@pytest.mark.parametrize(
    "words, error",
    [
        ("", "model=None"),
        ("--points 0", "points=0"),
        ("--miss_rate 1", "miss_rate=1.0"),
        ("--risk 0", "risk=0.0"),
        ("--budgets 1.5", r"budgets=\[1.5\]"),
        ("--model {0}/model --output_dir {0}/out --text_files {0}/none.tsv", "no data files match"),
    ],
)
def test_bad_settings_end_in_words(tmp_path: Path, monkeypatch, words: str, error: str):
    if "{0}" in words:
        made(tmp_path, "pabee")
    with pytest.raises(ValueError, match=error):
        call(monkeypatch, words.format(tmp_path))


def test_a_regression(tmp_path: Path, monkeypatch):
    made(tmp_path, "pabee", num_labels=1)
    words = f"--model {tmp_path}/model --output_dir {tmp_path}/out --text_files {tmp_path}/texts.tsv"
    call(monkeypatch, words)
    found = json.loads((tmp_path / "out" / "report.json").read_text())["controls"]
    assert [row["depth"] for row in found["constant_depth"]] == [1, 2, 3, 4]
    assert all(-1 <= row["spearman"] <= 1 and row["mse"] > 0 for row in found["constant_depth"])
    assert len(found["pabee"]) == 3 * 2
    best = found["constant_depth"][-1]
    for row in [*found["pabee"], *found["constant_depth"]]:
        assert row["gain"] == pytest.approx(best["mse"] - row["mse"])
    assert (
        found["pabee"][0]["layers"] <= found["pabee"][-1]["layers"]
        or found["pabee"][0]["tolerance"] < found["pabee"][-1]["tolerance"]
    )
    with pytest.raises(ValueError, match="of a regression"):
        call(monkeypatch, words, "--risk 0.1")


def test_what_was_found_is_printed_and_the_side_of_a_fold_named(tmp_path: Path, monkeypatch, capsys):
    made(tmp_path, "pabee")
    words = f"--model {tmp_path}/model --text_files {tmp_path}/texts.tsv --folds 2 --output_dir {tmp_path}/out --risk 0.01 --budgets 0.5 1"
    with pytest.warns(UserWarning, match="judging what training with fold=0 sees; --held_out true takes the rest"):
        call(monkeypatch, words)
    said = capsys.readouterr().out
    assert "| full model |" in said
    assert said.count("| confidence |") == 2
    assert "certified by learn then test: none" in said


def test_a_model_that_gives_several_classes_at_once_is_refused(tmp_path: Path, monkeypatch):
    made(tmp_path, "pabee")
    classifier = EarlyExitClassifier.from_pretrained(tmp_path / "model")
    classifier.config.problem_type = "multi_label_classification"
    classifier.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="problem_type='multi_label_classification', expected"):
        call(monkeypatch, f"--model {tmp_path}/model --text_files {tmp_path}/texts.tsv --output_dir {tmp_path}/out")
