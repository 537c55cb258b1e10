"""Several models' texts in one table: paired, and only of runs that belong together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from eval import decode_table


def test_runs_stand_beside_the_reference_meaning_by_meaning(tmp_path: Path, monkeypatch, capsys):
    said = {"rougeL_low": 0.4, "rougeL_high": 0.6, "bleu": 0.1, "chrf": 0.2}
    settings = {"text": "t.csv", "prompt": "{mr}", "chat": False, "max_new_tokens": 4, "dtype": "float32"}
    runs = {"full": ("full", [0.5, 1.0, 0.9], 5.0), "skip": ("policy", [0.4, 0.8, 0.72], 3.0)}
    runs |= {"mixed": ("policy", [0.5, 0.6, 0.9], 4.0)}
    for name, (candidate, each, layers) in runs.items():
        (tmp_path / name / "decode").mkdir(parents=True)
        own = said | {"rougeL": sum(each) / 3}
        before = [] if candidate == "full" else [{"name": "full", "layers": 5.0} | own]
        report = {"settings": settings, "quality": [*before, {"name": candidate, "layers": layers} | own]}
        (tmp_path / name / "decode" / "decode.json").write_text(json.dumps(report))
        said_of = {one: {"texts": ["x"] * 3, "rougeL": each} for one in ("full", candidate)}
        texts = {"meanings": ["a", "b", "c"], "candidates": said_of}
        (tmp_path / name / "decode" / "texts.json").write_text(json.dumps(texts))
    trained = {"fit": {"steps": 7, "seconds": 2.5, "losses": {"loss": 1.5}}}
    (tmp_path / "skip" / "report.json").write_text(json.dumps(trained))
    folders = [str(tmp_path / name / "decode") for name in runs]

    def table(*names: str, folders: list[str] = folders) -> list[dict]:
        words = ["--reference", folders[0], "--names", *names, "--folders", *folders, "--output_dir", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["decode_table", *map(str, words)])
        decode_table.main()
        return json.loads((tmp_path / "out" / "report.json").read_text())["table"]

    full, skip, mixed = table("full", "skip", "mixed")
    assert (full["lost"], full["lost_low"], full["lost_high"], full["layers"]) == (0, 0, 0, 5)
    assert [skip[key] for key in ("lost", "lost_low", "lost_high")] == pytest.approx([0.2] * 3, abs=1e-6), "paired"
    assert mixed["lost"] == pytest.approx(0.4 / 2.4)
    assert 0 <= mixed["lost_low"] < mixed["lost"] < mixed["lost_high"]
    assert (skip["layers"], skip["steps"], skip["training_seconds"], skip["loss"]) == (3, 7, 2.5, 1.5)
    with pytest.raises(ValueError, match="expected one each"):
        table("full")
    with pytest.raises(ValueError, match=r"lacks \['decode.json', 'texts.json'\]"):
        table("full", "skip", "mixed", folders=[folders[0], str(tmp_path), folders[2]])
    other = json.loads((tmp_path / "skip" / "decode" / "texts.json").read_text()) | {"meanings": ["a", "b", "d"]}
    (tmp_path / "skip" / "decode" / "texts.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="other meanings"):
        table("full", "skip", "mixed")
    with pytest.raises(ValueError, match="all distinct"):
        table("full", "skip", "skip")
    for text, change, told in (
        ("texts.json", {"meanings": ["a", "b", "c"]}, None),
        ("decode.json", {"settings": settings | {"dtype": "bfloat16"}}, "judged with .*bfloat16"),
        ("decode.json", {"settings": settings, "quality": []}, "no table of texts"),
        ("decode.json", {"quality": [{"name": "policy", "layers": 3.0} | said | {"rougeL": 0.9}]}, "files of one run"),
    ):
        path = tmp_path / "skip" / "decode" / text
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        if told is not None:
            with pytest.raises(ValueError, match=told):
                table("full", "skip", "mixed")
    nothing = json.loads((tmp_path / "full" / "decode" / "decode.json").read_text())
    nothing["quality"][0]["name"] = "policy"
    (tmp_path / "full" / "decode" / "decode.json").write_text(json.dumps(nothing))
    with pytest.raises(ValueError, match="expected 'full' among them"):
        table("full", "skip", "mixed")
