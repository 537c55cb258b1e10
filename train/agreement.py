"""What training scripts share that start from a folder: flags must not say something else than what is loaded."""

from __future__ import annotations

from collections.abc import Mapping


def check_agrees(what: str, found: Mapping, asked: Mapping) -> None:
    """Refuse flags that say something else than what was loaded."""
    differ = [f"{name}: {found[name]!r}, the flags say {asked[name]!r}" for name in asked if found[name] != asked[name]]
    if differ:
        raise ValueError(f"the {what} of init_from has other settings: {'; '.join(differ)}")
