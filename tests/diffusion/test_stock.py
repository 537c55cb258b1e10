"""Stock pipelines with exits attached: the call is as ever, every image decides for itself, the rows of an image leave together, and
nothing of one call is left for the next."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    HeunDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
)
from tiny_families import exits_for, forward, inner_modules, inputs_of, passing
from tiny_pipelines import STEPS, STOCK, call_of, images_of, pipe, pipeline_named
from torch import Tensor

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import replay
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.hooks.attach import attach_exits, exit_summary

IMAGES = [0, 1, 2]


def under(name: str, policy: Policy, arguments: dict, **attached) -> tuple[Tensor, Trace]:
    """A call of the stock pipeline with exits attached."""
    with attach_exits(pipe(name), exits_for(pipe(name).transformer), policy, **attached) as attachment:
        return images_of(pipe(name), arguments), attachment.trace


@functools.cache
def splitting(name: str) -> Policy:
    """A threshold under which the images of a guided call stop at different depths."""
    _, trace = under(name, Policy(Threshold(0.5), record_all=True), call_of(name, IMAGES))
    values = trace.scores.flatten().sort().values
    policies = [Policy(Threshold(float(values[place : place + 2].mean()))) for place in range(0, len(values) - 1, 5)]
    best = max(policies, key=lambda policy: sum(len(depths.unique()) for depths in replay(trace, policy)))
    assert max(len(depths.unique()) for depths in replay(trace, best)) >= 2
    return best


@pytest.mark.parametrize("name", STOCK)
def test_off_fixed_depth_and_detached(name: str):
    one, arguments = pipe(name), functools.partial(call_of, name, IMAGES)
    before = {key: value for key, value in one.__dict__.items() if not key.startswith("_")}
    plain = images_of(one, arguments())
    assert torch.equal(under(name, Policy(), arguments())[0], plain)
    with attach_exits(one, exits_for(one.transformer, rank=0), Policy(schedule=FixedDepth(2))) as attachment:
        cut = images_of(one, arguments())
        report = attachment.report
        assert "executed blocks per sample and step: 2.00" in exit_summary(one)
    assert (report.num_steps, report.num_samples, report.mean_executed) == (STEPS, len(IMAGES), 2)
    assert report.followed_calls == STEPS * (STOCK[name].calls - 1)
    with passing(one.transformer, 2):
        assert torch.equal(cut, images_of(one, arguments()))
    assert not torch.allclose(cut, plain, rtol=1e-3, atol=1e-3)
    assert torch.equal(images_of(one, arguments()), plain)
    assert {key: value for key, value in one.__dict__.items() if not key.startswith("_")} == before


@pytest.mark.parametrize("name", STOCK)
def test_an_image_in_a_batch_is_the_image_alone_and_work_is_counted(name: str):
    policy, rows = splitting(name), []
    inner = inner_modules(pipe(name).transformer)
    hooks = [
        one.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
        for one in inner
    ]
    together, trace = under(name, policy, call_of(name, IMAGES))
    for hook in hooks:
        hook.remove()
    assert trace.samples.tolist() == IMAGES
    assert trace.rows.tolist() == [[STOCK[name].rows] * len(IMAGES)] * STEPS
    assert trace.calls == (STOCK[name].calls,) * STEPS
    assert trace.times.tolist() == pipe(name).scheduler.timesteps.double().tolist()
    assert sum(rows) == int(trace.ran.sum())
    each = STOCK[name].rows * STOCK[name].calls
    assert int(trace.ran.sum()) == each * int(trace.depths.sum()), "both rows of an image, at its depth"
    for image in IMAGES:
        alone, its = under(name, policy, call_of(name, [image]))
        assert its.depths[:, 0].tolist() == trace.depths[:, image].tolist()
        torch.testing.assert_close(alone[0], together[image], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", STOCK)
def test_without_guidance_a_row_is_an_image(name: str):
    plan = Policy(DepthTable(((1, 2, 0),) * STEPS))
    _, trace = under(name, plan, call_of(name, IMAGES, guided=False))
    assert trace.depths.tolist() == [[1, 2, 0]] * STEPS
    assert trace.ran.sum((0, 2)).tolist() == [STEPS, 2 * STEPS, 0]
    assert trace.calls == (1,) * STEPS


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_branches_apart(name: str):
    _, trace = under(name, Policy(Threshold(0.5), cfg_exit="separate", record_all=True), call_of(name, IMAGES))
    assert trace.scores.shape[2] == 2 * len(IMAGES)
    assert trace.scores.isfinite().all()
    first, second = trace.scores.unflatten(2, (2, -1)).unbind(2)
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("name", STOCK)
def test_nothing_is_left_from_one_call_to_the_next(name: str, monkeypatch):
    one, policy = pipe(name), splitting(name)
    first, trace = under(name, policy, call_of(name, IMAGES))
    second = under(name, policy, call_of(name, [7, 8], guided=False, steps=2))[0]
    with attach_exits(one, exits_for(one.transformer), policy) as attachment:
        assert torch.equal(images_of(one, call_of(name, IMAGES)), first)
        with monkeypatch.context() as patch:
            patch.setattr(type(one.scheduler), "step", _broken)
            with pytest.raises(RuntimeError, match="in between"):
                images_of(one, call_of(name, IMAGES))
        assert torch.equal(images_of(one, call_of(name, IMAGES)), first)
        assert torch.equal(attachment.trace.depths, trace.depths)
        with monkeypatch.context() as patch:
            patch.setattr(AdapterExits, "confidence", _broken)
            with pytest.raises(RuntimeError, match="in between"):
                images_of(one, call_of(name, IMAGES))
        assert torch.equal(images_of(one, call_of(name, [7, 8], guided=False, steps=2)), second)
        assert attachment.trace.depths.shape == (2, 2)
        assert torch.equal(images_of(one, call_of(name, IMAGES)), first)
        assert torch.equal(attachment.trace.depths, trace.depths)


@pytest.mark.parametrize("name", ["pixart-sigma", "sd3", "flux", "wan", "qwenimage"])
def test_a_call_of_another_size(name: str):
    """Twice as wide: the exits go on, and the next call of the first size is as the first."""
    wider = {"width": 2 * call_of(name, IMAGES)["width"]}
    policy = splitting(name)
    first, trace = under(name, policy, call_of(name, IMAGES))
    alone, expected = under(name, policy, call_of(name, IMAGES, **wider))
    with attach_exits(pipe(name), exits_for(pipe(name).transformer), policy) as attachment:
        assert torch.equal(images_of(pipe(name), call_of(name, IMAGES)), first)
        assert torch.equal(images_of(pipe(name), call_of(name, IMAGES, **wider)), alone)
        assert torch.equal(attachment.trace.depths, expected.depths)
        assert torch.equal(images_of(pipe(name), call_of(name, IMAGES)), first)
        assert torch.equal(attachment.trace.depths, trace.depths)
    assert alone.numel() == 2 * first.numel()


def _broken(*args, **kwargs):
    raise RuntimeError("in between")


def test_a_solver_that_repeats_its_times(monkeypatch):
    monkeypatch.setattr(pipe("dit"), "scheduler", HeunDiscreteScheduler())
    _, trace = under("dit", Policy(DepthTable(((1, 5, 2),) * 5)), call_of("dit", IMAGES))
    times = pipe("dit").scheduler.timesteps.double().tolist()
    assert len(times) == 5
    assert times[1] == times[2]
    assert trace.times.tolist() == times
    assert trace.depths.tolist() == [[1, 5, 2]] * 5


def test_image_to_image_begins_in_the_middle():
    made = StableDiffusion3Img2ImgPipeline(**pipe("sd3").components)
    made.set_progress_bar_config(disable=True)
    arguments = call_of("sd3", IMAGES, steps=4) | {"image": torch.rand(3, 3, 8, 8), "strength": 0.5}
    arguments.pop("height"), arguments.pop("width")
    plan = Policy(DepthTable(((1, 5, 2), (5, 3, 0))))
    with attach_exits(made, exits_for(made.transformer), plan) as attachment:
        images_of(made, arguments)
        assert attachment.trace.depths.tolist() == [[1, 5, 2], [5, 3, 0]]
        assert attachment.trace.times.tolist() == made.scheduler.timesteps.double().tolist()[2:]


def test_image_to_image_in_half_precision():
    """The model sees rounded timesteps there."""
    made = FluxImg2ImgPipeline(**STOCK["flux"].make()).to(torch.bfloat16)
    made.set_progress_bar_config(disable=True)
    exits = exits_for(made.transformer, rank=0).to(torch.bfloat16)
    arguments = call_of("flux", [0], guided=False, steps=8) | {"image": torch.rand(1, 3, 8, 8), "strength": 0.5}
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        arguments[name] = arguments[name].to(torch.bfloat16)
    with attach_exits(made, exits, Policy(DepthTable(((1,), (5,), (2,), (0,))))) as attachment:
        images_of(made, {name: value for name, value in arguments.items() if name != "true_cfg_scale"})
    assert attachment.trace.depths.flatten().tolist() == [1, 5, 2, 0]
    assert attachment.trace.times.tolist() == made.scheduler.timesteps.double().tolist()[4:]


def test_skip_layer_guidance_runs_without_exits():
    """Its third prediction, of the conditional rows alone, is another model's; the guided pair keeps its exits."""
    arguments = call_of("sd3", IMAGES, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0)
    _, trace = under("sd3", Policy(DepthTable(((1, 5, 2),) * STEPS)), arguments)
    assert trace.depths.tolist() == [[1, 5, 2]] * STEPS
    model = pipe("sd3").transformer
    with attach_exits(model, exits_for(model)) as attachment:
        session = attachment.start(Policy(), rows=torch.arange(2), num_steps=1)
        with attachment.use(session.step(0, 1.0)), pytest.raises(ValueError, match="skip_layers runs without exits"):
            forward(model, inputs_of("SD3Transformer2DModel", [0, 1]) | {"skip_layers": [1]})


