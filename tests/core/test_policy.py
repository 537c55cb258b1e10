"""Policies: what fits a run is checked before it starts; they survive a dictionary and a file, and foreign files are refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ee_diffusion.core.criteria import DecayingThreshold, DepthTable, GatedExit, Patience, QExit, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import (
    DepthPerStep,
    FixedDepth,
    FixedLayers,
    LinearDecay,
    PiecewiseDepth,
    PowerDecay,
)
from ee_diffusion.core.session import begin

POLICIES = [
    Policy(),
    Policy(Threshold(0.3)),
    Policy(Threshold((0.1, 0.2)), exits=(1, 3), record_all=True),
    Policy(Threshold(((0.1, 0.2), (0.3, 0.4)), score="margin"), cfg_exit="separate"),
    Policy(Patience(0.5, (2, 1), consecutive=False)),
    Policy(Patience((0.5, 0.4), 3), FixedDepth(3)),
    Policy(QExit(0.9)),
    Policy(GatedExit(0.5)),
    Policy(DepthTable(((1, 2), (3, 4)))),
    Policy(DepthTable(((1, 2),), every_step=True)),
    Policy(DecayingThreshold(0.5, 9)),
    Policy(schedule=LinearDecay(4, 2, 9, bottom=1)),
    Policy(schedule=LinearDecay(4, 2, 9, bottom=None)),
    Policy(schedule=PowerDecay(0.9, 2, bottom=1)),
    Policy(schedule=DepthPerStep((1, 3))),
    Policy(schedule=PiecewiseDepth((10.0,), (3, 1))),
    Policy(schedule=FixedLayers((0, 2))),
    Policy(exits=()),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_dictionary_and_a_file_give_the_policy_back(policy: Policy, tmp_path):
    values = policy.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert Policy.from_dict(values) == policy
    policy.save(tmp_path / "a.json")
    assert Policy.load(tmp_path / "a.json") == policy
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_policies_differ_in_their_dictionaries():
    seen = [json.dumps(policy.to_dict()) for policy in POLICIES]
    assert len(set(seen)) == len(POLICIES)


def test_off():
    assert Policy().is_off
    assert Policy(exits=(1,)).is_off
    assert not Policy(Threshold(1.0)).is_off
    assert not Policy(schedule=FixedDepth(3)).is_off
    assert not Policy(schedule=FixedLayers((0, 1))).is_off


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        '{"format": "ee_diffusion.trace.1"}',
        '{"format": "ee_diffusion.policy.1"}',
        '{"format": "ee_diffusion.policy.1", "criterion": null, "schedule": null}',
        '{"format": "ee_diffusion.policy.1", "criterion": {"kind": "Magic"}, "schedule": {"kind": "FullDepth"}}',
        '{"format": "ee_diffusion.policy.1", "criterion": {"kind": "Threshold"}, "schedule": {"kind": "FullDepth"}}',
        '{"format": "ee_diffusion.policy.1", "criterion": {"kind": "Threshold", "threshold": 7}, "schedule": {"kind": "FullDepth"}}',
        '{"format": "ee_diffusion.policy.1", "criterion": null, "schedule": {"kind": "FullDepth"}, "surplus": 1}',
        '{"format": "ee_diffusion.policy.1", "criterion": null, "schedule": {"kind": "FullDepth", "depth": 1}}',
    ],
)
def test_files_that_are_no_policies_are_refused(text: str, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"policy|outside"):
        Policy.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    "rest, message",
    [
        ('"criterion": [], "schedule": {"kind": "FullDepth"}', "not the description of a policy"),
        (
            '"criterion": null, "schedule": {"kind": "FullDepth"}, "record_all": "false"',
            r"Policy\.record_all='false', expected True or False",
        ),
        (
            '"criterion": null, "schedule": {"kind": "FixedDepth", "depth": "3"}',
            r"FixedDepth\.depth='3', expected a whole number",
        ),
        (
            '"criterion": null, "schedule": {"kind": "DepthPerStep", "depths": 3}',
            r"DepthPerStep\.depths=3, expected a tuple of whole numbers",
        ),
    ],
)
def test_files_with_values_of_another_kind_are_refused(rest: str, message: str, tmp_path):
    (tmp_path / "a.json").write_text(f'{{"format": "ee_diffusion.policy.1", {rest}}}')
    with pytest.raises(ValueError, match=message):
        Policy.load(tmp_path / "a.json")


@pytest.mark.parametrize("name", [".", None, True])
def test_what_is_no_file_is_refused_and_nothing_is_left(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected the name of a file"):
        Policy().save(name)
    assert not [*tmp_path.iterdir(), *tmp_path.parent.glob(f"{tmp_path.name}.*")]


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="not a readable policy"):
        Policy.load(tmp_path / "a.json")


def test_a_truncated_file_is_refused(tmp_path):
    POLICIES[2].save(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    for length in range(0, len(text) - 2, 7):
        (tmp_path / "a.json").write_text(text[:length])
        with pytest.raises(ValueError, match="not a readable policy"):
            Policy.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Policy(exits=(3, 1)),
        lambda: Policy(exits=(1, 1)),
        lambda: Policy(exits=(-1, 1)),
        lambda: Policy(record_all=True),
        lambda: Policy(DepthTable(((1,),)), record_all=True),
        lambda: Policy(cfg_exit="both"),
        lambda: Policy("deediff"),
        lambda: Policy(schedule=None),
        lambda: Policy(exits=(2.0, 3.5)),
        lambda: Policy(made_for="abc"),
        lambda: Policy(made_for=(("weights",),)),
        lambda: Policy(Threshold(True)),
        lambda: Policy(Patience(0.5, math.nan)),
        lambda: Policy(DecayingThreshold(0.5, math.nan)),
    ],
)
def test_policies_that_say_nothing_sensible_are_refused(make):
    with pytest.raises(ValueError, match=r"expected|needs"):
        make()


def start(policy: Policy, **changes):
    values = {"num_layers": 5, "depths": (1, 3), "rows": torch.arange(2), "num_steps": 2} | changes
    return begin(policy, values.pop("num_layers"), values.pop("depths"), **values)


@pytest.mark.parametrize(
    "policy,changes",
    [
        (Policy(), {"num_steps": 0}),
        (Policy(), {"num_steps": -1}),
        (Policy(), {"rows": torch.arange(0)}),
        (Policy(), {"rows": torch.zeros(2, 2, dtype=torch.int64)}),
        (Policy(), {"rows": torch.tensor([0, 2])}),
        (Policy(), {"rows": torch.tensor([-1, 0])}),
        (Policy(), {"rows": torch.tensor([0.0, 1.0])}),
        (Policy(), {"samples": torch.arange(3)}),
        (Policy(), {"depths": (1, 5)}),
        (Policy(exits=(1, 2)), {}),
        (Policy(exits=(1, 9)), {}),
        (Policy(Threshold((0.5,) * 3)), {}),
        (Policy(Threshold((0.5, 0.5)), exits=(1,)), {}),
        (Policy(Threshold(((0.5, 0.5),))), {}),
        (Policy(DepthTable(((1, 2),))), {}),
        (Policy(schedule=FixedDepth(2)), {}),
        (Policy(schedule=FixedDepth(6)), {}),
        (Policy(schedule=FixedDepth(3), exits=(1,)), {}),
        (Policy(schedule=DepthPerStep((1,))), {}),
        (Policy(schedule=DepthPerStep((1, 2))), {}),
        (Policy(schedule=PiecewiseDepth((500.0,), (2, 5))), {}),
        (Policy(schedule=PiecewiseDepth((500.0,), (5, 2))), {}),
        (Policy(schedule=FixedLayers((0, 7))), {}),
        (Policy(Threshold(0.5), FixedLayers((0, 2))), {}),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_the_run(policy: Policy, changes):
    with pytest.raises(ValueError, match=r"\d|rows|holes"):
        start(policy, **changes)


def test_what_fits_starts():
    for policy in (Policy(Threshold(((0.5, 0.5),) * 2)), Policy(Threshold((0.5,)), exits=(3,)), Policy(exits=())):
        assert start(policy).num_steps == 2
