"""How many rows an image has is a fact of every forward: guidance that ends under way, perturbed attention guidance, truncated guidance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiTPAGPipeline,
    PixArtSigmaPAGPipeline,
    SanaPAGPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3PAGPipeline,
)
from diffusers.callbacks import SD3CFGCutoffCallback
from tiny_families import TEXT, exits_for
from tiny_pipelines import STOCK, call_of, images_of, pipe
from torch import Tensor

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.history import OutputHistory
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.guidance import sources_of_rows
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.methods import static_cache_schedule

STEPS = 4
BATCHES = ([0], [0, 1], [0, 1, 2])
PERTURBED = {
    "pixart-sigma": PixArtSigmaPAGPipeline,
    "sana": SanaPAGPipeline,
    "hunyuandit": HunyuanDiTPAGPipeline,
    "sd3": StableDiffusion3PAGPipeline,
}


def cutoff(after: int) -> Callable[..., dict[str, Tensor]]:
    """As diffusers' guide writes it: from that step on there is no guidance, and the prompts' conditional half alone."""

    def end(pipeline: DiffusionPipeline, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == after:
            pipeline._guidance_scale = 0.0
            tensors = {name: value.chunk(2)[-1] for name, value in tensors.items()}
        return tensors

    return end


def call(name: str, images: list[int], ending: Any = None, **more: Any) -> dict[str, Any]:
    """Guided, and with `ending`, without guidance from some step on. Masks say that all text counts: stock cuts prompts, not masks."""
    made = call_of(name, images, steps=STEPS) | more
    if ending is not None:
        made |= {key: torch.ones_like(value) for key, value in made.items() if key.endswith("attention_mask")}
        inputs = ["prompt_embeds", *(["pooled_prompt_embeds"] if name == "sd3" else [])]
        made |= {"callback_on_step_end": ending, "callback_on_step_end_tensor_inputs": inputs}
    return made


@functools.cache
def perturbing(name: str) -> DiffusionPipeline:
    """The same parts in a pipeline that perturbs the attention of the fourth block."""
    made = PERTURBED[name](**STOCK[name].make(), pag_applied_layers=[r"blocks\.3\."])
    made.set_progress_bar_config(disable=True)
    return made


def under(one: DiffusionPipeline, policy: Policy, arguments: dict[str, Any]) -> tuple[Tensor, Trace]:
    with attach_exits(one, exits_for(one.transformer), policy) as attachment:
        return images_of(one, arguments), attachment.trace


def holds(one: DiffusionPipeline, arguments: Callable[..., dict[str, Any]], rows: list[int]) -> None:
    """What must hold of a pipeline whose images have so many rows at each step, with one, two and three images."""
    full = len(exits_for(one.transformer).depths)
    depths, alone = ((1, full), (full, 0), (2, full), (full, 1)), None
    for images in BATCHES:
        several = len(images) > 1  # of which the last one never leaves
        plan = Policy(DepthTable(tuple((*row[: len(images) - 1], full) if several else row[:1] for row in depths)))
        stock = images_of(one, arguments(images))
        assert torch.equal(under(one, Policy(), arguments(images))[0], stock), "off"
        found, trace = under(one, plan, arguments(images))
        assert trace.samples.tolist() == list(range(len(images)))
        assert trace.rows.tolist() == [[count] * len(images) for count in rows]
        assert trace.depths.tolist() == [list(row) for row in plan.criterion.depths]
        assert trace.times.tolist() == one.scheduler.timesteps.double().tolist()
        assert torch.equal(trace.ran.sum(2), trace.depths * trace.rows)
        alone = found[0] if alone is None else alone
        torch.testing.assert_close(found[0], alone, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(found[0], stock[0], rtol=1e-3, atol=1e-3)
        if several:
            torch.testing.assert_close(found[-1], stock[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("name", ["sd3", "ltx", "sana"])
def test_guidance_that_a_callback_ends(name: str, after: int):
    arguments = functools.partial(call, name, ending=cutoff(after))
    holds(pipe(name), arguments, [2 if step <= after else 1 for step in range(STEPS)])


def test_diffusers_own_cutoff():
    """It keeps the last row: it is made for one image."""
    ending = SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    arguments = functools.partial(call, "sd3", [0], ending)
    assert torch.equal(under(pipe("sd3"), Policy(), arguments())[0], images_of(pipe("sd3"), arguments()))
    _, trace = under(pipe("sd3"), Policy(DepthTable(((1,), (4,), (2,), (0,)))), arguments())
    assert trace.rows.tolist() == [[2], [2], [1], [1]]
    assert trace.depths.tolist() == [[1], [4], [2], [0]]


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", PERTURBED)
def test_perturbed_attention_guidance(name: str, guided: bool):
    def arguments(images: list[int]) -> dict[str, Any]:
        return call(name, images, pag_scale=3.0) | ({} if guided else {"guidance_scale": 1.0})

    holds(perturbing(name), arguments, [3 if guided else 2] * STEPS)


def test_perturbed_attention_takes_the_rows_of_an_image_together():
    one, policy = perturbing("sd3"), Policy(Threshold(0.5), cfg_exit="separate")
    assert under(one, policy, call("sd3", [0, 1], pag_scale=0.0))[1].depths.shape == (STEPS, 4)
    before = one.transformer.attn_processors
    with attach_exits(one, exits_for(one.transformer), policy), pytest.raises(ValueError, match="perturbed attention"):
        images_of(one, call("sd3", [0, 1], pag_scale=3.0))
    one.transformer.set_attn_processor(before)  # diffusers does so at the end of a call that succeeds


def test_compiled_blocks_under_perturbed_attention_get_no_padding():
    """Which would shift its rows."""
    one, plan = perturbing("sd3"), Policy(DepthTable(((1, 4, 5), (5, 0, 5), (2, 5, 5), (5, 1, 5))))
    arguments = functools.partial(call, "sd3", [0, 1, 2], pag_scale=3.0)
    expected, _ = under(one, plan, arguments())
    with attach_exits(one, exits_for(one.transformer), plan, compile_options={"backend": "eager"}) as attachment:
        torch.testing.assert_close(images_of(one, arguments()), expected)
        assert attachment.padded == 0


@pytest.mark.parametrize("cfg_exit", ["joint", "separate"])
def test_truncated_guidance(cfg_exit: str):
    """Lumina2 leaves the second call out at the last steps."""
    one = pipe("lumina2")
    arguments = functools.partial(call, "lumina2", cfg_trunc_ratio=0.5)
    stock = images_of(one, arguments([0, 1, 2]))
    assert torch.equal(under(one, Policy(cfg_exit=cfg_exit), arguments([0, 1, 2]))[0], stock)
    depths = ((1, 4, 2), (4, 4, 3), (2, 4, 0), (4, 4, 2))
    found, trace = under(one, Policy(DepthTable(depths), cfg_exit=cfg_exit), arguments([0, 1, 2]))
    torch.testing.assert_close(found[1], stock[1], rtol=1e-3, atol=1e-4)
    first = [list(row) for row in depths]
    if cfg_exit == "joint":
        assert (trace.depths.tolist(), trace.calls) == (first, (2, 2, 1, 1))
    else:
        absent = [-1] * 3
        assert trace.depths.tolist() == [first[0] * 2, first[1] * 2, first[2] + absent, first[3] + absent]
        assert trace.report().num_samples == 6


@pytest.mark.parametrize("ending", [None, cutoff(1)])
def test_rows_that_decide_apart_are_absent_when_they_are_gone(ending: Any):
    one = pipe("sd3")
    found, trace = under(one, Policy(Threshold(1.0), cfg_exit="separate"), call("sd3", [0, 1], ending))
    torch.testing.assert_close(found, images_of(one, call("sd3", [0, 1], ending)), rtol=1e-3, atol=1e-4)
    gone = trace.depths == -1
    assert gone.tolist() == [[ending is not None and step > 1] * 2 + [False] * 2 for step in range(STEPS)]
    assert trace.scores[:, 0].isfinite().tolist() == (~gone).tolist()


def test_image_to_image_with_latents_of_ones_own():
    """Such a call draws none, and the pipeline's properties say how many rows an image has."""
    one = StableDiffusion3Img2ImgPipeline(**pipe("sd3").components)
    one.set_progress_bar_config(disable=True)
    arguments = call("sd3", [0, 1, 2]) | {"image": torch.rand(3, 3, 8, 8), "strength": 1.0}
    arguments |= {"latents": torch.randn(3, 4, 8, 8)}
    arguments.pop("height"), arguments.pop("width")
    _, trace = under(one, Policy(DepthTable(((1, 5, 2),) * STEPS)), arguments)
    assert trace.rows.tolist() == [[2] * 3] * STEPS


