"""Threads that share a transformer or a pipeline with exits: each gets what it gets alone, or is refused in words and harms nobody."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from factories import pipeline
from tiny_families import exits_for, forward, inner_modules, inputs_of, model_named
from tiny_pipelines import STOCK, call_of, images_of, pipeline_named
from torch import Tensor, nn

from ee_diffusion.core.criteria import DepthTable
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.pipelines.stock import EarlyExitSD3Pipeline

IMAGES = [0, 1, 2]
PLAN = Policy(DepthTable(((1, 3, 2),) * 3))
SHORT = Policy(schedule=FixedDepth(1))


@contextmanager
def held_up(model: nn.Module, forwards: int = 2) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The forward of that number waits inside a block: -> (it is there, it may go on)."""
    there, go, calls = threading.Event(), threading.Event(), []

    def wait(*_) -> None:
        calls.append(1)
        if len(calls) == forwards:
            there.set()
            assert go.wait(60)

    hook = inner_modules(model)[0].register_forward_pre_hook(wait)
    try:
        yield there, go
    finally:
        go.set()
        hook.remove()


def same(one: Trace, other: Trace) -> bool:
    return torch.equal(one.ran, other.ran) and torch.equal(one.depths, other.depths)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "wan"])
def test_a_second_call_is_refused_and_the_first_does_not_notice(name: str):
    pipe = pipeline_named(name)
    with attach_exits(pipe, exits_for(pipe.transformer), PLAN) as attachment:
        alone, trace = images_of(pipe, call_of(name, IMAGES)), attachment.trace
        with held_up(pipe.transformer) as (there, go), ThreadPoolExecutor(1) as first:
            call = first.submit(images_of, pipe, call_of(name, IMAGES))
            assert there.wait(60)
            with pytest.raises(
                RuntimeError, match=r"Pipeline \(or its transformer\) with exits is in use: another thread's call"
            ):
                images_of(pipe, call_of(name, [3], guided=False, steps=2))
            with pytest.raises(RuntimeError, match="is in use"):
                forward(pipe.transformer, inputs_of(type(pipe.transformer).__name__, [0]))
            go.set()
            assert torch.equal(call.result(), alone)
        assert same(attachment.trace, trace)
        assert torch.equal(images_of(pipe, call_of(name, IMAGES)), alone), "afterwards the pipeline is free"
    assert not {"check_inputs", "progress_bar", "maybe_free_model_hooks"} & pipe.__dict__.keys()
    assert "set_timesteps" not in pipe.scheduler.__dict__


def test_a_call_that_failed_holds_up_nobody():
    pipe = pipeline_named("sd3")

    def broken(*_) -> dict:
        raise KeyError("in between")

    with (
        attach_exits(pipe, exits_for(pipe.transformer), PLAN),
        ThreadPoolExecutor(1) as first,
        ThreadPoolExecutor(1) as second,
    ):
        alone = first.submit(images_of, pipe, call_of("sd3", IMAGES)).result()
        with pytest.raises(KeyError, match="in between"):
            first.submit(images_of, pipe, call_of("sd3", IMAGES, callback_on_step_end=broken)).result()
        assert "sigmas" in inspect.signature(pipe.scheduler.set_timesteps).parameters
        pipe.scheduler.set_timesteps(5)  # from a third one
        assert torch.equal(second.submit(images_of, pipe, call_of("sd3", IMAGES)).result(), alone)
    assert "set_timesteps" not in pipe.scheduler.__dict__


def test_another_pipeline_around_the_same_transformer():
    pipe = pipeline_named("sd3")
    other = StableDiffusion3Pipeline(**pipeline_named("sd3").components | {"transformer": pipe.transformer})
    other.set_progress_bar_config(disable=True)
    plain = images_of(other, call_of("sd3", IMAGES))
    with attach_exits(pipe, exits_for(pipe.transformer), PLAN):
        alone = images_of(pipe, call_of("sd3", IMAGES))
        with held_up(pipe.transformer) as (there, go), ThreadPoolExecutor(1) as first:
            call = first.submit(images_of, pipe, call_of("sd3", IMAGES))
            assert there.wait(60)
            with pytest.raises(RuntimeError, match="is in use"):
                images_of(other, call_of("sd3", IMAGES))
            go.set()
            assert torch.equal(call.result(), alone)
    assert torch.equal(images_of(other, call_of("sd3", IMAGES)), plain)


