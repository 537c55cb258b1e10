"""What one client can take from the others: sessions, memory, calls; who is one client; what a server says that is open to all."""

from __future__ import annotations

import threading
import time
import warnings
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from language import model_named
from split_parts import EXITS, TOKENS, client, edge, manager, parts, prompt

grpc = pytest.importorskip("grpc", reason="needs the extra cloud")

from cloud_servers import serving  # noqa: E402

from ee_diffusion.cli.main import main, parser  # noqa: E402
from ee_diffusion.core.policy import Policy  # noqa: E402
from ee_diffusion.edge_cloud import server as server_module  # noqa: E402
from ee_diffusion.edge_cloud.client import CloudLost  # noqa: E402
from ee_diffusion.edge_cloud.grpc_transport import RemoteTransport  # noqa: E402
from ee_diffusion.edge_cloud.server import client_of  # noqa: E402
from ee_diffusion.edge_cloud.sessions import SPARED, Limits, Refused  # noqa: E402
from ee_diffusion.edge_cloud.split import split_model  # noqa: E402
from ee_diffusion.edge_cloud.tokens import Entry, Tokens  # noqa: E402

BIG = Limits(sessions=256, owner_sessions=64, total_bytes=10**9, positions=64, idle_seconds=300.0)


def line(there, *, host: str = "127.0.0.1") -> RemoteTransport:
    return RemoteTransport(f"{host}:{there.port}", parts("llama")[0][1], width=32)


def sent() -> Future:
    """Nothing is on its way."""
    future: Future = Future()
    future.set_result(None)
    return future


def test_dropped_sessions_of_a_client_lock_out_nobody():
    now = [0.0]
    cloud = manager(limits=BIG, clock=lambda: now[0])
    others = [cloud.open("b")]  # idle for longer than any of a's
    dropped = [cloud.open("a") for _ in range(64)]
    with pytest.raises(Refused, match="65 sessions are open, 64 of them"):
        cloud.open("a")
    others += [cloud.open("b")]  # at once
    now[0] = SPARED - 0.1
    cloud.upload("a", dropped[0], 0, hidden=torch.zeros(1, 32))  # is still in use
    now[0] = SPARED
    fresh = [cloud.open("a") for _ in range(63)]  # each in the place of the idlest
    assert set(cloud.sessions) == {dropped[0], *fresh, *others}
    with pytest.raises(Refused, match="64 of them"):
        cloud.open("a")


def test_dropped_sessions_of_many_clients_make_room_for_another():
    now = [0.0]
    cloud = manager(limits=BIG, clock=lambda: now[0])
    for owner in "abcd":
        opened = [cloud.open(owner) for _ in range(64)]
        now[0] += 0.1
        assert len(cloud.sessions) <= 256
    with pytest.raises(Refused, match="256 sessions are open, 0 of them"):
        cloud.open("e")
    now[0] = SPARED
    cloud.open("e")
    assert set(opened) < set(cloud.sessions)  # of the last of them, idle for less
    assert sum(context.owner == "a" for context in cloud.sessions.values()) == 63


def test_memory_of_a_client_has_a_limit_and_idle_sessions_free_theirs():
    now, states = [0.0], torch.zeros(10, 32)
    one = manager().bytes_per_position
    limits = Limits(8, 8, 40 * one, 64, 300.0, owner_bytes=20 * one)
    cloud = manager(limits=limits, clock=lambda: now[0])
    mine = [cloud.open("a") for _ in range(3)]
    for session in mine[:2]:
        cloud.upload("a", session, 0, hidden=states)
    with pytest.raises(Refused, match=f"{20 * one} bytes are held of {20 * one}"):
        cloud.upload("a", mine[2], 0, hidden=states)
    other = cloud.open("b")
    cloud.upload("b", other, 0, hidden=states)
    now[0] = 1.0
    cloud.upload("a", mine[1], 0, hidden=states)  # nothing new, but it is in use
    now[0] = SPARED
    assert cloud.upload("a", mine[2], 0, hidden=states) == 10  # mine[0] was idle
    assert set(cloud.sessions) == {*mine[1:], other}
    third = cloud.open("c")
    now[0] = 2 * SPARED
    cloud.upload("b", other, 0, hidden=states)
    assert (
        cloud.upload("c", third, 0, hidden=states.repeat(2, 1)) == 20
    )  # 30 and 20 are more than 40: the idlest of all went
    assert set(cloud.sessions) == {mine[2], other, third}
    with pytest.raises(Refused, match="no room for 41 more"):
        cloud.upload("c", cloud.open("c"), 0, hidden=torch.zeros(41, 32))
    assert {"b", "c"} <= {context.owner for context in cloud.sessions.values()}


