"""`eval/classifier_table.py` on evaluations written by hand: folds, seeds, lengths and controls come out as on paper."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import pstdev

import pytest
import torch

from ee_diffusion.classification.evaluation import NO_SCORE, ExitRecord
from ee_diffusion.classification.methods import confidence
from eval import classifier_results, classifier_table, evaluated

A, B = [30, 10, 20], [5, 1, 2, 6, 3, 4]  # tokens of the texts of two folds
OF_A, OF_B = {"tokens": A, "safe": [9, 1, 1]}, {"tokens": B, "safe": [9, 9, 9, 1, 1, 1]}


def written(
    folder: Path,
    *right: list[int],
    tokens: list[int],
    safe: list[int] | None = None,
    layers: int = 4,
    least: dict[float, float] | None = None,
    said: float = 1.0,
    labels: torch.Tensor | None = None,
    num_labels: int = 2,
) -> Path:
    """An evaluation with an exit after one layer. right: of each answer, which texts it gets right; safe: tenths of the score; least:
    budget -> threshold; said: what the report says of layers. A text's layer costs its number of tokens."""
    n, lengths = len(tokens), torch.tensor(tokens)
    labels = torch.arange(n) % 2 if labels is None else labels
    correct = torch.tensor([*([right[0]] * (2 - len(right))), *right]).bool()  # (2, n)
    classes = torch.where(correct, labels.long(), 1 - labels.long())
    costs = lengths[:, None] * torch.tensor([1.0, layers])  # (n, 2)
    scores = {"max_probability": torch.tensor([safe or [5] * n]) / 10}
    both = {name: costs.clone() for name in (NO_SCORE, "max_probability")}
    (folder / "policies").mkdir(parents=True)
    answers = torch.nn.functional.one_hot(classes, num_labels).float()
    ExitRecord(answers, scores, both, lengths * 4.0, labels, lengths, (1,), layers).save(folder / "look.safetensors")
    budgets = {0.5: 0.5} if least is None else least
    for budget, threshold in budgets.items():
        confidence(threshold).save(folder / "policies" / f"confidence-{budget:g}.json")
    rows = [{"budget": budget, "accuracy": 0.5, "layers": said} for budget in budgets]
    report = {"calibration_texts": 7, "budgeted": {"confidence": rows}, "controls": {}}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def table(monkeypatch, out: Path, *words: object) -> dict:
    monkeypatch.setattr(sys, "argv", ["classifier_table.py", *map(str, words), "--output_dir", str(out)])
    classifier_table.main()
    return json.loads((out / "report.json").read_text())


def test_two_folds_by_hand(tmp_path: Path, monkeypatch):
    names = ("a0", "b0", "b1", "a1")
    rights = ([1, 1, 0], [1] * 6, [1, 1, 1, 0, 0, 0], [1, 0, 0])
    references = [
        written(tmp_path / name, right, tokens=A if len(right) == 3 else B)
        for name, right in zip(names, rights, strict=True)
    ]
    cut = [
        written(tmp_path / f"cut{place}", right, tokens=A if len(right) == 3 else B, layers=layers)
        for place, (layers, right) in enumerate([(2, [0, 0, 1]), (2, [1, 1, 1, 0, 0, 0]), (1, [0, 0, 0]), (1, [0] * 6)])
    ]
    least = ({0.5: 0.5, 0.7: 0.0}, {0.5: 0.5, 0.7: 0.5})
    a = written(tmp_path / "a", [0, 1, 0], [1, 1, 1], **OF_A, least=least[0], said=1.0)
    b = written(tmp_path / "b", [1, 0, 0, 0, 0, 1], [1, 1, 1, 0, 1, 0], **OF_B, least=least[1], said=4.0)
    words = ("--reference", *references, "--names", "m", "m", "--folders", b, a, "--lengths")
    report = table(monkeypatch, tmp_path / "out", *words, "--truncated", *cut)
    assert (report["texts"], report["folds"], report["calibration_texts"]) == (9, 2, 7)
    full, one, two, own, rule, _ = report["rows"]
    assert [row["exits"] for row in (full, one, two, own)] == ["full model", "truncated 1", "truncated 2", "m"]
    assert [row["seeds"] for row in (full, one, two, own, rule)] == [2, 1, 1, 1, 1]
    assert [row["accuracy"] for row in (full, one, two, own, rule)] == pytest.approx(
        [6 / 9, 0, 4 / 9, 7 / 9, 4 / 9], abs=1e-9
    )
    assert [row["to_full"] for row in (full, two, own)] == pytest.approx([0, -2 / 9, 1 / 9])
    assert own["spread"] == pytest.approx(pstdev([1, 4 / 6]))
    stays = 13 / 21  # the share of B's tokens that go on after the exit; of A's it is half
    assert rule["flops_fraction"] == pytest.approx((60 + 3 * 30 + 21 + 3 * 13) / (4 * 81))
    assert rule["layers"] == pytest.approx((3 * 1 + 6 * 4) / 9)
    beside = 3 * 0 + 6 * (1 / 3 - ((1 - stays) / 3 + stays * 2 / 3))
    assert rule["to_constant"] == pytest.approx(beside / 9)
    beside = 3 * (2 / 3 - (0.75 / 3 + 0.25 / 2)) + 6 * (1 / 3 - (4 / 7 * 0.5 + 3 / 7 * 0.75))
    assert rule["to_truncated"] == pytest.approx(beside / 9)
    found = own["lengths"]
    assert [found[third]["accuracy"] for third in ("short", "middle", "long")] == pytest.approx([1, 2 / 3, 2 / 3])
    assert [found[third]["to_full"] for third in ("short", "middle", "long")] == pytest.approx([1 / 6, 1 / 3, -1 / 6])
    assert all(third["flops_fraction"] == 1 for third in found.values())
    shares = [third["flops_fraction"] for third in rule["lengths"].values()]
    assert shares == pytest.approx([(40 + 3) / 52, (80 + 28) / 108, (30 + 5 + 24) / 164])
    shown = classifier_results.classifiers(report)
    assert "9 samples judged, 7 others to choose thresholds and sets on, 2 folds" in shown
    assert "| short: accuracy to full" in shown
    last = table(monkeypatch, tmp_path / "out", *words, "--truncated", *cut[:2])["rows"][-1]
    assert "to_constant" in last
    assert "to_truncated" not in last, "one fold's runs are cheaper than all its truncated models"


