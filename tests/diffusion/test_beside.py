"""What a call computes beside the forwards with exits is in its share of the work, or is named: held against hooks inside every block."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline, WanPipeline
from factories import randomise
from tiny_families import TINY, exits_for, inner_modules, inputs_of, model_named
from tiny_pipelines import STOCK, call_of, images_of, pipeline_named
from torch import nn

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.hooks.attach import attach_exits, detach_exits, exit_summary, hook_of
from ee_diffusion.diffusion.pipelines.stock import EarlyExitSD3Pipeline

IMAGES = [0, 1, 2]
THREE = Policy(schedule=FixedDepth(3))


@contextmanager
def counted(*models: nn.Module) -> Iterator[list[int]]:
    """Rows of every call of a module inside a block."""
    rows: list[int] = []

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        rows.append(len(args[0] if args else kwargs["hidden_states"]))

    inner = [one for model in models for one in inner_modules(model)]
    hooks = [one.register_forward_pre_hook(count, with_kwargs=True) for one in inner]
    yield rows
    for hook in hooks:
        hook.remove()


def said(text: str) -> float:
    """The share of all blocks of the call in a summary, in percent."""
    return float(re.search(r"of all blocks of the call: ([0-9.]+) %", text).group(1))


def share(pipe, models: list[nn.Module], arguments) -> float:
    """Rows x blocks with exits in percent of those without: by hooks."""
    with counted(*models) as rows:
        images_of(pipe, arguments())
        early = sum(rows)
        rows.clear()
        attached = [(model, hook_of(model)) for model in models if "_ee_hook" in model.__dict__]
        for model, _ in attached:
            detach_exits(model)
        images_of(pipe, arguments())
    return 100 * early / sum(rows)


def test_skip_layer_guidance():
    pipe = pipeline_named("sd3")

    def arguments() -> dict:
        return call_of("sd3", IMAGES, skip_guidance_layers=[1, 2], skip_layer_guidance_stop=1.0)

    with attach_exits(pipe, exits_for(pipe.transformer), THREE) as attachment:
        images_of(pipe, arguments())
        report, text, trace = attachment.report, exit_summary(pipe), attachment.trace
        assert "(60.0 %)\nof all blocks of the call: 66.7 %, with the forwards beside: 2 of skip_layers\n" in text
        images_of(pipe, call_of("sd3", IMAGES))
        assert "of all blocks of the call" not in exit_summary(pipe), "of the last call alone"
        images_of(pipe, arguments())
        assert exit_summary(pipe) == text
        found = share(pipe, [pipe.transformer], arguments)
    assert said(text) == pytest.approx(found, abs=0.05)
    assert report.call_fraction == pytest.approx(found / 100)
    assert report.fraction_executed == pytest.approx(0.6)
    made = EarlyExitSD3Pipeline(**STOCK["sd3"].make(), exits=exits_for(pipe.transformer))
    made.set_progress_bar_config(disable=True)
    assert made(**arguments(), exit_policy=THREE).report.summary() == trace.report().summary()


@pytest.mark.parametrize("own", [False, True], ids=["plain", "with exits of its own"])
def test_a_second_transformer(own: bool):
    parts = STOCK["wan"].make() | {"transformer_2": model_named("WanTransformer3DModel"), "boundary_ratio": 0.7}
    pipe = WanPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    models = [pipe.transformer, pipe.transformer_2]

    def arguments() -> dict:
        return call_of("wan", IMAGES, steps=5)

    images_of(pipe, arguments())
    attributes = [set(one.__dict__) for one in (pipe, *models[1].modules())]
    if own:
        attach_exits(models[1], exits_for(models[1]), Policy(schedule=FixedDepth(1)), rows_per_sample=1, num_steps=3)
    attach_exits(pipe, exits_for(models[0]), Policy(schedule=FixedDepth(2)))
    images_of(pipe, arguments())
    text = exit_summary(pipe)
    assert not any(one._forward_pre_hooks for one in models), "between calls there are none"
    assert said(text) == pytest.approx(share(pipe, models, arguments), abs=0.05)
    assert "6 of transformer_2 (WanTransformer3DModel)" in text
    assert [set(one.__dict__) for one in (pipe, *models[1].modules())] == attributes


def test_what_cannot_be_compared_is_named():
    known = inspect.signature(SD3ControlNetModel.__init__).parameters
    config = {name: value for name, value in TINY["SD3Transformer2DModel"].config.items() if name in known}
    net = SD3ControlNetModel(**config)
    parts = STOCK["sd3"].make() | {"controlnet": randomise(net, seed=4).eval()}
    pipe = StableDiffusion3ControlNetPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    arguments = call_of("sd3", IMAGES, control_image=torch.rand(1, 3, 8, 8))
    with attach_exits(pipe, exits_for(pipe.transformer), THREE) as attachment:
        images_of(pipe, arguments)
        text = exit_summary(pipe)
        assert "(60.0 %)\nnot counted in that: 3 forwards of controlnet (SD3ControlNetModel)\n" in text
        assert attachment.report.call_fraction == pytest.approx(0.6)
        net.__dict__["_compiled_call_impl"] = net._call_impl
        images_of(pipe, call_of("sd3", IMAGES, control_image=torch.rand(1, 3, 8, 8)))
        assert "not counted in that: any forwards of controlnet (SD3ControlNetModel, compiled)\n" in exit_summary(pipe)


def test_it_is_saved_and_joined(tmp_path):
    model = model_named("SD3Transformer2DModel")
    with attach_exits(model, exits_for(model), THREE, rows_per_sample=1, num_steps=1) as attachment, torch.no_grad():
        given = inputs_of("SD3Transformer2DModel", IMAGES)
        model(**given)
        model(**given, skip_layers=[1])
        trace = attachment.trace
        model(**given | {"timestep": given["timestep"] + 1})
        assert attachment.trace.beside == ()
    trace.save(tmp_path / "trace.safetensors")
    again = Trace.load(tmp_path / "trace.safetensors")
    assert again.beside == trace.beside
    assert (trace.beside[0].forwards, trace.beside[0].ran) == (1, 3 * 4)
    joined = Trace.concatenate([trace, again])
    assert joined.report().call_fraction == trace.report().call_fraction == pytest.approx((9 + 12) / (15 + 12))
    assert joined.beside[0].ran == 2 * 3 * 4
