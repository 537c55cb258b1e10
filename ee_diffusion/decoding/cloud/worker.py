"""What answers: one worker thread that takes all ready questions of the clients in one pass, and the metrics of a server.

Here: batches and their lock. Not here: calls (server.py), what a session is (context.py).
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ee_diffusion.decoding.cloud.context import ContextManager, Refused

LOG = logging.getLogger("ee_diffusion.cloud")


@dataclass
class Metrics:
    """What Prometheus is told; a registry of its own for each server."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.calls = Counter("ee_cloud_calls", "Calls by name and status", ["call", "status"], registry=self.registry)
        self.payload = Counter("ee_cloud_payload_bytes", "Bytes of states received", registry=self.registry)
        self.tokens = Counter("ee_cloud_tokens", "Tokens answered", registry=self.registry)
        self.batch = Histogram(
            "ee_cloud_batch", "Questions answered in one pass", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.seconds = Histogram("ee_cloud_pass_seconds", "Seconds of a pass", registry=self.registry)
        self.sessions = Gauge("ee_cloud_sessions", "Open sessions", registry=self.registry)
        self.bytes = Gauge("ee_cloud_bytes", "Bytes of all sessions", registry=self.registry)


@dataclass
class Question:
    """Somebody waits for the token after a position."""

    owner: str
    session: str
    position: int
    answer: Future


class Worker:
    """Owns the context manager: its lock, and the thread that answers every ready question in one pass, at most `batch` of them, the
    longest waiting first."""

    def __init__(self, manager: ContextManager, metrics: Metrics, *, batch: int):
        self.manager, self.metrics, self.batch = manager, metrics, batch
        self.changed = threading.Condition()
        self._questions: list[Question] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="cloud-worker", daemon=True)
        self._thread.start()

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
        while True:
            with self.changed:
                chosen = self._choose()
                while not chosen and not self._stopped:
                    self.changed.wait(timeout=1.0)
                    self.manager.expire()
                    chosen = self._choose()
                if self._stopped:
                    for question in [*chosen, *self._questions]:
                        question.answer.set_exception(CancelledError())
                    return
                self._answer(chosen)

    def _choose(self) -> list[Question]:
        chosen: list[Question] = []
        waiting: list[Question] = []
        sessions: set[str] = set()
        for question in self._questions:
            if question.answer.cancelled():
                continue
            try:
                ready = self.manager.ready(question.owner, question.session, question.position)
            except Refused as refused:
                question.answer.set_exception(refused)
                continue
            if ready and len(chosen) < self.batch and question.session not in sessions:
                sessions.add(question.session)
                chosen.append(question)
            else:
                waiting.append(question)
        self._questions = waiting
        return [question for question in chosen if question.answer.set_running_or_notify_cancel()]

    def _answer(self, chosen: list[Question]) -> None:
        begun = time.monotonic()
        try:
            answers = self.manager.answer([(one.owner, one.session, one.position) for one in chosen])
        except Exception as error:  # whatever the model raises is told to those who asked; the worker lives on
            LOG.exception("a pass failed")
            answers = [Refused("invalid", f"the pass failed: {type(error).__name__}")] * len(chosen)
        seconds = time.monotonic() - begun
        self.metrics.batch.observe(len(chosen))
        self.metrics.seconds.observe(seconds)
        for question, answer in zip(chosen, answers, strict=True):
            if isinstance(answer, Refused):
                question.answer.set_exception(answer)
            else:
                self.metrics.tokens.inc()
                question.answer.set_result((answer, seconds))