@pytest.mark.parametrize(
    "peer, name",
    [
        ("ipv4:192.0.2.7:5001", "192.0.2.7"),
        ("ipv6:%5B2001:db8:0:7::9%5D:5001", "2001:db8:0:7::/64"),
        ("ipv6:[2001:db8:0:7:8::1]:5001", "2001:db8:0:7::/64"),
        ("ipv6:[2001:db8:0:8::1]:5001", "2001:db8:0:8::/64"),
        ("ipv6:[::ffff:192.0.2.7]:5001", "192.0.2.7"),
        ("ipv6:[fe80::1%25eth0]:5001", "fe80::/64"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
    ],
)
def test_without_tokens_an_address_is_a_client(peer: str, name: str):
    assert client_of(peer) == name


def from_elsewhere(monkeypatch: pytest.MonkeyPatch, *, user_agent: str) -> None:
    """Calls of channels with that user agent come from another address, as the server sees it."""
    owner = server_module.CloudServer._owner

    class Elsewhere:
        def __init__(self, context):
            self._context = context

        def peer(self) -> str:
            return "ipv4:192.0.2.9:1234"

        def __getattr__(self, name: str):
            return getattr(self._context, name)

    def seen(self, context):
        there = user_agent in dict(context.invocation_metadata()).get("user-agent", "")
        return owner(self, Elsewhere(context) if there else context)

    monkeypatch.setattr(server_module.CloudServer, "_owner", seen)


def elsewhere(there) -> RemoteTransport:
    made = line(there)
    made.channel.close()
    made.channel = grpc.insecure_channel(f"127.0.0.1:{there.port}", [("grpc.primary_user_agent", "elsewhere")])
    for name, (request, reply) in server_module.CALLS.items():
        made._calls[name] = made.channel.unary_unary(
            f"/{server_module.SERVICE}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=reply.FromString,
        )
    return made


def test_an_anonymous_client_cannot_lock_out_another_address(monkeypatch: pytest.MonkeyPatch):
    """64 sessions that are dropped and 192 calls that wait, all of one address, and another address is served at once."""
    from_elsewhere(monkeypatch, user_agent="elsewhere")
    with serving(manager(limits=BIG)) as there, line(there) as greedy, elsewhere(there) as transport:
        sessions = [greedy.open(timeout=5) for _ in range(64)]
        questions = [server_module.wire.NextRequest(session=session, position=5) for session in sessions * 3]
        waiting = [greedy._calls["Next"].future(question, timeout=60) for question in questions]
        begun = time.monotonic()
        while there._calls["127.0.0.1"] < 192:
            assert time.monotonic() - begun < 20
            time.sleep(0.01)
        with pytest.raises(CloudLost, match="RESOURCE_EXHAUSTED: 192 calls"):
            greedy.open(timeout=5)
        with client(transport) as cloud:
            out = edge().generate(prompt(0), Policy(), cloud, max_new_tokens=TOKENS)
        assert out.sources == ["cloud"] * TOKENS
        with pytest.raises(CloudLost, match="NOT_FOUND"):  # sessions are their address's
            transport.close(sessions[0], timeout=5)
        for call in waiting:
            call.cancel()


def test_a_question_that_waits_gives_way_to_its_clients_next_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "SPARED", 0.3)
    with serving(manager(limits=BIG), owner_calls=4) as there, line(there) as greedy, line(there) as transport:
        session, ended = greedy.open(timeout=5), []

        def wait() -> None:
            try:
                greedy.next(session, 5, sending=sent(), timeout=60.0)
            except CloudLost as lost:
                ended.append(str(lost))

        threads = [threading.Thread(target=wait) for _ in range(4)]
        for thread in threads:
            thread.start()
        while there._calls["127.0.0.1"] < 4:
            time.sleep(0.01)
        with pytest.raises(CloudLost, match="RESOURCE_EXHAUSTED"):
            transport.open(timeout=5)
        time.sleep(0.35)
        with client(transport) as cloud:
            out = edge().generate(prompt(1), Policy(), cloud, max_new_tokens=TOKENS)
        assert out.sources == ["cloud"] * TOKENS
        assert 1 <= len(ended) <= 2  # an upload and a question at once
        assert all("RESOURCE_EXHAUSTED" in said and "waited longest" in said for said in ended)
        there.worker.close("127.0.0.1", session)
        for thread in threads:
            thread.join(timeout=20)
        assert not there._calls
        assert not there._waiting


