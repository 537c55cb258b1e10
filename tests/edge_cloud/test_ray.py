"""The cloud's worker on two replicas under Ray Serve: sessions stay with theirs, and losing one costs no token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from language import model_named
from split_parts import EXITS, LIMITS, TOKENS, client, prompt, whole

ray = pytest.importorskip("ray", reason="needs the extra ray")
pytest.importorskip("grpc", reason="needs the extra cloud")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

from ray import serve  # noqa: E402

from ee_diffusion.core.policy import Policy  # noqa: E402
from ee_diffusion.edge_cloud.edge import Edge  # noqa: E402
from ee_diffusion.edge_cloud.grpc_transport import RemoteTransport  # noqa: E402
from ee_diffusion.edge_cloud.ray_serve import ReplicatedWorker, start_replicas  # noqa: E402
from ee_diffusion.edge_cloud.server import CloudServer  # noqa: E402
from ee_diffusion.edge_cloud.sessions import Refused  # noqa: E402
from ee_diffusion.edge_cloud.split import load_part, split_model  # noqa: E402

WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    split_model(model_named("llama"), folder, exits=EXITS)
    return folder


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[ReplicatedWorker]:
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    try:
        handle = start_replicas(str(folder), replicas=2, dtype="float32", limits=LIMITS, batch=16, slice=64)
        yield ReplicatedWorker(handle)
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> list[dict]:
    found = ray.util.list_named_actors(all_namespaces=True)
    return [actor for actor in found if actor["name"].startswith("SERVE_REPLICA::")]


def states(row: int) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.tensor([whole(row)])[:, :-1]
        return model_named("llama").model(ids, output_hidden_states=True).hidden_states[EXITS[0]][0]


def test_two_replicas_answer_and_losing_one_costs_no_token(worker: ReplicatedWorker, folder: Path):
    assert len(replicas()) == 2
    hidden, end = states(0).float(), len(states(0)) - 1
    sessions = [worker.open("a") for _ in range(12)]
    for session in sessions:
        worker.upload("a", session, 0, hidden=hidden)
    first = [worker.ask("a", session, end - 1) for session in sessions]
    assert {future.result(timeout=60)[0] for future in first} == {whole(0)[-2]}  # each found what it had uploaded
    with pytest.raises(Refused, match="no such session"):
        worker.ask("b", sessions[0], end).result(timeout=60)

    lost = replicas()[0]
    ray.kill(ray.get_actor(lost["name"], namespace=lost["namespace"]))
    told, refused = [], []
    for session in sessions:
        try:
            told.append(worker.ask("a", session, end).result(timeout=90)[0])
        except Refused as reason:
            refused.append(reason.kind)
    assert set(told) == {whole(0)[-1]}  # the other replica's sessions know all they knew
    assert refused
    assert set(refused) <= {"unknown", "unavailable"}
    assert len(told) + len(refused) == len(sessions)

    model, part = load_part(folder, "edge", dtype=torch.float32)
    server = CloudServer(worker, port=0, tokens=None)
    with server, RemoteTransport(f"127.0.0.1:{server.port}", part, width=WIDTH) as line:
        for row in range(4):
            with client(line, deadline=90.0) as cloud:
                out = Edge(model, part).generate(prompt(row), Policy(), cloud, max_new_tokens=TOKENS)
            assert out.sources == ["cloud"] * TOKENS
            assert tuple(out.sequences[0].tolist()) == whole(row)
