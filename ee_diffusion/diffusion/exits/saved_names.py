"""Cached exits as earlier versions wrote them: their configs and state dicts under today's names, and back. Not here: policies
(core/saved_names.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLASSES = {"MemoryExits": "CachedOutputExits"}
ENTRIES = {
    "terms": "cached_type",
    "course_steps": "fitted_steps",
    "course_scheduler": "fitted_scheduler",
    "course_guidance": "fitted_guidance",
    "course_embedded_guidance": "fitted_embedded_guidance",
    "course_shape": "fitted_shape",
    "course_worth": "joint",
}
CACHED = {"clean": "sample", "noise": "epsilon"}
TENSORS = {"gauge.": "error_estimator.", "prediction.worth": "prediction.error_weights"}


def todays_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config under today's names; one that has them comes back equal.

    Raises:
        ValueError: exits with a learned trust, which no longer exist.
    """
    known = {
        ENTRIES.get(name, name): CACHED.get(value, value) if name == "terms" else value
        for name, value in config.items()
    }
    if known.pop("learned_trust", False):
        raise ValueError(
            "learned_trust=True: these exits were fitted by an earlier version, expected exits without it: fit them anew"
        )
    return known


def todays_tensor(name: str) -> str:
    """A key of a state dict under today's name."""
    return _renamed(name, TENSORS)


def first_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as the version that first marked policies wrote it: marks are fingerprints of that. Of other exits their own."""
    if "cached_type" not in config:
        return dict(config)
    entries, cached = ({new: old for old, new in names.items()} for names in (ENTRIES, CACHED))
    known = {entries.get(name, name): value for name, value in config.items()}
    return known | {"terms": cached[known["terms"]], "learned_trust": False}


def first_tensor(name: str) -> str:
    """A key of a state dict as the first version wrote it."""
    return _renamed(name, {new: old for old, new in TENSORS.items()})


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    old = next((one for one in prefixes if name.startswith(one)), "")
    return prefixes.get(old, "") + name[len(old) :]
