"""The tiny models themselves: exits that are not degenerate, the same at every call, criteria that split every batch."""

from __future__ import annotations

import pytest
import torch
from factories import CRITERIA, DRIVERS, LAYOUTS, criterion_named, dit, driver_named, exits_for, recorded, run, uvit

from ee_diffusion.core.policy import Policy


@pytest.mark.parametrize("name", DRIVERS)
def test_scores_differ_between_images_exits_and_steps(name: str):
    scores = recorded(name, "single").scores  # (S, K, E)
    assert ((scores > 0) & (scores < 1)).all()
    assert scores.std(2).min() > 0.01, "images"
    assert scores.std(1).mean() > 0.01, "exits"
    assert (scores[0] - scores[1]).abs().mean() > 0.01, "steps"


@pytest.mark.parametrize("name", DRIVERS)
def test_images_of_one_batch_stop_at_different_depths(name: str):
    driver = driver_named(name)
    for criterion in CRITERIA:
        depths = run(driver, Policy(criterion_named(criterion, name, "single")), LAYOUTS["single"]).trace.depths
        assert all(len(row.unique()) >= 2 for row in depths), criterion
        assert (depths == driver.num_layers).any(1).all(), criterion
    assert len(depths.unique()) >= 4  # of the plan


def test_models_are_the_same_at_every_call():
    torch.manual_seed(1)
    first = [uvit(), uvit("text"), dit(), exits_for(uvit(), (1, 3))]
    torch.manual_seed(2)
    again = [uvit(), uvit("text"), dit(), exits_for(uvit(), (1, 3))]
    for one, other in zip(first, again, strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
