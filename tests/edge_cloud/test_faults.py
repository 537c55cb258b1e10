"""Servers that are killed, lines that break, messages that come twice, in another order or not whole: no token is lost or wrong.

Every token is checked against whoever said it: the cloud's is the whole model's for that prefix, the edge's own is its second exit's.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from language import model_named
from serve_parts import Nursery, kill
from split_parts import client, edge, manager, parts, prompt

grpc = pytest.importorskip("grpc", reason="needs the extra cloud")

from cloud_servers import serving  # noqa: E402

from ee_diffusion.core.policy import Policy  # noqa: E402
from ee_diffusion.edge_cloud import wire_pb2 as wire  # noqa: E402
from ee_diffusion.edge_cloud.client import CloudClient, CloudLost, LocalTransport, Upload  # noqa: E402
from ee_diffusion.edge_cloud.codec import decode, encode  # noqa: E402
from ee_diffusion.edge_cloud.edge import EdgeOutput  # noqa: E402
from ee_diffusion.edge_cloud.grpc_transport import RemoteTransport  # noqa: E402
from ee_diffusion.metrics.links import Link  # noqa: E402

WIDTH, TOKENS = 32, 24


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


def line(port: int) -> RemoteTransport:
    return RemoteTransport(f"127.0.0.1:{port}", parts("llama")[0][1], width=WIDTH)


def learned_confidence(out: EdgeOutput, row: int) -> EdgeOutput:
    """Assert that the answer is complete and every token is that of whoever said it."""
    begun = prompt(row).shape[1]
    assert out.sequences.shape[1] == begun + TOKENS
    assert len(out.sources) == TOKENS
    assert set(out.sources) <= {"cloud", "own"}
    assert len(out.losses) == out.sources.count("own")
    with torch.no_grad():
        said = {
            "cloud": model_named("llama")(out.sequences).logits[0].argmax(-1),
            "own": parts("llama")[0][0](out.sequences).logits[0].argmax(-1),
        }
    for token, source in enumerate(out.sources):
        at = begun + token
        assert int(out.sequences[0, at]) == int(said[source][at - 1]), (token, source, out.sources)
    return out


def generate(
    cloud: CloudClient, row: int, *, pace: float = 0.0, before: Callable[[int], None] | None = None
) -> EdgeOutput:
    """Ask for everything, `pace` seconds apart, so that a line has time to come back."""
    ask, asked = cloud.ask, []

    def slowly(position: int, *, vocabulary: int) -> tuple[int, float]:
        time.sleep(pace)
        if before is not None:
            before(len(asked))
        asked.append(position)
        return ask(position, vocabulary=vocabulary)

    cloud.ask = slowly  # type: ignore[method-assign]
    return learned_confidence(edge().generate(prompt(row), Policy(), cloud, max_new_tokens=TOKENS), row)


class Killing:
    """A transport on whose n-th call of a method the server dies: before it, while the server holds it, or after its answer."""

    def __init__(self, transport: RemoteTransport, *, method: str, number: int, when: str, die: Callable[[bool], None]):
        self.transport, self.method, self.number, self.when, self.die = transport, method, number, when, die
        self.counts: dict[str, int] = {}

    def _call(self, method: str, *args, **kwargs):
        self.counts[method] = self.counts.get(method, 0) + 1
        now = method == self.method and self.counts[method] == self.number
        if now and self.when != "after":
            self.die(self.when == "during")
        result = getattr(self.transport, method)(*args, **kwargs)
        if now and self.when == "after":
            self.die(False)
        return result

    def open(self, **more):
        return self._call("open", **more)

    def upload(self, session, upload, **more):
        return self._call("upload", session, upload, **more)

    def next(self, session, position, **more):
        return self._call("next", session, position, **more)

    def close(self, session, **more):
        return self._call("close", session, **more)


OTHERWISE = ("truncated", "garbled", "dropped")
PHASES = [(method, 1, when) for method in ("open", "upload", "next", "close") for when in ("before", "during", "after")]
PHASES += [(method, 5, when) for method in ("upload", "next") for when in ("before", "during", "after")]


@pytest.mark.slow
@pytest.mark.parametrize("method,number,when", PHASES)
def test_a_server_killed_at_every_phase_of_a_token(nursery: Nursery, method: str, number: int, when: str):
    alive = [nursery.start()]
    with Link(alive[0][1], round_trip=0.0, rate=None) as link:

        def die(held: bool) -> None:
            pid = alive.pop()[0]
            if held:  # the server stands still, holds the call, and is killed
                os.kill(pid, signal.SIGSTOP)
                threading.Timer(0.1, kill, (pid,)).start()
            else:
                kill(pid)
            alive.append(nursery.start())  # another server takes its place, empty
            link.target = alive[0][1]

        with line(link.port) as transport:
            killing = Killing(transport, method=method, number=number, when=when, die=die)
            with client(killing, deadline=2.0) as cloud:
                out = generate(cloud, 0, pace=0.04)
            assert killing.counts[method] >= number
    kill(alive[0][0])
    assert out.sources[-1] == "cloud", out.losses  # the cloud is used again
    if method == "next" and when != "after":  # a question that nobody can answer any more
        assert out.losses
    if method == "close":  # nobody asks any more
        assert not out.losses
    # else states are lost that nobody asked about yet: they may be there again, with another server, before somebody does
    assert len(out.losses) < TOKENS // 2, out.losses


def test_a_line_that_is_cut_and_heals():
    with serving() as there:
        with Link(there.port, round_trip=0.002, rate=20e6) as link, line(link.port) as transport:

            def before(token: int) -> None:
                if token == 4:
                    link.cut()
                if token == 8:
                    link.heal()

            with client(transport, deadline=2.0) as cloud:
                out = generate(cloud, 1, pace=0.05, before=before)
        assert out.sources[:4] == ["cloud"] * 4
        assert out.sources[4:8] == ["own"] * 4
        assert out.sources[-1] == "cloud", out.sources
        assert there.worker.manager.sessions == {}  # the session that was lost was closed by the one after it


@pytest.mark.parametrize("kind", ["repeated", *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERWISE)])
def test_bytes_that_arrive_otherwise_than_they_were_sent(kind: str):
    """HTTP/2 notices and breaks the connection; what was under way is lost, and nothing else."""
    draw, chunks = random.Random(3), [0]

    def change(chunk: bytes) -> bytes:
        chunks[0] += 1
        if chunks[0] % 9:
            return chunk
        if kind == "garbled":
            return draw.randbytes(len(chunk))
        return {"truncated": chunk[: len(chunk) // 2], "dropped": b"", "repeated": chunk * 2}[kind]

    with serving() as there:
        with Link(there.port, round_trip=0.0, rate=None, change=change) as link, line(link.port) as transport:
            with client(transport, deadline=0.4) as cloud:
                out = generate(cloud, 0, pace=0.01)
        with line(there.port) as transport, client(transport) as cloud:
            assert generate(cloud, 1).sources == ["cloud"] * TOKENS
    assert chunks[0] > 9
    assert len(out.losses) < TOKENS
    assert out.losses or kind == "repeated"  # a frame that comes twice may be one that HTTP/2 ignores


class Muddled(LocalTransport):
    """Every upload comes late, as single positions in any order, some of them twice and the second time with other numbers."""

    def __init__(self, cloud):
        super().__init__(cloud)
        self.draw, self.times = random.Random(7), 0

    def upload(self, session, upload: Upload, *, timeout):
        hidden = decode(upload.payload, upload.count, WIDTH, kind=upload.kind)
        places = [*range(upload.count), *self.draw.choices(range(upload.count), k=2)]
        self.draw.shuffle(places)
        seen: set[int] = set()
        for place in places:
            state = hidden[place : place + 1] + (place in seen)
            seen.add(place)
            one = Upload(upload.first + place, 1, upload.kind, encode(state, kind=upload.kind))
            super().upload(session, one, timeout=timeout)
            self.times += 1

    def next(self, session, position, *, sending, timeout):
        first = super().next(session, position, sending=sending, timeout=timeout)
        assert super().next(session, position, sending=sending, timeout=timeout)[0] == first[0]
        return first


def test_messages_twice_and_in_any_order():
    muddled = Muddled(manager())
    with client(muddled) as cloud:
        assert generate(cloud, 0).sources == ["cloud"] * TOKENS
    assert muddled.times > prompt(0).shape[1] + TOKENS


def test_a_cloud_that_is_too_slow_costs_no_more_than_its_deadline():
    with serving() as there:
        with Link(there.port, round_trip=3.0, rate=None) as link, line(link.port) as transport:
            begun = time.monotonic()
            with client(transport, deadline=0.3, retry_after=60.0) as cloud:
                out = learned_confidence(edge().generate(prompt(0), Policy(), cloud, max_new_tokens=TOKENS), 0)
                took = time.monotonic() - begun
    assert out.sources == ["own"] * TOKENS
    assert 0.3 <= took < 2.0  # one deadline, not one for every token


def test_the_time_of_day_does_not_matter(monkeypatch: pytest.MonkeyPatch):
    """Deadlines, retries and expiry are on monotonic clocks (gRPC's own are in its core)."""
    draw = random.Random(1)
    monkeypatch.setattr(time, "time", lambda: draw.uniform(0, 4e9))
    with client(LocalTransport(manager()), deadline=5.0, retry_after=5.0) as cloud:
        assert generate(cloud, 0).sources == ["cloud"] * TOKENS


def test_a_server_of_another_version_leaves_the_edge_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ee_diffusion.edge_cloud.grpc_transport.VERSION", 3)
    with serving() as there, line(there.port) as transport:
        with client(transport, retry_after=60.0) as cloud:
            out = learned_confidence(edge().generate(prompt(1), Policy(), cloud, max_new_tokens=TOKENS), 1)
    assert out.sources == ["own"] * TOKENS
    assert "version 3, expected 2" in out.losses[0][1]


@pytest.mark.parametrize("token,seconds", [(-1, 0.0), (61, 0.0), (3, float("nan")), (3, -1.0), (3, float("inf"))])
def test_answers_that_make_no_sense_are_not_taken(token: int, seconds: float):
    class Lying(LocalTransport):
        def next(self, session, position, *, sending, timeout):
            return token, seconds

    with client(Lying(manager())) as cloud:
        cloud.upload(0, torch.zeros(1, WIDTH))
        with pytest.raises(CloudLost, match="wrong"):
            cloud.ask(0, vocabulary=61)


def test_an_answer_for_another_position_is_not_taken():
    transport, sent, answered = line(1), Future(), Future()
    sent.set_result(None)
    answered.set_result(wire.NextReply(position=7, token=5, seconds=0.1))
    transport._calls["Next"] = SimpleNamespace(future=lambda request, **options: answered)
    assert transport.next("session", 7, sending=sent, timeout=1.0) == (5, pytest.approx(0.1))
    with pytest.raises(CloudLost, match="an answer for position 7, expected 6"):
        transport.next("session", 6, sending=sent, timeout=1.0)
