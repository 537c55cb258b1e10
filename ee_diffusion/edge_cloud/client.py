"""The edge's end of the line: uploads in the background, questions with a deadline, a new session after a loss.

Here: what is kept and sent when. Not here: the bytes' way (a `Transport`: grpc_transport.py, or `LocalTransport` in this process).
N positions, D width.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ee_diffusion.edge_cloud.codec import decode, encode, overflows, payload_bytes
from ee_diffusion.edge_cloud.sessions import ContextManager, Refused

LARGEST = 2**21  # bytes of states in one message: a long prompt goes in several, below what servers take


class CloudLost(Exception):
    """The cloud did not answer, not in time, or not sensibly; the message says which."""


@dataclass(frozen=True)
class Upload:
    """States of `count` positions from `first` on, encoded as `kind`."""

    first: int
    count: int
    kind: str
    payload: bytes


class Transport(Protocol):
    """One call each; `timeout` in seconds. Raises CloudLost for whatever goes wrong."""

    def open(self, *, timeout: float) -> str:
        """Begin a session -> its id."""
        ...

    def upload(self, session: str, upload: Upload, *, timeout: float) -> None:
        """Hand over states."""
        ...

    def next(self, session: str, position: int, *, sending: Future, timeout: float) -> tuple[int, float]:
        """The token after a position, and the seconds the cloud computed for it. `sending`: states that are still on their way; where
        the other end waits for them the question goes out at once, and is given up when they are lost."""
        ...

    def close(self, session: str, *, timeout: float) -> None:
        """End the session."""
        ...


class Helper(Protocol):
    """What an edge that generates needs of a cloud. `payload`: bytes of states sent so far."""

    payload: int

    def upload(self, first: int, hidden: Tensor) -> None:
        """Take the states (N, D) of positions first.. and return at once."""
        ...

    def ask(self, position: int, *, vocabulary: int) -> tuple[int, float]:
        """The token after `position` and the cloud's own seconds. Raises CloudLost."""
        ...


class LocalTransport:
    """The cloud in this process, for tests and for comparisons without a network."""

    def __init__(self, manager: ContextManager, *, owner: str = "local"):
        self.manager, self.owner = manager, owner

    def open(self, *, timeout: float) -> str:
        return self._call(self.manager.open, self.owner)

    def upload(self, session: str, upload: Upload, *, timeout: float) -> None:
        hidden = decode(upload.payload, upload.count, self.manager.width, kind=upload.kind)
        self._call(self.manager.upload, self.owner, session, upload.first, hidden=hidden)

    def next(self, session: str, position: int, *, sending: Future, timeout: float) -> tuple[int, float]:
        sending.result(timeout)
        begun = time.monotonic()
        (answer,) = self.manager.answer([(self.owner, session, position)])
        if isinstance(answer, Refused):
            raise CloudLost(f"refused: {answer}")
        return answer, time.monotonic() - begun

    def close(self, session: str, *, timeout: float) -> None:
        self._call(self.manager.close, self.owner, session)

    @staticmethod
    def _call(function: Callable, *args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Refused as refused:
            raise CloudLost(f"refused: {refused}") from refused


class CloudClient:
    """One generation's use of a cloud. `deadline`: seconds a token may wait; `retry_after`: seconds without trying after a loss.

    States are encoded and kept, sent once per cloud session by one background thread, in order, and nobody waits for that: a question
    goes out while they are on their way. After a loss the next question that is allowed to opens a new session and sends everything
    again. `payload`: bytes of states sent, framing apart. `clock`: seconds, monotonic. A context manager.
    """

    def __init__(
        self, transport: Transport, *, kind: str, deadline: float, retry_after: float, clock: Callable = time.monotonic
    ):
        if not deadline > 0 or not retry_after >= 0:
            raise ValueError(f"deadline={deadline}, retry_after={retry_after}, expected seconds > 0 and >= 0")
        self.transport, self.kind, self.deadline, self.retry_after = transport, kind, deadline, retry_after
        self.clock, self.payload = clock, 0
        self._kept: list[Upload] = []
        self._taken = 0  # positions of what is kept
        self._lock = threading.Lock()  # of the session
        self._session: str | None = None
        self._lost: list[str] = []  # sessions that a living cloud may still hold
        self._sent = 0  # of what is kept, in this session
        self._not_before, self._why = -float("inf"), ""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._sending: Future | None = None

    def __enter__(self) -> CloudClient:
        return self

    def __exit__(self, *exception) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._session is not None:
            self._lost.append(self._session)
        self._close_lost()

    def upload(self, first: int, hidden: Tensor) -> None:
        """Take the states (N, D) of positions first.. and return; they are sent while the caller goes on. A message that the encoding
        cannot hold goes as float32.

        Raises:
            ValueError: states that are not finite; positions that do not follow those before (a second generation needs a client of its
                own).
        """
        if first != self._taken:
            raise ValueError(f"states from position {first} on, expected {self._taken}: one client for each generation")
        self._taken += len(hidden)
        for part in hidden.split(max(1, LARGEST // payload_bytes(1, hidden.shape[1], kind=self.kind))):
            kind = "float32" if overflows(part, kind=self.kind) else self.kind
            self._kept.append(Upload(first, len(part), kind, encode(part, kind=kind)))
            first += len(part)
        if self.clock() >= self._not_before:
            self._sending = self._thread.submit(self._send)

    def ask(self, position: int, *, vocabulary: int) -> tuple[int, float]:
        """The token after `position`, and the cloud's own seconds.

        Raises:
            CloudLost: no sensible answer within the deadline, or a loss less than `retry_after` ago.
        """
        begun = self.clock()
        if begun < self._not_before:
            raise CloudLost(f"lost before ({self._why}), not tried again yet")
        try:
            if self._sending is None or self._sending.done():  # a new session after a loss sends what is kept
                self._sending = self._thread.submit(self._send)
            if self._session is None:
                self._sending.result(timeout=self.deadline)
            session, left = self._session, self.deadline - (self.clock() - begun)
            if left <= 0 or session is None:
                raise CloudLost("late: the states took the whole deadline")
            token, seconds = self.transport.next(session, position, sending=self._sending, timeout=left)
            if not 0 <= token < vocabulary or not 0 <= seconds < math.inf:
                raise CloudLost(f"wrong: token {token} of a vocabulary of {vocabulary} after {seconds} s")
        except (CloudLost, Late) as error:
            lost = error if isinstance(error, CloudLost) else CloudLost("late: the states were not sent in time")
            self._lose(str(lost))
            raise lost from error
        return token, seconds

    def _send(self) -> None:
        """In the background thread: everything that this session has not had yet."""
        try:
            if self._session is None:
                self._sent = 0
                session = self.transport.open(timeout=self.deadline)
                with self._lock:
                    self._session = session
                self._close_lost()
            session = self._session
            while self._sent < len(self._kept) and session is not None and self._session == session:
                upload = self._kept[self._sent]
                self.transport.upload(session, upload, timeout=self.deadline)
                self._sent += 1
                self.payload += len(upload.payload)
        except CloudLost as error:
            self._lose(str(error))
            raise

    def _lose(self, why: str) -> None:
        """No more of this session; the next one is not before `retry_after` seconds from now."""
        with self._lock:
            if self._session is not None:
                self._lost.append(self._session)
            self._session, self._not_before, self._why = None, self.clock() + self.retry_after, why

    def _close_lost(self) -> None:
        """Tell the cloud to forget sessions that are used no more; where that fails, they expire by themselves."""
        while self._lost:
            session = self._lost.pop()
            try:
                self.transport.close(session, timeout=self.deadline)
            except CloudLost:
                continue
