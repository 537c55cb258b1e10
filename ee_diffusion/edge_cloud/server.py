"""The cloud's server: gRPC calls in threads, one worker that answers all ready questions in one pass.

Threads and not asyncio: the pass holds a thread whatever is done around it (torch releases the interpreter lock), and calls do nothing but
check, store and wait. Here: calls, tokens, drain. Not here: batches (worker.py), what a session is (sessions.py).
"""

from __future__ import annotations

import ipaddress
import json
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import start_http_server

from ee_diffusion.edge_cloud import wire_pb2 as wire
from ee_diffusion.edge_cloud.codec import decode
from ee_diffusion.edge_cloud.grpc_transport import is_loopback
from ee_diffusion.edge_cloud.rpc import CALLS, ENCODINGS, SERVICE, STATUS, VERSION
from ee_diffusion.edge_cloud.sessions import SPARED, Refused
from ee_diffusion.edge_cloud.split import disagreement
from ee_diffusion.edge_cloud.tokens import Tokens
from ee_diffusion.edge_cloud.worker import LOG, Backend, Metrics


class CloudServer:
    """A gRPC server before a worker. `tokens`: who may ask (None: anybody, each address is a client); `port` 0: any free one; `metrics`:
    the worker's own, if it has some.

    host: loopback unless told otherwise; certificate and key: files for TLS. `largest`: bytes of a message; `owner_calls`: calls of one
    client at once, below `threads`, so that none can take them all; beyond them its question that has waited longest gives way. A context
    manager: leaving drains for `grace` seconds and ends the worker. Warns where it can be reached from elsewhere without tokens or TLS.

    Raises:
        ValueError: one of certificate and key without the other; an address that cannot be had.
    """

    def __init__(
        self,
        worker: Backend,
        *,
        port: int,
        tokens: Tokens | None,
        metrics: Metrics | None = None,
        host: str = "127.0.0.1",
        certificate: str | None = None,
        key: str | None = None,
        threads: int = 256,
        owner_calls: int = 192,
        largest: int = 16 * 2**20,
        grace: float = 5.0,
        log_calls: bool = True,
    ):
        if (certificate is None) != (key is None):
            raise ValueError(f"certificate={certificate}, key={key}, expected both or neither")
        lacking = [] if tokens is not None else ["tokens (anybody may ask)"]
        lacking += [] if certificate is not None else ["a certificate (states and tokens travel in clear text)"]
        if lacking and not is_loopback(host):
            warnings.warn(f"listening at {host}, beyond this machine, without {' and '.join(lacking)}", stacklevel=2)
        self.log_calls = log_calls
        self.worker, self.tokens, self.grace = worker, tokens, grace
        self.metrics = Metrics() if metrics is None else metrics
        self._calls, self._counting, self.owner_calls = Counter[str](), threading.Lock(), owner_calls
        self._waiting: dict[str, dict[threading.Event, float]] = {}  # by owner: what ends a question's wait, since when
        options = [("grpc.max_receive_message_length", largest), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(ThreadPoolExecutor(threads), options=options, maximum_concurrent_rpcs=2 * threads)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, self._handlers()),))
        self.port = self._bind(f"{host}:{port}", certificate, key)

    def __enter__(self) -> CloudServer:
        self._server.start()
        self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        return self

    def __exit__(self, *exception) -> None:
        self._health.enter_graceful_shutdown()
        self._server.stop(self.grace).wait()
        self.worker.stop()

    def _bind(self, address: str, certificate: str | None, key: str | None) -> int:
        try:
            if certificate is None or key is None:
                return self._server.add_insecure_port(address)
            pair = (Path(key).read_bytes(), Path(certificate).read_bytes())
            return self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except RuntimeError as error:
            self.worker.stop()
            raise ValueError(f"cannot listen at {address}: {error}") from error

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        return {
            name: grpc.unary_unary_rpc_method_handler(
                self._wrapped(name),
                request_deserializer=request.FromString,
                response_serializer=reply.SerializeToString,
            )
            for name, (request, reply) in CALLS.items()
        }

    def _wrapped(self, name: str):
        """The call with its owner found out, counted and logged; nothing of its content is logged."""
        function = {
            "Open": self._open,
            "Upload": self._upload,
            "Next": self._next,
            "Rollback": self._rollback,
            "Close": self._close,
        }[name]

        def call(request, context: grpc.ServicerContext):
            status, begun = grpc.StatusCode.UNKNOWN, time.monotonic()  # what grpc says of any other exception
            try:
                with self._owner(context) as owner:
                    reply = function(owner, request, context)
                status = grpc.StatusCode.OK
                return reply
            except Refused as refused:
                status = STATUS[refused.kind]
                context.abort(status, str(refused))
            except PermissionError:
                status = grpc.StatusCode.UNAUTHENTICATED
                context.abort(status, "no token that is known here, or one that has expired")
            except (Late, CancelledError) as error:
                delayed = isinstance(error, Late)
                status = grpc.StatusCode.DEADLINE_EXCEEDED if delayed else grpc.StatusCode.UNAVAILABLE
                context.abort(status, "not in time" if delayed else "the server ends")
            finally:
                self._count(name, status, time.monotonic() - begun)

        return call

    def _count(self, name: str, status: grpc.StatusCode, seconds: float) -> None:
        self.metrics.calls.labels(name, status.name).inc()
        if self.log_calls:
            LOG.info(json.dumps({"call": name, "status": status.name, "milliseconds": round(1e3 * seconds, 2)}))

    @contextmanager
    def _owner(self, context: grpc.ServicerContext) -> Iterator[str]:
        """Who calls, counted while the call lasts. Raises PermissionError, or Refused where the client has too many calls already and none
        gives way."""
        owner: str | None = client_of(context.peer())
        if self.tokens is not None:
            said = dict(context.invocation_metadata()).get("authorization", "")
            owner = self.tokens.owner(said.removeprefix("Bearer "))
        if owner is None:
            raise PermissionError
        with self._counting:
            if self._calls[owner] >= self.owner_calls and not self._give_way(owner):
                raise Refused("limit", f"{self._calls[owner]} calls of this client are under way")
            self._calls[owner] += 1
        try:
            yield owner
        finally:
            with self._counting:
                self._calls[owner] -= 1
                if not self._calls[owner]:
                    del self._calls[owner]

    def _give_way(self, owner: str) -> bool:
        """End the client's question that has waited longest, unless it began a moment ago -> whether it was ended."""
        waiting = self._waiting.get(owner, {})
        longest = min(waiting, key=waiting.__getitem__, default=None)
        if longest is None or waiting[longest] > time.monotonic() - SPARED:
            return False
        del waiting[longest]
        longest.set()
        return True

    def _open(self, owner: str, request: wire.OpenRequest, context) -> wire.OpenReply:
        if request.version != VERSION:
            raise Refused("invalid", f"wire version {request.version}, expected {VERSION}")
        expected = self.worker.part.terms | {"width": str(self.worker.width)}
        if differs := disagreement(dict(request.terms), expected):
            raise Refused("invalid", f"the edge's part differs from the cloud's in {differs}")
        return wire.OpenReply(session=self.worker.open(owner))

    def _upload(self, owner: str, request: wire.UploadRequest, context) -> wire.UploadReply:
        kinds = {number: kind for kind, number in ENCODINGS.items()}
        if request.encoding not in kinds:
            raise Refused("invalid", f"encoding {request.encoding}, expected one of {sorted(kinds)}")
        try:
            hidden = decode(request.payload, request.count, self.worker.width, kind=kinds[request.encoding])
        except ValueError as error:
            raise Refused("invalid", str(error)) from error
        stored = self.worker.upload(owner, request.session, request.first, hidden=hidden)
        self.metrics.payload.inc(len(request.payload))
        return wire.UploadReply(stored=stored)

    def _next(self, owner: str, request: wire.NextRequest, context) -> wire.NextReply:
        answer = self.worker.ask(owner, request.session, request.position)
        if not context.add_callback(answer.cancel):  # whoever goes away holds no thread
            answer.cancel()
        done = threading.Event()
        answer.add_done_callback(lambda _: done.set())
        with self._counting:
            self._waiting.setdefault(owner, {})[done] = time.monotonic()
        left = context.time_remaining()
        done.wait(timeout=60.0 if left is None else min(left, 60.0))
        with self._counting:
            waiting = self._waiting.get(owner, {})  # gone where all of them gave way
            gave_way = waiting.pop(done, None) is None
            if not waiting:
                self._waiting.pop(owner, None)
        if gave_way and answer.cancel():
            raise Refused("limit", f"{self.owner_calls} calls of this client are under way: this one waited longest")
        try:
            token, seconds = answer.result(timeout=0)
        except Late:
            answer.cancel()
            raise
        return wire.NextReply(position=request.position, token=token, seconds=seconds)

    def _rollback(self, owner: str, request: wire.RollbackRequest, context) -> wire.Empty:
        self.worker.rollback(owner, request.session, request.length)
        return wire.Empty()

    def _close(self, owner: str, request: wire.CloseRequest, context) -> wire.Empty:
        self.worker.close(owner, request.session)
        return wire.Empty()


def client_of(peer: str) -> str:
    """Who is at the other end, by gRPC's name of it: an IPv4 address, or the network of an IPv6 address (its first 64 bits, of which a
    client has all the others); ports are left out."""
    kind, _, place = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer
    address = ipaddress.ip_address(place.rpartition(":")[0].strip("[]").partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    if address.version == 4 or mapped is not None:
        return str(mapped or address)
    return str(ipaddress.ip_network((address, 64), strict=False))


def serve(server: CloudServer, *, metrics_port: int | None = None) -> None:
    """Run until SIGTERM or SIGINT, then drain: no new calls, those under way are answered. `metrics_port`: Prometheus on loopback."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    if metrics_port is not None:
        start_http_server(metrics_port, addr="127.0.0.1", registry=server.metrics.registry)
    with server:
        LOG.info(json.dumps({"listening": server.port}))
        ended.wait()
