"""Published methods as policies: what they say, what they refuse, what they do on a tiny model."""

from __future__ import annotations

import pytest
import torch
from factories import IMAGES, LAYOUTS, driver_named, recorded, run

from ee_diffusion.core.criteria import Patience, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import replay
from ee_diffusion.core.schedules import PiecewiseDepth
from ee_diffusion.diffusion.methods import ase, deediff, deediff_released, duodiff

SINGLE = LAYOUTS["single"]


def test_deediff_stops_at_the_first_exit_with_mean_uncertainty_below():
    scores = recorded("uvit-paper", "single").scores  # 1 - mean u
    theta = 1 - float(scores.quantile(0.7))
    found = run(driver_named("uvit-paper"), deediff(theta), SINGLE).trace
    expected = torch.full((2, IMAGES), 7)
    for step in range(2):
        for image in range(IMAGES):
            for exit, depth in reversed(list(enumerate((0, 2, 3, 5)))):
                if 1 - float(scores[step, exit, image]) < theta:
                    expected[step, image] = depth
    assert len(expected.unique()) >= 3
    assert torch.equal(found.depths.long(), expected)


def test_deediff_is_bolder_with_a_larger_threshold_and_takes_a_choice_of_exits():
    trace = recorded("uvit-paper", "single")
    depths = [replay(trace, deediff(theta)).float().mean() for theta in (0.0, 0.3, 0.6, 0.8, 1.0)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == 7
    assert depths[-1] == 0
    assert set(replay(trace, deediff(0.9, exits=(2, 5))).unique().tolist()) <= {2, 5, 7}
    assert deediff(0.25) == Policy(Threshold(0.75))


def test_deediff_as_released_needs_two_crossings_among_the_in_blocks():
    policy = deediff_released(0.5, depths=(1, 3, 4, 6), num_layers=7)
    assert policy.criterion == Patience(0.5, (2, 2, 1, 1), consecutive=False)
    assert (policy.cfg_exit, policy.exits) == ("separate", (1, 3, 4, 6))
    trace = run(driver_named("uvit-released"), policy, SINGLE).trace
    scores = recorded("uvit-released", "single").scores
    for step in range(2):
        for image in range(IMAGES):
            crossings, expected = 0, 7
            for exit, depth in enumerate((1, 3, 4, 6)):
                crossed = float(scores[step, exit, image]) > 0.5
                crossings += crossed
                if crossed and expected == 7 and (depth > 3 or crossings >= 2):
                    expected = depth
            assert int(trace.depths[step, image]) == expected


def test_deediff_as_released_for_text_has_no_patience():
    policy = deediff_released(0.5, depths=(1, 3, 4, 6), num_layers=7, patience=False)
    assert policy == Policy(Threshold(0.5), exits=(1, 3, 4, 6), cfg_exit="separate")
    trace = run(driver_named("uvit-released"), policy, SINGLE).trace
    scores = recorded("uvit-released", "single").scores
    for step in range(2):
        for image in range(IMAGES):
            crossed = [depth for exit, depth in enumerate((1, 3, 4, 6)) if float(scores[step, exit, image]) > 0.5]
            assert int(trace.depths[step, image]) == (crossed or [7])[0]
    assert not torch.equal(
        trace.depths,
        run(
            driver_named("uvit-released"), deediff_released(0.5, depths=(1, 3, 4, 6), num_layers=7), SINGLE
        ).trace.depths,
    )


def test_static_schedules():
    assert ase((6, 4, 2)).schedule == PiecewiseDepth((1000 / 3, 2000 / 3), (6, 4, 2))
    ten = ase((28, 28, 24, 24, 20, 20, 16, 16, 12, 12)).schedule
    found = [sum(ten.layers(0, time, num_steps=1, num_layers=28)) for time in (0, 99, 199, 200, 500, 899, 900, 999)]
    assert found == [28, 28, 28, 24, 20, 12, 12, 12]
    duo = duodiff(3, switch=400.0, num_layers=13).schedule
    assert [sum(duo.layers(0, time, num_steps=1, num_layers=13)) for time in (0, 399, 400, 999)] == [13, 13, 3, 3]


@pytest.mark.parametrize(
    "make",
    [
        lambda: deediff(1.5),
        lambda: deediff(-0.1),
        lambda: deediff(float("nan")),
        lambda: deediff_released(1.5, depths=(1,), num_layers=7),
        lambda: deediff_released(1.5, depths=(1,), num_layers=7, patience=False),
        lambda: deediff_released(0.5, depths=(), num_layers=7),
        lambda: deediff_released(0.5, depths=(), num_layers=7, patience=False),
        lambda: deediff_released(0.5, depths=(3, 1), num_layers=7),
        lambda: ase(()),
    ],
)
def test_thresholds_and_depths_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match=r"outside|expected"):
        make()
