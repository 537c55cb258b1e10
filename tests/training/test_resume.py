"""A killed run resumes to the very weights of an unbroken one; nothing is ever half-written; what does not fit is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.tiny_run import run, tiny_source, tiny_trainer
from tree import ROOT

from ee_diffusion.training import checkpointing as checkpoints

HERE = Path(__file__).parent


def process(*command: str, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | settings, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "weights.safetensors")


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_kill_9_at_every_file_operation_and_at_random_moments(tmp_path: Path):
    """Real SIGKILLs: before each opening to write, rename, removal, and half-way through each write; then at moments of the clock."""
    seen = json.loads(process(str(HERE / "kill_run.py"), str(tmp_path)).stdout.splitlines()[-1])
    assert seen["operations"] > 30
    assert not seen["wrong"]


@pytest.mark.slow
def test_two_processes_take_the_step_of_one_with_twice_the_batch(tmp_path: Path):
    process("-m", "torch.distributed.run", "--nproc_per_node=2", str(HERE / "rank_run.py"), str(tmp_path / "two"))
    assert json.loads((tmp_path / "two" / "report.json").read_text())["processes"] == 2
    run(tmp_path / "one", train_batch_size=8)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_micro_steps_take_the_step_of_one_larger_batch(tmp_path: Path):
    run(tmp_path / "one", train_batch_size=8)
    run(tmp_path / "four", train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_run(tmp_path / "one", tmp_path / "four")


def assert_same_run(one: Path, other: Path) -> None:
    for ours, theirs in zip(log(one), log(other), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["level"] == pytest.approx(theirs["level"], rel=1e-5)
    ours, theirs = weights(one), weights(other)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_training_learns_and_the_frozen_stays(tmp_path: Path):
    trainer = tiny_trainer(tmp_path, max_train_steps=60, logging_steps=10, checkpointing_steps=60, train_batch_size=16)
    fixed = trainer.learner.objective.fixed.weight.clone()
    report = trainer.fit()
    losses = [line["loss"] for line in log(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]
    assert report.finished
    assert (report.steps, report.samples) == (60, 960)
    assert torch.equal(weights(tmp_path)["fixed.weight"], fixed)


def test_the_export_has_averaged_weights_and_training_goes_on_with_its_own(tmp_path: Path):
    shown = []
    trainer = tiny_trainer(tmp_path, max_train_steps=5)
    trainer.validate = lambda step, objective: shown.append((step, objective.training, objective.net[0].weight.clone()))
    object.__setattr__(trainer.config, "validation_steps", 5)
    trainer.fit()
    state = torch.load(tmp_path / "checkpoint-5" / checkpoints.STATE_FILE, weights_only=True)
    averaged, raw = state["ema"]["shadow_params"][0], state["objective"]["net.0.weight"]
    assert torch.equal(weights(tmp_path)["net.0.weight"], averaged)
    assert not torch.equal(averaged, raw)
    assert shown[0][:2] == (5, False)
    assert torch.equal(shown[0][2], averaged)
    assert torch.equal(trainer.learner.objective.net[0].weight, raw)
    assert trainer.learner.objective.training


def test_stopping_by_the_clock_leaves_a_checkpoint_to_go_on_from(tmp_path: Path):
    run(tmp_path / "unbroken", dropout=0.3)
    for _ in range(7):
        report = run(tmp_path / "chain", dropout=0.3, max_train_minutes=1e-9, resume_from_checkpoint="latest")
    assert report.finished
    assert report.resumed_from == 6
    ours, theirs = weights(tmp_path / "chain"), weights(tmp_path / "unbroken")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert run(tmp_path / "chain", dropout=0.3, resume_from_checkpoint="latest").finished  # nothing left to do


def test_the_global_generator_differs_from_step_to_step(tmp_path: Path):
    trainer, seen = tiny_trainer(tmp_path), []
    trainer.learner.objective.net.register_forward_hook(lambda *_: seen.append(torch.rand(())))
    trainer.fit()
    assert len(set(map(float, seen))) == len(seen) == 7


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path):
    run(tmp_path, checkpoints_total_limit=2)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-7"]
    run(tmp_path, max_train_steps=11, checkpoints_total_limit=1, resume_from_checkpoint="checkpoint-6")
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-11"]


def test_an_interrupted_replacement_is_put_back(tmp_path: Path):
    (tmp_path / ".model.replaced").mkdir()
    (tmp_path / ".model.replaced" / "old").touch()
    (tmp_path / ".other.partial").mkdir()
    (tmp_path / ".gitignore").touch()
    assert checkpoints.clean(tmp_path) == [".model.replaced", ".other.partial"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".gitignore", "model", "old"]


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"seed": 1}, "seed: came 1, the checkpoint has 0"),
        ({"train_batch_size": 8}, "global_batch: came 8, the checkpoint has 4"),
        ({"gradient_accumulation_steps": 3}, "global_batch: came 12"),
        ({"learning_rate": 1e-3}, "learning_rate: came 0.001"),
        ({"use_ema": False}, "use_ema"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler: came 'cosine'"),
        ({"source": tiny_source(seed=2)}, "data: came"),
        ({"max_train_steps": 3}, "at step 7, beyond max_train_steps=3"),
    ],
)
def test_a_run_with_other_maths_is_not_resumed(tmp_path: Path, changes, told):
    run(tmp_path)
    with pytest.raises(ValueError, match="checkpoint-7.*" + told):
        run(tmp_path, resume_from_checkpoint="latest", **changes)


def test_another_model_is_not_resumed(tmp_path: Path):
    run(tmp_path)
    trainer = tiny_trainer(tmp_path, resume_from_checkpoint="latest")
    trainer.learner.objective.net[3] = torch.nn.Conv2d(8, 3, 1)
    trainer.identity |= trainer._identity()
    with pytest.raises(ValueError, match="model: came"):
        trainer.fit()


def test_more_steps_are_no_other_maths_where_the_rate_is_constant(tmp_path: Path):
    run(tmp_path / "seven")
    run(tmp_path / "seven", max_train_steps=9, resume_from_checkpoint="latest")
    run(tmp_path / "nine", max_train_steps=9)
    ours, theirs = weights(tmp_path / "seven"), weights(tmp_path / "nine")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def damages(whole: bytes) -> list[bytes]:
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    return [whole[:middle], b"", b"not a checkpoint", flipped]


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path):
    run(tmp_path)
    state = tmp_path / "checkpoint-7" / checkpoints.STATE_FILE
    whole = state.read_bytes()
    for content in damages(whole):
        state.write_bytes(content)
        with pytest.raises(ValueError, match=r"state\.pt is not as it was written: digest [0-9a-f]{64}, expected"):
            run(tmp_path, resume_from_checkpoint="checkpoint-7")
    state.unlink()
    with pytest.raises(ValueError, match="truncated or no checkpoint"):
        run(tmp_path, resume_from_checkpoint="checkpoint-7")
    for record in ("{}", "{", "[" * 100_000, '{"identity": 3}'):
        (state.parent / checkpoints.RUN_FILE).write_text(record)
        with pytest.raises(ValueError, match=r"run\.json is damaged"):
            run(tmp_path, resume_from_checkpoint="checkpoint-7")


def test_no_letter_of_a_record_can_change_unnoticed(tmp_path: Path):
    """Its step says which samples and draws come next, its identity whose it is."""
    run(tmp_path)
    path = tmp_path / "checkpoint-7"
    record = path / checkpoints.RUN_FILE
    whole, identity = record.read_text(), tiny_identity(tmp_path)
    known = checkpoints.load_checkpoint(path, identity)[1]
    for place in range(0, len(whole), 7):
        record.write_text(whole[:place] + chr(ord(whole[place]) ^ 1) + whole[place + 1 :])
        try:
            assert checkpoints.load_checkpoint(path, identity)[1] == known  # a space between two values
        except checkpoints.Damaged:
            continue
    record.write_text(whole.replace('"step": 7', '"step": 6'))
    with pytest.raises(checkpoints.Damaged, match=r"run\.json"):
        checkpoints.load_checkpoint(path, identity)


def test_the_checkpoint_before_a_damaged_one_takes_its_place(tmp_path: Path, capsys: pytest.CaptureFixture):
    run(tmp_path / "whole", checkpointing_steps=3)
    run(tmp_path / "hurt", checkpointing_steps=3)
    names = [path.name for path in checkpoints.list_checkpoints(tmp_path / "hurt")]
    newest, before = names[-1], names[-2]
    state = tmp_path / "hurt" / newest / checkpoints.STATE_FILE
    state.write_bytes(damages(state.read_bytes())[-1])
    report = run(tmp_path / "hurt", checkpointing_steps=3, resume_from_checkpoint="latest")
    assert f"{report.resumed_from}" == before.removeprefix("checkpoint-")
    said = capsys.readouterr().out
    assert f"going on from {before}" in said
    assert newest in said
    ours, theirs = weights(tmp_path / "hurt"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    checkpoints.load_checkpoint(tmp_path / "hurt" / newest, tiny_identity(tmp_path / "hurt"))  # written anew, whole

    for path in checkpoints.list_checkpoints(tmp_path / "hurt"):
        (path / checkpoints.STATE_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{before}.*not as it was written"):
        run(tmp_path / "hurt", checkpointing_steps=3, resume_from_checkpoint="latest")


def tiny_identity(folder: Path) -> dict:
    return tiny_trainer(folder).identity


def test_a_full_disk_is_an_error_of_the_disk_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torch.save hides the OSError of its file in a RuntimeError of its own."""

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name):
            return getattr(self.file, name)

    whole = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *rest, **others: (
            Full(whole(self, mode)) if mode == "wb" else whole(self, mode, *rest, **others)
        ),
    )
    with pytest.raises(OSError, match="No space left on device") as caught:
        run(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.glob(".*"))
    assert not checkpoints.list_checkpoints(tmp_path)


def test_a_fresh_run_does_not_write_into_another(tmp_path: Path):
    run(tmp_path)
    with pytest.raises(ValueError, match="holds checkpoint-7 of an earlier run"):
        run(tmp_path)
    with pytest.raises(ValueError, match="expected latest or a checkpoint folder"):
        run(tmp_path, resume_from_checkpoint="checkpoint-99")


def test_a_loss_that_is_not_finite_stops_before_a_checkpoint(tmp_path: Path):
    trainer = tiny_trainer(tmp_path)
    trainer.source.images = trainer.source.images.float() * float("nan")
    with pytest.raises(FloatingPointError, match=r"steps 1\.\.2 is nan"):
        trainer.fit()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] for line in lines] == [None]
    assert not checkpoints.list_checkpoints(tmp_path)
