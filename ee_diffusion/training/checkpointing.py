"""Folders that are either whole or absent: written beside, flushed to disk, then renamed. Checkpoints, their rotation and their refusal.

Here: files on disk. Not here: what goes into a checkpoint and when (loop.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ee_diffusion.core.io import disk_errors, flush, read_json, write_text

PREFIX = "checkpoint-"
_PARTIAL, _REPLACED = ".partial", ".replaced"
STATE_FILE, RUN_FILE = "state.pt", "run.json"


class Damaged(ValueError):
    """A checkpoint that is not whole, or not as it was written."""


def write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary sibling of `final`, flush it, and rename it to `final`; a folder there is replaced.

    Killed at any moment, `final` is the old folder, the new one, or absent while the old one waits to be put back by `clean`.
    """
    partial, replaced = _sibling(final, _PARTIAL), _sibling(final, _REPLACED)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with disk_errors(partial):
            fill(partial)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # a disk that is full is to be full of whole things
        raise
    _flush(partial)
    if final.exists() or final.is_symlink():
        _remove(replaced)
        os.replace(final, replaced)
    os.replace(partial, final)
    flush(final.parent)
    with contextlib.suppress(OSError):  # what is new is in place: `clean` comes back for the rest
        _remove(replaced)


def write_entries(directory: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write folders and files into an empty temporary folder, then move each entry into `directory`, whole."""
    with tempfile.TemporaryDirectory(prefix=".export", suffix=_PARTIAL, dir=directory) as scratch:
        with disk_errors(directory):
            fill(Path(scratch))
        for entry in sorted(Path(scratch).iterdir()):
            if entry.is_dir():
                write_folder(directory / entry.name, lambda partial, entry=entry: _move_into(entry, partial))
            else:
                flush(entry)
                os.replace(entry, directory / entry.name)


def write_json(path: Path, content: dict) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def clean(directory: Path) -> list[str]:
    """Remove what killed runs left half-written in `directory`, put back what they were about to replace; returns the names."""
    leftovers = []
    for path in sorted(directory.glob(".*")):
        name = path.name[1:].removesuffix(_REPLACED)
        if path.name.endswith(_REPLACED) and not (directory / name).exists():
            os.replace(path, directory / name)
        elif path.name.endswith((_PARTIAL, _REPLACED)):
            _remove(path)
        else:
            continue
        leftovers.append(path.name)
    return leftovers


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, oldest step first."""
    found = [
        path for path in directory.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def save_checkpoint(directory: Path, step: int, state: dict, *, run: dict, keep: int | None) -> Path:
    """Write `checkpoint-{step}`, then prune to `keep`: state.pt holds tensors, run.json the run's identity and the digests of both files.

    Raises:
        OSError: it cannot be written (a full disk); older checkpoints stay.
    """

    def fill(partial: Path) -> None:
        with (partial / STATE_FILE).open("wb") as file:
            torch.save(state, file)
        record = {"step": step, "digest": _digest(partial / STATE_FILE)} | run
        write_json(partial / RUN_FILE, record | {"record": _record_digest(record)})

    path = directory / f"{PREFIX}{step}"
    write_folder(path, fill)
    prune(directory, keep, spare=path)
    return path


def prune(directory: Path, keep: int | None, *, spare: Path | None) -> None:
    """Delete all but the newest `keep` checkpoints, `spare` (which counts) never; None keeps all."""
    others = [path for path in list_checkpoints(directory) if path != spare]
    surplus = 0 if keep is None else max(0, len(others) + (spare is not None) - keep)
    for old in others[:surplus]:
        doomed = _sibling(old, _PARTIAL)  # renamed first: a half-deleted checkpoint must not look like one
        os.replace(old, doomed)
        _remove(doomed)


def find_checkpoint(directory: Path, resume_from: str | None) -> Path | None:
    """The checkpoint to resume from: None if none is to be resumed, or `latest` is and there is none.

    Raises:
        ValueError: a named path that is no checkpoint, or checkpoints in a directory that a fresh run would write into.
    """
    there = list_checkpoints(directory)
    if resume_from is None and there:
        raise ValueError(
            f"{directory} holds {there[-1].name} of an earlier run: give --resume_from_checkpoint latest, or another output_dir"
        )
    if resume_from is None or resume_from == "latest":
        return there[-1] if there else None
    path = Path(resume_from) if Path(resume_from).exists() else directory / resume_from
    if not (path / RUN_FILE).is_file():
        raise ValueError(
            f"resume_from_checkpoint={resume_from!r}: no {RUN_FILE} there, expected latest or a checkpoint folder"
        )
    return path


def load_checkpoint(path: Path, identity: dict) -> tuple[dict, dict]:
    """Read a checkpoint: (state on the CPU, run). `identity` is that of the run which wants it.

    Raises:
        Damaged: it is not whole, or not as it was written.
        ValueError: the checkpoint is of another run (every difference is named).
    """
    try:
        run = read_json(path / RUN_FILE, "record of a checkpoint of this trainer")
        if run.pop("record") != _record_digest(run):
            raise ValueError("it is not as it was written")
        theirs = dict(run["identity"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise Damaged(f"{path / RUN_FILE} is damaged: {error!r}") from error
    ours = json.loads(json.dumps(identity, default=str))
    differ = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    if differ:
        differences = "; ".join(
            f"{name}: came {ours.get(name)!r}, the checkpoint has {theirs.get(name)!r}" for name in differ
        )
        raise ValueError(f"{path} is of another run, resuming would change its maths: {differences}")
    try:
        if run["digest"] != (found := _digest(path / STATE_FILE)):
            raise Damaged(f"{path / STATE_FILE} is not as it was written: digest {found}, expected {run['digest']}")
        return torch.load(path / STATE_FILE, map_location="cpu", weights_only=True), run
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError) as error:
        raise Damaged(f"{path / STATE_FILE} is truncated or no checkpoint of this trainer: {error!r}") from error


def resume(directory: Path, resume_from: str | None, identity: dict) -> tuple[Path | None, dict, dict, list[str]]:
    """(checkpoint to continue from, its state, its run, what was passed over). With `latest`, a damaged newest one gives way to the one
    before it. (None, {}, {}, []): start anew.

    Raises:
        Damaged: the named checkpoint is damaged, or all are.
        ValueError: as `find_checkpoint`, or a checkpoint of another run.
    """
    path = find_checkpoint(directory, resume_from)
    if path is None:
        return None, {}, {}, []
    candidates = [path] if resume_from != "latest" else list_checkpoints(directory)[::-1]
    passed: list[str] = []
    for candidate in candidates:
        try:
            return candidate, *load_checkpoint(candidate, identity), passed
        except Damaged as damage:
            passed.append(str(damage))
    raise Damaged("; ".join(passed))


def _record_digest(record: dict) -> str:
    """SHA-256 (hexadecimal) of what a record says, as JSON has it."""
    said = json.loads(json.dumps(record, default=str))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _move_into(source: Path, target: Path) -> None:
    for entry in source.iterdir():
        os.replace(entry, target / entry.name)


def _remove(path: Path) -> None:
    """A folder, a file, or a link and not what it points to; nothing, if nothing is there."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        flush(path)
    flush(folder)
