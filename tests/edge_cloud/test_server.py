"""The server over real gRPC on loopback: equal tokens, ownership, faults, fuzz, drain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from language import model_named
from split_parts import EXITS, TOKENS, client, edge, parts, prompt, whole
from tiny_language import text_folder
from tree import ROOT

grpc = pytest.importorskip("grpc", reason="needs the extra cloud")

from cloud_servers import serving  # noqa: E402
from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: E402

from ee_diffusion.cli.main import main  # noqa: E402
from ee_diffusion.core.policy import Policy  # noqa: E402
from ee_diffusion.decoding.heads import LearnedExits  # noqa: E402
from ee_diffusion.edge_cloud import wire_pb2 as wire  # noqa: E402
from ee_diffusion.edge_cloud.client import CloudLost, Upload  # noqa: E402
from ee_diffusion.edge_cloud.codec import encode  # noqa: E402
from ee_diffusion.edge_cloud.grpc_transport import RemoteTransport  # noqa: E402
from ee_diffusion.edge_cloud.rpc import SERVICE  # noqa: E402
from ee_diffusion.edge_cloud.server import CloudServer  # noqa: E402
from ee_diffusion.edge_cloud.split import load_part, split_model  # noqa: E402
from ee_diffusion.edge_cloud.tokens import Entry, Tokens  # noqa: E402

WIDTH = 32


def line(there: CloudServer | int, **more) -> RemoteTransport:
    port = there if isinstance(there, int) else there.port
    return RemoteTransport(f"127.0.0.1:{port}", parts("llama")[0][1], width=WIDTH, **more)


def sent() -> Future:
    """Nothing is on its way."""
    future: Future = Future()
    future.set_result(None)
    return future


def ask_everything(transport, row: int, **more):
    with client(transport, **more) as cloud:
        return edge().generate(prompt(row), Policy(), cloud, max_new_tokens=TOKENS)


def test_over_the_wire_the_tokens_are_the_whole_models():
    with serving() as there, line(there) as transport:
        out = ask_everything(transport, 0)
        assert tuple(out.sequences[0].tolist()) == whole(0)
        assert out.sources == ["cloud"] * TOKENS
        assert there.worker.manager.bytes == 0  # closed at the end
        stub = health_pb2_grpc.HealthStub(transport.channel)
        assert stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5).status == 1


def test_clients_at_once_get_their_own_answers():
    rows, found = [0, 1, 2, 3] * 2, {}

    def one(place: int, port: int) -> None:
        with line(port) as transport:
            found[place] = ask_everything(transport, rows[place]).sequences[0].tolist()

    edges = parts("llama")  # loaded before the threads start
    with serving() as there:
        assert len(edges) == 2
        for place in range(4):  # edges patch their model while they run: one at a time here, in processes elsewhere
            one(place, there.port)
        hidden = {row: _states(row) for row in set(rows)}
        threads = [
            threading.Thread(target=_raw, args=(there.port, rows[i], hidden[rows[i]], found, i)) for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        text = there.metrics.registry.get_sample_value("ee_cloud_tokens_total")
    assert all(found[place] == list(whole(rows[place])) for place in range(8))
    assert text == 12 * TOKENS


def _states(row: int) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.tensor([whole(row)])[:, :-1]
        return model_named("llama").model(ids, output_hidden_states=True).hidden_states[EXITS[0]][0]


def _raw(port: int, row: int, hidden: torch.Tensor, found: dict, place: int) -> None:
    """A client without layers: it uploads known states and asks."""
    said = prompt(row)[0].tolist()
    with line(port) as transport:
        session = transport.open(timeout=20)
        begun = len(said)
        for at in range(len(hidden)):
            transport.upload(session, Upload(at, 1, "float32", encode(hidden[at : at + 1], kind="float32")), timeout=20)
            if at >= begun - 1:
                said.append(transport.next(session, at, sending=sent(), timeout=20)[0])
        transport.close(session, timeout=20)
    found[place] = said


def test_tokens_and_ownership():
    now = [datetime(2027, 1, 1, tzinfo=UTC)]
    until = Entry("a", now[0] + timedelta(hours=1))
    with serving(tokens=Tokens({"secret": until, "other": Entry("b")}, now=lambda: now[0])) as there:
        for token in (None, "wrong", ""):
            with line(there, token=token) as transport, pytest.raises(CloudLost, match="UNAUTHENTICATED"):
                transport.open(timeout=5)
        with line(there, token="secret") as mine, line(there, token="other") as theirs:
            session = mine.open(timeout=5)
            for forged in (session, "0" * 32, ""):
                with pytest.raises(CloudLost, match="NOT_FOUND"):
                    theirs.next(forged, 0, sending=sent(), timeout=5)
                with pytest.raises(CloudLost, match="NOT_FOUND"):
                    theirs.close(forged, timeout=5)
            now[0] += timedelta(hours=1)
            with pytest.raises(CloudLost, match="UNAUTHENTICATED"):
                mine.next(session, 0, sending=sent(), timeout=5)


def test_what_is_malformed_is_refused_and_late_is_late():
    with serving(largest=2**16) as there, line(there) as transport:
        session = transport.open(timeout=5)
        good = encode(torch.zeros(2, WIDTH), kind="float32")
        bad = torch.full((1, WIDTH), torch.nan).numpy().tobytes()
        for upload, reason in [
            (Upload(0, 2, "float32", good[:-1]), "INVALID"),
            (Upload(0, 3, "float32", good), "INVALID"),
            (Upload(0, 1, "float32", bad), "INVALID.*NaN"),
            (Upload(63, 2, "float32", good), "RESOURCE_EXHAUSTED"),
            (Upload(0, 2**20, "float32", b"\0" * 2**17), "RESOURCE_EXHAUSTED"),
        ]:
            with pytest.raises(CloudLost, match=reason):
                transport.upload(session, upload, timeout=5)
        begun = time.monotonic()
        with pytest.raises(CloudLost, match="DEADLINE_EXCEEDED"):
            transport.next(session, 0, sending=sent(), timeout=0.2)
        assert time.monotonic() - begun < 3
        wrong = wire.OpenRequest(version=1, terms=transport.terms)
        with pytest.raises(CloudLost, match="version 1, expected 2"):
            transport._call("Open", wrong, 5)
        for name in transport.terms:
            for terms in (transport.terms | {name: "x"}, {**transport.terms, name + "s": "x"}):
                wrong = wire.OpenRequest(version=2, terms=terms)
                with pytest.raises(CloudLost, match=f"differs from the cloud's in {name}"):
                    transport._call("Open", wrong, 5)
            wrong = wire.OpenRequest(
                version=2, terms={key: transport.terms[key] for key in transport.terms if key != name}
            )
            with pytest.raises(CloudLost, match=rf"in {name} \(came None, expected"):
                transport._call("Open", wrong, 5)


def test_a_server_that_dies_and_comes_back():
    """At every token the server is gone once: the answer is complete, and the cloud is used again."""
    there = serving().__enter__()
    port = there.port
    try:
        for token in (0, 2, TOKENS - 1):
            with line(port) as transport, client(transport, deadline=2.0) as cloud:
                ask, asked = cloud.ask, []

                def dying(position, *, vocabulary, ask=ask, asked=asked, token=token):
                    nonlocal there
                    asked.append(position)
                    if len(asked) == token + 1:
                        there.grace = None
                        there.__exit__()
                    try:
                        return ask(position, vocabulary=vocabulary)
                    finally:
                        if len(asked) == token + 1:
                            there = serving(port=port).__enter__()

                cloud.ask = dying
                out = edge().generate(prompt(0), Policy(), cloud, max_new_tokens=TOKENS)
            assert out.sequences.shape[1] == prompt(0).shape[1] + TOKENS
            assert out.sources[token] == "own"
            assert out.losses[0][0] == token
            with torch.no_grad():
                logits = model_named("llama")(out.sequences).logits[0, -TOKENS - 1 : -1].argmax(-1)
            said = out.sequences[0, -TOKENS:]
            assert all(a == b for a, b, source in zip(said, logits, out.sources, strict=True) if source == "cloud")
    finally:
        there.__exit__()


def test_one_session_asked_twice_at_once_gets_both_answers():
    hidden = _states(0)
    with serving() as there:
        cloud = there.worker.manager
        with there.worker.changed:  # both wait for the same pass
            session = cloud.open("a")
            cloud.upload("a", session, 0, hidden=hidden)
            asked = [there.worker.ask("a", session, len(hidden) - 1) for _ in range(2)]
        assert {answer.result(timeout=20)[0] for answer in asked} == {whole(0)[-1]}


def test_clear_text_tokens_beyond_this_machine_are_warned_about():
    with pytest.warns(UserWarning, match="clear text"):
        RemoteTransport("192.0.2.1:1", parts("llama")[0][1], width=WIDTH, token="x").channel.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RemoteTransport("localhost:1", parts("llama")[0][1], width=WIDTH, token="x").channel.close()
    with pytest.raises(ValueError, match="expected both or neither"):
        serving(certificate="a")


@pytest.mark.slow
def test_the_command_serves_and_drains_on_sigterm(tmp_path: Path):
    split_model(model_named("llama"), tmp_path, exits=EXITS)
    command = [sys.executable, "-m", "ee_diffusion.cli.main", "cloud", "serve"]
    process = subprocess.Popen(
        [*command, "--model", str(tmp_path), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        lines = iter(process.stderr.readline, "")
        port = next(json.loads(line)["listening"] for line in lines if line.startswith('{"listening"'))
        part = load_part(tmp_path, "edge", dtype=torch.float32)[1]  # the server's default
        with RemoteTransport(f"127.0.0.1:{port}", part, width=WIDTH) as transport:
            assert len(transport.open(timeout=10)) == 32
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()


def test_the_command_generates_with_trained_exits(tmp_path: Path, capsys: pytest.CaptureFixture):
    model = str(text_folder(tmp_path) / "model")
    assert main(["edge", "split", "--model", model, "--exits", *map(str, EXITS), "--output", str(tmp_path)]) == 0
    LearnedExits((1, *EXITS), 32).save(tmp_path / "exits.safetensors")
    command = ["edge", "generate", "--model", str(tmp_path), "--tokenizer", model, "--prompt", "w3 w4"]
    command += ["--max_new_tokens", "3", "--threshold", "0.0"]
    capsys.readouterr()
    assert main([*command, "--exits", str(tmp_path / "exits.safetensors")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"].keys() == {"exit 0"}
    assert main([*command, "--exits", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main([*command, "--cloud", "localhost"]) == 2
    assert "host:port" in capsys.readouterr().err
    assert main([*command[:-2], "--always_ask"]) == 2
    assert "expected somebody to ask" in capsys.readouterr().err
    assert main([*command[:-2], "--always_ask", "--cloud", "127.0.0.1:1", "--deadline", "0.2"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1])["tokens"] == {"own": 3}
    assert "warning: the cloud was asked" in told.err


def test_a_call_that_breaks_is_not_counted_as_answered(monkeypatch: pytest.MonkeyPatch):
    with serving() as there, line(there.port) as transport:

        def broken(owner: str):
            raise RuntimeError("broken")

        monkeypatch.setattr(there.worker, "open", broken)
        with pytest.raises(CloudLost, match="UNKNOWN"):
            transport.open(timeout=5)
        counted = {
            status: there.metrics.registry.get_sample_value("ee_cloud_calls_total", {"call": "Open", "status": status})
            for status in ("UNKNOWN", "OK")
        }
    assert counted == {"UNKNOWN": 1, "OK": None}
