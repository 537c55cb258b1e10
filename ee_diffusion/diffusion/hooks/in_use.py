"""Threads that share one pipeline: its scheduler and settings are those of one call. The project's own pipelines take turns; a stock
pipeline with exits refuses a call while another thread's goes on, before that changes anything.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from diffusers import DiffusionPipeline
from torch import nn

from ee_diffusion.core.patch import ForwardPatch, restore_all

_TURNS: WeakKeyDictionary[Any, threading.RLock] = (
    WeakKeyDictionary()
)  # outside of the models: those are copied and saved
_MAKING = threading.Lock()


def in_turn(call: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline's `__call__` that waits until no other thread's goes on with the same transformer."""

    @functools.wraps(call)
    def waiting(pipeline: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        transformer = pipeline.components.get("transformer")
        with _MAKING:
            turn = _TURNS.setdefault(pipeline if transformer is None else transformer, threading.RLock())
        with turn:
            return call(pipeline, *args, **kwargs)

    return waiting


class OneCall:
    """One thread at a time in the call of a pipeline. Whose call it is follows from that thread's stack, so that one which failed holds up
    nobody."""

    def __init__(self, pipeline: DiffusionPipeline, check: Callable[[nn.Module], None]):
        """check: is shown the pipeline's transformer before a call."""
        self._check = check
        self._pipeline, self._code = pipeline, inspect.unwrap(type(pipeline).__call__).__code__
        self._lock, self._thread = threading.Lock(), 0
        checks = callable(getattr(pipeline, "check_inputs", None))  # first of all, but not every class has it
        self._interceptions = [
            *([ForwardPatch(pipeline, self._begins, name="check_inputs")] if checks else []),
            ForwardPatch(pipeline, self._loop_begins, name="progress_bar"),
            ForwardPatch(pipeline, self._ends, name="maybe_free_model_hooks"),
        ]
        self._scheduler: ForwardPatch | None = None  # within a loop: other threads may not set its steps anew

    def enter(self) -> None:
        """This thread is in the call, or in a forward of it.

        Raises:
            RuntimeError: another thread is.
        """
        me = threading.get_ident()
        with self._lock:
            if self._thread not in (0, me) and self._goes_on(self._thread):
                raise RuntimeError(
                    f"this {type(self._pipeline).__name__} (or its transformer) with exits is in use: another thread's call goes on; "
                    "make one call at a time, or give each thread a pipeline and a transformer of its own"
                )
            self._thread = me

    def detach(self) -> None:
        """Restore the pipeline's methods."""
        self._free_scheduler()
        restore_all(self._interceptions)
        self._interceptions = []

    def _goes_on(self, thread: int) -> bool:
        frame = sys._current_frames().get(thread)
        while frame is not None:
            if frame.f_code is self._code and frame.f_locals.get("self") is self._pipeline:
                return True
            frame = frame.f_back
        return False

    def _begins(self, original, *args, **kwargs):
        self.enter()
        self._free_scheduler()  # of a call that failed
        self._check(self._pipeline.transformer)
        return original(*args, **kwargs)

    def _loop_begins(self, original, *args, **kwargs):
        self.enter()
        self._free_scheduler()
        self._check(self._pipeline.transformer)
        self._scheduler = ForwardPatch(self._pipeline.scheduler, self._steps_set, name="set_timesteps")
        return original(*args, **kwargs)

    def _steps_set(self, original, *args, **kwargs):
        self.enter()
        return original(*args, **kwargs)

    def _ends(self, original, *args, **kwargs):
        self._free_scheduler()
        return original(*args, **kwargs)

    def _free_scheduler(self) -> None:
        if self._scheduler is not None:
            self._scheduler.restore()
            self._scheduler = None
