"""Files on disk: the one atomic writer, and reading tensors back with errors that name the file.

Here: whole files. Not here: what they hold, folders of a training run (training/checkpointing.py).
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_whole(path: str | os.PathLike[str], fill: Callable[[Path], None]) -> None:
    """Let `fill` write a file beside `path`, flush it to disk and rename it: `path` is the old file or the new one, never a part.

    The file beside has a new, unpredictable name, and a link at `path` is replaced, not followed.

    Raises:
        ValueError: no path, or that of a folder.
        OSError: it cannot be written; nothing of it is left.
    """
    if not isinstance(path, str | os.PathLike) or Path(path).is_dir():
        raise ValueError(f"path={path!r}, expected the name of a file")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the system takes the umask off
    try:
        with disk_errors(path):
            fill(beside)
        flush(beside)
        os.replace(beside, path)
        flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text, whole or not at all. Raises as `write_whole`."""

    def fill(beside: Path) -> None:
        beside.write_text(text, encoding="utf-8")

    write_whole(path, fill)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file, whole or not at all. Raises as `write_whole`."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda beside: save_file(ready, beside, metadata=dict(metadata) if metadata else None))


def read_tensors(
    path: str | os.PathLike[str],
    what: str,
    *,
    names: Sequence[str] | None = None,
    format: str | tuple[str, ...] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata. names: those it must hold, and which are read; None: all.
    format: what the metadata must name under "format" (of several: this, or an earlier one that is understood); None: that is not asked.

    Raises:
        ValueError: no such file, a folder, a damaged file, one of another format or without these tensors; `what` was expected is said.
    """
    try:
        with safe_open(path, framework="pt") as file:
            there, metadata = list(file.keys()), file.metadata() or {}
            known = (format,) if isinstance(format, str | None) else format
            if format is not None and metadata.get("format") not in known:
                raise ValueError(f"it is no {what}: format {metadata.get('format')!r}, expected {known[0]!r}")
            missing = [name for name in names or () if name not in there]
            if missing:
                raise ValueError(f"it lacks the tensors {missing}, it holds {there}")
            return {name: file.get_tensor(name) for name in (there if names is None else names)}, metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable {what}: {error}") from error


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The value that a JSON file holds.

    Raises:
        ValueError: a damaged file, or one that is nested too deeply; `what` it was expected to be is said.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable {what}: {error}") from error


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError that a library hid in an error of its own (a full disk, in torch.save and safetensors) is raised as what it was."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        number = _number_of(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def flush(path: Path) -> None:
    """Have the disk hold a file or folder as it is now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _number_of(error: Exception) -> int | None:
    """The errno behind a library's error: of the OSError it came from, or as safetensors words it."""
    if isinstance(error.__context__, OSError):
        return error.__context__.errno or errno.EIO
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None
