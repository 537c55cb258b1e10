"""Pipelines with exits inside: the stock call plus a policy, and every way to load them, each in a fresh process."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from factories import randomise
from safetensors.torch import load_file
from tiny_pipelines import STEPS, STOCK, call_of, images_of, pipeline_named
from tree import ROOT

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.pipelines.stock import (
    EarlyExitDiTPipeline,
    EarlyExitFluxPipeline,
    EarlyExitPixArtPipeline,
    EarlyExitSD3Pipeline,
)

KINDS = {
    "dit": EarlyExitDiTPipeline,
    "pixart": EarlyExitPixArtPipeline,
    "sd3": EarlyExitSD3Pipeline,
    "flux": EarlyExitFluxPipeline,
}
IMAGES = [0, 1]
PLAN = Policy(DepthTable(((1, 3), (2, 0), (5, 1))))


@functools.cache
def made(name: str) -> DiffusionPipeline:
    """A pipeline with exits; nobody changes it."""
    components = STOCK[name].make()
    exits = randomise(AdapterExits.for_transformer(components["transformer"], (0, 1, 2, 3), rank=2), seed=3).eval()
    pipe = KINDS[name](**components, exits=exits)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", KINDS)
def test_the_call_is_the_stock_call_with_a_policy(name: str):
    pipe, stock = made(name), pipeline_named(name)
    assert torch.equal(images_of(pipe, call_of(name, IMAGES)), images_of(stock, call_of(name, IMAGES)))
    output = pipe(**call_of(name, IMAGES), exit_policy=PLAN)
    with attach_exits(stock, pipe.exits, PLAN):
        expected = images_of(stock, call_of(name, IMAGES))
    assert torch.equal(torch.as_tensor(output.images), expected)
    assert output.trace.depths.tolist()[:2] == [[1, 3], [2, 0]]
    assert output.report.num_steps == STEPS
    images, trace = pipe(**call_of(name, IMAGES), exit_policy=PLAN, return_dict=False)
    # an array from DiTPipeline of diffusers 0.40, whatever output_type says
    assert type(images) is type(stock(**call_of(name, IMAGES)).images)
    assert torch.equal(torch.as_tensor(images), expected)
    assert torch.equal(trace.depths, output.trace.depths)
    assert "forward" not in pipe.transformer.__dict__
    off = pipe(**call_of(name, IMAGES), exit_policy=Policy())
    assert off.trace is None


@pytest.mark.parametrize("name", KINDS)
def test_components_are_those_of_the_stock_class_and_exits(name: str):
    stock = inspect.signature(STOCK[name].kind.__init__).parameters
    ours = inspect.signature(KINDS[name].__init__).parameters
    assert list(ours) == [*stock, "exits"]
    assert all(ours[key].annotation == parameter.annotation for key, parameter in stock.items())
    assert set(STOCK[name].kind._optional_components) | {"exits"} == set(KINDS[name]._optional_components)


def test_what_does_not_fit():
    without = EarlyExitDiTPipeline(**STOCK["dit"].make())
    with pytest.raises(ValueError, match="this pipeline has no exits"):
        without(**call_of("dit", IMAGES), exit_policy=PLAN)
    with pytest.raises(ValueError, match="the policy exits at depths"):
        made("dit")(**call_of("dit", IMAGES), exit_policy=Policy(Threshold(0.5), exits=(4,)))
    foreign = EarlyExitDiTPipeline(**STOCK["dit"].make(), exits=made("flux").exits)
    with pytest.raises(ValueError, match="heads of another model: hidden_dim is 32"):
        foreign(**call_of("dit", IMAGES), exit_policy=PLAN)
    assert "forward" not in foreign.transformer.__dict__


def test_class_names_are_kept_when_saved(tmp_path: Path):
    names = EarlyExitDiTPipeline(**STOCK["dit"].make(), id2label={0: "tench, Tinca tinca", 1: "goldfish"})
    names.save_pretrained(tmp_path)
    assert EarlyExitDiTPipeline.from_pretrained(tmp_path).labels == names.labels


ROUTES = {
    "direct": "pipe = KINDS[name].from_pretrained(folder, **absent)",
    "custom": "pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=f'pipelines/early_exit_{name}_pipeline.py', "
    "trust_remote_code=True, **absent)",
    "custom-from-stock": "pipe = DiffusionPipeline.from_pretrained(folder + '/stock', trust_remote_code=True, "
    "custom_pipeline=f'pipelines/early_exit_{name}_pipeline.py', exits=AdapterExits.from_pretrained(folder + '/exits'), **absent)",
    "from-pipe": "pipe = KINDS[name].from_pipe(STOCK[name].kind.from_pretrained(folder + '/stock', **absent), "
    "exits=AdapterExits.from_pretrained(folder + '/exits'))",
}
BEGIN = "import sys; sys.path[:0] = ['tests', 'tests/diffusion']; name, folder = sys.argv[1:]; from test_stock_pipelines import *\n"
BEGIN += "absent = {name: None for name, part in STOCK[name].make().items() if part is None}\n"  # stock classes ask for text encoders
END = """
from safetensors.torch import save_file
pipe.set_progress_bar_config(disable=True)
assert type(pipe).__name__ == KINDS[name].__name__
output = pipe(**call_of(name, IMAGES), exit_policy=PLAN)
save_file({"images": torch.as_tensor(output.images).contiguous(), "depths": output.trace.depths}, folder + "/found.safetensors")
"""


def loads_alike(name: str, route: str, folder: Path) -> None:
    """Save, load in a fresh process by one route, generate there, and compare."""
    pipe = made(name)
    pipe.save_pretrained(folder)
    pipeline_named(name).save_pretrained(folder / "stock")
    expected = pipe(**call_of(name, IMAGES), exit_policy=PLAN)
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + ROUTES[route] + END, name, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(folder / "modules")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(folder / "found.safetensors")
    assert torch.equal(found["depths"], expected.trace.depths)
    # Weights mapped from a file lie at other addresses, for which a kernel on one row may round the last digit otherwise.
    torch.testing.assert_close(found["images"], torch.as_tensor(expected.images), rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", KINDS)
def test_every_route_loads_the_same_pipeline_in_a_fresh_process(name: str, route: str, tmp_path: Path):
    loads_alike(name, route, tmp_path)