def test_several_questions_give_way_at_once(monkeypatch: pytest.MonkeyPatch):
    """None of them trips over another one's end."""
    monkeypatch.setattr(server_module, "SPARED", 0.0)
    with serving(manager(limits=BIG), owner_calls=3) as there, line(there) as greedy:
        session = greedy.open(timeout=5)
        question = server_module.wire.NextRequest(session=session, position=5)
        waiting = [greedy._calls["Next"].future(question, timeout=60) for _ in range(3)]
        while len(there._waiting.get("127.0.0.1", ())) < 3:
            time.sleep(0.01)
        with there._counting:
            assert all(there._give_way("127.0.0.1") for _ in range(3))
        said = [call.exception(timeout=20).code().name for call in waiting]
        assert said == ["RESOURCE_EXHAUSTED"] * 3
        assert not there._waiting


@pytest.mark.parametrize("tokens", [None, Tokens({"secret": Entry("a")})])
def test_a_server_that_is_open_to_others_says_what_it_lacks(tokens: Tokens | None):
    """Nothing listens: the address (of documentation) is not this machine's."""
    with (
        pytest.warns(UserWarning, match="beyond this machine, without") as warned,
        pytest.raises(ValueError, match="cannot"),
    ):
        serving(host="192.0.2.1", tokens=tokens)
    said = str(warned[0].message)
    assert ("anybody may ask" in said) == (tokens is None)
    assert "clear text" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there = serving(tokens=tokens)
        there.worker.stop()


def test_devices_are_said_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture):
    split_model(model_named("llama"), tmp_path, exits=EXITS)
    serve = ["cloud", "serve", "--model", str(tmp_path), "--port", "0"]
    generate = [
        "edge",
        "generate",
        "--model",
        str(tmp_path),
        "--tokenizer",
        "x",
        "--prompt",
        "x",
        "--max_new_tokens",
        "1",
    ]
    for command in (serve, [*generate, "--always_ask", "--cloud", "127.0.0.1:1"]):
        assert parser().parse_args(command).device == "cpu"
        for device in ("cuda:99", "nowhere"):
            assert main([*command, "--device", device]) == 2
            assert f"device='{device}' cannot be used here" in capsys.readouterr().err


@pytest.mark.parametrize("gpus, replicas, share", [(2.0, 2, 1.0), (8.0, 2, 1.0), (1.0, 4, 0.25), (3.0, 4, 0.75)])
def test_replicas_share_the_gpus(gpus: float, replicas: int, share: float):
    ray_serve = pytest.importorskip("ee_diffusion.edge_cloud.ray_serve", reason="needs the extra ray")
    assert ray_serve.resources_of("cuda", replicas, gpus=gpus) == {"num_cpus": 0.5, "num_gpus": share}
    assert ray_serve.resources_of("cpu", replicas, gpus=gpus) == {"num_cpus": 0.5}
    for device, there in (("cuda", 0.0), ("cuda:1", gpus)):
        with pytest.raises(ValueError, match=r"no GPU|Ray chooses"):
            ray_serve.resources_of(device, replicas, gpus=there)
