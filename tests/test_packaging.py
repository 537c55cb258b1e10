"""The built wheel: what is in it, and that the README's lines run from it outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from tree import ROOT, python_blocks, tracked_files

import ee_diffusion

pytestmark = pytest.mark.slow


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "EE_DIFFUSION_DATA"}}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, so that nothing else can slip in and nothing is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in tracked_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {path for path in tracked_files() if path.is_relative_to(ROOT / "ee_diffusion")}
    assert packed == {path.relative_to(ROOT).as_posix() for path in code}
    assert "ee_diffusion/py.typed" in packed


def test_the_wheel_says_what_it_is(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_file,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(metadata_file).decode())
    assert (metadata["Name"], metadata["Version"]) == ("ee-diffusion", ee_diffusion.__version__)
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """The Python of an environment with the wheel; what it depends on is lent by the running one, or installed too."""
    environment = tmp_path_factory.mktemp("environment")
    full = pytestconfig.getoption("--full-install")
    _run(sys.executable, "-m", "venv", *([] if full else ["--without-pip"]), environment, cwd=environment)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    if full:
        constraints = ("-c", ROOT / "constraints.txt")
        _run(*pip, *constraints, "torch", cwd=environment)
        _run(
            *pip, *constraints, f"{wheel}[decoding,classification]", cwd=environment
        )  # the sides that name model libraries
        return python
    _run(*pip, "--no-deps", wheel, cwd=environment)
    inside = Path(
        _run(python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment).strip()
    )
    # A folder that a .pth file names has its own .pth files ignored: the running environment's editable install stays out.
    lent = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (inside / "lent.pth").write_text("\n".join(lent) + "\n")
    return python


# What the README's reader has: a stock pipeline and a call of it. Here a tiny one with random weights.
PIPELINE_OF_ONES_OWN = """
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

torch.manual_seed(0)
sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 3, "sample_size": 4, "patch_size": 2}
transformer = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=4, norm_num_groups=4).eval()
vae = AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4, sample_size=8).eval()
pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())
pipe.set_progress_bar_config(disable=True)
prompt = [1, 2]


def call():
    pipe(prompt, generator=[torch.Generator().manual_seed(seed) for seed in range(2)], output_type="np")


"""


def test_the_readme_runs_from_the_wheel(installed: Path, tmp_path: Path):
    where = _run(installed, "-I", "-c", "import ee_diffusion; print(ee_diffusion.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent.parent), f"ee_diffusion comes from {where}"
    blocks = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert blocks, "README.md has no ```python block"
    script = tmp_path / "readme.py"
    script.write_text("\n".join([PIPELINE_OF_ONES_OWN, *blocks]), encoding="utf-8")
    _run(installed, "-I", script, cwd=tmp_path)


def test_every_public_name_comes_from_the_wheel(installed: Path, tmp_path: Path):
    code = "import ee_diffusion\nfor name in ee_diffusion.__all__: getattr(ee_diffusion, name)"
    _run(installed, "-I", "-c", code, cwd=tmp_path)


def test_custom_pipelines_load_from_the_wheel(installed: Path, tmp_path: Path):
    """Outside of the checkout, where no path below its root exists."""
    code = f"""
import os
os.environ["HF_MODULES_CACHE"] = {str(tmp_path / "modules")!r}
from diffusers import DiffusionPipeline
from ee_diffusion import EarlyExitPipeline, checkpoint_path, custom_pipeline
path = custom_pipeline("EarlyExitPipeline")
pipe = DiffusionPipeline.from_pretrained(str(checkpoint_path()), custom_pipeline=path, trust_remote_code=True)
assert type(pipe) is EarlyExitPipeline, type(pipe)
assert pipe.exits is not None
"""
    _run(installed, "-I", "-c", code, cwd=tmp_path)
