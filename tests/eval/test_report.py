"""docs/results.md: every report of results/ can be read, the page is what the reports say, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from tree import ROOT

from eval import report


def rendered(monkeypatch: pytest.MonkeyPatch, output: Path, *words: object) -> str:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["report", "--output", str(output), *map(str, words)])
    report.main()
    return output.read_text(encoding="utf-8")


def test_the_page_is_what_the_reports_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    text = rendered(monkeypatch, tmp_path / "results.md")
    assert text == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == 8, "seven questions and the list"
    assert len(text.encode()) <= 25_000
    for path in (ROOT / "results").glob("*.json"):
        assert f"(data/{path.name})" in text


def test_reports_stay_small_and_hold_all_their_parts():
    paths = sorted((ROOT / "results").glob("*.json"))
    assert len(paths) > 40
    assert sum(path.stat().st_size for path in paths) <= 400_000
    for path in paths:
        found = report.read_report(path)
        assert all(rows for rows in found["tables"].values())
        assert found["tables"]
        assert found["command"]


def changed(tmp_path: Path, change) -> list[object]:
    """Flags for a copy of the reports and questions in which `change(questions, folder)` changed something."""
    shutil.copytree(ROOT / "results", tmp_path / "reports")
    questions = yaml.safe_load((ROOT / "eval/configs/results.yaml").read_text(encoding="utf-8"))
    change(questions, tmp_path / "reports")
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(questions), encoding="utf-8")
    return ["--reports", tmp_path / "reports", "--questions", tmp_path / "questions.yaml"]


def of_another_format(questions: list, folder: Path) -> None:
    path = folder / f"{questions[0]['report']}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "other"}))


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda questions, folder: questions[0]["rows"]["name"].append("nobody"), r"no row has name \['nobody'\]"),
        (lambda questions, folder: questions[1].update(table="no table"), "has no table 'no table', expected one of"),
        (of_another_format, "is no report: format 'other'"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_old_page_stays(change, error: str, monkeypatch, tmp_path: Path):
    (tmp_path / "results.md").write_text("old")
    words = changed(tmp_path, change)
    with pytest.raises(ValueError, match=error):
        rendered(monkeypatch, tmp_path / "results.md", *words)
    assert (tmp_path / "results.md").read_text() == "old"
