"""Who may ask: tokens of clients, read from a file, each with an optional expiry.

The file is JSON: `{"TOKEN": "client"}` or `{"TOKEN": {"client": "client", "expires": "2027-01-31T12:00:00+00:00"}}`.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """The client a token belongs to, and until when; None: for good."""

    client: str
    expires: datetime | None = None


class Tokens:
    """Tokens and their clients. `now`: the time of day, since an expiry is a date; deadlines elsewhere are on monotonic clocks.

    Raises:
        ValueError: no token at all (that would let nobody in), an empty one, an expiry without a time zone.
    """

    def __init__(self, entries: Mapping[str, Entry], *, now: Callable[[], datetime] = lambda: datetime.now(UTC)):
        if not entries or not all(entries):
            raise ValueError(f"{len(entries)} tokens, expected at least one and none empty")
        if any(entry.expires is not None and entry.expires.tzinfo is None for entry in entries.values()):
            raise ValueError("an expiry without a time zone, expected as in 2027-01-31T12:00:00+00:00")
        self._entries = [(token.encode(), entry) for token, entry in entries.items()]
        self._now = now

    @classmethod
    def read(cls, path: str | os.PathLike) -> Tokens:
        """Read the file. Raises ValueError where it is of another form; no message repeats a token."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}, expected an object token -> client")
        return cls({token: _entry(value) for token, value in values.items()})

    def owner(self, said: str) -> str | None:
        """The client that a token belongs to; None: it is unknown or has expired. Every token is compared, in constant time."""
        found = [entry for token, entry in self._entries if hmac.compare_digest(token, said.encode())]
        if not found or (found[0].expires is not None and found[0].expires <= self._now()):
            return None
        return found[0].client


def _entry(value: object) -> Entry:
    if isinstance(value, str):
        return Entry(value)
    if not isinstance(value, dict) or not isinstance(value.get("client"), str) or set(value) - {"client", "expires"}:
        raise ValueError('a token with something else than "client" or {"client": ..., "expires": ...}')
    expires = value.get("expires")
    if not isinstance(expires, str | None):
        raise ValueError("an expiry that is no text, expected as in 2027-01-31T12:00:00+00:00")
    return Entry(value["client"], None if expires is None else datetime.fromisoformat(expires))
