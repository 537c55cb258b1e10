"""Cached exits as earlier versions saved them (saved/: files of the first format, as they were) still load, and marked policies run."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ee_diffusion.checkpoints import checkpoint_path
from ee_diffusion.cli.main import _check_folder as check_folder
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.fingerprint import made_for_of
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline

SAVED = Path(__file__).parent / "saved"
MARKS = {  # of the shipped model with these exits, 50 steps and guidance 4.0, as the version that wrote them had it
    "memory": {"weights": "74a3dcac9d9ac83d", "exits settings": "be17171da8c818e2"},
    "memory-ddim50": {"weights": "ed15b69c41592b1d", "exits settings": "8bc41db8e2e559ca"},
}


@pytest.mark.parametrize("name", MARKS)
def test_files_of_the_first_format_load(name: str, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exits = CachedOutputExits.from_pretrained(SAVED / name)
    assert not {"gauge", "prediction.worth"} & {key.split(".0")[0] for key in exits.state_dict()}
    expected = {"cached_type": "sample", "fitted_steps": 0, "joint": None}
    if name == "memory-ddim50":
        expected = {
            "cached_type": "epsilon",
            "fitted_steps": 50,
            "fitted_scheduler": "DDIMScheduler",
            "fitted_guidance": 4.0,
            "joint": True,
        }
    assert exits.config.items() >= expected.items()
    told = load_file(SAVED / name / "diffusion_pytorch_model.safetensors").values()
    assert sorted(float(one.double().sum()) for one in told) == sorted(
        float(one.double().sum()) for one in exits.state_dict().values()
    )
    shipped = CachedOutputExits.from_pretrained(checkpoint_path() / name.replace("memory", "cache"))
    assert all(torch.equal(one, shipped.state_dict()[key]) for key, one in exits.state_dict().items())
    exits.save_pretrained(tmp_path)
    again = CachedOutputExits.from_pretrained(tmp_path)
    assert dict(again.config).items() >= {n: v for n, v in exits.config.items() if not n.startswith("_")}.items()
    assert all(torch.equal(one, again.state_dict()[key]) for key, one in exits.state_dict().items())


@pytest.mark.parametrize("name", MARKS)
def test_marks_of_the_first_format_hold(name: str):
    pipe = EarlyExitPipeline.from_pretrained(checkpoint_path())
    pipe.exits = CachedOutputExits.from_pretrained(SAVED / name)
    mark = dict(made_for_of(pipe, num_inference_steps=50, guidance_scale=4.0))
    assert {what: mark[what] for what in MARKS[name]} == MARKS[name]


def test_they_are_made_way_for_as_todays(tmp_path: Path):
    """`ee-diffusion calibrate --fit_cache FOLDER` takes the place of cached exits and of nothing else."""
    shutil.copytree(SAVED / "memory", tmp_path, dirs_exist_ok=True)
    check_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UViTTransformer2DModel"}')
    with pytest.raises(ValueError, match="holds a UViTTransformer2DModel"):
        check_folder(tmp_path)


def test_exits_with_a_learned_trust_are_refused(tmp_path: Path):
    shutil.copytree(SAVED / "memory", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"learned_trust": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"learned_trust=True: .* expected exits without it"):
        CachedOutputExits.from_pretrained(tmp_path)
