"""Types of fields: that a row's values are what its dataclass says of them, whether code or a file gave them.

Here: one check for criteria, schedules and policies. Not here: ranges of numbers, which each of them knows.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_NOUNS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("True or False", "True or False"),
    str: ("a text", "texts"),
    type(None): ("None", "None"),
}


def check_fields(row: object) -> None:
    """A dataclass's fields hold values of the types that stand at them: a whole number is a number, a boolean is none, NaN is none; tuples
    are looked into.

    Raises:
        ValueError: one does not; which class, which field, what came and what was expected.
    """
    own: Any = type(row)
    for name, kind in _kinds(own).items():
        value = getattr(row, name)
        if not _is(value, kind):
            raise ValueError(f"{own.__name__}.{name}={value!r}, expected {_words(kind)}")


@functools.cache
def _kinds(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _is(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and value == value  # NaN is not itself
    if origin in (Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is not tuple:
        return isinstance(value, origin or kind)
    if not isinstance(value, tuple):
        return False
    if parts[-1:] == (...,):
        return all(_is(item, parts[0]) for item in value)
    return len(value) == len(parts) and all(map(_is, value, parts))


def _words(kind: Any, *, several: bool = False) -> str:
    """What a type is called in a message."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind in _NOUNS:
        return _NOUNS[kind][several]
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part, several=several) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple and parts[-1:] == (...,):
        return f"{'tuples' if several else 'a tuple'} of {_words(parts[0], several=True)}"
    if origin is tuple:
        called = "pair" if len(parts) == 2 else f"tuple of {len(parts)}"
        return f"{f'{called}s' if several else f'a {called}'} of {' and '.join(map(_words, parts))}"
    return f"a {getattr(origin or kind, '__name__', kind)}"
