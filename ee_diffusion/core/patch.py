"""Replace a method on one instance (mostly a module's forward) and restore it exactly: on its own, or for one thread's calls."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

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
                f"the {self.name} of {type(self.target).__name__} was replaced by something else after the patch; "
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
        self._ours.patch = self
        self.target.__dict__[self.name] = self._ours
        self.target.__dict__.setdefault("__reduce_ex__", functools.partial(_reduced_plain, self.target))


class _Replaced(functools.partial):
    """What stands in the place of a method. Copied or pickled (in somebody else's reference to it), it is the method itself."""

    patch: ForwardPatch

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.args[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.args[-1],)


class Uncopied(functools.partial):
    """A hook of a module that copies come without (where nothing is patched: with one that does nothing)."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (_nothing,)


def restore_all(patches: Iterable[ForwardPatch]) -> None:
    """Restore them in reverse order: all, or none.

    Raises:
        RuntimeError: somebody replaced a method after one of them.
    """
    taken = list(patches)
    for patch in taken:
        patch.require_outermost()
    for patch in reversed(taken):
        patch.restore()


def _itself(value: Any) -> Any:
    return value


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _reduced_plain(target: object, protocol: int) -> Any:
    """What `copy.deepcopy` and `pickle` ask an object for, without what patches and hooks put into the instance."""
    made = type(target).__reduce_ex__(target, protocol)
    if isinstance(made, str) or len(made) < 3 or not isinstance(made[2], dict):
        return made
    state = {name: value for name, value in made[2].items() if name != "__reduce_ex__" and not name.startswith("_ee_")}
    for name, value in list(state.items()):
        while isinstance(value, _Replaced) and value.patch.name == name:
            value = value.patch._before
            state[name] = value
        if value is _ABSENT:
            del state[name]
    hooks = {name: value for name, value in state.items() if name.startswith("_forward_") and isinstance(value, dict)}
    ours = {key for value in hooks.values() for key, hook in value.items() if isinstance(hook, Uncopied)}
    for name, value in hooks.items():
        state[name] = type(value)((key, hook) for key, hook in value.items() if key not in ours)
    return (*made[:2], state, *made[3:])


Wrapper = Callable[..., Any]


class _ThreadLock:
    """Which thread patches a module; others wait."""

    def __init__(self) -> None:
        self.lock, self.thread = threading.Lock(), 0


# outside of the modules: these are copied and saved
_LOCKS: WeakKeyDictionary[nn.Module, _ThreadLock] = WeakKeyDictionary()
_NEW_LOCK = threading.Lock()


@contextmanager
def patched(wrappers: Sequence[tuple[nn.Module, Wrapper]]) -> Iterator[None]:
    """`module.forward(*args)` becomes `wrapper(original, *args)` for calls of this thread, until left; calls of other threads are what
    they were. Another thread that patches the same modules (told by the first one) waits until they are free.

    Raises:
        ValueError: within the same thread's own use of these modules, which would wait for itself.
        RuntimeError: at the end, somebody replaced a forward meanwhile; it stays, all others are restored, and ours does nothing more.
    """
    first = wrappers[0][0]
    with _NEW_LOCK:
        held = _LOCKS.setdefault(first, _ThreadLock())
    me = threading.get_ident()
    if held.thread == me:
        raise ValueError(
            f"exits are attached to this {type(first).__name__} by this thread already (a call from a processor or a streamer?), "
            "expected that to be over first"
        )
    with held.lock:
        owner, patches = [me], list[ForwardPatch]()
        try:
            held.thread = me
            for module, wrapper in wrappers:
                patches.append(ForwardPatch(module, functools.partial(_for_thread, owner, wrapper)))
            yield
        finally:
            owner.clear()
            held.thread = 0
            _restore(patches)


def _for_thread(owner: list[int], wrapper: Wrapper, original: Wrapper, *args: Any, **kwargs: Any) -> Any:
    call = functools.partial(wrapper, original) if threading.get_ident() in owner else original
    return call(*args, **kwargs)


def _restore(patches: list[ForwardPatch]) -> None:
    """Undo them, the last first, those behind one that cannot be undone too."""
    try:
        while patches:
            patches.pop().restore()
    finally:
        if patches:
            _restore(patches)
