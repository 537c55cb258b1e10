"""Walks see what memory gets wrong on the states they say; the fit brings u nearer to the truth and touches nothing else."""

from __future__ import annotations

import pytest
import torch
from factories import pipeline

from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.pipelines.sampling import sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_estimator import ErrorSamples, collect_errors, fit_error_estimator

CALL = {"num_inference_steps": 10, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe() -> EarlyExitPipeline:
    return pipeline()


def seen(
    pipe: EarlyExitPipeline, exits: CachedOutputExits, *, skip: float = 0.5, states: str = "exited"
) -> ErrorSamples:
    return collect_errors(
        pipe, exits, [0, 1, 2], skip=skip, states=states, generator=torch.Generator().manual_seed(1), **CALL
    )


def test_without_skipping_the_errors_are_those_of_the_line_through_the_last_two_steps(pipe: EarlyExitPipeline):
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    found = seen(pipe, exits, skip=0.0)
    clean: list[torch.Tensor] = []

    def keep(module, args, kwargs, output):
        clean.append(exits.clean_of(args[0], output.sample, args[1]))

    hook = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        seen(pipe, exits, skip=0.0)
    finally:
        hook.remove()
    true = [
        (2 * b - a - c).flatten(1).square().mean(1).sqrt()
        for a, b, c in zip(clean[1:], clean[2:], clean[3:], strict=False)
    ]
    torch.testing.assert_close(found.errors, torch.cat(true), rtol=1e-3, atol=1e-4)
    assert found.steps.unique().tolist() == list(range(3, 10))


def test_rows_are_the_images_with_their_labels_then_without(pipe: EarlyExitPipeline):
    """Both rows of an image are remembered, or neither; the first half of a step's rows is conditional; the walk is guided by both."""
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    kept: list[torch.Tensor] = []
    append = exits.append

    def watch(module, args, kwargs, output):
        asked.append((args[0], kwargs["class_labels"], output.sample))

    def appending(memory, rows, **said):
        kept.append(rows)
        return append(memory, rows, **said)

    hook = pipe.transformer.register_forward_hook(watch, with_kwargs=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exits, "append", appending)
            seen(pipe, exits, states="full")
    finally:
        hook.remove()
    assert any(0 < len(rows) < 6 for rows in kept)
    assert all(sorted(rows[rows < 3].tolist()) == sorted((rows[rows >= 3] - 3).tolist()) for rows in kept)
    assert all(labels.tolist() == [0, 1, 2, *[pipe.transformer.config.null_class] * 3] for _, labels, _ in asked)
    scheduler = sampler("ddim", like=pipe.scheduler)
    scheduler.set_timesteps(10)
    (sample, _, output), (after, _, _) = asked[:2]
    guided = output[3:] + 2.0 * (output[:3] - output[3:])
    moved = scheduler.step(guided, scheduler.timesteps[0], sample[:3]).prev_sample
    torch.testing.assert_close(after, torch.cat([moved, moved]))


def test_a_seed_repeats_a_walk_whose_scheduler_draws_noise(pipe: EarlyExitPipeline):
    noisy = EarlyExitPipeline(pipe.transformer, sampler("ddpm", like=pipe.scheduler), pipe.exits)
    exits = CachedOutputExits.for_pipeline(pipe.transformer, noisy.scheduler)
    torch.manual_seed(1)
    first = seen(noisy, exits)
    torch.manual_seed(2)
    assert torch.equal(seen(noisy, exits).errors, first.errors)


def test_states_differ_only_in_where_the_walk_leads(pipe: EarlyExitPipeline):
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    exited, full = (seen(pipe, exits, states=states) for states in ("exited", "full"))
    first = exited.steps <= 3
    torch.testing.assert_close(exited.errors[first], full.errors[full.steps <= 3])
    assert not torch.allclose(exited.errors, full.errors)
    assert exited.steps.tolist() == full.steps.tolist()


def test_the_fit_learns_a_constant_factor_and_a_trend(pipe: EarlyExitPipeline):
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    features = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    errors = (features[:, 0] + 0.7 + 0.5 * features[:, 2]).exp()
    before = {name: value.clone() for name, value in exits.state_dict().items()}
    fit_error_estimator(exits, ErrorSamples(features, errors, torch.zeros(500)), iterations=300)
    with torch.no_grad():
        wrong = (exits.expected_error(features) / errors).log().abs().median()
    assert wrong < 0.05
    changed = {name for name, value in exits.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("error_estimator.")}


def test_until_memory_was_put_to_the_test_every_row_remembers(pipe: EarlyExitPipeline, monkeypatch: pytest.MonkeyPatch):
    exits, kept = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler), []
    append = exits.append

    def appending(memory, rows, **said):
        kept.append(len(rows))
        return append(memory, rows, **said)

    monkeypatch.setattr(exits, "append", appending)
    seen(pipe, exits, skip=0.9)
    assert kept[:3] == [6, 6, 6]
    assert sum(kept[3:]) < 6 * 7 / 2


def test_bad_input(pipe: EarlyExitPipeline):
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    for bad in ({"skip": 1.0}, {"skip": float("nan")}, {"states": "both"}):
        with pytest.raises(ValueError, match="expected a probability below 1 and one of"):
            seen(pipe, exits, **bad)
    with pytest.raises(ValueError, match="0 errors were collected"):
        fit_error_estimator(exits, ErrorSamples(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)))
    for iterations in (0, -1):
        with pytest.raises(ValueError, match=f"iterations={iterations}: expected .* at least 1"):
            fit_error_estimator(
                exits, ErrorSamples(torch.zeros(1, 4), torch.ones(1), torch.zeros(1)), iterations=iterations
            )
