"""Names in saved policies that have changed since: what files of the first format call a criterion, a score or a field today."""

from __future__ import annotations

from typing import Any

KINDS = {
    "Planned": "DepthTable",
    "Accumulated": "ErrorBudget",
    "Cumulative": "QExit",
    "Sampled": "SampledExit",
    "Gate": "GatedExit",
}
SCORES = {"certainty": "confidence", "judged": "learned_confidence", "low_entropy": "negative_entropy"}
FIELDS = {"late": "delayed"}


def todays_names(policy: dict[str, Any]) -> dict[str, Any]:
    """The description of a policy with the names of today; one that has them comes back equal."""
    renamed = {FIELDS.get(name, name): value for name, value in policy.items()}
    if isinstance(criterion := renamed.get("criterion"), dict):
        kind, score = criterion.get("kind"), criterion.get("score")
        renamed["criterion"] = criterion | {"kind": KINDS.get(str(kind), kind)}
        renamed["criterion"] |= {"score": SCORES.get(str(score), score)} if "score" in criterion else {}
    return renamed
