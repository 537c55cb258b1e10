"""Files for `custom_pipeline=`: diffusers finds exactly one class in each, the package's own, and the checkout's files are the same."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from tree import ROOT

import ee_diffusion

NAMES = sorted(name for name in ee_diffusion.__all__ if name.startswith("EarlyExit") and name.endswith("Pipeline"))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_holds_one_pipeline_class_the_packages_own(name: str):
    held = runpy.run_path(ee_diffusion.custom_pipeline(name)).values()  # as diffusers looks for the class
    assert [one for one in held if isinstance(one, type) and issubclass(one, DiffusionPipeline)] == [
        getattr(ee_diffusion, name)
    ]


def test_diffusers_loads_by_the_path_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.chdir(tmp_path)  # not the root of the checkout
    path = ee_diffusion.custom_pipeline("EarlyExitPipeline")
    folder = str(ee_diffusion.checkpoint_path())
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=path, trust_remote_code=True)
    assert type(pipe) is ee_diffusion.EarlyExitPipeline
    assert pipe.exits is not None


def test_the_checkout_has_the_same_files():
    own = {Path(ee_diffusion.custom_pipeline(name)) for name in NAMES}
    beside = {path.name: path.read_text() for path in (ROOT / "pipelines").glob("*.py")}
    assert {path.name: path.read_text() for path in own} == beside


def test_a_class_without_a_file_is_refused():
    with pytest.raises(ValueError, match=r"custom_pipeline\('DiTPipeline'\), expected .*early_exit_dit_pipeline"):
        ee_diffusion.custom_pipeline("DiTPipeline")
