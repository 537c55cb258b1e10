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
        self.target, self.name = target, name
        self._before = target.__dict__.get(name, _ABSENT)
        self._ours = functools.partial(wrapper, getattr(target, name))
        target.__dict__[name] = self._ours

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
