"""How modules of train/ start: help without torch, flags over presets over defaults, refusals before the work."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tree import ROOT

from ee_diffusion.decoding.exit_objective import TEACHERS
from ee_diffusion.diffusion.distillation.deediff_objective import MODES
from train import train_lm_exits
from train.launch import launch
from train.train_text_to_image import TextToImageConfig
from train.train_uvit import UViTConfig

MODULES = sorted(path.stem for path in (ROOT / "train").glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
HEAVY = ("torch", "diffusers", "accelerate", "datasets", "peft", "matplotlib")
HELP = """
import runpy, sys, time
for name in {names}:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"train.{{name}}", run_name="__main__")
    except SystemExit as end:
        assert not end.code, name
    assert not [heavy for heavy in {heavy} if heavy in sys.modules], name
print(time.process_time())
"""


def test_help_of_every_module_loads_no_torch_and_takes_less_than_a_second_of_work():
    assert len(MODULES) > 8
    command = [sys.executable, "-c", HELP.format(names=MODULES, heavy=HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--dry_run") >= len(MODULES)
    assert float(done.stdout.split()[-1]) < 1 + 0.2 * len(MODULES), "one takes most of it: the import of the parser"


@dataclass(frozen=True)
class Size:
    """A setting, and where the output goes."""

    size: int = 1
    output_dir: str | None = None


def work(config: Size) -> None:
    print(f"size {config.size} into {config.output_dir}")


def call(monkeypatch: pytest.MonkeyPatch, words: str, **more) -> None:
    monkeypatch.setattr(sys, "argv", ["module", *words.split()])
    launch("test_launch_work:work", "About.", Size, **more)


@pytest.fixture(autouse=True)
def _work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "test_launch_work", sys.modules[__name__])


@pytest.mark.parametrize(
    ("words", "size"), [("", 2), ("--preset large", 3), ("--preset large --size 4", 4), ("--size 5", 5)]
)
def test_flags_win_over_presets_and_presets_over_defaults(words: str, size: int, monkeypatch, capsys):
    more = {"defaults": {"size": 2}, "presets": {"large": {"size": 3}}}
    call(monkeypatch, f"{words} --dry-run", **more)
    assert json.loads(capsys.readouterr().out) == {"size": size, "output_dir": None}
    call(monkeypatch, f"{words} --output_dir x", **more)
    assert capsys.readouterr().out == f"size {size} into x\n"


def test_refusals_come_before_the_work(monkeypatch, capsys):
    def check(config: Size) -> None:
        if config.size > 9:
            raise ValueError("too large")

    with pytest.raises(ValueError, match="output_dir=None, expected a value for each"):
        call(monkeypatch, "", check=check)
    for words in ("--size 10 --output_dir x", "--size 10 --dry_run"):
        with pytest.raises(ValueError, match="too large"):
            call(monkeypatch, words, check=check)
    assert capsys.readouterr().out == ""


def test_names_in_flags_are_those_of_the_library():
    """The modules that hold flags may not load torch, so they list the names themselves."""
    assert train_lm_exits.TEACHERS == TEACHERS
    for mode in MODES:
        start = {"mode": mode, "init_from": "x"}
        assert (UViTConfig(**start).mode, TextToImageConfig(**start).mode) == (mode, mode)


def test_the_documented_start_of_every_module_is_by_its_name():
    for name in MODULES:
        text = Path(ROOT / "train" / f"{name}.py").read_text(encoding="utf-8")
        assert f"-m train.{name} " in text
        assert text.endswith("    run_script(main)\n")
