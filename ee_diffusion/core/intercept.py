"""Replace a method on one instance (mostly a module's forward), and restore it exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_ABSENT = object()


class Interception:
    """`target.forward(*args)` (or the method `name`) becomes `wrapper(original, *args)` until `restore()`.

    The class is not touched, parameters and state_dict keys do not change, and whatever stood in the instance before (an offload
    hook's forward, say) stands there again afterwards.
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

    def restore(self) -> None:
        """Put the former method back.

        Raises:
            RuntimeError: somebody replaced the method after us; restoring would silently undo that.
        """
        if self.target.__dict__.get(self.name) is not self._ours:
            raise RuntimeError(
                f"the {self.name} of {type(self.target).__name__} was replaced by something else after the interception; "
                "remove that first"
            )
        if self._before is _ABSENT:
            del self.target.__dict__[self.name]
        else:
            self.target.__dict__[self.name] = self._before

    def _take(self) -> None:
        self._before = self.target.__dict__.get(self.name, _ABSENT)
        self._ours = functools.partial(self._wrapper, getattr(self.target, self.name))
        self.target.__dict__[self.name] = self._ours
