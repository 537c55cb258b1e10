"""Schedules: which layers, at which step or time; what does not fit the model or the run is refused."""

from __future__ import annotations

import pytest

from ee_diffusion.core.schedules import (
    DepthPerStep,
    FixedDepth,
    FixedLayers,
    FullDepth,
    Periodic,
    PiecewiseDepth,
    depth_of,
)


def depths(schedule, times, num_layers: int = 6) -> list[int | None]:
    return [
        depth_of(schedule.layers(step, time, num_steps=len(times), num_layers=num_layers))
        for step, time in enumerate(times)
    ]


def test_depths():
    assert depths(FullDepth(), [9.0, 1.0]) == [6, 6]
    assert depths(FixedDepth(0), [9.0, 1.0]) == [0, 0]
    assert depths(FixedDepth(4), [9.0, 1.0]) == [4, 4]
    assert depths(DepthPerStep((3, 0, 6)), [9.0, 5.0, 1.0]) == [3, 0, 6]


def test_piecewise_boundaries():
    schedule = PiecewiseDepth((10.0, 20.0), (6, 4, 2))
    assert depths(schedule, [0.0, 9.99, 10.0, 19.99, 20.0, 1e9, -1.0]) == [6, 6, 4, 4, 2, 2, 6]
    assert depths(PiecewiseDepth((), (5,)), [3.0]) == [5]


def test_periodic():
    times = [9.0] * 9
    assert depths(Periodic(3, 2), times) == [6, 6, 0, 0, 6, 0, 0, 6, 0]
    assert depths(Periodic(2, 0, depth=4), times) == [4, 6, 4, 6, 4, 6, 4, 6, 4]
    assert depths(Periodic(1, 1), times) == [6] * 9


def test_holes():
    assert FixedLayers((0, 2)).layers(0, 0.0, num_steps=1, num_layers=4) == (True, False, True, False)
    assert depths(FixedLayers((0, 2)), [0.0]) == [None]
    assert depths(FixedLayers((1, 0)), [0.0]) == [2]
    assert depths(FixedLayers(()), [0.0]) == [0]


@pytest.mark.parametrize(
    "schedule",
    [
        FullDepth(),
        FixedDepth(2),
        DepthPerStep((1, 4, 4)),
        PiecewiseDepth((10.0, 20.0), (6, 4, 2)),
        Periodic(2, 1),
        Periodic(3, 0, depth=6),
        FixedLayers((0, 3)),
    ],
    ids=repr,
)
def test_plans_are_all_that_layers_can_say(schedule):
    seen = {
        schedule.layers(step, time, num_steps=3, num_layers=6) for step in range(3) for time in (0.0, 10.0, 15.0, 25.0)
    }
    assert seen == set(schedule.plans(num_steps=3, num_layers=6))


@pytest.mark.parametrize(
    "schedule",
    [
        FixedDepth(7),
        FixedDepth(-1),
        DepthPerStep((1, 2)),
        DepthPerStep((1, 2, 7)),
        PiecewiseDepth((1.0,), (7, 1)),
        Periodic(2, 1, depth=7),
        FixedLayers((0, 6)),
        FixedLayers((-1,)),
    ],
    ids=repr,
)
def test_what_does_not_fit_is_refused(schedule):
    with pytest.raises(ValueError, match=r"expected within|steps"):
        schedule.plans(num_steps=3, num_layers=6)


@pytest.mark.parametrize("edges,depths", [((2.0, 1.0), (1, 2, 3)), ((1.0,), (1,)), ((1.0,), (1, 2, 3))])
def test_edges_ascend_and_have_one_depth_more(edges, depths):
    with pytest.raises(ValueError, match="one depth more"):
        PiecewiseDepth(edges, depths)


@pytest.mark.parametrize("period,warm_up", [(0, 1), (2, -1)])
def test_a_period_counts_steps(period: int, warm_up: int):
    with pytest.raises(ValueError, match=f"period={period}, warm_up={warm_up}, expected"):
        Periodic(period, warm_up)
