"""Tokens that expire, TLS, what the log says and does not say, health without reflection, one client that wants every thread."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import threading
import time
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from split_parts import TOKENS, client, edge, parts, prompt, whole

grpc = pytest.importorskip("grpc", reason="needs the extra cloud")

from cloud_servers import serving  # noqa: E402
from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: E402

from ee_diffusion.core.policy import Policy  # noqa: E402
from ee_diffusion.edge_cloud import wire_pb2 as wire  # noqa: E402
from ee_diffusion.edge_cloud.client import CloudLost  # noqa: E402
from ee_diffusion.edge_cloud.grpc_transport import RemoteTransport  # noqa: E402
from ee_diffusion.edge_cloud.rpc import SERVICE  # noqa: E402
from ee_diffusion.edge_cloud.tokens import Entry, Tokens  # noqa: E402

WIDTH = 32


def line(there, *, host: str = "127.0.0.1", **more) -> RemoteTransport:
    return RemoteTransport(f"{host}:{there.port}", parts("llama")[0][1], width=WIDTH, **more)


def ask_everything(transport: RemoteTransport, row: int, **more):
    with client(transport, **more) as cloud:
        return edge().generate(prompt(row), Policy(), cloud, max_new_tokens=TOKENS)


def test_the_file_of_tokens(tmp_path: Path):
    path = tmp_path / "tokens.json"
    path.write_text(
        json.dumps(
            {
                "plain": "a",
                "dated": {"client": "b", "expires": "2027-01-31T12:00:00+00:00"},
                "elsewhere": {"client": "c", "expires": "2027-01-31T12:00:00+05:00"},
                "for good": {"client": "d"},
            }
        )
    )
    tokens = Tokens.read(path)
    for now, known in [
        (datetime(2027, 1, 31, 6, 59, tzinfo=UTC), "abcd"),
        (datetime(2027, 1, 31, 7, 0, tzinfo=UTC), "abd"),
        (datetime(2027, 1, 31, 12, 0, tzinfo=UTC), "ad"),
    ]:
        tokens._now = lambda now=now: now
        said = [tokens.owner(token) for token in ("plain", "dated", "elsewhere", "for good")]
        assert "".join(owner for owner in said if owner) == known
    assert [tokens.owner(token) for token in ("", "Plain", "plain ", "plainx")] == [None] * 4
    for wrong in (
        {},
        {"": "a"},
        {"x": 1},
        {"x": {"client": "a", "until": "2027"}},
        {"x": {"expires": None}},
        {"x": {"client": "a", "expires": 5}},
        ["x"],
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"expected|with something else") as error:
            Tokens.read(path)
        assert "x" not in str(error.value).split()
    path.write_text(json.dumps({"x": {"client": "a", "expires": "2027-01-31T12:00:00"}}))
    with pytest.raises(ValueError, match="time zone"):
        Tokens.read(path)


def test_a_token_that_expires_within_an_answer_leaves_the_rest_to_the_edge():
    now = [datetime(2027, 1, 1, tzinfo=UTC)]
    tokens = Tokens({"secret": Entry("a", now[0] + timedelta(hours=1))}, now=lambda: now[0])
    with serving(tokens=tokens) as there, line(there, token="secret") as transport, client(transport) as cloud:
        ask, asked = cloud.ask, []

        def counting(position: int, *, vocabulary: int) -> tuple[int, float]:
            asked.append(position)
            if len(asked) == 4:
                now[0] += timedelta(hours=1)
            return ask(position, vocabulary=vocabulary)

        cloud.ask = counting  # type: ignore[method-assign]
        out = edge().generate(prompt(0), Policy(), cloud, max_new_tokens=TOKENS)
    assert out.sources[:3] == ["cloud"] * 3
    assert out.sources[4:] == ["own"] * (TOKENS - 4)
    assert tuple(out.sequences[0, : prompt(0).shape[1] + 3].tolist()) == whole(0)[: prompt(0).shape[1] + 3]
    assert all("UNAUTHENTICATED" in reason for _, reason in out.losses[1:])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Two pairs of (certificate, key) for localhost, each its own authority."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl")
    folder, found = tmp_path_factory.mktemp("tls"), []
    for name in ("ours", "another"):
        certificate, key = str(folder / f"{name}.pem"), str(folder / f"{name}.key")
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        command = ["openssl", "req", "-x509", *curve, *names, "-out", certificate, "-keyout", key]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        found.append((certificate, key))
    return found


def test_over_tls_the_tokens_are_the_same_and_strangers_stay_outside(certificates: list[tuple[str, str]]):
    (certificate, key), (another, _) = certificates
    tokens = Tokens({"secret": Entry("a")})
    with serving(tokens=tokens, certificate=certificate, key=key) as there:
        with line(there, host="localhost", token="secret", certificate=certificate) as transport:
            out = ask_everything(transport, 0)
        assert tuple(out.sequences[0].tolist()) == whole(0)
        assert out.sources == ["cloud"] * TOKENS
        for wrong in ({"certificate": another}, {"certificate": None}):  # another authority, clear text
            with line(there, token="secret", **wrong) as transport, pytest.raises(CloudLost, match="UNAVAILABLE"):
                transport.open(timeout=5)


def test_the_log_says_nothing_of_what_was_asked(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    with serving(tokens=Tokens({"secret": Entry("a")})) as there:
        with line(there, token="secret") as transport:
            session = transport.open(timeout=5)
            ask_everything(transport, 0)
        with line(there, token="wrong") as transport, pytest.raises(CloudLost):
            transport.open(timeout=5)
    lines = [record.getMessage() for record in caplog.records if record.name == "ee_diffusion.cloud"]
    assert len(lines) >= 2 * TOKENS
    for text in lines:
        said = json.loads(text)
        assert set(said) == {"call", "status", "milliseconds"}
        assert said["call"] in ("Open", "Upload", "Next", "Close")
    whole_log = "\n".join(record.getMessage() for record in caplog.records)
    for secret in (session, "secret", "wrong"):
        assert secret not in whole_log


def test_health_is_told_and_reflection_is_not():
    with serving() as there, line(there) as transport:
        stub = health_pb2_grpc.HealthStub(transport.channel)
        assert stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5).status == 1
        for version in ("v1", "v1alpha"):
            name = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            call = transport.channel.stream_stream(name, request_serializer=bytes, response_deserializer=bytes)
            with pytest.raises(grpc.RpcError) as error:
                list(call(iter([b""]), timeout=5))
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_who_goes_away_holds_no_thread():
    with serving() as there:
        with line(there) as transport:
            request = wire.NextRequest(session=transport.open(timeout=5), position=3)
            waiting = transport._calls["Next"].future(request, timeout=60)
            while not there._calls["127.0.0.1"]:
                time.sleep(0.01)
            waiting.cancel()
            begun = time.monotonic()
            while there._calls["127.0.0.1"] and time.monotonic() - begun < 30:
                time.sleep(0.01)
            assert there._calls["127.0.0.1"] == 0


def test_one_client_cannot_take_every_thread():
    """Eight questions that wait for states: two are let in, six are refused at once, another client gets its answers meanwhile."""
    tokens = Tokens({"greedy": Entry("a"), "secret": Entry("b")})
    with serving(tokens=tokens, threads=8, owner_calls=2) as there:
        with line(there, token="greedy") as greedy, line(there, token="secret") as transport:
            session, refused = greedy.open(timeout=5), []

            def wait() -> None:
                done: Future = Future()
                done.set_result(None)
                try:
                    greedy.next(session, 5, sending=done, timeout=60.0)
                except CloudLost as lost:
                    refused.append(str(lost))

            threads = [threading.Thread(target=wait) for _ in range(8)]
            for thread in threads:
                thread.start()
            out = ask_everything(transport, 1)
            while len(refused) < 6:
                time.sleep(0.01)
            assert sum(thread.is_alive() for thread in threads) == 2  # they wait still, and nobody waited for them
            there.worker.close("a", session)
            for thread in threads:
                thread.join(timeout=20)
    assert out.sources == ["cloud"] * TOKENS
    assert sum("RESOURCE_EXHAUSTED" in reason for reason in refused) == 6
    assert sum("NOT_FOUND" in reason for reason in refused) == 2
