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
from ee_diffusion.diffusion.distillation.objective import observe
from ee_diffusion.diffusion.exits.tracking_exits import TrackingExits
from ee_diffusion.diffusion.exits.tracking_fit import (
    correction_of,
    errors_of,
    fit_corrections,
    fit_gauges,
    shares_left,
    walk_tracks,
)
from ee_diffusion.diffusion.methods import remembered
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.trajectories import full_steps
from ee_diffusion.metrics.splits import seeds

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


@pytest.mark.parametrize("exit", [1, 2])
@torch.no_grad()
def test_answers_are_those_of_a_loop_that_spells_them_out(pipe: EarlyExitPipeline, exit: int):
    """Full, full, full, then an exit: the recalled clean image and the correction in float64, row by row."""
    exits, depth, images = pipe.exits, pipe.exits.depths[exit], [0, 1]
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
        said = exits.heads[exit - 1](patches, exits.config.sample_size)
        return exits.patches_of(exits.memory.clean_of(sample, said, torch.full((4,), t)).float())

    now, newest, before = (
        reads(h, s, t) for h, s, t in ((hidden, asked.sample, float(asked.time)), (h_0, s_0, t_0), (h_1, s_1, t_1))
    )
    innovation = now - newest - ratio * (newest - before)
    context = exits.recall(memory, asked.sample, time)
    torch.testing.assert_close(exits.innovation(exit, hidden[depth], context), innovation, rtol=1e-3, atol=1e-4)
    moved = exits.patches_of((x_0 - x_1).float())
    sizes = [one.double().square().mean((1, 2)).sqrt().log() for one in (innovation, moved)]
    features = torch.cat([context["features"], torch.stack(sizes, 1)], 1).float()
    torch.testing.assert_close(exits.gauged(innovation, context), features, rtol=1e-3, atol=1e-3)
    expected = exits.patches_of((x_0 + ratio * (x_0 - x_1)).float())
    if exits.config.variant == "residual":
        expected = expected + innovation
    else:
        expected = expected + exits.corrections[exit - 1](innovation, moved, exits.gauged(innovation, context))
    clean = exits.memory.clean_of(asked.sample, exits.answer(exit, hidden[depth], context), time)
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


@pytest.mark.parametrize("variant", ["residual", "learned"])
def test_half_precision_answers_at_every_depth(variant: str):
    """The pipeline in bfloat16: its corrections are those of float32, but for rounding."""
    pipe, layers = made(variant).to(torch.bfloat16), 7
    depths = (layers, layers, layers, pipe.exits.depths[1], 0, pipe.exits.depths[2], layers, 0)
    images, trace = draw(pipe, Policy(schedule=DepthPerStep(depths)))
    assert bool(images.isfinite().all())
    assert trace.depths[:, 0].tolist() == list(depths)
    draw(pipe, Policy(Threshold(0.5)))  # measured at every depth


def test_a_correction_in_half_precision_is_that_of_float32_but_for_rounding():
    correction, generator = made("learned").exits.corrections[0], torch.Generator().manual_seed(0)
    width, values = correction.innovation.in_features, correction.out.out_features
    innovation, movement = (torch.randn(4, 16, size, generator=generator) for size in (width, values))
    features = torch.randn(4, 6, generator=generator)
    with torch.no_grad():
        expected = correction(innovation, movement, features)
        found = correction.to(torch.bfloat16)(innovation, movement, features)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.03)


def test_both_rows_of_an_image_are_kept_or_neither(monkeypatch: pytest.MonkeyPatch):
    """And all of them until memory was put to the test."""
    pipe, kept = made("learned"), []
    remember = pipe.exits.remember

    def remembering(memory, rows, **facts):
        kept.append(rows)
        return remember(memory, rows, **facts)

    monkeypatch.setattr(pipe.exits, "remember", remembering)
    call = {"skip": 0.5, "states": "full", "generator": torch.Generator().manual_seed(2), **CALL}
    walk_tracks(pipe, pipe.exits, seeds("fit", 3), [0, 1, 2], **call)
    assert [len(rows) for rows in kept[:3]] == [6, 6, 6]
    assert any(0 < len(rows) < 6 for rows in kept)
    assert all(sorted(rows[rows < 3].tolist()) == sorted((rows[rows >= 3] - 3).tolist()) for rows in kept)


def test_what_a_correction_leaves_is_a_share_of_what_each_row_missed():
    pipe = made("learned")
    call = {"skip": 0.4, "states": "full", "generator": torch.Generator().manual_seed(0), **CALL}
    seen = walk_tracks(pipe, pipe.exits, seeds("fit", 2), [0, 1], **call)
    expected = []
    for place in range(2):
        shares = []
        for row in range(len(seen.steps)):
            missed = seen.missed[row].double()
            left = correction_of(pipe.exits, place, seen[torch.tensor([row])])[0].double() - missed
            shares.append(float(left.square().mean() / missed.square().mean()))
        expected.append(sum(shares) / len(shares))
    assert shares_left(pipe.exits, seen).tolist() == pytest.approx(expected, rel=1e-3)


def test_what_cannot_be_fitted_is_refused():
    pipe = made("learned")
    call = {"skip": 0.4, "states": "full", "generator": torch.Generator().manual_seed(0), **CALL}
    seen = walk_tracks(pipe, pipe.exits, [1], [0], **call)
    for change in ({"batch_size": 0}, {"batch_size": len(seen.steps) + 1}, {"iterations": 0}):
        given = {"iterations": 1, "batch_size": 1, "generator": torch.Generator()} | change
        with pytest.raises(ValueError, match=r"10 moments, .* a batch of at least one moment and at most all"):
            fit_corrections(pipe.exits, seen, **given)
    with pytest.raises(ValueError, match="iterations=0, expected at least 1"):
        fit_gauges(pipe.exits, seen, iterations=0)


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
