"""The family table: what attaching must know of each transformer class. Written down per class, never guessed from a shape.

Here: facts. Not here: what is done with them (attach.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Family:
    """One transformer class.

    blocks: name of the ModuleList of blocks. Each block takes the hidden states (R, N, D) first and returns them.
    row_arguments: names of the block's arguments that hold one entry per row of the whole batch.
    earlier: names of arguments that an earlier block returned (long skips): name -> (layer, L) -> that block's index, or None.
    tail_takes_all: the model's tail combines the hidden states with something of the whole batch (a timestep embedding).
    prefix_tokens: attribute that holds the number of tokens before the image tokens; None: there are none.
    inner: the first module inside a block that sees the hidden states; work is counted there.
    """

    class_name: str
    blocks: str
    row_arguments: tuple[str, ...] = ()
    earlier: dict[str, Callable[[int, int], int | None]] = field(default_factory=dict)
    tail_takes_all: bool = True
    prefix_tokens: str | None = None
    inner: str = "attn1"


def _uvit_skip(layer: int, num_layers: int) -> int | None:
    """Out-block `layer` takes what in-block `L - 1 - layer` returned."""
    return num_layers - 1 - layer if layer > num_layers // 2 else None


FAMILIES: dict[str, Family] = {
    family.class_name: family
    for family in (
        Family(
            "UViTTransformer2DModel",
            "transformer_blocks",
            earlier={"skip": _uvit_skip},
            tail_takes_all=False,
            prefix_tokens="num_prefix_tokens",
            inner="attn",
        ),
        Family("DiTTransformer2DModel", "transformer_blocks", row_arguments=("timestep", "class_labels")),
    )
}


def register_family(family: Family) -> None:
    """Make a transformer class known to `attach`.

    Raises:
        ValueError: the class is known already.
    """
    if family.class_name in FAMILIES:
        raise ValueError(f"{family.class_name} is in the family table already")
    FAMILIES[family.class_name] = family


def family_of(transformer: nn.Module) -> Family:
    """The table's row for a transformer.

    Raises:
        ValueError: its class is unknown.
    """
    name = type(transformer).__name__
    if name not in FAMILIES:
        raise ValueError(f"no family for {name}; known: {sorted(FAMILIES)}. Add one with register_family(Family(...))")
    return FAMILIES[name]