@pytest.mark.parametrize("count, sizes", [(3, [1, 1, 1]), (4, [2, 1, 1]), (5, [2, 2, 1]), (7, [3, 2, 2])])
def test_thirds_of_few_texts(tmp_path: Path, monkeypatch, count: int, sizes: list[int]):
    run = written(tmp_path / "run", [1] * count, tokens=[*range(1, count + 1)])
    (fold,) = evaluated.folds_of([evaluated.Evaluated.read(run)], [])
    assert [len(third) for third in fold.thirds()] == sizes
    report = table(monkeypatch, tmp_path / "out", "--reference", run, "--names", "m", "--folders", run, "--lengths")
    assert "| +0.0000 " in classifier_results.classifiers(report), "a third of one text has no interval"


def test_runs_that_share_no_setting_have_their_own_end(tmp_path: Path, monkeypatch, capsys):
    runs = [written(tmp_path / str(budget), [1, 1, 0], tokens=A, least={budget: 0.5}) for budget in (0.5, 0.6)]
    report = table(monkeypatch, tmp_path / "out", "--reference", runs[0], "--names", "m", "m", "--folders", *runs)
    assert [row["rule"] for row in report["rows"]] == ["none", "none"]
    assert "lengths" not in report["rows"][0]
    assert "layers" not in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(tmp_path: Path, monkeypatch):
    a, again = (written(tmp_path / name, [1, 1, 0], tokens=A) for name in ("a", "again"))
    b = written(tmp_path / "b", [1] * 6, tokens=B)
    short = written(tmp_path / "short", [1, 1, 0], tokens=A, layers=2)
    few = written(tmp_path / "few", [1, 1], tokens=[1, 2])
    values = written(tmp_path / "values", [1, 1, 0], tokens=A, labels=torch.tensor([0.0, 1.0, 0.0]))
    swapped = written(tmp_path / "swapped", [1, 1, 0], tokens=A, labels=torch.tensor([1, 0, 1]))
    four = written(tmp_path / "four", [1, 1, 0], tokens=A, num_labels=4)
    longer = written(tmp_path / "longer", [1, 1, 0], tokens=[31, 10, 20])
    wrong = [
        ([a, short], [a], "references of .2, 4. layers"),
        ([a], [a, a], "a was given twice"),
        ([a, a], [a], "full model: .*a was given twice"),
        ([a, b], [a, again, b], r"m: \[2, 1\] runs"),
        ([a, again, b], [a, b], r"full model: \[2, 1\] runs"),
        ([few], [few], "few judged 2 texts, expected three or more"),
        ([a], [values], "values is of a regression"),
        ([a], [swapped], "swapped was evaluated on other texts"),
        ([a], [longer], "longer was evaluated on other texts than any reference: 3, the references on .3."),
        ([a], [four], "four tells 4 classes apart, its reference 2"),
    ]
    for references, folders, told in wrong:
        words = ("--reference", *references, "--names", *("m" for _ in folders), "--folders", *folders, "--lengths")
        with pytest.raises(ValueError, match=told):
            table(monkeypatch, tmp_path / "out", *words)
