"""A cloud under load: throughput, time per token, memory of the sessions and whether anybody starves, for numbers of clients at once.

python -m eval.cloud_load --parts parts --clients 1 4 16 64 --prompt_tokens 32 --new_tokens 16 --output_dir runs/cloud-load

The server is a process of its own on the last core, one thread; the clients are threads of this one on the others, each with a
connection of its own, without layers: they send the edge's states of random tokens, made beforehand, and ask for every token. Time per
token: from handing over its state to its answer. Memory: bytes that the context manager counts (its own metric) and the resident memory of
the server's process above what it was before the first client. Writes cloud-load.json.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ee_diffusion.cli.errors import run_script
from ee_diffusion.edge_cloud.client import CloudLost, Upload
from ee_diffusion.edge_cloud.codec import encode
from ee_diffusion.edge_cloud.grpc_transport import RemoteTransport
from ee_diffusion.edge_cloud.split import Part, load_part
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from eval.cloud_clock import cores, started
from eval.harness.options import flag, parse

DEADLINE = 120.0  # seconds


@dataclass(frozen=True)
class LoadOptions:
    """How many ask for how much."""

    parts: str = flag("Folder that `ee-diffusion edge split` wrote.")
    clients: list[int] = field(default_factory=lambda: [1, 4, 16, 64], metadata={"help": "Clients at once."})
    prompt_tokens: int = flag("Positions of a prompt.", 32)
    new_tokens: int = flag("Tokens that every client asks for.", 16)
    kind: str = flag("Encoding of the states.", "float16")
    batch: int = flag("Questions that the server answers in one pass.", 64)
    seed: int = flag("Seed of the random tokens.", 0)
    output_dir: str = flag("Where cloud-load.json goes.")


@torch.no_grad()
def edge_states(options: LoadOptions) -> tuple[Part, Tensor]:
    """The edge's part, and the states (C, N, D) at its first exit of as many random texts as there are clients at most."""
    model, part = load_part(options.parts, "edge", dtype=torch.float32)
    generator = torch.Generator().manual_seed(options.seed)
    shape = (max(options.clients), options.prompt_tokens + options.new_tokens - 1)
    ids = torch.randint(2, model.config.vocab_size, shape, generator=generator)
    rows = [model.base_model(one[None], output_hidden_states=True).hidden_states[part.exits[0]] for one in ids]
    return part, torch.cat(rows)


def client(address: str, part: Part, hidden: Tensor, options: LoadOptions) -> list[float]:
    """One client -> seconds of each of its tokens. Raises CloudLost where it does not get one."""
    times, sent = [], Future()
    sent.set_result(None)
    with RemoteTransport(address, part, width=hidden.shape[1]) as line:
        session, first = line.open(timeout=DEADLINE), 0
        for position in range(options.prompt_tokens - 1, len(hidden)):
            begun, states = time.monotonic(), hidden[first : position + 1]
            upload = Upload(first, len(states), options.kind, encode(states, kind=options.kind))
            line.upload(session, upload, timeout=DEADLINE)
            line.next(session, position, sending=sent, timeout=DEADLINE)
            times.append(time.monotonic() - begun)
            first = position + 1
        line.close(session, timeout=DEADLINE)
    return times


class OutputHistory:
    """The most memory that the server showed while the context was open: bytes of sessions by its metric, resident bytes of its process."""

    def __init__(self, pid: int, metrics_port: int):
        self.pid, self.metrics_port = pid, metrics_port
        self.sessions, self.resident, self._ended = 0.0, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> OutputHistory:
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self.sessions = max(self.sessions, held(self.metrics_port))
            self.resident = max(self.resident, resident(self.pid))


def held(metrics_port: int) -> float:
    """Bytes of all sessions, as the server's metrics say."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=DEADLINE) as reply:
        lines = reply.read().decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("ee_cloud_bytes ")))


def resident(pid: int) -> int:
    """Resident bytes of a process (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def load(
    count: int, address: str, part: Part, hidden: Tensor, options: LoadOptions
) -> tuple[float, list[list[float]], int]:
    """So many clients at once -> seconds in all, every client's times, and how many lost the cloud."""
    begun = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(client, address, part, hidden[place], options) for place in range(count)]
        answered, lost = [], 0
        for future in futures:
            try:
                answered.append(future.result())
            except CloudLost:
                lost += 1
    return time.monotonic() - begun, answered, lost


def row(count: int, seconds: float, times: list[list[float]], lost: int) -> dict:
    """Figures of one load. starved: the slowest client's time over the median client's."""
    later = sorted(one for client_times in times for one in client_times[1:])
    firsts, sums = sorted(client_times[0] for client_times in times), sorted(sum(one) for one in times)
    tokens = sum(len(one) for one in times)
    return {
        "clients": count,
        "lost": lost,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "p50_ms": 1e3 * later[len(later) // 2],
        "p95_ms": 1e3 * later[min(len(later) - 1, int(0.95 * len(later)))],
        "max_ms": 1e3 * later[-1],
        "first_p50_ms": 1e3 * median(firsts),
        "first_max_ms": 1e3 * firsts[-1],
        "slowest_over_median": sums[-1] / median(sums),
    }


def main() -> None:
    (options,) = parse(LoadOptions, description=__doc__)
    for name in ("parts", "output_dir"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing")
    torch.set_num_threads(1)
    part, hidden = edge_states(options)
    rows, metrics_port = [], free_port()
    serve = [
        "-m",
        "ee_diffusion.cli.main",
        "cloud",
        "serve",
        "--model",
        options.parts,
        "--port",
        "0",
        "--quiet",
    ]
    with ExitStack() as stack:
        limits = ["--metrics_port", str(metrics_port), "--batch", str(options.batch)]
        port, pid = started(stack, [*serve, *limits], core=cores()[1])
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {cores()[1]} or {cores()[0]})
        address = f"127.0.0.1:{port}"
        client(address, part, hidden[0], options)  # warm
        before = resident(pid)
        for count in options.clients:
            with OutputHistory(pid, metrics_port) as memory:
                found = row(count, *load(count, address, part, hidden, options))
            left = held(metrics_port)
            found |= {
                "sessions_mb": memory.sessions / 1e6,
                "resident_mb": (memory.resident - before) / 1e6,
                "left_bytes": left,
            }
            rows.append(found)
            print(found, flush=True)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "cloud-load.json", {"settings": asdict(options), "rows": rows, "environment": environment("cpu")}
    )
    print(markdown_table(rows))


if __name__ == "__main__":
    run_script(main)