def test_rows_that_are_no_whole_number_for_each_image():
    def end(pipeline, step, time, tensors):
        pipeline._guidance_scale = 0.0
        return {name: value[:4] for name, value in tensors.items()} | {"latents": torch.zeros(4, 4, 8, 8)}

    arguments = call("sd3", [0, 1, 2], end)
    arguments["callback_on_step_end_tensor_inputs"].append("latents")
    one = pipe("sd3")
    with (
        attach_exits(one, exits_for(one.transformer), Policy(DepthTable(((1, 4, 2),) * STEPS))),
        pytest.raises(ValueError, match="4 rows at step 1 for 3 images: no whole number of rows for each"),
    ):
        images_of(one, arguments)


# --- what is remembered


def test_conditional_rows_keep_what_they_remember():
    """A clean image that is said again: after guidance it is the one that the conditional row said."""
    one, seen = pipe("sd3"), []
    exits = CachedOutputExits.for_pipeline(
        one.transformer, FlowMatchEulerDiscreteScheduler(), length=1, cached_type="sample"
    )
    policy = static_cache_schedule([0, 1], num_steps=STEPS, num_layers=5)

    def look(module, args, kwargs, output):
        seen.append((kwargs["hidden_states"], kwargs["timestep"][0] / 1000, output[0]))

    with attach_exits(one, exits, policy) as attachment:
        hook = one.transformer.register_forward_hook(look, with_kwargs=True)
        try:
            images_of(one, call("sd3", [0, 1, 2], cutoff(1)))
        finally:
            hook.remove()
        assert attachment.trace.depths.tolist() == [[5] * 3, [5] * 3, [0] * 3, [0] * 3]
    sample, sigma, output = seen[1]
    said = (sample - sigma * output)[3:]  # of the conditional rows
    for sample, sigma, output in seen[2:]:
        torch.testing.assert_close(output, (sample - said) / sigma, rtol=1e-3, atol=1e-3)