@pytest.mark.parametrize("name", STOCK)
def test_heads_see_the_schedulers_time(name: str, monkeypatch):
    one, exits, seen = pipe(name), exits_for(pipe(name).transformer), []
    original = exits.context
    monkeypatch.setitem(exits.__dict__, "context", lambda timestep: seen.append(timestep) or original(timestep))
    with attach_exits(one, exits, Policy(Threshold(1.0))) as attachment:
        images_of(one, call_of(name, IMAGES))
        times = attachment.trace.times
    assert len(seen) == STEPS, "nothing is measured in a call that follows another"
    torch.testing.assert_close(torch.stack(seen)[:, 0].double(), times, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("order", ["offload, attach", "attach, offload"])
def test_model_offload_renews_its_hooks_after_every_call(order: str):
    """`enable_model_cpu_offload` takes the hook off the transformer when a call ends, and puts it on again."""
    plan, one = Policy(DepthTable(((1, 5, 2),) * STEPS)), pipeline_named("dit")
    expected, trace = under("dit", plan, call_of("dit", IMAGES))
    if order == "offload, attach":
        one.enable_model_cpu_offload(device="cpu")
    with attach_exits(one, exits_for(one.transformer), plan) as attachment:
        if order == "attach, offload":
            one.enable_model_cpu_offload(device="cpu")
        for _ in range(3):
            assert torch.equal(images_of(one, call_of("dit", IMAGES)), expected)
            assert torch.equal(attachment.trace.ran, trace.ran)
            assert one.transformer._hf_hook in [hook.hook for hook in one._all_hooks]
    assert torch.equal(images_of(one, call_of("dit", IMAGES)), under("dit", Policy(), call_of("dit", IMAGES))[0])
    one.remove_all_hooks()
    assert "_hf_hook" not in one.transformer.__dict__


# --- nothing is kept


def tensors() -> int:
    """Tensors that are alive."""
    gc.collect()
    return sum(type(one) is Tensor for one in gc.get_objects())


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "wan"])
def test_calls_do_not_gather_memory(name: str, monkeypatch):
    one, policy, alive = pipe(name), splitting(name), []
    with attach_exits(one, exits_for(one.transformer), policy) as attachment:
        for seed in range(4):
            images_of(one, call_of(name, [seed, seed + 1, seed + 2]))
            if seed == 2:
                with monkeypatch.context() as patch:
                    patch.setattr(AdapterExits, "confidence", _broken)
                    with pytest.raises(RuntimeError, match="in between"):
                        images_of(one, call_of(name, IMAGES))
                images_of(one, call_of(name, [seed, seed + 1, seed + 2]))
            assert attachment.runs._sessions == []
            alive.append(tensors())
    assert alive[1] == alive[2] == alive[3]


def test_detached_and_dropped_everything_is_freed():
    one = pipeline_named("flux")
    attachment = attach_exits(one, exits_for(one.transformer), Policy(DepthTable(((1, 3, 2),) * STEPS)))
    images_of(one, call_of("flux", IMAGES))
    gone = [weakref.ref(what) for what in (attachment, attachment.runs, attachment.heads)]
    attachment.detach()
    del attachment
    gc.collect()
    assert [what() for what in gone] == [None] * 3
    with_exits = weakref.ref(attach_exits(one, exits_for(one.transformer)))
    gone = [weakref.ref(one), weakref.ref(one.transformer), with_exits]
    del one
    gc.collect()
    assert [what() for what in gone] == [None] * 3, "attached exits keep no pipeline alive"
