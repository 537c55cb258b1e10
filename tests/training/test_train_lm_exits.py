"""The script `train/train_lm_exits.py`: exits learn to say what a tiny frozen model says, resume exactly, load where they are used."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import datasets
import pytest
import torch
from language import EXITS, alone, generate
from safetensors.torch import load_file
from tiny_language import text_folder
from transformers import AutoModelForCausalLM

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.heads import LearnedExits
from ee_diffusion.edge_cloud.edge import Edge
from ee_diffusion.edge_cloud.split import load_part, split_model
from train import train_lm_exits

SHORT = "--train_batch_size 16 --max_train_steps 4 --logging_steps 1 --checkpointing_steps 2 --lr_warmup_steps 0 --held_out 12"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return text_folder(tmp_path)


def call(monkeypatch: pytest.MonkeyPatch, base: Path, *words: object) -> dict:
    """Run the script on the tiny model and texts; its report."""
    files = ["--text_files", f"{base}/texts.json", f"{base}/texts.csv", "--answer_columns", "answer", "ref"]
    files += ["--prompt_templates", "{ask}\\n{more}", "{mr}", "--model", f"{base}/model"]
    given = [part for word in words for part in str(word).split()]
    monkeypatch.setattr(sys, "argv", ["train_lm_exits.py", *files, *given])
    train_lm_exits.main()
    folder = base / given[given.index("--output_dir") + 1]
    return json.loads((folder / "report.json").read_text())


def exits_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "exits.safetensors")


HEADS = "--exit_depths 1 2 4 --adapter_width 16"


def test_exits_come_nearer_to_the_frozen_model(base: Path, monkeypatch, capsys):
    monkeypatch.chdir(base)
    longer = "--max_train_steps 60 --learning_rate 1e-2 --checkpointing_steps 60 --ema_decay 0.5"
    report = call(monkeypatch, base, HEADS, SHORT, longer, "--output_dir fit")
    lines = [json.loads(line) for line in (base / "fit" / "log.jsonl").read_text().splitlines()]
    for depth in EXITS:
        assert lines[-1][f"answer_{depth}"] < 0.5 * lines[0][f"answer_{depth}"]
        same, sure = (sum(line[f"{name}_{depth}"] for line in lines[-20:]) / 20 for name in ("same", "sure"))
        assert sure < -same * math.log(same) - (1 - same) * math.log(1 - same), "better than saying the share of hits"
    assert report["fit"]["finished"]
    model = AutoModelForCausalLM.from_pretrained(base / "model").eval()
    exits = LearnedExits.load(base / "fit" / "exits.safetensors").bind(model)
    assert exits.depths == EXITS
    out = generate(model, Policy(Threshold(0.4, "confidence"), exits=(1, 4)), exit_heads=exits)
    assert out.trace.depths.max() <= 6
    assert f"depth 4 loss {report['after'][2]['loss']:.4g}" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(base: Path, monkeypatch):
    monkeypatch.chdir(base)
    call(monkeypatch, base, HEADS, SHORT, "--output_dir whole")
    call(monkeypatch, base, HEADS, SHORT, "--max_train_steps 2 --output_dir parts")
    report = call(monkeypatch, base, HEADS, SHORT, "--resume_from_checkpoint latest --output_dir parts")
    assert report["fit"]["resumed_from"] == 2
    whole, parts = exits_of(base / "whole"), exits_of(base / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    labels = "--teacher labels --resume_from_checkpoint latest"
    with pytest.raises(ValueError, match="another run"):
        call(monkeypatch, base, HEADS, SHORT, labels, "--output_dir parts")
    with pytest.raises(ValueError, match="holds the states"):
        call(monkeypatch, base, "--exit_depths 1 2 --adapter_width 16", SHORT, "--output_dir parts")


def test_steps_over_some_tokens_then_a_last_run_over_all(base: Path, monkeypatch):
    monkeypatch.chdir(base)
    longer = "--max_train_steps 60 --learning_rate 1e-2 --checkpointing_steps 60 --ema_decay 0.5 --sampled_tokens 4"
    report = call(monkeypatch, base, HEADS, SHORT, longer, "--output_dir drawn")
    for before, after in zip(report["before"], report["after"], strict=True):
        assert after["loss"] < before["loss"], "judged over all tokens"
    last = "--init_exits drawn/exits.safetensors --states drawn/states.safetensors --learning_rate 1e-9"
    again = call(monkeypatch, base, HEADS, SHORT, last, "--output_dir all")
    for drawn, went_on in zip(report["after"], again["before"], strict=True):
        assert went_on["loss"] == pytest.approx(drawn["loss"], abs=1e-6)
    with pytest.raises(ValueError, match="adapters of 16, expected 32 and adapter_width=8"):
        call(monkeypatch, base, "--exit_depths 1 2 4 --adapter_width 8", SHORT, last, "--output_dir other")


def test_the_edge_answers_through_the_exits_of_its_depths(base: Path, monkeypatch):
    monkeypatch.chdir(base)
    call(monkeypatch, base, HEADS, SHORT, "--output_dir fit")
    model = AutoModelForCausalLM.from_pretrained(base / "model").eval()
    split_model(model, base / "parts", exits=(2, 4))
    whole = LearnedExits.load(base / "fit" / "exits.safetensors")
    part_model, part = load_part(base / "parts", "edge", dtype=torch.float32)
    heads = whole.at(part.exits).bind(part_model, part_of=part.fingerprint)
    policy, ids = Policy(Threshold(0.0, "max_probability"), exits=part.exits), alone(0)["input_ids"]
    out = Edge(part_model, part, heads=heads).generate(ids, policy, max_new_tokens=6)
    assert out.sources == ["exit 0"] * 6
    assert heads.depths == (2, 4)
    whole.bind(model)
    hidden = torch.randn(1, 3, 32)
    for exit in (0, 1):
        assert torch.equal(heads.answer(exit, hidden, {}), whole.answer(exit + 1, hidden, {}))
        assert torch.equal(heads.confidence(exit, hidden, {}), whole.confidence(exit + 1, hidden, {}))
    with pytest.raises(ValueError, match="4 layers"):
        whole.at(part.exits).bind(part_model)
    with pytest.raises(ValueError, match="fingerprints"):
        whole.at(part.exits).bind(part_model, part_of="another")
    with pytest.raises(ValueError, match=r"no exits at depths \[3\]"):
        whole.at((2, 3))


def test_dry_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_lm_exits.py", "--model", "m", "--teacher", "labels", "--dry-run"])
    train_lm_exits.main()
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["model"], resolved["teacher"], resolved["learning_rate"]) == ("m", "labels", 1e-3)


@pytest.mark.parametrize(
    "words, error",
    [
        ("--exit_depths 1 --output_dir x --teacher cat", "teacher='cat'"),
        ("--exit_depths 1", "output_dir=None"),
        ("--output_dir x", "exit_depths=None"),
        ("--output_dir x --exit_depths 2 1", "ascending"),
        ("--output_dir x --exit_depths 6", "6 layers"),
        ("--output_dir x --exit_depths 1 --adapter_width 0", "adapter_width=0"),
        ("--output_dir x --exit_depths 1 --held_out 0", "held_out=0"),
        ("--output_dir x --exit_depths 1 --held_out 9999", "held_out=9999"),
        ("--output_dir x --exit_depths 1 --chat", "no chat template"),
        ("--output_dir x --exit_depths 1 --max_texts 3", "max_texts has 1 entries, expected one for each of 2"),
        ("--output_dir x --exit_depths 1 --max_length 1", "max_length=1"),
        ("--output_dir x --exit_depths 1 --answer_columns answer what", "no column 'what'"),
        (
            "--output_dir x --exit_depths 1 --text_files a.txt --prompt_templates x --answer_columns y",
            r"expected \.csv",
        ),
    ],
)
def test_bad_settings_end_in_words(base: Path, monkeypatch, words: str, error: str):
    monkeypatch.chdir(base)
    with pytest.raises(ValueError, match=error):
        call(monkeypatch, base, words)
