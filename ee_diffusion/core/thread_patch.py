"""Forwards of a model's modules, replaced for one thread's calls and for a while. Not here: one forward alone (patch.py)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ee_diffusion.core.patch import ForwardPatch

Wrapper = Callable[..., Any]


class _Turn:
    """Whose turn it is on a module; others wait."""

    def __init__(self) -> None:
        self.lock, self.thread = threading.Lock(), 0


_TURNS: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()  # outside of the modules: these are copied and saved
_MAKING = threading.Lock()


@contextmanager
def patched(wrappers: Sequence[tuple[nn.Module, Wrapper]]) -> Iterator[None]:
    """`module.forward(*args)` becomes `wrapper(original, *args)` for calls of this thread, until left; calls of other threads are what
    they were. Another thread that patches the same modules (told by the first one) waits until they are free.

    Raises:
        ValueError: within the same thread's own use of these modules, which would wait for itself.
        RuntimeError: at the end, somebody replaced a forward meanwhile; it stays, all others are restored, and ours does nothing more.
    """
    first = wrappers[0][0]
    with _MAKING:
        turn = _TURNS.setdefault(first, _Turn())
    me = threading.get_ident()
    if turn.thread == me:
        raise ValueError(
            f"exits are attached to this {type(first).__name__} by this thread already (a call from a processor or a streamer?), "
            "expected that to be over first"
        )
    with turn.lock:
        owner, interceptions = [me], list[ForwardPatch]()
        try:
            turn.thread = me
            for module, wrapper in wrappers:
                interceptions.append(ForwardPatch(module, functools.partial(_for_thread, owner, wrapper)))
            yield
        finally:
            owner.clear()
            turn.thread = 0
            _restore(interceptions)


def _for_thread(owner: list[int], wrapper: Wrapper, original: Wrapper, *args: Any, **kwargs: Any) -> Any:
    call = functools.partial(wrapper, original) if threading.get_ident() in owner else original
    return call(*args, **kwargs)


def _restore(interceptions: list[ForwardPatch]) -> None:
    """Undo them, the last first, those behind one that cannot be undone too."""
    try:
        while interceptions:
            interceptions.pop().restore()
    finally:
        if interceptions:
            _restore(interceptions)
