"""Cached exits as earlier versions wrote them: what their configs say in today's terms. Not here: policies (core/saved_names.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def todays_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in today's terms; one that is in them comes back equal.

    Raises:
        ValueError: exits with a learned trust, which no longer exist.
    """
    known = dict(config)
    if known.pop("learned_trust", False):
        raise ValueError(
            "learned_trust=True: these exits were fitted by an earlier version, expected exits without it: fit them anew"
        )
    return known


def first_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config as the version that first marked policies would have written it: marks are fingerprints of that."""
    return {**config, "learned_trust": False} if "hidden_dim" in config and "length" in config else dict(config)
