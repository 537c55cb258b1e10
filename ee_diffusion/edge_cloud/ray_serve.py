"""The cloud's worker on several replicas under Ray Serve: each session stays with one, and its loss costs no token.

python -m ee_diffusion.edge_cloud.ray_serve --model parts --port 50051 --replicas 2      (extra ray; other flags as `cloud serve`)

The gRPC server stays in front (tokens, limits of messages, TLS, health). Ray Serve's consistent hashing sends all calls of a session to one
replica, which holds its states, keys and values; Ray starts a lost replica anew. A session that was there is unknown then: the edge is
refused, answers itself, and sends everything again in a new session. Here: replicas and the way to them. Not here: what a replica does
(worker.py).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from torch import Tensor

from ee_diffusion.edge_cloud.codec import KINDS
from ee_diffusion.edge_cloud.commands import limits_of, serve_backend
from ee_diffusion.edge_cloud.flags import add_serve_flags
from ee_diffusion.edge_cloud.sessions import ContextManager, Limits, Refused
from ee_diffusion.edge_cloud.split import Part, load_part
from ee_diffusion.edge_cloud.worker import Metrics, Worker

_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_WAIT = 60.0  # seconds: beyond every deadline of an edge


class Replica:
    """One worker with its part of the model, and what may be asked of it. Refusals come back as values: (True, value) or (False, (kind,
    message))."""

    def __init__(self, folder: str, dtype: str, device: str, limits: Limits, batch: int, slice: int):
        manager = ContextManager(*load_part(folder, "cloud", dtype=KINDS[dtype], device=device), limits=limits)
        self.worker = Worker(manager, Metrics(), batch=batch, slice=slice)

    async def describe(self) -> tuple[Part, int]:
        """The part, and its width."""
        return self.worker.part, self.worker.width

    async def call(self, name: str, args: tuple, more: dict) -> tuple[bool, object]:
        """Any method of the worker but `ask`."""
        return self._told(lambda: getattr(self.worker, name)(*args, **more))

    async def ask(self, owner: str, session: str, position: int) -> tuple[bool, object]:
        """(token, seconds), once it is known; given up when the caller gives up."""
        try:
            return True, await asyncio.wrap_future(self.worker.ask(owner, session, position))
        except Refused as refused:
            return False, (refused.kind, str(refused))

    @staticmethod
    def _told(call: Callable[[], object]) -> tuple[bool, object]:
        try:
            return True, call()
        except Refused as refused:
            return False, (refused.kind, str(refused))


class ReplicatedWorker:
    """Stands in a `Worker`'s place before replicas. Limits are those of each replica. Methods as the worker's."""

    def __init__(self, handle: DeploymentHandle, *, threads: int = 256):
        self.handle = handle
        self.part, self.width = handle.describe.remote().result(timeout_s=_WAIT)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="replicas")

    def open(self, owner: str) -> str:
        session = secrets.token_hex(16)
        return self._call(session, "open", (owner,), {"session": session})

    def upload(self, owner: str, session: str, first: int, *, hidden: Tensor) -> int:
        return self._call(session, "upload", (owner, session, first), {"hidden": hidden})

    def rollback(self, owner: str, session: str, length: int) -> None:
        self._call(session, "rollback", (owner, session, length), {})

    def close(self, owner: str, session: str) -> None:
        self._call(session, "close", (owner, session), {})

    def ask(self, owner: str, session: str, position: int) -> Future:
        response = self.handle.options(session_id=session).ask.remote(owner, session, position)
        return self._pool.submit(_value, response)

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _call(self, session: str, name: str, args: tuple, more: dict):
        return _value(self.handle.options(session_id=session).call.remote(name, args, more))


def _value(response: DeploymentResponse):
    """What a replica said. Raises Refused, also where the replica is no more."""
    try:
        fine, said = response.result(timeout_s=_WAIT)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise Refused("unavailable", f"the replica of this session is lost: {type(error).__name__}") from error
    if not fine:
        raise Refused(*said)
    return said


def resources_of(device: str, replicas: int, *, gpus: float) -> dict[str, float]:
    """What Ray sets aside for a replica: half a core, and with `device` "cuda" an equal share of the cluster's `gpus`, a whole one at most
    (which one it is, Ray says).

    Raises:
        ValueError: another device than cpu and cuda; cuda on a cluster without a GPU.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}, expected cpu or cuda: Ray chooses each replica's GPU")
    if device == "cpu":
        return {"num_cpus": 0.5}
    if not gpus:
        raise ValueError("device='cuda', but the Ray cluster has no GPU")
    return {"num_cpus": 0.5, "num_gpus": 1.0 if gpus >= replicas else gpus / replicas}


def start_replicas(
    folder: str,
    *,
    replicas: int,
    dtype: str,
    limits: Limits,
    batch: int,
    slice: int,
    device: str = "cpu",
    name: str = "ee-diffusion-cloud",
) -> DeploymentHandle:
    """Deploy on the Ray cluster that `ray.init` chose (one on this machine where there is none), without any HTTP door. Raises ValueError
    as `resources_of`."""
    router = RequestRouterConfig(request_router_class=_ROUTER, request_router_kwargs={"num_fallback_replicas": 0})
    deployed = serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=1024,
        request_router_config=router,
        health_check_period_s=1.0,
        ray_actor_options=resources_of(device, replicas, gpus=ray.cluster_resources().get("GPU", 0.0)),
    )(Replica)
    serve.start(proxy_location="Disabled")
    return serve.run(deployed.bind(folder, dtype, device, limits, batch, slice), name=name, route_prefix=None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_serve_flags(parser)
    parser.add_argument("--replicas", type=int, required=True, help="Workers, each with the whole cloud part.")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ray.init(include_dashboard=False, ignore_reinit_error=True)
    what = {"limits": limits_of(options), "replicas": options.replicas}
    what |= {name: getattr(options, name) for name in ("dtype", "device", "batch", "slice")}
    try:
        serve_backend(ReplicatedWorker(start_replicas(options.model, **what)), options)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
