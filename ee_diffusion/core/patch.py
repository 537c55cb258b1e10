"""Replace a method on one instance (mostly a module's forward), and restore it exactly."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

_ABSENT = object()


class ForwardPatch:
    """`target.forward(*args)` (or the method `name`) becomes `wrapper(original, *args)` until `restore()`.

    The class is not touched, parameters and state_dict keys do not change, and whatever stood in the instance before (an offload
    hook's forward, say) stands there again afterwards. `inspect.signature` says what it said.
    `copy.deepcopy` and `pickle` make a plain one: a copy with none of this on it.
    """

    def __init__(self, target: object, wrapper: Callable[..., Any], *, name: str = "forward"):
        self.target, self.name, self._wrapper = target, name, wrapper
        self._take()

    @property
    def original(self) -> Callable[..., Any]:
        """What the wrapper is given: the method as it was."""
        return self._ours.args[-1]  # a wrapper that is a partial itself has its own before

    def renew(self) -> None:
        """Where something else replaced the method after us (an offload hook that was taken off and put on again), wrap that."""
        if self.target.__dict__.get(self.name) is not self._ours:
            self._take()

    def require_outermost(self) -> None:
        """Raises RuntimeError: somebody replaced the method after us; restoring would silently undo that."""
        if self.target.__dict__.get(self.name) is not self._ours:
            raise RuntimeError(
                f"the {self.name} of {type(self.target).__name__} was replaced by something else after the interception; "
                "remove that first"
            )

    def restore(self) -> None:
        """Put the former method back. Raises RuntimeError as `require_outermost` does."""
        self.require_outermost()
        attributes = self.target.__dict__
        if self._before is _ABSENT:
            del attributes[self.name]
        else:
            attributes[self.name] = self._before
        if not any(isinstance(value, _Replaced) for value in attributes.values()):
            attributes.pop("__reduce_ex__", None)

    def _take(self) -> None:
        self._before = self.target.__dict__.get(self.name, _ABSENT)
        self._ours = _Replaced(self._wrapper, getattr(self.target, self.name))
        self._ours.interception = self
        self.target.__dict__[self.name] = self._ours
        self.target.__dict__.setdefault("__reduce_ex__", functools.partial(_reduced_plain, self.target))


class _Replaced(functools.partial):
    """What stands in the place of a method. Copied or pickled (in somebody else's reference to it), it is the method itself."""

    interception: ForwardPatch

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.args[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.args[-1],)


class Uncopied(functools.partial):
    """A hook of a module that copies come without (where nothing is intercepted: with one that does nothing)."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (_nothing,)


def restore_all(interceptions: Iterable[ForwardPatch]) -> None:
    """Restore them in reverse order: all, or none.

    Raises:
        RuntimeError: somebody replaced a method after one of them.
    """
    taken = list(interceptions)
    for interception in taken:
        interception.require_outermost()
    for interception in reversed(taken):
        interception.restore()


def _itself(value: Any) -> Any:
    return value


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _reduced_plain(target: object, protocol: int) -> Any:
    """What `copy.deepcopy` and `pickle` ask an object for, without what interceptions and attachments put into the instance."""
    made = type(target).__reduce_ex__(target, protocol)
    if isinstance(made, str) or len(made) < 3 or not isinstance(made[2], dict):
        return made
    state = {name: value for name, value in made[2].items() if name != "__reduce_ex__" and not name.startswith("_ee_")}
    for name, value in list(state.items()):
        while isinstance(value, _Replaced) and value.interception.name == name:
            value = value.interception._before
            state[name] = value
        if value is _ABSENT:
            del state[name]
    hooks = {name: value for name, value in state.items() if name.startswith("_forward_") and isinstance(value, dict)}
    ours = {key for value in hooks.values() for key, hook in value.items() if isinstance(hook, Uncopied)}
    for name, value in hooks.items():
        state[name] = type(value)((key, hook) for key, hook in value.items() if key not in ours)
    return (*made[:2], state, *made[3:])
