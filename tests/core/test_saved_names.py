"""Policies as they were saved under the names of the first format still load, and are saved under those of today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ee_diffusion.core.criteria import DepthTable, ErrorBudget, GatedExit, QExit, SampledExit, Threshold
from ee_diffusion.core.policy import Policy

FIRST = {
    "threshold": ({"kind": "Threshold", "threshold": 0.9, "score": "certainty"}, Threshold(0.9)),
    "judged": ({"kind": "Threshold", "threshold": 0.9, "score": "judged"}, Threshold(0.9, "learned_confidence")),
    "entropy": ({"kind": "Threshold", "threshold": 0.9, "score": "low_entropy"}, Threshold(0.9, "negative_entropy")),
    "planned": ({"kind": "Planned", "depths": [[1, 2], [2, 2]]}, DepthTable(((1, 2), (2, 2)))),
    "accumulated": (
        {"kind": "Accumulated", "budget": 0.5, "weights": [1.0, 2.0], "decay": 0.7},
        ErrorBudget(0.5, (1.0, 2.0), 0.7),
    ),
    "cumulative": ({"kind": "Cumulative", "q": 0.5, "score": "judged"}, QExit(0.5, "learned_confidence")),
    "sampled": ({"kind": "Sampled", "seed": 3, "score": "judged"}, SampledExit(3, "learned_confidence")),
    "gate": ({"kind": "Gate", "threshold": 0.5, "score": "judged"}, GatedExit(0.5, "learned_confidence")),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_names_still_load(name: str, tmp_path: Path):
    saved, expected = FIRST[name]
    first = {"format": "ee_diffusion.policy.1", "criterion": saved, "schedule": {"kind": "FullDepth"}, "exits": [1, 2]}
    (tmp_path / "policy.json").write_text(json.dumps(first | {"record_all": False, "guidance": "together"}))
    policy = Policy.load(tmp_path / "policy.json")
    assert policy == Policy(expected, exits=(1, 2))
    policy.save(tmp_path / "again.json")
    assert Policy.load(tmp_path / "again.json") == policy
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["criterion"]["kind"] == type(expected).__name__


def test_a_policy_that_decides_late_still_loads():
    values = Policy(Threshold(0.5), exits=(1, 2), delayed=True).to_dict()
    values["late"] = values.pop("delayed")
    assert Policy.from_dict(values).delayed
