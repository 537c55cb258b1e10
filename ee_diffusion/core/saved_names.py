"""Names in saved files that have changed since: of criteria, scores and fields in policies, of tensors and metadata in traces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")

KINDS = {
    "Planned": "DepthTable",
    "Accumulated": "ErrorBudget",
    "Cumulative": "QExit",
    "Sampled": "SampledExit",
    "Gate": "GatedExit",
}
SCORES = {"certainty": "confidence", "judged": "learned_confidence", "low_entropy": "negative_entropy"}
FIELDS = {"late": "delayed", "guidance": "cfg_exit"}
VALUES = {"cfg_exit": {"together": "joint", "apart": "separate"}}
TRACE_NAMES = {"elements": "samples", "frozen": "keeps_exited_rows"}


def renamed(values: Mapping[str, Value], names: Mapping[str, str]) -> dict[str, Value]:
    """The same values, those with a name of before under the name of today."""
    return {names.get(name, name): value for name, value in values.items()}


def todays_names(policy: dict[str, Any]) -> dict[str, Any]:
    """The description of a policy with the names of today; one that has them comes back equal."""
    found = renamed(policy, FIELDS)
    found |= {name: names.get(found[name], found[name]) for name, names in VALUES.items() if name in found}
    if isinstance(criterion := found.get("criterion"), dict):
        kind, score = criterion.get("kind"), criterion.get("score")
        found["criterion"] = criterion | {"kind": KINDS.get(str(kind), kind)}
        found["criterion"] |= {"score": SCORES.get(str(score), score)} if "score" in criterion else {}
    return found
