"""A tiny Llama in two parts, its clouds and edges. Used by tests/decoding/test_cloud*.py."""

from __future__ import annotations

import functools
import tempfile

import torch
from language import LENGTHS, alone, model_named, plain
from torch import Tensor

from ee_diffusion.edge_cloud.client import CloudClient, LocalTransport
from ee_diffusion.edge_cloud.edge import Edge
from ee_diffusion.edge_cloud.sessions import ContextManager, Limits
from ee_diffusion.edge_cloud.split import load_part, split_model

EXITS, TOKENS = (2, 4), 6
LIMITS = Limits(sessions=80, owner_sessions=80, total_bytes=10**8, positions=64, idle_seconds=60.0)


@functools.cache
def parts(name: str):
    """(edge model, edge part), (cloud model, cloud part), in float64 as the whole model."""
    with tempfile.TemporaryDirectory() as folder:
        split_model(model_named(name), folder, exits=EXITS)
        return tuple(load_part(folder, side, dtype=torch.float64) for side in ("edge", "cloud"))


def edge(name: str = "llama") -> Edge:
    return Edge(*parts(name)[0])


def manager(name: str = "llama", **more) -> ContextManager:
    return ContextManager(*parts(name)[1], **{"limits": LIMITS} | more)


def client(transport=None, *, kind: str = "float32", **more) -> CloudClient:
    transport = LocalTransport(manager()) if transport is None else transport
    return CloudClient(transport, kind=kind, **{"deadline": 10.0, "retry_after": 0.0} | more)


def prompt(row: int) -> Tensor:
    """(1, N) one of the prompts of different lengths."""
    return alone(row % len(LENGTHS))["input_ids"]


@functools.cache
def whole(row: int, name: str = "llama") -> tuple[int, ...]:
    """What the whole model says to a prompt."""
    return tuple(plain(model_named(name), alone(row), max_new_tokens=TOKENS).sequences[0].tolist())
