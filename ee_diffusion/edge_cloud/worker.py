"""What answers: one worker thread that takes the ready questions of the clients in passes, and the metrics of a server.

Here: passes, whose turn it is, and the lock of the sessions, which no pass holds. Not here: calls (server.py), sessions (sessions.py).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from torch import Tensor

from ee_diffusion.edge_cloud.sessions import ContextManager, Made, Refused, Row
from ee_diffusion.edge_cloud.split import Part

LOG = logging.getLogger("ee_diffusion.cloud")
SHORT = 8  # positions: questions with no more to process share a pass, the others have one to themselves


@dataclass
class Metrics:
    """What Prometheus is told; a registry of its own for each server."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.calls = Counter("ee_cloud_calls", "Calls by name and status", ["call", "status"], registry=self.registry)
        self.payload = Counter("ee_cloud_payload_bytes", "Bytes of states received", registry=self.registry)
        self.tokens = Counter("ee_cloud_tokens", "Tokens answered", registry=self.registry)
        self.batch = Histogram(
            "ee_cloud_batch",
            "Questions worked on in one pass",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.seconds = Histogram("ee_cloud_pass_seconds", "Seconds of a pass", registry=self.registry)
        self.sessions = Gauge("ee_cloud_sessions", "Open sessions", registry=self.registry)
        self.bytes = Gauge("ee_cloud_bytes", "Bytes of all sessions", registry=self.registry)


@dataclass(eq=False)
class Question:
    """Somebody waits for the token after a position; `seconds`: of the passes that worked on it so far."""

    owner: str
    session: str
    position: int
    answer: Future
    seconds: float = 0.0


class Backend(Protocol):
    """What a server stands before: a `Worker`, or several elsewhere. Methods raise Refused."""

    part: Part
    width: int

    def open(self, owner: str) -> str:
        """Begin a session -> its id."""
        ...

    def upload(self, owner: str, session: str, first: int, *, hidden: Tensor) -> int:
        """Store states (N, D) -> how many were new."""
        ...

    def ask(self, owner: str, session: str, position: int) -> Future:
        """A future of (token, seconds)."""
        ...

    def rollback(self, owner: str, session: str, length: int) -> None:
        """Forget positions from `length` on."""
        ...

    def close(self, owner: str, session: str) -> None:
        """End a session."""
        ...

    def stop(self) -> None:
        """No more answers."""
        ...


class Worker:
    """Owns the context manager: its lock, and the thread that answers. Methods take the owner that authenticated, as the manager's do.

    Short questions (the next token of a session that is nearly up to date) are answered together, at most `batch` of them, oldest first.
    A long one (a prompt) is worked on alone, `slice` positions a pass, and long ones take turns. Short and long passes alternate: nobody
    waits for the whole prompt of somebody else.
    """

    def __init__(self, manager: ContextManager, metrics: Metrics, *, batch: int, slice: int):
        if batch < 1 or slice < 1:
            raise ValueError(f"batch={batch}, slice={slice}, expected at least 1 question and 1 position")
        self.manager, self.metrics, self.batch, self.slice = manager, metrics, batch, slice
        self.part, self.width = manager.part, manager.width
        self.changed = threading.Condition()
        self._questions: list[Question] = []
        self._long_next = False
        self._stopped = False
        metrics.sessions.set_function(lambda: self.usage()[0])
        metrics.bytes.set_function(lambda: self.usage()[1])
        self._thread = threading.Thread(target=self._work, name="cloud-worker", daemon=True)
        self._thread.start()

    def usage(self) -> tuple[int, int]:
        """Open sessions, and their bytes."""
        with self.changed:
            return len(self.manager.sessions), self.manager.bytes

    def open(self, owner: str, *, session: str | None = None) -> str:
        """As `ContextManager.open`."""
        with self.changed:
            return self.manager.open(owner, session=session)

    def upload(self, owner: str, session: str, first: int, *, hidden: Tensor) -> int:
        """As `ContextManager.upload`."""
        with self.changed:
            stored = self.manager.upload(owner, session, first, hidden=hidden)
            self.changed.notify()
        return stored

    def rollback(self, owner: str, session: str, length: int) -> None:
        """As `ContextManager.rollback`."""
        with self.changed:
            self.manager.rollback(owner, session, length)

    def close(self, owner: str, session: str) -> None:
        """As `ContextManager.close`; whoever still asks is refused."""
        with self.changed:
            self.manager.close(owner, session)
            self.changed.notify()

    def ask(self, owner: str, session: str, position: int) -> Future:
        """A future of (token, seconds). Raises Refused at once where no upload could help."""
        with self.changed:
            self.manager.ready(owner, session, position)
            question = Question(owner, session, position, Future())
            self._questions.append(question)
            self.changed.notify()
        return question.answer

    def stop(self) -> None:
        """End the thread; whoever still waits is told that the server ends."""
        with self.changed:
            self._stopped = True
            self.changed.notify()
        self._thread.join()

    def _work(self) -> None:
        going = True
        while going:
            try:
                going = self._turn()
            except (
                Exception
            ) as error:  # told to all who wait, for whatever is broken may be theirs; the worker lives on
                LOG.error(json.dumps({"event": "a turn failed", "error": type(error).__name__}))
                with self.changed:
                    for question in list(self._questions):
                        self._tell(question, Refused("invalid", f"the server failed: {type(error).__name__}"))

    def _turn(self) -> bool:
        """Wait for questions, make one pass, answer. False: the server ends."""
        with self.changed:
            taken = self._take()
            while not taken and not self._stopped:
                self.changed.wait(timeout=1.0)
                self.manager.expire()
                taken = self._take()
            if self._stopped:
                for question in self._questions:
                    if question.answer.set_running_or_notify_cancel():
                        question.answer.set_exception(CancelledError())
                return False
        made, seconds = self._pass([row for _, row in taken])  # without the lock: uploads go on meanwhile
        with self.changed:
            self._finish(taken, made, seconds)
        return True

    def _take(self) -> list[tuple[Question, Row]]:
        """Who is next, and the rows of their pass; none: nobody is ready."""
        while True:
            self._questions = [question for question in self._questions if not question.answer.cancelled()]
            short, long = self._ready()
            take_long = bool(long) and (self._long_next or not short)
            self._long_next = not take_long
            rows = [(question, self._row(question)) for question in (long[:1] if take_long else short[: self.batch])]
            taken = [(question, row) for question, row in rows if row is not None]
            if taken or not rows:  # else all of them were answered without a pass: look again
                return taken

    def _ready(self) -> tuple[list[Question], list[Question]]:
        """Questions whose states are there, short and long, one of a session; what is refused is told so."""
        short: list[Question] = []
        long: list[Question] = []
        sessions: set[str] = set()
        for question in list(self._questions):
            key = (question.owner, question.session, question.position)
            try:
                if not self.manager.ready(*key) or question.session in sessions:
                    continue
                (short if self.manager.remaining(*key) <= SHORT else long).append(question)
                sessions.add(question.session)
            except Refused as refused:
                self._tell(question, refused)
        return short, long

    def _row(self, question: Question) -> Row | None:
        """The row of a question, or None where it is answered without one."""
        try:
            found = self.manager.take(question.owner, question.session, question.position, most=self.slice)
        except Refused as refused:
            self._tell(question, refused)
            return None
        if isinstance(found, Row):
            return found
        self._tell(question, found)
        return None

    def _pass(self, rows: Sequence[Row]) -> tuple[list[Made | Refused], float]:
        """What a pass makes of the rows; where it fails, each row alone, so that nobody suffers for another."""
        begun = time.monotonic()
        try:
            made: list[Made | Refused] = list(self.manager.compute(rows))
        except Exception as error:  # whatever the model raises is told to those who asked; the worker lives on
            LOG.error(json.dumps({"event": "a pass failed", "rows": len(rows), "error": type(error).__name__}))
            if len(rows) > 1:
                made = [self._pass([row])[0][0] for row in rows]
            else:
                made = [Refused("invalid", f"the pass failed: {type(error).__name__}")]
        return made, time.monotonic() - begun

    def _finish(self, taken: list[tuple[Question, Row]], made: list[Made | Refused], seconds: float) -> None:
        self.metrics.batch.observe(len(taken))
        self.metrics.seconds.observe(seconds)
        for (question, row), part in zip(taken, made, strict=True):
            question.seconds += seconds
            answer = part if isinstance(part, Refused) else self.manager.finish(row, part)
            if row.last or isinstance(answer, Refused):
                self._tell(question, answer)
            elif question in self._questions:  # a slice more is done: the others of its kind come first
                self._questions.remove(question)
                self._questions.append(question)

    def _tell(self, question: Question, answer: int | Refused) -> None:
        """Answer a question and forget it."""
        if question in self._questions:
            self._questions.remove(question)
        if not question.answer.set_running_or_notify_cancel():
            return
        if isinstance(answer, Refused):
            question.answer.set_exception(answer)
        else:
            self.metrics.tokens.inc()
            question.answer.set_result((answer, question.seconds))
