"""Schedules: which layers, at which step or time; what does not fit the model or the run is refused."""

from __future__ import annotations

import math

import pytest

from ee_diffusion.core.schedules import (
    DepthPerStep,
    FixedDepth,
    FixedLayers,
    FullDepth,
    LinearDecay,
    Periodic,
    PiecewiseDepth,
    PowerDecay,
    depth_of,
    full_steps_of,
    last_steps,
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


def test_full_steps_among_answers_from_memory():
    times = [9.0, 7.0, 5.0, 3.0, 1.0]
    assert full_steps_of(DepthPerStep((6, 6, 0, 6, 0)), times, num_layers=6) == (0, 1, 3)
    assert full_steps_of(Periodic(2, 1), times, num_layers=6) == (0, 2, 4)
    assert full_steps_of(PiecewiseDepth((4.0,), (0, 6)), times, num_layers=6) == (0, 1, 2)
    assert full_steps_of(FullDepth(), times, num_layers=6) == (0, 1, 2, 3, 4)
    assert full_steps_of(FixedDepth(0), times, num_layers=6) == ()
    assert full_steps_of(DepthPerStep((6, 6, 2, 6, 0)), times, num_layers=6) is None


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
        LinearDecay(6, 3, 3, bottom=2),
        LinearDecay(4, 1, 9, bottom=None),
        PowerDecay(0.7, 2, bottom=1),
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
        DepthPerStep((1, 2)),
        DepthPerStep((1, 2, 7)),
        PiecewiseDepth((1.0,), (7, 1)),
        Periodic(2, 1, depth=7),
        FixedLayers((0, 6)),
        LinearDecay(7, 3, 9, bottom=1),
        PowerDecay(0.5, 7, bottom=1),
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


def test_decays_are_their_formulas():
    """Against slow loops; every layer that runs at a step ran at the one before."""
    for schedule, count in (
        (LinearDecay(6, 3, 5, bottom=2), lambda t: math.floor(6 - 3 * min(t, 4) / 4 + 0.5)),
        (LinearDecay(5, 1, 7, bottom=None), lambda t: math.floor(5 - 4 * min(t, 6) / 6 + 0.5)),
        (PowerDecay(0.8, 3, bottom=1), lambda t: max(3, math.floor(6 * 0.8**t))),
        (PowerDecay(0.8, 0, bottom=None), lambda t: math.floor(6 * 0.8**t)),
    ):
        before = (True,) * 6
        for t in range(12):
            bottom = count(t) if schedule.bottom is None else schedule.bottom
            kept = {*range(bottom), *range(6 - (count(t) - bottom), 6)}
            layers = schedule.layers(t, 0.0, num_steps=12, num_layers=6)
            assert layers == tuple(layer in kept for layer in range(6))
            assert all(was or not runs for was, runs in zip(before, layers, strict=True))
            before = layers


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: LinearDecay(5, 2, 1, bottom=1), "horizon=1"),
        (lambda: LinearDecay(5, 6, 4, bottom=1), "least <= most"),
        (lambda: LinearDecay(5, 2, 4, bottom=2), "bottom=2"),
        (lambda: LinearDecay(5, 2, 4, bottom=0), "bottom=0"),
        (lambda: PowerDecay(0.0, 2, bottom=1), "alpha=0"),
        (lambda: PowerDecay(1.1, 2, bottom=1), "alpha=1.1"),
        (lambda: PowerDecay(0.9, 2, bottom=3), "bottom=3"),
        (lambda: PowerDecay(0.9, 2.5, bottom=None), r"PowerDecay\.least=2\.5, expected a whole number"),
        (lambda: LinearDecay(5, 2, 4.0, bottom=1), r"LinearDecay\.horizon=4\.0, expected a whole number"),
        (lambda: FixedDepth(2.5), r"FixedDepth\.depth=2\.5, expected a whole number"),
        (lambda: FixedDepth(True), r"FixedDepth\.depth=True, expected a whole number"),
        (lambda: DepthPerStep((1, 2.0)), r"DepthPerStep\.depths=\(1, 2\.0\), expected a tuple of whole numbers"),
        (lambda: PiecewiseDepth((math.nan,), (3, 2)), r"PiecewiseDepth\.edges=\(nan,\), expected a tuple of numbers"),
        (lambda: PiecewiseDepth((1.0,), (3, 2.5)), r"PiecewiseDepth\.depths=.*whole numbers"),
        (lambda: Periodic(2.5, 1), r"Periodic\.period=2\.5, expected a whole number"),
        (lambda: Periodic(math.nan, 1), r"Periodic\.period=nan, expected a whole number"),
        (lambda: FixedLayers((0.0, 2.5)), r"FixedLayers\.keep=.*whole numbers"),
    ],
)
def test_decays_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 40])
def test_last_steps_and_plans_are_those_of_the_slow_way(steps: int):
    """Every step asked."""
    schedules = [FullDepth(), FixedDepth(4), FixedDepth(0), FixedLayers((0, 2, 5)), DepthPerStep((3, 6, 0, 2) * steps)]
    schedules = [*schedules[:-1], DepthPerStep(((3, 6, 0, 2) * steps)[:steps]), Periodic(3, 2), Periodic(7, 0, depth=2)]
    schedules += [
        PiecewiseDepth((1.5, 3.0, 9.25), (6, 5, 2, 4)),
        PiecewiseDepth((-3.0, 2.0), (6, 5, 2)),
        PiecewiseDepth((-math.inf, 2.0, math.inf), (0, 6, 2, 5)),
        PiecewiseDepth((), (3,)),
    ]
    schedules += [
        LinearDecay(5, 2, 5, None),
        LinearDecay(5, 2, 30, 1),
        LinearDecay(4, 4, 9, None),
        LinearDecay(6, 0, 2, None),
    ]
    schedules += [PowerDecay(0.9, 2, None), PowerDecay(0.5, 2, 1), PowerDecay(1.0, 1, None), PowerDecay(0.99, 0, None)]
    for schedule in schedules:
        said = [schedule.layers(step, float(step), num_steps=steps, num_layers=6) for step in range(steps)]
        last = [max((step for step in range(steps) if said[step][layer]), default=-1) for layer in range(6)]
        assert last_steps(schedule, num_steps=steps, num_layers=6) == last, schedule
        if isinstance(schedule, LinearDecay | PowerDecay):
            assert schedule.plans(num_steps=steps, num_layers=6) == list(dict.fromkeys(said)), schedule


def test_a_long_schedule_is_not_walked_through():
    for schedule in (LinearDecay(5, 2, 10**9, None), PowerDecay(0.9999999, 2, None), PiecewiseDepth((4.0,), (6, 2))):
        assert last_steps(schedule, num_steps=10**9, num_layers=6)[0] == 10**9 - 1
        assert len(schedule.plans(num_steps=10**9, num_layers=6)) <= 6
