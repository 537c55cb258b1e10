"""A network between two processes of one machine: a TCP proxy on loopback with a delay, a rate and a switch, for measurements and tests.

Here: what happens to bytes on their way. Not here: what they mean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import selectors
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

_CHUNK = 16 * 1024  # bytes read at once


@dataclass
class Carried:
    """Bytes that went towards the target and back, and connections that were made."""

    up: int = 0
    down: int = 0
    connections: int = 0


@dataclass(eq=False)
class _Lane:
    """One direction of one connection: when the wire is free again."""

    free: float = 0.0


@dataclass(eq=False)
class _Pair:
    """Both sockets of one connection."""

    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def abort(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class Link:
    """Listens on a free port of loopback and passes everything on to 127.0.0.1:`target` and back.

    A chunk of n bytes that arrives at time t leaves at `max(t, the wire is free) + 8 n / rate` and arrives half of `round_trip` later.
    Every connection has a wire of its own. `round_trip`: seconds there and back; `rate`: bits per second each way, None: no bound.
    `change` may alter, drop (b"") or repeat what goes towards the target. A context manager.

        with Link(port, round_trip=0.05, rate=20e6) as link:
            connect to 127.0.0.1:link.port; link.cut(); link.heal()

    Raises:
        ValueError: a negative round trip, a rate that is not positive.
    """

    def __init__(
        self, target: int, *, round_trip: float, rate: float | None, change: Callable[[bytes], bytes] | None = None
    ):
        if not round_trip >= 0 or (rate is not None and not rate > 0):
            raise ValueError(f"round_trip={round_trip}, rate={rate}, expected seconds >= 0 and bits per second > 0")
        self.target, self.round_trip, self.rate, self.change = target, round_trip, rate, change
        self.carried, self.port = Carried(), 0
        # select() waits to the microsecond, epoll to the millisecond
        self._loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        self._pairs: set[_Pair] = set()
        self._whole = True
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)

    def __enter__(self) -> Link:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exception: object) -> None:
        self.cut()
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Break all connections; new ones break at once."""
        self._whole = False
        self._do(self._abort())

    def heal(self) -> None:
        """Let new connections live."""
        self._whole = True

    def _do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _abort(self) -> None:
        for pair in list(self._pairs):
            pair.abort()

    async def _end(self) -> None:
        self._server.close()
        waiting = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = _Pair([writer])
        self._pairs.add(pair)
        try:
            if not self._whole:
                return
            there, towards = await asyncio.open_connection("127.0.0.1", self.target)
            pair.writers.append(towards)
            self.carried.connections += 1
            await asyncio.gather(self._pass(reader, towards, up=True), self._pass(there, writer, up=False))
        except OSError:  # the target is not there, or one side broke off: the other side learns it the same way
            pass
        finally:
            pair.abort()
            self._pairs.discard(pair)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        """One direction until its end. Chunks queue up on the wire, at most 64, then the sender waits."""
        wire: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=64)
        delivering = asyncio.ensure_future(self._deliver(wire, writer))
        lane = _Lane()
        try:
            while chunk := await reader.read(_CHUNK):
                if up and self.change is not None:
                    chunk = self.change(chunk)
                self._count(len(chunk), up=up)
                if chunk:
                    await wire.put((self._arrival(lane, len(chunk)), chunk))
            await wire.put((self._arrival(lane, 0), b""))
            await delivering
        finally:
            delivering.cancel()

    def _count(self, size: int, *, up: bool) -> None:
        if up:
            self.carried.up += size
        else:
            self.carried.down += size

    def _arrival(self, lane: _Lane, size: int) -> float:
        begun = max(self._loop.time(), lane.free)
        lane.free = begun if self.rate is None else begun + 8 * size / self.rate
        return lane.free + self.round_trip / 2

    async def _deliver(self, wire: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            arrival, chunk = await wire.get()
            await asyncio.sleep(max(0.0, arrival - self._loop.time()))
            if not chunk:
                writer.write_eof()
                return
            writer.write(chunk)
            await writer.drain()


def main() -> None:
    parser = argparse.ArgumentParser(description="A link to a port of this machine, until the process is ended.")
    parser.add_argument("--target", type=int, required=True, help="The port that it leads to.")
    parser.add_argument("--round_trip", type=float, required=True, help="Seconds there and back.")
    parser.add_argument("--rate", type=float, help="Bits per second each way.")
    options = parser.parse_args()
    with Link(options.target, round_trip=options.round_trip, rate=options.rate) as link:
        print(json.dumps({"listening": link.port}), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
