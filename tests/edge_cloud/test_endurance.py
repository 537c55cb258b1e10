"""A server that lives long: fuzzed messages, and memory after a thousand sessions."""

from __future__ import annotations

import gc
import os
import random
import tracemalloc
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from split_parts import LIMITS, TOKENS, client, edge, manager, parts, prompt, whole

grpc = pytest.importorskip("grpc", reason="needs the extra cloud")

from cloud_servers import serving  # noqa: E402

from ee_diffusion.core.policy import Policy  # noqa: E402
from ee_diffusion.edge_cloud import wire_pb2 as wire  # noqa: E402
from ee_diffusion.edge_cloud.client import Upload  # noqa: E402
from ee_diffusion.edge_cloud.codec import encode  # noqa: E402
from ee_diffusion.edge_cloud.grpc_transport import RemoteTransport  # noqa: E402
from ee_diffusion.edge_cloud.rpc import CALLS, SERVICE  # noqa: E402

WIDTH = 32


def line(there) -> RemoteTransport:
    return RemoteTransport(f"127.0.0.1:{there.port}", parts("llama")[0][1], width=WIDTH)


def ask_everything(transport: RemoteTransport, row: int):
    with client(transport) as cloud:
        return edge().generate(prompt(row), Policy(), cloud, max_new_tokens=TOKENS)


def sent() -> Future:
    """Nothing is on its way."""
    future: Future = Future()
    future.set_result(None)
    return future


def _resident() -> int:
    """Resident bytes of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_is_back_after_a_thousand_sessions():
    """Over the wire, every third one left open to expire; counters of the store, Python's own objects, and the whole process."""
    now, payload = [0.0], encode(torch.randn(24, WIDTH), kind="float32")
    cloud = manager(clock=lambda: now[0])

    def sessions(count: int) -> None:
        for place in range(count):
            session = transport.open(timeout=10)
            transport.upload(session, Upload(0, 24, "float32", payload), timeout=10)
            transport.next(session, 23, sending=sent(), timeout=10)
            if place % 3:
                transport.close(session, timeout=10)
            now[0] += 2 * LIMITS.idle_seconds / 60  # some thirty are open at a time
        now[0] += 2 * LIMITS.idle_seconds
        transport.close(transport.open(timeout=10), timeout=10)

    with serving(cloud, log_calls=False) as there, line(there) as transport:
        sessions(200)  # everything that is made once
        gc.collect()
        tracemalloc.start()
        objects, resident = tracemalloc.get_traced_memory()[0], _resident()
        sessions(1000)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - objects
        tracemalloc.stop()
        assert (cloud.bytes, len(cloud.sessions)) == (0, 0)
        assert there.worker.usage() == (0, 0)
        print(f"{grown} bytes of objects, {_resident() - resident} resident bytes more")
        assert grown < 200_000  # 200 bytes a session would already be a leak
        assert _resident() - resident < 30e6


FUZZ_ENDS = {"OK", "NOT_FOUND", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "INTERNAL"}


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_messages_leave_a_server_that_answers_as_before(count: int):
    """Half-right messages, wrong numbers, flipped and missing bytes; INTERNAL is what gRPC says of bytes that are no message."""
    draw, ended = random.Random(5), dict.fromkeys(FUZZ_ENDS, 0)
    with serving(log_calls=False) as there, line(there) as transport:
        sessions = [transport.open(timeout=5), "0" * 32, ""]
        for _ in range(count):
            if sessions[0] not in there.worker.manager.sessions:  # it was closed: another, so that calls go deep
                sessions[0] = transport.open(timeout=5)
            name, message = _fuzzed(draw, sessions)
            raw = transport.channel.unary_unary(
                f"/{SERVICE}/{name}", request_serializer=bytes, response_deserializer=bytes
            )
            try:
                raw(message, timeout=0.02 if name == "Next" else 5)
                ended["OK"] += 1
            except grpc.RpcError as error:
                ended[error.code().name] = ended.get(error.code().name, 0) + 1
            if len(there.worker.manager.sessions) > 70:
                there.worker.manager.sessions.clear()
        print(ended)
        assert set(ended) == FUZZ_ENDS  # nothing unknown, nobody gone
        assert min(ended.values()) > 0, ended
        there.worker.manager.sessions.clear()
        assert tuple(ask_everything(transport, 1).sequences[0].tolist()) == whole(1)
        assert there.worker.usage() == (0, 0)


def _fuzzed(draw: random.Random, sessions: list[str]) -> tuple[str, bytes]:
    name = draw.choice(list(CALLS))
    whole_message = CALLS[name][0]()
    fields = whole_message.DESCRIPTOR.fields_by_name
    if "session" in fields:
        whole_message.session = draw.choice(sessions)
    if name == "Open" and draw.random() < 0.2:
        whole_message.version = 2
        for fact, value in (parts("llama")[0][1].terms | {"width": str(WIDTH)}).items():
            whole_message.terms[fact] = value
    if name == "Upload" and draw.random() < 0.5:
        whole_message.count, whole_message.encoding = 1, wire.FLOAT32
        whole_message.payload = draw.randbytes(4 * WIDTH)  # numbers of every size, NaN among them
    for number in ("first", "count", "position", "length", "encoding", "version"):
        if number in fields and draw.random() < 0.4:
            setattr(
                whole_message,
                number,
                draw.choice([0, 1, 3, 63, 64, 2**31 - 1, 2**32 - 1][: 6 if number == "encoding" else 7]),
            )
    if draw.random() < 0.6:
        return name, whole_message.SerializeToString()
    message = bytearray(whole_message.SerializeToString() + draw.randbytes(draw.choice([0, 0, 4, 132])))
    for _ in range(draw.choice([0, 0, 1, 3])):
        if message:
            message[draw.randrange(len(message))] = draw.randrange(256)
    return name, bytes(message[: draw.choice([len(message), len(message), len(message) // 2])])