def test_a_row_goes_on_from_the_one_that_was_asked_the_same():
    unconditional, conditional = torch.zeros(2, TEXT, 3), torch.randn(2, TEXT, 3)
    three = torch.cat([unconditional, conditional, conditional])  # the last is perturbed
    images = {"num_images": 2}
    assert sources_of_rows(conditional, torch.cat([unconditional, conditional]), num_rows=2, **images) == [2, 3]
    assert sources_of_rows(torch.cat([unconditional, conditional]), three, num_rows=4, **images) == [0, 1, 2, 3]
    assert sources_of_rows(torch.cat([conditional, conditional]), three, num_rows=4, **images) == [2, 3, 4, 5]
    assert sources_of_rows(three, conditional, num_rows=6, **images) == [None, None, 0, 1, None, None]
    assert sources_of_rows(None, three, num_rows=2, **images) == [None, None]


def test_rows_without_a_source_remember_nothing():
    memory = OutputHistory.empty(torch.zeros(3, 2), length=2)
    for time in (9.0, 5.0, 3.0):
        memory = memory.append(torch.arange(3), torch.rand(3, 2), torch.full((3,), time).double())
    kept = memory.regrouped([2, None, 0])
    assert kept.count.tolist() == [2, 0, 2]
    assert kept.bend.isnan().tolist() == [False, True, False]
    now = torch.full((3,), 1.0, dtype=torch.float64)
    assert torch.equal(kept.extrapolate(now)[[0, 2]], memory.extrapolate(now)[[2, 0]])
    assert kept.extrapolate(now)[1].tolist() == [0, 0]
