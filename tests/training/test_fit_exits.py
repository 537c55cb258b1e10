"""The script `train/fit_exits.py`: it fits what it says on the states it says, resumes, splits over processes, and refuses in words."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiTPipeline
from diffusers.utils import is_peft_available
from factories import exits_for, pipeline
from PIL import Image
from safetensors.torch import load_file
from stock import dit_pipeline
from tree import ROOT, python_blocks

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from train import fit_exits
from train.work.fit_exits import conditions_of

TINY = "--num_inference_steps 2 --guidance_scale 2.0 --num_trajectories 6 --collect_batch_size 3 --held_out 3 --labels 0 2 1"
SHORT = "--train_batch_size 4 --max_train_steps 4 --logging_steps 1 --checkpointing_steps 2 --lr_warmup_steps 0"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Pipelines on disk: our own, which brings exits, and a stock one."""
    made = {"uvit": pipeline(), "dit": dit_pipeline()}
    for name, one in made.items():
        made[name] = tmp_path_factory.mktemp(name)
        one.save_pretrained(made[name])
    return made


@pytest.fixture
def fresh_accelerate():
    """One process, two precisions: accelerate keeps the first until it is told to forget it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["fit_exits.py", *(part for word in words for part in str(word).split())])
    fit_exits.main()


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "exits").glob("*.safetensors")
    return load_file(file)


def test_a_fit_brings_the_exits_nearer_to_the_full_model(folders, tmp_path, monkeypatch, capsys):
    longer = "--max_train_steps 40 --learning_rate 1e-2 --ema_decay 0.5 --checkpointing_steps 40"
    call(monkeypatch, "--model", folders["uvit"], TINY, SHORT, longer, "--output_dir", tmp_path / "fit")
    report = report_of(tmp_path / "fit")
    gain = report["gain"]["full"]
    assert gain["depths"] == [1, 2, 3, 4, 5, 6]
    for before, after in zip(gain["before"]["error"], gain["after"]["error"], strict=True):
        assert after < 0.8 * before
    assert gain["before"]["tail_error"] == gain["after"]["tail_error"]
    states = report["states"]
    assert (states["samples"], states["trajectories"], states["calls"], states["rows"]) == (12, 6, 2, 2)
    assert states["seconds"] > 0
    assert states["bytes_on_disk"] > states["bytes_in_memory"] == 6 * (2 * 2 * (3 * 8 * 8 * 4 + 8) + 2 * 8)
    assert states["peak_memory"]["process"] >= states["peak_memory_before"]["process"] > 0
    assert report["fit"]["samples"] == 160
    printed = capsys.readouterr().out
    assert "depth   before own tail   fitted" in printed
    loaded = EarlyExitPipeline.from_pretrained(tmp_path / "fit")
    assert loaded.exits.depths == (1, 2, 3, 4, 5, 6)
    original = EarlyExitPipeline.from_pretrained(folders["uvit"]).transformer
    assert all(map(torch.equal, loaded.transformer.parameters(), original.parameters()))


def test_exits_for_a_stock_pipeline(folders, tmp_path, monkeypatch):
    call(monkeypatch, "--model", folders["dit"], TINY, SHORT, "--exit_depths 1 3 --output_dir", tmp_path)
    assert not (tmp_path / "transformer").exists(), "a pipeline that was not changed is not copied"
    exits, pipe = DenoisingExits.from_pretrained(tmp_path / "exits"), DiTPipeline.from_pretrained(folders["dit"])
    with attach_exits(pipe.transformer, exits):
        assert exits.depths == (1, 3)


@pytest.mark.parametrize("name", ["dit", pytest.param("uvit", marks=pytest.mark.slow)])
def test_adapters_before_the_models_own_tail(name, folders, tmp_path, monkeypatch):
    words = "--exit_variant adapter --adapter_rank 4 --exit_depths 1 2 --output_dir"
    longer = "--max_train_steps 15 --learning_rate 2e-2 --ema_decay 0.5"
    call(monkeypatch, "--model", folders[name], TINY, SHORT, longer, words, tmp_path / "fit")
    gain = report_of(tmp_path / "fit")["gain"]["full"]
    assert gain["before"]["error"] == pytest.approx(gain["before"]["tail_error"], rel=1e-5), "untrained: the own tail"
    for before, after in zip(gain["before"]["error"], gain["after"]["error"], strict=True):
        assert after < 0.9 * before
    exits = AdapterExits.from_pretrained(tmp_path / "fit" / "exits")
    assert (exits.depths, exits.config.rank) == ((1, 2), 4)
    if name == "uvit":
        assert isinstance(EarlyExitPipeline.from_pretrained(tmp_path / "fit").exits, AdapterExits)
        return
    onward = f"--init_exits {tmp_path / 'fit/exits'} --trajectories exited --exit_threshold 0.9"
    call(monkeypatch, "--model", folders[name], TINY, SHORT, onward, words, tmp_path / "onward")
    assert set(report_of(tmp_path / "onward")["gain"]) == {"full", "exited"}
    for other, told in {"--adapter_rank 8": "the flags say", "--exit_depths 1": "the flags say"}.items():
        with pytest.raises(ValueError, match=told):
            call(monkeypatch, "--model", folders[name], TINY, SHORT, onward, words, tmp_path / "x", other)
    plain = f"--init_exits {tmp_path / 'fit/exits'} --output_dir"
    with pytest.raises(ValueError, match="are AdapterExits, the flags say DenoisingExits"):
        call(monkeypatch, "--model", folders[name], TINY, SHORT, plain, tmp_path / "x")


@pytest.mark.parametrize("states", ["stored", "fresh"])
def test_a_run_in_two_parts_is_the_run_in_one(states, folders, tmp_path, monkeypatch):
    common = f"--model {folders['uvit']} {TINY} {SHORT} --states {states}"
    call(monkeypatch, common, "--output_dir", tmp_path / "one")
    call(monkeypatch, common, "--max_train_steps 2 --output_dir", tmp_path / "two")
    call(monkeypatch, common, "--resume_from_checkpoint latest --output_dir", tmp_path / "two")
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert report_of(tmp_path / "two")["fit"]["resumed_from"] == 2
    other = "--guidance_scale 3.0 --states_dir"
    with pytest.raises(ValueError, match="data: came"):
        call(
            monkeypatch, common, other, tmp_path / "x", "--resume_from_checkpoint latest --output_dir", tmp_path / "two"
        )


def test_states_that_are_there_are_used_and_missing_ones_are_made_again(folders, tmp_path, monkeypatch):
    common = f"--model {folders['uvit']} {TINY} {SHORT} --states_dir {tmp_path / 'states'} --output_dir"
    call(monkeypatch, common, tmp_path / "first")
    kept, lost = (tmp_path / "states" / f"part-0000{i}.safetensors" for i in range(2))
    before, when = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    call(monkeypatch, common, tmp_path / "second")
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == when
    walked = [report_of(tmp_path / name)["states"]["files_recorded_now"] for name in ("first", "second")]
    assert walked == [2, 1]
    first, second = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="something else: call: came"):
        call(monkeypatch, common, tmp_path / "third", "--num_inference_steps 3")


@pytest.mark.parametrize("states", ["stored", "fresh"])
def test_along_the_exited_models_trajectories(states, folders, tmp_path, monkeypatch):
    exits = exits_for(EarlyExitPipeline.from_pretrained(folders["uvit"]).transformer, (2, 4))
    exits.save_pretrained(tmp_path / "exits")
    Policy(Threshold(0.1)).save(tmp_path / "bold.json")
    exited = f"--trajectories exited --init_exits {tmp_path / 'exits'} --exit_policy {tmp_path / 'bold.json'}"
    common = f"--model {folders['uvit']} {TINY} {SHORT} --states {states}"
    call(monkeypatch, common, exited, "--output_dir", tmp_path / "fit")
    gain = report_of(tmp_path / "fit")["gain"]
    assert gain["full"]["before"]["error"] != gain["exited"]["before"]["error"]
    assert EarlyExitPipeline.from_pretrained(tmp_path / "fit").exits.depths == (2, 4)
    call(monkeypatch, common, exited, "--trajectories full --output_dir", tmp_path / "full")
    learned_confidence = report_of(tmp_path / "full")["gain"]
    assert {kind: gain[kind]["before"] for kind in gain} == {kind: learned_confidence[kind]["before"] for kind in gain}
    one, other = weights_of(tmp_path / "fit"), weights_of(tmp_path / "full")
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_data_set_instead(folders, tmp_path, monkeypatch, fresh_accelerate):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / f"images/class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    data = f"--states dataset --train_data_dir {tmp_path / 'images'} --label_column label"
    for name, resolution in (("uvit", 8), ("dit", 16)):
        common = f"--model {folders[name]} {TINY} {SHORT} {data} --resolution {resolution} --mixed_precision bf16"
        call(monkeypatch, common, "--output_dir", tmp_path / name)
        report = report_of(tmp_path / name)
        assert report["fit"]["finished"]
        assert all(map(np.isfinite, report["fit"]["losses"].values()))


@pytest.mark.skipif(not is_peft_available(), reason="needs peft (ee-diffusion[lora])")
def test_the_backbone_adapts_and_is_saved_without_peft(folders, tmp_path, monkeypatch):
    words = "--lora_rank 2 --learning_rate 1e-2 --ema_decay 0.1 --output_dir"
    call(monkeypatch, "--model", folders["dit"], TINY, SHORT, words, tmp_path)
    assert report_of(tmp_path)["fit"]["losses"]["full"] >= 0
    before, after = (DiTPipeline.from_pretrained(folder).transformer for folder in (folders["dit"], tmp_path))
    changed = {name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])}
    assert changed
    assert all(name.startswith("transformer_blocks.") and name.endswith("weight") for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("states", ["stored", "fresh"])
def test_two_processes_take_the_steps_of_one_with_twice_the_batch(states, folders, tmp_path):
    common = f"--model {folders['uvit']} {TINY} {SHORT} --states {states}"
    launch(f"{common} --train_batch_size 2 --output_dir {tmp_path / 'two'}", processes=2)
    launch(f"{common} --output_dir {tmp_path / 'one'}", processes=1)
    assert report_of(tmp_path / "two")["processes"] == 2
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    for part in (tmp_path / "one" / "states").glob("*.safetensors"):
        assert part.read_bytes() == (tmp_path / "two" / "states" / part.name).read_bytes()


def launch(words: str, *, processes: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    command = [sys.executable, *launcher, "-m", "train.fit_exits", *words.split()]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "words, told",
    [
        ("", "model=None, expected"),
        ("--model m", "output_dir=None, expected"),
        ("--model m --states here", "states='here', expected"),
        ("--model m --trajectories sideways", "trajectories='sideways', expected"),
        ("--model m --exit_variant other", "exit_variant='other', expected"),
        ("--model m --exit_variant adapter", "expected a rank"),
        ("--model m --adapter_rank 4", "expected a rank"),
        ("--model m --num_trajectories 0", "num_trajectories=0, expected"),
        ("--model m --held_out 0", "held_out=0, expected"),
        ("--model m --labels 1 --prompts p.txt", "labels or prompts"),
        ("--model m --trajectories exited", "needs init_exits"),
        ("--model m --trajectories exited --init_exits e", "needs init_exits and one of"),
        ("--model m --exit_threshold 0.1", "init_exits=None: expected"),
        ("--model m --init_exits e --exit_threshold 0.1 --exit_policy p", "one of exit_threshold and exit_policy"),
        ("--model m --output_dir o --states dataset", "dataset needs data"),
        ("--model m --output_dir o --train_data_dir d", "others take none"),
        ("--model m --output_dir o --compile", "cannot be compiled"),
    ],
)
def test_bad_settings_end_in_words(words, told, monkeypatch):
    with pytest.raises(ValueError, match=told):
        call(monkeypatch, words)


def test_what_contradicts_the_model_ends_in_words(folders, tmp_path, monkeypatch):
    common = f"--model {folders['uvit']} {TINY} {SHORT} --output_dir {tmp_path / 'fit'}"
    exits_for(EarlyExitPipeline.from_pretrained(folders["uvit"]).transformer, (2,)).save_pretrained(tmp_path / "e")
    (tmp_path / "labels.txt").write_text("0\none\n")
    for words, told in {
        "--exit_depths 9": r"exits at depths \(9,\), expected",
        "--labels 99": "class_labels",
        "--exit_variant adapter --adapter_rank -1": "rank=-1, expected",
        "--labels zero": "expected integers or a file",
        f"--labels {tmp_path / 'labels.txt'}": "expected integers or a file",
        f"--init_exits {tmp_path / 'e'} --exit_depths 1": "the flags say",
        "--sampler sideways": "sampler='sideways', expected",
        "--lora_rank 0": "rank=0, expected|needs peft",
    }.items():
        with pytest.raises((ValueError, ImportError), match=told):
            call(monkeypatch, common, words)
    assert not (tmp_path / "fit" / "exits").exists()


def test_labels_from_a_file_and_a_dry_run(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "labels.txt").write_text("2\n0\n")
    call(monkeypatch, "--model", folders["uvit"], TINY, "--dry-run --learning_rate 0.125")
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["learning_rate"], resolved["labels"]) == (0.125, ["0", "2", "1"])
    fit = fit_exits.FitConfig(model=str(folders["uvit"]), labels=[str(tmp_path / "labels.txt")])
    transformer = EarlyExitPipeline.from_pretrained(folders["uvit"]).transformer
    assert conditions_of(fit, transformer) == [2, 0]
    assert conditions_of(fit_exits.FitConfig(model="m"), transformer) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_the_lines_of_the_documentation_run(capsys):
    (block,) = python_blocks((ROOT / "docs" / "training.md").read_text())
    exec(compile(block, "docs/training.md", "exec"), {})
    assert "tensor([" in capsys.readouterr().out
