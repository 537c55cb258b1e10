"""Replace a module's forward on the instance, and restore it exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_ABSENT = object()


class Interception:
    """`module.forward(*args)` becomes `wrapper(original, *args)` until `restore()`.

    The class is not touched, parameters and state_dict keys do not change, and whatever stood in the instance before (an offload
    hook's forward, say) stands there again afterwards.
    """

    def __init__(self, module: nn.Module, wrapper: Callable[..., Any]):
        self.module = module
        self._before = module.__dict__.get("forward", _ABSENT)
        self._ours = functools.partial(wrapper, module.forward)
        module.__dict__["forward"] = self._ours

    def restore(self) -> None:
        """Put the former forward back.

        Raises:
            RuntimeError: somebody replaced the forward after us; restoring would silently undo that.
        """
        if self.module.__dict__.get("forward") is not self._ours:
            raise RuntimeError(
                f"the forward of {type(self.module).__name__} was replaced by something else after the interception; remove that first"
            )
        if self._before is _ABSENT:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self._before
