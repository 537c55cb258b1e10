"""Servers of the tiny Llama's cloud part as processes that can be killed, each made in milliseconds by a fork of one that has all loaded.

As a script: one line on stdin starts a server, which says `pid port` on stdout. Used by tests/decoding/test_cloud_faults.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Nursery:
    """Starts server processes, and ends all of them on leaving."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        self.pids: list[int] = []

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in self.pids:
            kill(pid)
        self._process.kill()
        self._process.wait()

    def start(self) -> tuple[int, int]:
        """A new server -> its pid and port."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("start\n")
        self._process.stdin.flush()
        pid, port = (int(word) for word in self._process.stdout.readline().split())
        self.pids.append(pid)
        return pid, port


def kill(pid: int) -> None:
    """SIGKILL, if it still lives."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> None:
    import torch  # noqa: PLC0415  (of the script alone: who imports Nursery has it loaded differently)
    from cloud_servers import serving  # noqa: PLC0415
    from split_parts import parts  # noqa: PLC0415

    torch.set_num_threads(1)
    parts("llama")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for _ in sys.stdin:
        if os.fork():
            continue
        server = serving().__enter__()
        print(os.getpid(), server.port, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