def in_step(*each: Callable[[Callable[[], None]], Tensor]) -> list[Tensor]:
    """Results of threads that all wait for one another wherever they call what they are given."""
    barrier = threading.Barrier(len(each), timeout=60)
    with ThreadPoolExecutor(len(each)) as pool:
        return [call.result() for call in [pool.submit(one, barrier.wait) for one in each]]


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "WanTransformer3DModel"])
def test_loops_of_ones_own_around_one_transformer(name: str):
    """Under a policy for every forward: each thread has a run of its own, whatever times the others are at."""
    model = model_named(name)
    policy = Policy(DepthTable(((1, 4, 2), (4, 3, 0), (0, 1, 2))))

    def loop(images: list[int], times: tuple[float, ...]) -> Callable[[Callable[[], None]], Tensor]:
        def run(wait: Callable[[], object]) -> Tensor:
            outputs = []
            for time in times:
                wait()
                outputs.append(forward(model, inputs_of(name, images, time=time)))
            assert len(attachment.trace.times) == 3
            return torch.stack(outputs)

        return run

    loops = [
        loop(IMAGES, (900.0, 600.0, 300.0)),
        loop([3, 4, 5], (900.0, 500.0, 300.0)),
        loop(IMAGES, (800.0, 700.0, 100.0)),
    ]
    exits = exits_for(model)
    alone = []
    for one in loops:
        with attach_exits(model, exits, policy, rows_per_sample=1, num_steps=3) as attachment:
            alone.append(one(lambda: None))
    with attach_exits(model, exits, policy, rows_per_sample=1, num_steps=3) as attachment:
        for _ in range(3):
            for found, expected in zip(in_step(*loops), alone, strict=True):
                assert torch.equal(found, expected)
        assert attachment.trace.depths.tolist() == [list(row) for row in policy.criterion.depths], "another thread's"


@pytest.mark.parametrize("options", [None, {"backend": "eager"}], ids=["plain", "compiled"])
def test_steps_of_ones_own_around_one_transformer(options: dict | None):
    """Under `use(step)`, and beside a thread that wants no exits at all."""
    name = "DiTTransformer2DModel"
    model = model_named(name)
    plain = forward(model, inputs_of(name, IMAGES))

    def under(depth: int) -> Callable[[Callable[[], None]], Tensor]:
        def run(wait: Callable[[], object]) -> Tensor:
            session = attachment.start(Policy(schedule=FixedDepth(depth)), rows=torch.arange(3), num_steps=1)
            with attachment.use(session.step(0, 700.0)):
                wait()
                found = forward(model, inputs_of(name, IMAGES))
                wait()
            assert session.trace().depths.tolist() == [[depth] * 3]
            return found

        return run

    def bare(wait: Callable[[], object]) -> Tensor:
        wait()
        found = forward(model, inputs_of(name, IMAGES))
        wait()
        return found

    with attach_exits(model, exits_for(model), compile_options=options) as attachment:
        alone = [under(depth)(lambda: None) for depth in (1, 3)]
        for found, expected in zip(in_step(under(1), bare, under(3)), [alone[0], plain, alone[1]], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch._dynamo.reset()


def test_pipelines_with_exits_inside_take_turns():
    stock = pipeline_named("sd3")
    made = EarlyExitSD3Pipeline(**STOCK["sd3"].make(), exits=exits_for(stock.transformer))
    made.set_progress_bar_config(disable=True)
    ours = pipeline()

    def sd3(policy: Policy | None, steps: int) -> Callable[[], Tensor]:
        return lambda: made(**call_of("sd3", IMAGES, steps=steps), exit_policy=policy).images

    def own(threshold: float | None, steps: int) -> Callable[[], Tensor]:
        call = {"num_inference_steps": steps, "guidance_scale": 1.5, "output_type": "pt"}
        return lambda: ours([0, 1], exit_threshold=threshold, generator=torch.Generator().manual_seed(1), **call).images

    calls = [sd3(PLAN, 3), sd3(None, 4), sd3(SHORT, 2), own(0.3, 3), own(None, 2), own(0.6, 5)]
    alone = [torch.as_tensor(one()) for one in calls]
    found = in_step(*[lambda wait, one=one: (wait(), torch.as_tensor(one()))[1] for one in calls])
    for one, expected in zip(found, alone, strict=True):
        assert torch.equal(one, expected)
    assert "forward" not in made.transformer.__dict__
    assert "forward" not in ours.transformer.__dict__
