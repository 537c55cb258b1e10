"""The oracle: its certainty is the true error, its answers are the exits' own, and it spoils no run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from factories import NULL_CLASS, pipeline
from torch import Tensor

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import Periodic
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.oracle import OracleExits, seconds_on
from ee_diffusion.diffusion.pipelines.sampling import generate
from ee_diffusion.diffusion.step_cache.recording import outputs_through

CALL = {"num_inference_steps": 6, "guidance_scale": 2.0}
SEEDS, LABELS = [1, 2], [0, 1]


def oracle() -> tuple:
    made = pipeline()
    made.exits = CachedOutputExits.for_pipeline(made.transformer, made.scheduler)
    seer = OracleExits(made.exits, made.transformer)
    seer.labels = torch.tensor([*LABELS, NULL_CLASS, NULL_CLASS])
    return made, made.exits, seer


def test_certainty_is_the_true_error_of_the_recalled_clean_image():
    made, exits, seer = oracle()
    made.exits = seer
    watched = Policy(Threshold(1.0))  # measured everywhere, never left
    scores = generate(made, SEEDS, LABELS, batch_size=2, exit_policy=watched, **CALL).trace.scores[:, 0]  # (S, E)
    memory, errors = None, []

    def compare(index: int, sample: Tensor, time: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        nonlocal memory
        output = forward()
        if index > 2:
            extrapolated = exits.extrapolate(memory, sample, time)["extrapolated"]
            missed = exits.clean_of(sample, extrapolated, time) - exits.clean_of(sample, output, time)
            rows = missed.double().square().flatten(1).mean(1).sqrt()  # (R,)
            errors.append(1 - rows.clamp(max=1).reshape(2, 2).amax(0))  # the less safe of an image's rows
        memory = exits.append(memory, torch.arange(4), sample=sample, timestep=time, output=output)
        return output

    with outputs_through(made.transformer, compare):
        generate(made, SEEDS, LABELS, batch_size=2, **CALL)
    assert bool((scores[:3] == 0).all())  # nothing was put to the test yet
    torch.testing.assert_close(scores[3:].double(), torch.stack(errors), rtol=1e-4, atol=1e-5)
    assert seer.seconds > 0


def test_answers_are_those_of_the_exits():
    made, _, seer = oracle()
    static = Policy(schedule=Periodic(2, 2), exits=(0,))
    own = generate(made, SEEDS, LABELS, batch_size=2, exit_policy=static, **CALL).images
    made.exits = seer
    assert torch.equal(generate(made, SEEDS, LABELS, batch_size=2, exit_policy=static, **CALL).images, own)


def test_labels_of_another_run_are_refused():
    made, _, seer = oracle()
    seer.labels = None
    made.exits = seer
    with pytest.raises(ValueError, match="None labels for 4 rows"):
        generate(made, SEEDS, LABELS, batch_size=2, exit_policy=Policy(Threshold(0.5)), **CALL)


def test_it_vouches_for_nothing_while_memory_is_not_full():
    """One full step: the answer is near the truth, and yet nobody may leave."""
    _, exits, seer = oracle()
    sample = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    times, rows = (torch.full((4,), time) for time in (2.0, 1.0)), torch.arange(4)
    then, now = times
    output = seer._model(sample, then, seer.labels).sample
    memory = exits.append(None, rows, sample=sample, timestep=then, output=output.detach())
    context = seer.extrapolate(memory, sample, now)
    answer = seer.answer(0, sample, context)
    error = (exits.clean_of(sample, answer, now) - context["true"]).square().mean((1, 2, 3)).sqrt()
    assert bool((error < 0.5).all())
    assert seer.confidence(0, sample, context).tolist() == [0.0] * 4


def test_seconds_add_up_and_are_taken_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch):
    _, _, seer = oracle()
    sample, time = torch.zeros(4, 3, 8, 8), torch.full((4,), 500.0)
    found = []
    for _ in range(3):
        seer.extrapolate(None, sample, time)
        found.append(seer.seconds)
    assert 0 < found[0] < found[1] < found[2]
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    seconds_on(torch.device("cpu"))
    assert not waited
    seconds_on(torch.device("cuda", 0))
    assert waited == [torch.device("cuda", 0)]
