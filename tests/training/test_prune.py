"""Old checkpoints go whole: a run that is killed while it deletes one leaves nothing that looks like a checkpoint and is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ee_diffusion.training.checkpointing import (
    clean,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)

IDENTITY = {"identity": {"seed": 1}}


def save(folder: Path, step: int, *, keep: int | None) -> Path:
    return save_checkpoint(folder, step, {"value": torch.tensor(step)}, run=IDENTITY, keep=keep)


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_the_newest_are_kept(tmp_path: Path):
    for step in (2, 10, 9, 30):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-30"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-30"]
    save(tmp_path, 40, keep=None)
    assert len(names(tmp_path)) == 3


def test_killed_while_it_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One file of the old checkpoint is gone when the process dies."""
    save(tmp_path, 1, keep=None)

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if not Path(path).exists():
            return
        next(Path(path).glob("state.pt")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-2"], "a half-deleted checkpoint does not look like one"
    assert len(clean(tmp_path)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    state, _ = load_checkpoint(find_checkpoint(tmp_path, "latest"), IDENTITY["identity"])
    assert int(state["value"]) == 2


def test_a_checkpoint_that_is_a_link_goes_and_what_it_points_to_stays(tmp_path: Path):
    """Disks are full: old checkpoints were moved elsewhere, with links in their places."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    save(folder, 1, keep=None)
    shutil.move(folder / "checkpoint-1", elsewhere)
    (folder / "checkpoint-1").symlink_to(elsewhere)
    save(folder, 2, keep=1)
    assert names(folder) == ["checkpoint-2"]
    (folder / "checkpoint-3").symlink_to(elsewhere)
    save(folder, 3, keep=None)
    assert not (folder / "checkpoint-3").is_symlink()
    (folder / ".checkpoint-4.replaced").symlink_to(elsewhere)
    (folder / "checkpoint-4").mkdir()
    assert clean(folder) == [".checkpoint-4.replaced"]
    assert sorted(path.name for path in folder.glob(".*")) == []
    assert sorted(path.name for path in elsewhere.iterdir()) == ["run.json", "state.pt"]
