"""Calibration: budgets met by the safest number, static schedules with a policy's mean, shuffles that keep histograms, honest replays."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from factories import LAYOUTS, driver_named, recorded, run

from ee_diffusion.core.criteria import DepthTable, Patience, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import replay, shuffled_overall, shuffled_per_step, static_depths, value_for_budget
from ee_diffusion.core.schedules import FixedDepth


@pytest.mark.parametrize("budget", [0.2, 0.45, 0.7, 0.9])
def test_the_budget_is_met_by_the_safest_number(budget: float):
    trace = recorded("plain-output", "single")
    choice = value_for_budget(trace, lambda value: Policy(Threshold(value)), budget=budget, low=0.0, high=1.0)
    fraction = replay(trace, Policy(Threshold(choice.value))).float().mean().item() / 6
    assert choice.fraction == pytest.approx(fraction)
    assert fraction <= budget
    safer = replay(trace, Policy(Threshold(choice.value + 1e-6))).float().mean().item() / 6
    assert safer > budget, "a slightly safer number would have met the budget too"


def test_a_budget_of_everything_takes_the_safest_and_one_of_nothing_is_refused():
    trace = recorded("plain-output", "single")
    choice = value_for_budget(trace, lambda value: Policy(Threshold(value)), budget=1.0, low=0.0, high=1.0)
    assert (choice.value, choice.fraction) == (1.0, 1.0)
    for budget in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"expected a fraction of the blocks in \(0, 1\]"):
            value_for_budget(trace, lambda value: Policy(Threshold(value)), budget=budget, low=0.0, high=1.0)
    with pytest.raises(ValueError, match=r"meets budget 0\.3"):
        value_for_budget(trace, lambda value: Policy(Threshold(value)), budget=0.3, low=0.9999, high=1.0)


def test_a_budget_that_is_met_exactly_is_met():
    trace = recorded("plain-output", "single")

    def fraction(value: float) -> float:
        return replay(trace, Policy(Threshold(value))).float().mean().item() / 6

    for low in (0.0, 0.2):  # between the ends; the boldest itself
        budget = fraction(0.2)
        choice = value_for_budget(trace, lambda value: Policy(Threshold(value)), budget=budget, low=low, high=1.0)
        assert choice.fraction == budget
        assert choice.value >= 0.2


def test_who_is_absent_costs_nothing():
    trace = recorded("plain-output", "single")
    depths = trace.depths.clone()
    depths[1, 1:] = -1
    some = replace(trace, depths=depths)
    choice = value_for_budget(some, lambda value: Policy(Threshold(value)), budget=0.7, low=0.0, high=1.0)
    ran = replay(some, Policy(Threshold(choice.value)))
    assert (ran[1, 1:] == -1).all()
    total = int(ran[0].sum()) + int(ran[1, 0])
    assert choice.fraction == pytest.approx(total / (len(ran[0]) + 1) / 6)


def test_ends_that_are_no_range_are_refused():
    trace = recorded("plain-output", "single")
    for low, high in ((1.0, 0.0), (math.nan, 1.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match=f"low={low}, high={high}, expected low <= high"):
            value_for_budget(trace, lambda value: Policy(Threshold(value)), budget=0.5, low=low, high=high)
    with pytest.raises(ValueError, match=r"0\.0 costs .* and 1\.0 costs .*expected a larger value to be safer"):
        value_for_budget(trace, lambda value: Policy(Threshold(1 - value)), budget=0.5, low=0.0, high=1.0)


def test_a_step_without_samples_has_no_mean_depth():
    with pytest.raises(ValueError, match=r"steps \[1\].*expected at least one sample"):
        static_depths(torch.tensor([[2, 5], [-1, -1]]), (0, 2), num_layers=6)


def test_replay_of_other_rules_needs_every_score():
    trace = recorded("plain-output", "single")
    narrow = Policy(Patience(0.2, 1), exits=(1, 4))
    live = run(driver_named("plain-output"), narrow, LAYOUTS["single"]).trace
    assert torch.equal(replay(trace, narrow), live.depths)
    assert (replay(trace, Policy(schedule=FixedDepth(2))) == 2).all()
    capped = Policy(Threshold(0.2), FixedDepth(2))
    assert torch.equal(replay(trace, capped), run(driver_named("plain-output"), capped, LAYOUTS["single"]).trace.depths)
    with pytest.raises(ValueError, match="record_all"):
        replay(live, Policy(Patience(0.2, 1)))
    with pytest.raises(ValueError, match="record_all"):
        replay(live, Policy(Patience(0.2, 2), exits=(1, 4)))
    with pytest.raises(ValueError, match="exits at depths"):
        replay(trace, Policy(Threshold(0.2), exits=(1, 3)))


def test_a_plan_can_be_replayed_on_any_recorded_trace():
    trace = recorded("plain-output", "single")
    plan = Policy(DepthTable(((0, 1, 2, 4, 6, 5, 3),) * 2))
    assert replay(trace, plan)[0].tolist() == [0, 1, 2, 4, 6, 6, 4]


def test_static_depths_keep_the_mean():
    generator = torch.Generator().manual_seed(0)
    exits, num_layers = (0, 2, 5, 9), 13
    allowed = torch.tensor([*exits, num_layers])
    for steps in (1, 7, 50):
        depths = allowed[torch.randint(5, (steps, 6), generator=generator)]
        chosen = static_depths(depths, exits, num_layers=num_layers)
        assert len(chosen) == steps
        assert set(chosen) <= {*exits, num_layers}
        assert abs(sum(chosen) - float(depths.double().mean(1).sum())) <= 2.0 + 1e-9  # half the widest gap
    same = torch.full((4, 3), 5, dtype=torch.int16)
    assert static_depths(same, exits, num_layers=num_layers) == (5, 5, 5, 5)
    ramp = torch.tensor([[13, 13], [9, 9], [2, 2], [0, 0]])
    assert static_depths(ramp, exits, num_layers=num_layers) == (13, 9, 2, 0)
    between = torch.tensor([[2, 5]] * 6)
    assert sorted(static_depths(between, exits, num_layers=num_layers)) == [2, 2, 2, 5, 5, 5]


def test_shuffles_keep_histograms():
    depths = torch.arange(40).reshape(8, 5)
    per_step = shuffled_per_step(depths, torch.Generator().manual_seed(0))
    assert torch.equal(per_step.sort(1).values, depths)
    assert not torch.equal(per_step, depths)
    assert len((per_step - depths[:, :1]).unique(dim=0)) > 1, "every step is dealt out anew"
    overall = shuffled_overall(depths, torch.Generator().manual_seed(0))
    assert torch.equal(overall.flatten().sort().values, depths.flatten())
    assert not torch.equal(overall.sort(1).values, depths)
    assert torch.equal(shuffled_overall(depths, torch.Generator().manual_seed(0)), overall)
