"""The edge's transport over gRPC: one channel, calls with deadlines. Sessions and retries are client.py's."""

from __future__ import annotations

import ipaddress
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import grpc

from ee_diffusion.edge_cloud import wire_pb2 as wire
from ee_diffusion.edge_cloud.client import CloudLost, Upload
from ee_diffusion.edge_cloud.rpc import CALLS, ENCODINGS, SERVICE, VERSION
from ee_diffusion.edge_cloud.split import Part


class RemoteTransport:
    """Calls a cloud at `address` (host:port). `token`: authenticates; `certificate`: file of the authority that signed the server's (TLS).

    Warns if a token would travel in clear text beyond this machine. A context manager.
    """

    def __init__(
        self,
        address: str,
        part: Part,
        *,
        width: int,
        token: str | None = None,
        certificate: str | None = None,
    ):
        options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
        if certificate is not None:
            credentials = grpc.ssl_channel_credentials(Path(certificate).read_bytes())
            self.channel = grpc.secure_channel(address, credentials, options=options)
        else:
            if token is not None and not is_loopback(address.rsplit(":", 1)[0]):
                warnings.warn(f"the token travels to {address} in clear text: give a certificate", stacklevel=2)
            self.channel = grpc.insecure_channel(address, options=options)
        self.terms = part.terms | {"width": str(width)}
        self._metadata = [] if token is None else [("authorization", f"Bearer {token}")]
        self._calls = {
            name: self.channel.unary_unary(
                f"/{SERVICE}/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=reply.FromString,
            )
            for name, (request, reply) in CALLS.items()
        }

    def __enter__(self) -> RemoteTransport:
        return self

    def __exit__(self, *exception) -> None:
        self.channel.close()

    def open(self, *, timeout: float) -> str:
        request = wire.OpenRequest(version=VERSION, terms=self.terms)
        return self._call("Open", request, timeout).session

    def upload(self, session: str, upload: Upload, *, timeout: float) -> None:
        request = wire.UploadRequest(
            session=session,
            first=upload.first,
            count=upload.count,
            encoding=ENCODINGS[upload.kind],
            payload=upload.payload,
        )
        self._call("Upload", request, timeout)

    def next(self, session: str, position: int, *, sending: Future, timeout: float) -> tuple[int, float]:
        request = wire.NextRequest(session=session, position=position)
        under_way = self._said(
            "Next", lambda: self._calls["Next"].future(request, timeout=timeout, metadata=self._metadata)
        )
        sending.add_done_callback(lambda sent: under_way.cancel() if _failed(sent) else None)
        reply = self._said("Next", under_way.result)
        if reply.position != position:
            raise CloudLost(f"wrong: an answer for position {reply.position}, expected {position}")
        return reply.token, reply.seconds

    def close(self, session: str, *, timeout: float) -> None:
        self._call("Close", wire.CloseRequest(session=session), timeout)

    def _call(self, name: str, request, timeout: float):
        return self._said(name, lambda: self._calls[name](request, timeout=timeout, metadata=self._metadata))

    def _said(self, name: str, call: Callable):
        """What a call gives. Raises CloudLost for whatever goes wrong."""
        try:
            return call()
        except grpc.FutureCancelledError as error:
            raise CloudLost(f"{name} was given up: the states did not arrive") from error
        except (grpc.RpcError, ValueError) as error:  # ValueError: the channel was closed
            said = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
            raise CloudLost(f"{name} failed, {said}") from error


def _failed(sent: Future) -> bool:
    return sent.cancelled() or sent.exception() is not None


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
