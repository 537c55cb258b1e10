"""Servers of the tiny Llama's cloud part on loopback. Used by tests/decoding/test_cloud_*.py; needs the extra cloud."""

from __future__ import annotations

from split_parts import manager

from ee_diffusion.edge_cloud.server import CloudServer
from ee_diffusion.edge_cloud.sessions import ContextManager
from ee_diffusion.edge_cloud.worker import Metrics, Worker


def serving(cloud: ContextManager | None = None, *, batch: int = 16, slice: int = 64, **more) -> CloudServer:
    """A server on a free port, before a worker of its own."""
    metrics = Metrics()
    worker = Worker(manager() if cloud is None else cloud, metrics, batch=batch, slice=slice)
    return CloudServer(worker, **{"port": 0, "tokens": None, "metrics": metrics, "grace": 0.3} | more)
