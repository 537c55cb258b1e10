"""Fields of criteria, schedules and policies: every one of another type is refused by name, from code and from a file."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Literal

import pytest

from ee_diffusion.core.criteria import CRITERIA, DepthTable, GatedExit, Patience, Threshold
from ee_diffusion.core.fields import check_fields
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import SCHEDULES, DepthPerStep, FixedDepth, FixedLayers, PiecewiseDepth, PowerDecay

SOUND = {
    "Threshold": {"threshold": 0.5},
    "DecayingThreshold": {"threshold": 0.5, "horizon": 4},
    "Patience": {"threshold": 0.5, "patience": 2},
    "QExit": {"q": 0.5},
    "SampledExit": {"seed": 1},
    "GatedExit": {"threshold": 0.5},
    "ErrorBudget": {"budget": 0.5, "weights": (1.0,), "decay": 0.5},
    "DepthTable": {"depths": ((1, 2),)},
    "FullDepth": {},
    "FixedDepth": {"depth": 1},
    "DepthPerStep": {"depths": (1,)},
    "PiecewiseDepth": {"edges": (1.0,), "depths": (1, 2)},
    "Periodic": {"period": 2, "warm_up": 1},
    "FixedLayers": {"keep": (0,)},
    "LinearDecay": {"most": 4, "least": 2, "horizon": 3, "bottom": 1},
    "PowerDecay": {"alpha": 0.5, "least": 2, "bottom": 1},
    "Policy": {},
}
KINDS = {**CRITERIA, **SCHEDULES, "Policy": Policy}
STRANGE = ("x", "false", math.nan, [1], {}, (math.nan,), (("x",),), ("x", 1), object(), True, 2.5, None)
FIELDS = [(name, field.name) for name, kind in KINDS.items() for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("kind, field", FIELDS)
def test_every_field_of_every_kind_tells_what_is_none(kind: str, field: str):
    """Of a dozen values of all sorts most are refused, by the name of the class and of the field; what is taken can be saved."""
    taken, part = [], "criterion" if kind in CRITERIA else "schedule"
    for value in STRANGE:
        message = ""
        try:
            made = KINDS[kind](**SOUND[kind] | {field: value})
        except ValueError as error:
            message = str(error)
        assert not message or field in message
        if not message:
            taken.append(value)
            whole = made if kind == "Policy" else Policy(**{part: made})
            assert Policy.from_dict(whole.to_dict()) == whole
    assert len(taken) <= 3, taken


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GatedExit((0.5, 0.6)), r"GatedExit\.threshold=\(0\.5, 0\.6\), expected a number"),
        (lambda: PiecewiseDepth(("a",), (1, 2)), r"PiecewiseDepth\.edges=\('a',\), expected a tuple of numbers"),
        (lambda: Patience(0.5, 2, consecutive="false"), r"Patience\.consecutive='false', expected True or False"),
        (
            lambda: DepthTable(((math.nan,),)),
            r"DepthTable\.depths=\(\(nan,\),\), expected a tuple of tuples of whole numbers",
        ),
        (lambda: DepthTable(((1,),), every_step=1), r"DepthTable\.every_step=1, expected True or False"),
        (lambda: Threshold(True), r"Threshold\.threshold=True, expected a number or a tuple of numbers or a tuple of"),
        (lambda: Threshold(0.5, score=3), r"Threshold\.score=3, expected a text"),
        (lambda: PowerDecay(math.nan, 2, bottom=None), r"PowerDecay\.alpha=nan, expected a number"),
        (lambda: FixedLayers((0,), of="6"), r"FixedLayers\.of='6', expected a whole number or None"),
        (lambda: Policy(cfg_exit="both"), r"Policy\.cfg_exit='both', expected 'joint' or 'separate'"),
        (lambda: Policy(schedule=None), r"Policy\.schedule=None, expected a Schedule"),
        (
            lambda: Policy(made_for=(("weights", 3),)),
            r"Policy\.made_for=.*expected a tuple of pairs of a text and a text",
        ),
    ],
)
def test_what_came_and_what_was_expected(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedDepth(-1),
        lambda: DepthPerStep(()),
        lambda: DepthPerStep((1, -1)),
        lambda: PiecewiseDepth((1.0,), (-1, 2)),
        lambda: FixedLayers((-1,)),
        lambda: FixedLayers((3,), of=3),
        lambda: PowerDecay(0.5, -1, bottom=None),
        lambda: Threshold(((0.5, 0.5), (0.5,))),
        lambda: CRITERIA["DecayingThreshold"](0.5, 4, rate=math.inf),
        lambda: SCHEDULES["Periodic"](2, 1, depth=-1),
        lambda: SCHEDULES["LinearDecay"](4, -1, 3, bottom=None),
    ],
)
def test_what_no_model_can_run_is_refused_where_it_is_made(make):
    with pytest.raises(ValueError, match="expected"):
        make()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"criterion": {"kind": "GatedExit", "threshold": [0.5, 0.6]}}, "GatedExit.threshold="),
        (
            {"criterion": {"kind": "Patience", "threshold": 0.5, "patience": 1, "consecutive": "false"}},
            "Patience.consec",
        ),
        ({"schedule": {"kind": "PiecewiseDepth", "edges": ["a"], "depths": [1, 2]}}, "PiecewiseDepth.edges="),
        ({"criterion": {"kind": "DepthTable", "depths": [[math.nan]]}}, "DepthTable.depths="),
        ({"delayed": "no"}, "Policy.delayed="),
        ({"criterion": {"kind": "Magic"}}, "Magic"),
    ],
)
def test_a_file_is_named_with_its_field(changes: dict, message: str, tmp_path):
    path = tmp_path / "bad.json"
    Policy().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        Policy.load(path)


def test_a_kind_of_a_users_own_is_checked_too():
    @dataclass(frozen=True)
    class Own(FixedDepth):
        name: str = "own"
        pair: tuple[int, float] = (1, 1.0)
        mode: Literal["a", "b"] = "a"

    assert Own(1).pair == (1, 1.0)
    for changes, message in (
        ({"depth": 1.5}, r"Own\.depth=1\.5"),
        ({"name": 3}, r"Own\.name=3"),
        ({"pair": (1,)}, r"Own\.pair=\(1,\), expected a pair of a whole number and a number"),
        ({"mode": "c"}, r"Own\.mode='c', expected 'a' or 'b'"),
    ):
        with pytest.raises(ValueError, match=message):
            Own(**{"depth": 1} | changes)


def test_numbers_may_be_whole_and_truth_is_no_number():
    @dataclass
    class Row:
        number: float
        whole: int

    check_fields(Row(1, 1))
    check_fields(Row(math.inf, 0))
    for row, name in (
        (Row(True, 1), "number"),
        (Row(1.0, True), "whole"),
        (Row(1.0, 1.0), "whole"),
        (Row(None, 1), "number"),
    ):
        with pytest.raises(ValueError, match=f"Row.{name}="):
            check_fields(row)
