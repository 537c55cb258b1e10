"""Which forwards of a stock pipeline are a step: in half precision, where calls have no names, and where a call of guidance is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from factories import randomise
from tiny_families import TINY, exits_for
from tiny_pipelines import STOCK, call_of, images_of, pipe
from torch import Tensor

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.diffusion.hooks.attach import attach_exits

STEPS = 100
# class, channels that the transformer takes in, whether it has a second call of guidance, arguments beside the prompts
UNNAMED: dict[str, tuple[type[DiffusionPipeline], int, bool, dict[str, Any]]] = {
    "img2img": (FluxImg2ImgPipeline, 4, True, {"image": torch.rand(2, 3, 8, 8), "strength": 0.9}),
    "kontext": (FluxKontextPipeline, 4, True, {"image": torch.rand(2, 3, 8, 8), "_auto_resize": False, "max_area": 64}),
    "inpaint": (
        FluxInpaintPipeline,
        4,
        True,
        {"image": torch.rand(2, 3, 8, 8), "mask_image": torch.ones(2, 1, 8, 8), "strength": 0.9},
    ),
    "fill": (FluxFillPipeline, 12, False, {"image": torch.rand(2, 3, 8, 8), "mask_image": torch.ones(2, 1, 8, 8)}),
    "control": (FluxControlPipeline, 8, False, {"control_image": torch.rand(2, 3, 8, 8)}),
}


def unnamed(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline that does not name its calls, under a schedule whose first times lie near to one another."""
    kind, channels, _, _ = UNNAMED[name]
    config = TINY["FluxTransformer2DModel"].config | {"in_channels": channels, "out_channels": 4}
    parts = STOCK["flux"].make() | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    parts["transformer"] = randomise(FluxTransformer2DModel(**config), seed=2, gain=0.7).eval()
    made = kind(**parts).to(dtype)
    made.set_progress_bar_config(disable=True)
    return made


def arguments_of(name: str, guided: bool, dtype: torch.dtype) -> dict[str, Any]:
    made = call_of("flux", [0, 1], guided=guided, steps=STEPS) | UNNAMED[name][3]
    if not UNNAMED[name][2]:
        made.pop("true_cfg_scale")
    return {key: value.to(dtype) if key.endswith("embeds") else value for key, value in made.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name, guided", [(name, guided) for name in UNNAMED for guided in (False, True)[: 1 + UNNAMED[name][2]]]
)
def test_a_step_is_one_of_the_solver(name: str, guided: bool, dtype: torch.dtype):
    one = unnamed(name, dtype)
    exits = exits_for(one.transformer, rank=0).to(dtype)
    with attach_exits(one, exits, Policy(schedule=FixedDepth(1))) as attachment:
        images_of(one, arguments_of(name, guided, dtype))
        trace = attachment.trace
    times = one.scheduler.timesteps.double().tolist()
    assert len(trace.times) == one.num_timesteps
    assert trace.times.tolist() == times[len(times) - one.num_timesteps :]
    assert trace.calls == (2 if guided else 1,) * one.num_timesteps
    assert trace.depths.shape == (one.num_timesteps, 2)


def test_a_scheduler_with_a_time_after_the_last_step():
    """SCM's timesteps end with 0, at which nothing is asked; Sana's model is told other times than the scheduler's."""
    config = TINY["SanaTransformer2DModel"].config | {"guidance_embeds": True}
    transformer = randomise(SanaTransformer2DModel(**config), seed=2).eval()
    one = SanaSprintPipeline(**STOCK["sana"].make() | {"scheduler": SCMScheduler(), "transformer": transformer})
    one.set_progress_bar_config(disable=True)
    with attach_exits(one, exits_for(transformer), Policy(DepthTable(((1, 2), (3, 0))))) as attachment:
        arguments = call_of("sana", [0, 1], guided=False, steps=2)
        arguments.pop("negative_prompt")
        images_of(one, arguments)
        assert attachment.trace.depths.tolist() == [[1, 2], [3, 0]]
        assert attachment.trace.times.tolist() == one.scheduler.timesteps.double().tolist()[:2]


# --- a call that is lost


def at_call(number: int, do: Callable[[], None]) -> Callable[..., None]:
    """A forward pre-hook for a transformer that does something before its call of that number."""
    seen = []

    def hook(module, args) -> None:
        seen.append(module)
        if len(seen) == number:
            do()

    return hook


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("cfg_exit", ["joint", "separate"])
@pytest.mark.parametrize("name", ["flux", "wan", "qwenimage", "lumina2", "hunyuanvideo", "sd3", "dit"])
@pytest.mark.parametrize("call", [2, 4])
def test_an_interruption_between_two_calls_is_of_no_consequence(name: str, cfg_exit: str, call: int):
    one, policy = pipe(name), Policy(Threshold(0.9), cfg_exit=cfg_exit)
    exits = exits_for(one.transformer)
    with attach_exits(one, exits, policy):
        expected = images_of(one, call_of(name, [0, 1], steps=4))
    with attach_exits(one, exits, policy) as attachment:
        for _ in range(2):
            hook = one.transformer.register_forward_pre_hook(at_call(call, interrupt))
            with pytest.raises(KeyboardInterrupt):
                images_of(one, call_of(name, [0, 1], steps=4))
            hook.remove()
            assert torch.equal(images_of(one, call_of(name, [0, 1], steps=4)), expected)
            assert len(attachment.trace.times) == 4


@pytest.mark.parametrize("cfg_exit", ["joint", "separate"])
def test_a_call_that_loses_its_second_branch_returns_its_image(cfg_exit: str):
    """A callback ends guidance; Wan's pipeline asks at every step whether there is any."""

    def end(pipeline: DiffusionPipeline, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1:
            pipeline._guidance_scale = 0.0
        return tensors

    one, policy, together = pipe("wan"), Policy(Threshold(1.0), cfg_exit=cfg_exit), cfg_exit == "joint"
    stock = images_of(one, call_of("wan", [0, 1], steps=4, callback_on_step_end=end))
    whole = images_of(one, call_of("wan", [0, 1], steps=4))
    with attach_exits(one, exits_for(one.transformer), policy) as attachment:
        found = images_of(one, call_of("wan", [0, 1], steps=4, callback_on_step_end=end))
        torch.testing.assert_close(found, stock)
        assert attachment.trace.calls == ((2, 2, 1, 1) if together else (1,) * 4)
        assert (attachment.trace.depths >= 0).sum(1).tolist() == ([2] * 4 if together else [4, 4, 2, 2])
        torch.testing.assert_close(images_of(one, call_of("wan", [0, 1], steps=4)), whole)
        assert bool((attachment.trace.depths >= 0).all())
