"""Exits that remember at several depths: residual and learned, the laws, fitting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import CLASSES, pipeline
from torch import Tensor

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import DepthPerStep
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.courses import full_steps
from ee_diffusion.diffusion.distillation import observe
from ee_diffusion.diffusion.methods import remembered
from ee_diffusion.diffusion.pipeline import EarlyExitPipeline
from ee_diffusion.diffusion.tracking_exits import TrackingExits
from ee_diffusion.diffusion.tracking_fit import errors_of, fit_corrections, fit_gauges, walk_tracks
from ee_diffusion.measure.splits import seeds

STEPS = 8
CALL = {"num_inference_steps": STEPS, "guidance_scale": 2.0}


def made(variant: str) -> EarlyExitPipeline:
    """A tiny pipeline; the learned corrections are not 0, so that what they see shows in images."""
    pipe = pipeline()
    heads = pipe.exits if variant == "residual" else None
    deeper = tuple(depth for depth in pipe.exits.depths if depth)[:2]
    pipe.exits = TrackingExits.for_pipeline(pipe.transformer, pipe.scheduler, deeper=deeper, heads=heads)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for correction in pipe.exits.corrections:
            correction.out.weight.copy_(0.1 * torch.randn(correction.out.weight.shape, generator=generator))
    return pipe


@pytest.fixture(scope="module", params=["residual", "learned"])
def pipe(request: pytest.FixtureRequest) -> EarlyExitPipeline:
    return made(request.param)


def draw(pipe: EarlyExitPipeline, policy: Policy | None, images: tuple[int, ...] = (0, 1, 2)) -> tuple[Tensor, Trace]:
    generators = [torch.Generator().manual_seed(image) for image in images]
    labels = [image % CLASSES for image in images]
    drawn = pipe(labels, exit_policy=policy, generator=generators, output_type="pt", **CALL)
    return drawn.images, drawn.trace


def variety(pipe: EarlyExitPipeline) -> Policy:
    """A threshold under which images stop at different depths."""
    scores = draw(pipe, Policy(Threshold(1.0)))[1].scores.transpose(0, 1)  # (K, S, E)
    strict = (0.7, 0.4, 0.4)  # untrained, all exits of a step say the same: the deeper ones must be asked for less
    return Policy(Threshold(tuple(own[own > 0].quantile(q).item() for own, q in zip(scores, strict, strict=True))))


def test_off_and_never_are_the_plain_model(pipe: EarlyExitPipeline):
    plain = draw(pipe, None)[0]
    assert torch.equal(draw(pipe, Policy(Threshold(1.0)))[0], plain)


def test_batch_mates_do_not_matter(pipe: EarlyExitPipeline):
    policy = variety(pipe)
    together, trace = draw(pipe, policy)
    assert len(trace.depths.unique()) > 2
    for image in range(3):
        alone, own = draw(pipe, policy, (image,))
        assert torch.equal(own.depths[:, 0], trace.depths[:, image])
        torch.testing.assert_close(alone[0], together[image], rtol=1e-3, atol=1e-3)


def test_a_deeper_exit_runs_its_blocks_and_no_more(pipe: EarlyExitPipeline):
    seen: list[int] = []
    hooks = [
        block.attn.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        for block in pipe.transformer.transformer_blocks
    ]
    layers, depth = len(pipe.transformer.transformer_blocks), pipe.exits.depths[1]
    depths = (layers, layers, depth, 0, layers, depth, 0, layers)
    try:
        draw(pipe, Policy(schedule=DepthPerStep(depths)))
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == [6] * sum(depths)


@torch.no_grad()
def test_answers_are_those_of_a_loop_that_spells_them_out(pipe: EarlyExitPipeline):
    """Full, full, full, then exit 1: the recalled clean image and the correction in float64, row by row."""
    exits, depth, images = pipe.exits, pipe.exits.depths[1], [0, 1]
    labels = torch.tensor([*images, *[pipe.transformer.config.null_class] * 2])
    memory, past = None, []
    for asked in full_steps(pipe, images, images, **CALL):
        time = asked.time.expand(4)
        inputs = {"hidden_states": asked.sample, "timestep": time, "class_labels": labels}
        hidden = dict(zip(exits.keeps, observe(pipe.transformer, exits.keeps, inputs)[1], strict=True))
        if asked.index == 3:
            break
        past.append((float(asked.time), exits.memory.clean_of(asked.sample, asked.output, time), hidden, asked.sample))
        facts = {"sample": asked.sample, "timestep": time, "output": asked.output, "hidden": hidden}
        memory = exits.remember(memory, torch.arange(4), **facts)
    (t_1, x_1, h_1, s_1), (t_0, x_0, h_0, s_0) = past[-2:]
    ratio = (float(asked.time) - t_0) / (t_0 - t_1)

    def reads(hidden: dict, sample: Tensor, t: float) -> Tensor:
        patches = hidden[depth][:, pipe.transformer.num_prefix_tokens :]
        if exits.config.variant == "learned":
            return patches
        said = exits.heads[0](patches, exits.config.sample_size)
        return exits.patches_of(exits.memory.clean_of(sample, said, torch.full((4,), t)).float())

    now, newest, before = (
        reads(h, s, t) for h, s, t in ((hidden, asked.sample, float(asked.time)), (h_0, s_0, t_0), (h_1, s_1, t_1))
    )
    innovation = now - newest - ratio * (newest - before)
    context = exits.recall(memory, asked.sample, time)
    torch.testing.assert_close(exits.innovation(1, hidden[depth], context), innovation, rtol=1e-3, atol=1e-4)
    expected = exits.patches_of((x_0 + ratio * (x_0 - x_1)).float())
    if exits.config.variant == "residual":
        expected = expected + innovation
    else:
        moved = exits.patches_of((x_0 - x_1).float())
        expected = expected + exits.corrections[0](innovation, moved, exits.gauged(innovation, context))
    clean = exits.memory.clean_of(asked.sample, exits.answer(1, hidden[depth], context), time)
    torch.testing.assert_close(exits.patches_of(clean.float()), expected, rtol=1e-2, atol=1e-2)


def test_save_and_load_make_the_same_images(pipe: EarlyExitPipeline, tmp_path: Path):
    policy = variety(pipe)
    pipe.exits.save_pretrained(tmp_path)
    again = EarlyExitPipeline(pipe.transformer, pipe.scheduler, TrackingExits.from_pretrained(tmp_path))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, policy)[0], draw(pipe, policy)[0])


def test_an_answer_before_the_first_full_step_is_refused(pipe: EarlyExitPipeline):
    with pytest.raises(ValueError, match="before the first full step"):
        draw(pipe, Policy(schedule=DepthPerStep((pipe.exits.depths[1],) * STEPS)))


def test_remembered_may_leave_at_any_of_its_exits(pipe: EarlyExitPipeline):
    policy = remembered(0.5, sensitivity=(1.0,) * STEPS, exits=pipe.exits.depths)
    assert len(policy.criterion.threshold[0]) == len(pipe.exits.depths)
    draw(pipe, policy)


@pytest.mark.parametrize("states", ["full", "exited"])
def test_fitting_brings_answers_nearer_and_uncertainty_with_them(states: str):
    pipe = made("learned")
    call = {"skip": 0.4, "states": states, **CALL}
    seen = walk_tracks(
        pipe, pipe.exits, seeds("fit", 4), [0, 1, 2, 0], generator=torch.Generator().manual_seed(0), **call
    )
    before = errors_of(pipe.exits, seen)
    with torch.no_grad():
        said = pipe.exits.expected_error(1, seen.features[:, 0])
    apart = (said.log() - before[1].log()).abs().median()
    fit_corrections(pipe.exits, seen, iterations=60, batch_size=8, generator=torch.Generator().manual_seed(0))
    fit_gauges(pipe.exits, seen, iterations=60)
    after = errors_of(pipe.exits, seen)
    assert torch.equal(before[0], after[0])
    assert after[1].mean() < before[1].mean()
    with torch.no_grad():
        said = pipe.exits.expected_error(1, seen.features[:, 0])
    assert (said.log() - after[1].log()).abs().median() < apart


def test_what_does_not_fit_is_refused(pipe: EarlyExitPipeline):
    for deeper in ((), (0, 1), (2, 1)):
        with pytest.raises(ValueError, match="ascending distinct"):
            TrackingExits(deeper)
    with pytest.raises(ValueError, match="unknown"):
        TrackingExits((1,), "unknown")
    with pytest.raises(ValueError, match="no output heads at depths"):
        TrackingExits.for_pipeline(pipe.transformer, pipe.scheduler, deeper=(1, 9), heads=pipeline().exits)
    narrow = TrackingExits((1,), width=8, sample_size=8)
    narrow.memory.load_state_dict(pipe.exits.memory.state_dict())
    with pytest.raises(ValueError, match="width is 8"):
        narrow.check_fits(pipe.transformer)
