"""Runs as a process of its own: kills tiny trainings with SIGKILL at every operation on files and at random moments, resumes them.

Each training is a fork of this process, which does nothing with tensors itself. Prints one JSON line of what it saw.
usage: kill_run.py FOLDER
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from training.tiny_run import run

from ee_diffusion.training import checkpointing as checkpoints

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
OPTIONS = {"dropout": 0.3, "resume_from_checkpoint": "latest", "checkpoints_total_limit": 2}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(at: int, folder: Path, counted: Path | None = None) -> None:
    """Die just before operation number `at` on files in `folder`, whoever asks for it: opening to write, renaming, removing, making a
    folder (Python's audit events), and half-way through writing the tensors of a checkpoint, with half of the bytes on disk."""
    seen = 0

    def happens() -> bool:
        nonlocal seen
        seen += 1
        if counted is not None:
            counted.write_text(str(seen))
        return seen == at

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        below = (
            event in ("os.remove", "os.rmdir") and arguments[1] != -1
        )  # shutil.rmtree names files relative to open folders
        here = (writes or event in OPERATIONS) and str(arguments[0]).startswith(str(folder))
        if (here or below) and happens():
            die()

    def save(state: dict, file: BinaryIO) -> None:
        torch_save(state, file)
        if happens():
            file.truncate(file.tell() // 2)
            file.flush()
            die()

    torch_save, torch.save = torch.save, save
    sys.addaudithook(hook)


def fork(action: Callable[[], object], kill_after: float | None = None) -> int:
    """Run `action` in a fork; returns its exit code, negative if a signal ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            action()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, object]:
    """All that must be equal: names, exported weights, and the state in every checkpoint."""
    found: dict[str, object] = {"names": sorted(path.name for path in folder.iterdir())}
    found["weights"] = (folder / "model" / "weights.safetensors").read_bytes()
    for path in checkpoints.list_checkpoints(folder):
        found[path.name] = repr(torch.load(path / checkpoints.STATE_FILE, weights_only=True))
        found[path.name + " step"] = json.loads((path / checkpoints.RUN_FILE).read_text())["step"]
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found["log"] = [{name: value for name, value in line.items() if name != "samples_per_second"} for line in logged]
    return found


def check_whole(folder: Path) -> None:
    """After a kill: whatever bears a checkpoint's name is whole."""
    for path in checkpoints.list_checkpoints(folder):
        torch.load(path / checkpoints.STATE_FILE, weights_only=True)
        json.loads((path / checkpoints.RUN_FILE).read_text())
    if (folder / "model").exists() and not (folder / "model" / "weights.safetensors").exists():
        raise AssertionError(f"{folder} holds an export without weights")


def one(folder: Path, unbroken: dict, action: Callable[[], object], kill_after: float | None = None) -> str | None:
    """Kill a run in `folder`, resume it, compare; returns what is wrong."""
    folder.mkdir()
    code = fork(action, kill_after)
    if code != -signal.SIGKILL and not (code == 0 and kill_after is not None):
        return f"{folder.name}: exit code {code} instead of a kill"
    try:
        check_whole(folder)
    except Exception as error:
        return f"{folder.name}: not whole after the kill: {error!r}"
    if code := fork(lambda: run(folder, **OPTIONS)):
        return f"{folder.name}: the resumed run ended with {code}"
    resumed = contents(folder)
    differ = [name for name in unbroken.keys() | resumed.keys() if unbroken.get(name) != resumed.get(name)]
    shutil.rmtree(folder)
    return f"{folder.name}: differs in {sorted(differ)}" if differ else None


def main(root: Path) -> None:
    if fork(lambda: run(root / "unbroken", **OPTIONS)):
        raise SystemExit("the unbroken run failed")
    unbroken = contents(root / "unbroken")
    counted = root / "operations"
    fork(lambda: (arm(0, root / "counting", counted), run(root / "counting", **OPTIONS)))
    operations, wrong = int(counted.read_text()), []
    for at in range(1, operations + 1):
        folder = root / f"operation-{at}"
        wrong.append(one(folder, unbroken, lambda at=at, folder=folder: (arm(at, folder), run(folder, **OPTIONS))))
    begun = time.monotonic()
    fork(lambda: run(root / "timed", **OPTIONS))
    whole, draw = time.monotonic() - begun, random.Random(0)
    for number in range(6):
        folder = root / f"moment-{number}"
        wrong.append(
            one(folder, unbroken, lambda folder=folder: run(folder, **OPTIONS), whole * draw.uniform(0.2, 0.95))
        )
    print(json.dumps({"operations": operations, "wrong": [complaint for complaint in wrong if complaint]}))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as scratch:
        main(Path(scratch))
