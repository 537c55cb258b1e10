"""The shaped link: how long bytes take, that they arrive whole and in order, and what a cut does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from statistics import median

import pytest

from ee_diffusion.metrics.links import Link


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that says back what it hears."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            while chunk := connection.recv(65536):
                connection.sendall(chunk)

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listening.getsockname()[1]
    listening.close()


def connect(link: Link) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", link.port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def heard(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        chunk = connection.recv(65536)
        if not chunk:
            break
        found += chunk
    return found


def seconds(connection: socket.socket, message: bytes) -> float:
    begun = time.monotonic()
    connection.sendall(message)
    assert heard(connection, len(message)) == message
    return time.monotonic() - begun


def test_a_round_trip_takes_its_time(echo: int):
    for round_trip in (0.0, 0.02):
        with Link(echo, round_trip=round_trip, rate=None) as link, connect(link) as connection:
            took = median(seconds(connection, b"x") for _ in range(9))
        assert round_trip <= took < round_trip + 0.02


def test_the_rate_bounds_what_passes_and_the_bytes_stay_whole(echo: int):
    message = bytes(range(256)) * 400  # 102,400 bytes: 0.1 s each way at 8 Mbit/s, overlapping
    with Link(echo, round_trip=0.0, rate=8e6) as link, connect(link) as connection:
        took = seconds(connection, message)
        assert 0.1 <= took < 0.4
        assert (link.carried.up, link.carried.down, link.carried.connections) == (len(message), len(message), 1)


def test_a_cut_breaks_and_healing_lets_new_connections_live(echo: int):
    with Link(echo, round_trip=0.0, rate=None) as link:
        with connect(link) as connection:
            assert seconds(connection, b"before") > 0
            link.cut()
            with pytest.raises(ConnectionError):
                _until_broken(connection)
        with pytest.raises(ConnectionError), connect(link) as connection:
            _until_broken(connection)
        link.heal()
        with connect(link) as connection:
            assert seconds(connection, b"after") > 0


def _until_broken(connection: socket.socket) -> None:
    for _ in range(100):
        connection.sendall(b"x")
        if not connection.recv(10):
            raise ConnectionResetError


def test_what_goes_up_can_be_changed(echo: int):
    with Link(echo, round_trip=0.0, rate=None, change=lambda chunk: chunk * 2) as link, connect(link) as connection:
        connection.sendall(b"abc")
        assert heard(connection, 6) == b"abcabc"


def test_wrong_settings_are_refused():
    for wrong in ({"round_trip": -1.0, "rate": None}, {"round_trip": 0.0, "rate": 0.0}):
        with pytest.raises(ValueError, match="expected seconds"):
            Link(1, **wrong)
