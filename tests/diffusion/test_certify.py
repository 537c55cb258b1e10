"""Live losses are those of runs done by hand; a calibrated policy knows its model and its settings and is refused with others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import pipeline

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.calibration.live import live_losses, marked
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.fingerprint import fingerprint, made_for_of
from ee_diffusion.diffusion.pipelines.sampling import generate, use_sampler

SEEDS, LABELS, CALL = [3, 1, 4, 1, 5], [0, 1, 2, 3, 4], {"num_inference_steps": 3, "guidance_scale": 2.0}


def distance(images: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    return (images - full).flatten(1).abs().mean(1)


def test_losses_and_costs_are_those_of_live_runs():
    pipe, policies = pipeline(), [Policy(Threshold(1.0)), Policy(Threshold(0.4))]
    live = live_losses(pipe, policies, SEEDS, class_labels=LABELS, loss=distance, batch_size=2, **CALL)
    full = generate(pipe, SEEDS, LABELS, batch_size=5, **CALL).images
    drawn = generate(pipe, SEEDS, LABELS, batch_size=5, exit_policy=policies[1], **CALL)
    assert (live.losses[0] == 0).all()
    assert live.losses[1].max() > 0
    torch.testing.assert_close(live.losses[1], distance(drawn.images, full), rtol=1e-3, atol=1e-4)
    assert live.costs.tolist() == pytest.approx([1.0, drawn.trace.report().fraction_executed])


def test_a_marked_policy_runs_where_it_was_made_and_nowhere_else(tmp_path: Path):
    pipe = pipeline()
    marked(Policy(Threshold(0.4)), pipe, **CALL).save(tmp_path / "policy.json")
    policy = Policy.load(tmp_path / "policy.json")
    assert policy.made_for
    twin = pipeline()  # the same weights
    images = [
        made([1], exit_policy=policy, generator=torch.Generator().manual_seed(0), output_type="pt", **CALL).images
        for made in (pipe, twin)
    ]
    assert torch.equal(*images)
    for change, message in (
        ({"num_inference_steps": 4}, "num_inference_steps 3, this run has 4"),
        ({"guidance_scale": 2.5}, "guidance_scale 2.0, this run has 2.5"),
        ({"eta": 1.0}, "eta 0.0, this run has 1.0"),
        ({"timesteps": [900, 500, 100]}, r"num_inference_steps 3, this run has \[900, 500, 100\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe([1], exit_policy=policy, **CALL | change)
    other = pipeline()
    for change in ({"beta_schedule": "squaredcos_cap_v2"}, {"timestep_spacing": "trailing"}):
        other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **change)
        with pytest.raises(ValueError, match="calibrated for scheduler settings"):
            other([1], exit_policy=policy, **CALL)
    pipe.scheduler.save_pretrained(tmp_path / "same")
    other.scheduler = type(pipe.scheduler).from_pretrained(tmp_path / "same")
    other([1], exit_policy=policy, **CALL)
    use_sampler(twin, "euler")
    with pytest.raises(ValueError, match="scheduler DDIMScheduler, this run has EulerDiscreteScheduler"):
        twin([1], exit_policy=policy, **CALL)
    with torch.no_grad():
        pipe.exits.uncertainty_modules[0].bias.add_(1e-6)
    with pytest.raises(ValueError, match="calibrated for weights"):
        pipe([1], exit_policy=policy, **CALL)


def test_a_fingerprint_sees_values_names_and_types():
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(one, None) == fingerprint(one)
    assert fingerprint(one, other) != fingerprint(one)
    assert fingerprint(other.to(torch.bfloat16)) != fingerprint(one)
    assert fingerprint(torch.nn.Sequential(one)) != fingerprint(one)


def test_a_loss_is_asked_for_the_images_then_those_of_the_full_model():
    pipe, policy = pipeline(), Policy(Threshold(0.4))
    call = {"class_labels": LABELS, "batch_size": 5, **CALL}

    def brighter(images: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        return (images - full).clamp(min=0).flatten(1).mean(1)

    found = live_losses(pipe, [policy], SEEDS, loss=brighter, **call).losses[0]
    full = generate(pipe, SEEDS, LABELS, batch_size=5, **CALL).images
    drawn = generate(pipe, SEEDS, LABELS, batch_size=5, exit_policy=policy, **CALL).images
    assert not torch.allclose(brighter(drawn, full), brighter(full, drawn), atol=1e-3)
    torch.testing.assert_close(found, brighter(drawn, full))


def test_bad_input():
    pipe = pipeline()
    call = {"class_labels": LABELS, "batch_size": 5, **CALL}
    for policies in ([Policy()], [Policy(Threshold(0.4)), Policy()], [None]):
        with pytest.raises(ValueError, match=rf"the policies at \[{len(policies) - 1}\] are off"):
            live_losses(pipe, policies, SEEDS, loss=distance, **call)
    for loss in (lambda a, b: distance(a, b)[:-1], lambda a, b: distance(a, b).mean()):
        with pytest.raises(ValueError, match=r"losses \(.*\), expected one for each of 5 images"):
            live_losses(pipe, [Policy(Threshold(0.4))], SEEDS, loss=loss, **call)
    with pytest.raises(ValueError, match="no policies"):
        live_losses(pipe, [], SEEDS, class_labels=LABELS, loss=distance, batch_size=2, **CALL)
    with pytest.raises(ValueError, match="expected numbers in"):
        live_losses(
            pipe,
            [Policy(Threshold(0.4))],
            SEEDS,
            class_labels=LABELS,
            loss=lambda a, b: distance(a, b) - 1,
            batch_size=5,
            **CALL,
        )


def test_what_exits_remember_is_part_of_what_a_policy_was_made_for():
    pipe = pipeline()
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0}
    marks = []
    for cached_type in ("sample", "epsilon"):
        pipe.exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type=cached_type)
        marks.append(dict(made_for_of(pipe, **settings)))
    different = {name for name in marks[0] if marks[0][name] != marks[1][name]}
    assert different == {"exits settings"}
