"""The scripts `eval/classifier_table.py` and `eval/classifier_speed.py` on tiny untrained classifiers; bad settings end in words."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_classify import _cache, call, made  # noqa: F401, a fixture that is used by itself

from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.exits import ClassifierExits
from ee_diffusion.classification.methods import confidence
from ee_diffusion.classification.truncate import truncate
from eval import classifier_speed, classifier_table, write_results
from eval import evaluated as evaluated_runs


def run(monkeypatch: pytest.MonkeyPatch, module, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *(part for word in words for part in str(word).split())])
    module.main()


def evaluated(folder: Path, monkeypatch, *names: str) -> None:
    for name in names:
        words = f"--model {folder}/{name} --text_files {folder}/texts.tsv --output_dir {folder}/out/{name} --points 2 --draws 1"
        call(monkeypatch, words, "--budgets 0.6 0.9 --risk 0.3")


def variants(folder: Path) -> None:
    """model (PALBERT), its first two layers as cut, and other: PALBERT with other heads."""
    made(folder, "palbert")
    classifier = EarlyExitClassifier.from_pretrained(folder / "model")
    cut = truncate(classifier.model, 2)
    torch.manual_seed(1)
    for name, model in (("cut", cut), ("other", classifier.model)):
        exits = ClassifierExits.for_model(model, head="shared", judge="halting")
        EarlyExitClassifier.from_classifier(model, exits).save_pretrained(folder / name)
        for file in ("vocab.txt", "tokenizer_config.json", "tokenizer.json"):
            if (folder / "model" / file).exists():
                (folder / name / file).write_bytes((folder / "model" / file).read_bytes())


def test_a_table_over_seeds_with_controls_at_equal_cost(tmp_path: Path, monkeypatch, capsys):
    variants(tmp_path)
    evaluated(tmp_path, monkeypatch, "model", "cut", "other")
    out = tmp_path / "out"
    run(
        monkeypatch,
        classifier_table,
        f"--reference {out}/model --truncated {out}/cut --names palbert palbert --folders {out}/model {out}/other --output_dir {out}",
        "--note untrained",
    )
    report = json.loads((out / "report.json").read_text())
    single = (
        json.loads((out / "model" / "report.json").read_text()),
        json.loads((out / "other" / "report.json").read_text()),
    )
    full, cut, own, *rows = report["rows"]
    assert (own["exits"], own["rule"], own["number"]) == ("palbert", "none", None)
    ends = [one["controls"]["constant_depth"][-1]["accuracy"] for one in single]
    assert own["accuracy"] == pytest.approx(sum(ends) / 2)
    assert (full["exits"], full["to_full"], full["flops_fraction"]) == ("full model", 0, pytest.approx(1))
    assert cut["exits"] == "truncated 2"
    assert 0.4 < cut["flops_fraction"] < 0.6
    found = {(row["rule"], row["number"]): row for row in rows}
    assert {("palbert", 0.9), ("confidence", 0.6), ("pabee", 1), ("pondernet", 0)} <= found.keys()
    constant = [one["controls"]["constant_depth"][1] for one in single]
    assert found["constant", 2]["accuracy"] == pytest.approx(sum(one["accuracy"] for one in constant) / 2)
    assert found["constant", 2]["flops_fraction"] == pytest.approx(constant[0]["flops_fraction"])
    assert {number for rule, number in found if rule == "constant"} == {1, 2, 3}
    row = found["palbert", 0.9]
    both = [next(one for one in report["budgeted"]["palbert"] if one["budget"] == 0.9)["accuracy"] for report in single]
    assert row["accuracy"] == pytest.approx(sum(both) / 2)
    assert row["seeds"] == 2
    assert row["to_full"] == pytest.approx(row["accuracy"] - full["accuracy"])
    assert row["full_low"] <= row["to_full"] <= row["full_high"]
    assert "palbert" in capsys.readouterr().out
    results = tmp_path / "results"
    results.mkdir()
    for name, place in (("classifiers-a", "report.json"), ("classify-b", "model/report.json")):
        (results / f"{name}.json").write_text((out / place).read_text())
    run(monkeypatch, write_results, f"--reports {results} --output {tmp_path}/RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| truncated 2 |" in text
    table = text.split("\n## ")[1]  # what comes before is the list of contents
    shown = {line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| palbert ")}
    assert shown == {"none", "constant", "confidence", "palbert"}, "not every rule on every exit"
    assert "\nuntrained\n" in text
    assert "Nothing certified by: " in text or "learn_then_test |" in text
    assert f"{tmp_path}/model" not in text


def half(folder: Path, texts: int) -> Path:
    """An evaluation as if of the first or last texts alone: `texts` above 0 or below."""
    look = evaluated_runs.ExitRecord.load(folder / "look.safetensors")
    places = torch.arange(len(look.labels))
    out = folder.with_name(f"{folder.name}{texts}")
    shutil.copytree(folder, out)
    look.select(places[:texts] if texts > 0 else places[texts:]).save(out / "look.safetensors")
    return out


def test_folds_count_every_text_once_beside_its_own_reference(tmp_path: Path, monkeypatch):
    variants(tmp_path)
    evaluated(tmp_path, monkeypatch, "model", "cut", "other")
    out = tmp_path / "out"
    whole = ("--reference {0}/other --truncated {0}/cut --names palbert --folders {0}/model --lengths", "whole")
    count = len(evaluated_runs.ExitRecord.load(out / "model" / "look.safetensors").labels)
    first = count // 3
    for name in ("model", "cut", "other"):
        half(out / name, first), half(out / name, first - count)
    split = (
        f"--reference {{0}}/other{first} {{0}}/other{first - count} --truncated {{0}}/cut{first - count} {{0}}/cut{first} "
        f"--names palbert palbert --folders {{0}}/model{first - count} {{0}}/model{first} --lengths",
        "split",
    )
    reports = {}
    for words, name in (whole, split):
        run(monkeypatch, classifier_table, f"{words.format(out)} --output_dir {out}/{name}")
        reports[name] = json.loads((out / name / "report.json").read_text())
    assert reports["split"]["texts"] == reports["whole"]["texts"] == count
    assert (reports["whole"]["folds"], reports["split"]["folds"]) == (1, 2)
    for one, other in zip(reports["whole"]["rows"], reports["split"]["rows"], strict=True):
        assert (one["exits"], one["rule"], one["seeds"]) == (other["exits"], other["rule"], other["seeds"])
        if one["rule"] == "pondernet":  # draws by place among the texts
            continue
        for fact in ("accuracy", "flops_fraction", "to_full", "full_low", "full_high"):
            assert one[fact] == pytest.approx(other[fact]), (one["rule"], fact)
    row = reports["whole"]["rows"][-1]
    mean = sum(third["to_full"] for third in row["lengths"].values()) / 3
    assert mean == pytest.approx(row["to_full"], abs=0.1)
    assert reports["split"]["rows"][2]["to_truncated"] == pytest.approx(
        reports["whole"]["rows"][2]["to_truncated"], abs=0.02
    )
    words = f"--reference {out}/other{first} {out}/other{first - count} --names palbert --folders {out}/model{first}"
    with pytest.raises(ValueError, match=r"palbert: \[1, 0\] runs"):
        run(monkeypatch, classifier_table, f"{words} --output_dir {out}/broken")


def test_a_control_at_equal_cost_is_a_mixture():
    points = [(1.0, torch.tensor([1.0, 1.0])), (0.5, torch.tensor([0.0, 1.0]))]
    assert evaluated_runs.at_cost(points, 0.75).tolist() == [0.5, 1.0]
    assert evaluated_runs.at_cost(points, 0.6).tolist() == pytest.approx([0.2, 1.0])
    beaten = [(0.75, torch.tensor([0.0, 1.0])), (1.0, torch.tensor([0.0, 0.0]))]
    assert evaluated_runs.at_cost([*points, *beaten], 0.75).tolist() == [0.5, 1.0], "the best mixture at that cost"
    better = [*points, (0.75, torch.tensor([1.0, 1.0]))]
    assert evaluated_runs.at_cost(better, 0.75).tolist() == [1.0, 1.0]
    assert evaluated_runs.at_cost(better, 0.625).tolist() == [0.5, 1.0]
    assert evaluated_runs.at_cost(points, 0.4) is None
    assert evaluated_runs.at_cost(points, 1.1) is None


def test_other_texts_are_refused(tmp_path: Path, monkeypatch):
    made(tmp_path, "palbert")
    evaluated(tmp_path, monkeypatch, "model")
    lines = (tmp_path / "texts.tsv").read_text().splitlines()
    (tmp_path / "texts.tsv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    call(
        monkeypatch,
        f"--model {tmp_path}/model --text_files {tmp_path}/texts.tsv --output_dir {tmp_path}/out/b --points 2 --draws 1",
    )
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="on other texts"):
        run(monkeypatch, classifier_table, f"--reference {out}/model --names a --folders {out}/b --output_dir {out}")
    with pytest.raises(ValueError, match="2 names and 1 folders"):
        run(monkeypatch, classifier_table, f"--reference {out}/model --names a b --folders {out}/b --output_dir {out}")


def test_seconds_side_by_side(tmp_path: Path, monkeypatch):
    variants(tmp_path)
    classifier = EarlyExitClassifier.from_pretrained(tmp_path / "model")
    classifier.pruning = (0.05, 0.1, 0.15, 0.2)
    classifier.policy = confidence(0.0)
    classifier.save_pretrained(tmp_path / "model")
    confidence(1.0).save(tmp_path / "policy.json")
    run(
        monkeypatch,
        classifier_speed,
        f"--names full file own both --models {' '.join([f'{tmp_path}/model'] * 4)} --policies off {tmp_path}/policy.json own own",
        f"--pruning none none none own --text_files {tmp_path}/texts.tsv --output_dir {tmp_path}/out --batch_sizes 1 4",
        "--timed_texts 6 --timed_runs 2 --thirds true",
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = report["rows"]
    assert len(rows) == 4 * 2 * 4
    assert all(row["ratio"] == 1 for row in rows if row["name"] == "full")
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows)
    (tmp_path / "out" / "report.json").rename(tmp_path / "out" / "classifier-speed.json")
    run(monkeypatch, write_results, f"--reports {tmp_path}/out --output {tmp_path}/RESULTS.md")
    assert "| short " in (tmp_path / "RESULTS.md").read_text()
    means = report["mean_tokens"]
    assert means["short"] < means["middle"] < means["long"]


@pytest.mark.parametrize(
    "words, error",
    [
        ("--names a b --models m --policies off --pruning none", "expected one of each"),
        ("--names a --models m --policies off --pruning some", "pruning 'some'"),
        ("--timed_runs 0", "timed_runs=0"),
        ("", "expected folders"),
    ],
)
def test_bad_settings_end_in_words(monkeypatch, words: str, error: str):
    with pytest.raises(ValueError, match=error):
        run(monkeypatch, classifier_speed, words)
