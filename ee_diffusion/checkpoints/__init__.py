"""Checkpoints that come with the package, in diffusers layout, each with its model card."""

from __future__ import annotations

from pathlib import Path

DEFAULT = "cifar10-uvit-cpu"


def checkpoint_path(name: str = DEFAULT) -> Path:
    """The folder of a shipped checkpoint, for `EarlyExitPipeline.from_pretrained(checkpoint_path())`.

    Raises:
        ValueError: there is none of that name.
    """
    here = Path(__file__).parent
    known = sorted(path.parent.name for path in here.glob("*/model_index.json"))
    if name not in known:
        raise ValueError(f"checkpoint {name!r}, expected one of {known}")
    return here / name
