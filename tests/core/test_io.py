"""The one writer: whole or not at all, through no link, with the disk's own errors; readers that name the file and what is missing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tree import ROOT

from ee_diffusion.core.devices import device_named
from ee_diffusion.core.io import read_json, read_tensors, write_tensors, write_text, write_whole
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.trace import Trace

WRITERS = {
    "text": lambda path: write_text(path, "new"),
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(2)}),
    "policy": lambda path: Policy().save(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_is_replaced_not_followed(name: str, tmp_path: Path):
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("precious")
    path.symlink_to(victim)
    (tmp_path / f"file.{os.getpid()}.tmp").symlink_to(victim)  # where a guessable name would be written first
    WRITERS[name](path)
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    assert path.stat().st_size > 0


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("path", [None, 3, "."])
def test_what_is_no_file_is_refused(name: str, path: object):
    with pytest.raises(ValueError, match="expected the name of a file"):
        WRITERS[name](path)


def test_the_rights_are_those_of_any_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And are not asked by changing them, which other threads' new files would notice."""
    change = os.umask
    before = change(0o027)
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the whole process's rights were changed"))
    try:
        write_text(tmp_path / "file", "")
    finally:
        change(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")

    def fill(beside: Path) -> None:
        beside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fill)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_limit_of_the_disk_is_said_in_its_own_words(tmp_path: Path):
    """A real limit, in a process of its own: safetensors raises an error of its own class for it."""
    code = (
        "import resource, signal, sys, torch\n"
        "from ee_diffusion.core.io import write_tensors\n"
        "from ee_diffusion.cli.errors import said_in_one_line\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "sys.exit(said_in_one_line('save', lambda: write_tensors(sys.argv[1], {'a': torch.zeros(10_000)})))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=paths)
    assert done.returncode == 2, done.stderr
    assert f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_other_errors_of_a_library_stay_what_they_are(tmp_path: Path):
    def fill(beside: Path) -> None:
        raise SafetensorError("a tensor of a kind that it does not know")

    with pytest.raises(SafetensorError, match="does not know"):
        write_whole(tmp_path / "file", fill)


def test_tensors_come_back_and_missing_ones_are_named(tmp_path: Path):
    write_tensors(tmp_path / "file", {"a": torch.arange(3), "b": torch.ones(2, 2).T}, {"kind": "test"})
    tensors, metadata = read_tensors(tmp_path / "file", "test", names=["a"])
    assert tensors.keys() == {"a"}
    assert torch.equal(tensors["a"], torch.arange(3))
    assert metadata == {"kind": "test"}
    with pytest.raises(
        ValueError, match=r"file is not a readable test: it lacks the tensors \['c'\], it holds \['a', 'b'\]"
    ):
        read_tensors(tmp_path / "file", "test", names=["a", "c"])
    (tmp_path / "file").write_bytes(b"half")
    with pytest.raises(ValueError, match="file is not a readable test"):
        read_tensors(tmp_path / "file", "test")


def test_a_trace_without_its_tensors_is_refused(tmp_path: Path):
    save_file({"rows": torch.ones(1)}, tmp_path / "trace", metadata={"format": "ee_diffusion.trace.1"})
    with pytest.raises(ValueError, match="lacks the tensors"):
        Trace.load(tmp_path / "trace")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 50_000, "{", "1" * 5000, "\xff"])
def test_json_that_nobody_can_read_is_refused(content: str, tmp_path: Path):
    (tmp_path / "policy.json").write_bytes(content.encode("latin-1"))
    for read in (lambda path: read_json(path, "policy"), Policy.load):
        with pytest.raises(ValueError, match=r"policy\.json is not a readable policy"):
            read(tmp_path / "policy.json")


@pytest.mark.parametrize("name", ["cuda", "cuda:9", "tpu", "xpu", ""])
def test_a_device_that_is_not_there_is_refused(name: str):
    if torch.cuda.is_available() and name == "cuda":
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="cannot be used here"):
        device_named(name)


def test_the_device_that_is_there():
    assert device_named("cpu") == torch.device("cpu")
    assert device_named(None).type in ("cpu", "cuda")
