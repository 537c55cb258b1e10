"""Tables by name that users may add to. Here: adding a row once. Not here: the rows."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TypeVar

Row = TypeVar("Row")


def add_row(table: MutableMapping[str, Row], name: str, row: Row, *, called: str) -> None:
    """Put a row into a table of `called` ("the family table", ...).

    Raises:
        ValueError: the name is taken.
    """
    if name in table:
        raise ValueError(f"{name} is in {called} already")
    table[name] = row


def family_row(table: Mapping[str, Row], model: object, *, module: str) -> Row:
    """The row of a model's class; `module`: where rows are added.

    Raises:
        ValueError: there is none.
    """
    name = type(model).__name__
    if name not in table:
        raise ValueError(f"no family for {name}; known: {sorted(table)}. Add one with {module}.register_model")
    return table[name]
