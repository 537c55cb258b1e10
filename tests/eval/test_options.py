"""Flags over a YAML file over defaults, as frozen options; the work is loaded by name, after them."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tree import ROOT

from eval.harness import options
from eval.harness.options import flag, numbers


@dataclass(frozen=True)
class Options:
    """Some flags."""

    count: int = flag("How many.", 3)
    shares: list[float] = numbers("Which.", 0.5)
    controls: bool = flag("With controls.", True)


def parsed(*words: object, **defaults) -> Options:
    return options.parse(Options, description="", words=[str(word) for word in words], **defaults)[0]


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("count: 5\nshares: [0.25, 0.75]\ncontrols: false\n")
    assert parsed(count=4) == Options(count=4)
    assert parsed("--config", tmp_path / "a.yaml", count=4) == Options(5, [0.25, 0.75], False)
    assert parsed("--config", tmp_path / "a.yaml", "--count", 6, "--controls", True) == Options(6, [0.25, 0.75], True)


@pytest.mark.parametrize("text, told", [("counts: 5\n", r"sets \['counts'\]"), ("- 5\n", r"sets \[5\]"), ("", "None")])
def test_a_file_of_other_names_is_refused(text: str, told: str, tmp_path: Path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=told):
        parsed("--config", tmp_path / "a.yaml")


def test_a_command_names_the_module_and_no_machine(monkeypatch: pytest.MonkeyPatch):
    for name in options.CLOCK:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(sys, "argv", ["/somewhere/eval/frontier.py", "--model", "/home/me/model", "--names", "a b"])
    assert options.command() == "OMP_NUM_THREADS=2 python -m eval.frontier --model .../model --names 'a b'"


def test_one_of_several_commands(monkeypatch: pytest.MonkeyPatch, capsys):
    commands = {"one": ("json:dumps", (Options,), {"count": 7}), "two": ("json:loads", (Options,), {})}
    monkeypatch.setattr(sys, "argv", ["script", "one", "--dry-run"])
    with pytest.raises(SystemExit):
        options.launch_one_of("About.", **commands)
    assert json.loads(capsys.readouterr().out) == {"count": 7, "shares": [0.5], "controls": True}
    for words, status in (([], 0), (["--help"], 0), (["three"], 2)):
        monkeypatch.setattr(sys, "argv", ["script", *words])
        with pytest.raises(SystemExit) as stopped:
            options.launch_one_of("About.", **commands)
        assert stopped.value.code == status
        assert "Commands: one, two." in capsys.readouterr().out


def test_flags_load_no_torch():
    code = "import sys; import eval.harness.options; print({'torch', 'diffusers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


CONFIGS = sorted(path for path in (ROOT / "eval" / "configs").glob("*.yaml") if path.name != "results.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_names_its_script_and_holds_its_flags(path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    launch = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").split()
    assert launch[:2] == ["python", "-m"]
    words = [*launch[3:], "--config", path, "--output_dir", "out", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(launch[2]).main()
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["output_dir"] == "out"
    if not path.stem.startswith("gpu-"):
        assert (ROOT / "results" / f"{path.stem}.json").is_file()


def test_a_report_of_a_frontier_has_its_config():
    missing = [
        path.stem for path in (ROOT / "results").glob("frontier*.json") if path.stem not in {c.stem for c in CONFIGS}
    ]
    assert not missing
