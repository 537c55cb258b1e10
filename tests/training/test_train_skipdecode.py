"""The script `train/train_skipdecode.py`: fine-tuning under a schedule lowers its loss, resumes exactly, and what it writes generates."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
from language import LAYERS, alone, generate, model_named, new_tokens
from tiny_language import text_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_peft_available
from tree import python_blocks

from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.methods import calm, early_termination
from ee_diffusion.training.config import LanguageModelConfig
from train import train_skipdecode
from train.work.language_model import load_model

needs_peft = pytest.mark.skipif(not is_peft_available(), reason="needs peft (ee-diffusion[lora])")
SKIP = "--warm_up 1 --least 2 --most 5 --horizon 4"
SHORT = "--train_batch_size 4 --max_train_steps 4 --logging_steps 1 --checkpointing_steps 2 --lr_warmup_steps 0 --max_length 12"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return text_folder(tmp_path)


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    files = ["--text_files", "texts.csv", "--answer_columns", "ref", "--prompt_templates", "{mr}", "--model", "model"]
    given = [part for word in words for part in str(word).split()]
    monkeypatch.setattr(sys, "argv", ["train_skipdecode.py", *files, *given])
    train_skipdecode.main()


def lines_of(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapters", ["", pytest.param("--lora_rank 4", marks=needs_peft)])
def test_what_is_trained_is_what_generates(base: Path, monkeypatch, adapters: str):
    longer = "--max_train_steps 40 --learning_rate 1e-2 --checkpointing_steps 40"
    call(monkeypatch, SKIP, SHORT, longer, adapters, "--output_dir skip")
    lines = lines_of("skip")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    report = json.loads(Path("skip/report.json").read_text())
    assert report["layers_by_step"][:5] == [5, 4, 3, 2, 2]
    model = AutoModelForCausalLM.from_pretrained("skip/model").eval()
    AutoTokenizer.from_pretrained("skip/model")
    policy = Policy.load("skip/policy.json")
    assert Policy.load("skip/model/policy.json") == policy, "it travels with the weights"
    (card,) = python_blocks(Path("skip/model/README.md").read_text())
    exec(compile(card.replace("path/to/this/folder", "skip/model").replace('"..."', '"w3 w4"'), "card", "exec"), {})
    out = generate(model, policy, alone(0))
    assert out.report.mean_executed < 4
    assert new_tokens(out).shape == (1, 7)
    with pytest.raises(ValueError, match="another model"):
        generate(model_named("llama"), policy, alone(0))


@needs_peft
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(base: Path, monkeypatch):
    call(monkeypatch, SKIP, SHORT, "--lora_rank 2 --output_dir whole")
    call(monkeypatch, SKIP, SHORT, "--lora_rank 2 --max_train_steps 2 --output_dir parts")
    call(monkeypatch, SKIP, SHORT, "--lora_rank 2 --resume_from_checkpoint latest --output_dir parts")
    whole, parts = (AutoModelForCausalLM.from_pretrained(f"{name}/model").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    start = AutoModelForCausalLM.from_pretrained("model").state_dict()
    assert any(not torch.equal(whole[name], start[name]) for name in whole)
    with pytest.raises(ValueError, match="another run"):
        call(monkeypatch, "--keep 3", SHORT, "--lora_rank 2 --resume_from_checkpoint latest --output_dir parts")


def test_controls_are_trained_alike(base: Path, monkeypatch):
    early_termination(least=2, most=5, horizon=4).save("terminate.json")
    call(monkeypatch, SHORT, "--policy terminate.json --output_dir terminate")
    call(monkeypatch, SHORT, "--keep 3 --output_dir truncated")
    call(monkeypatch, SHORT, "--output_dir full")
    assert Policy.load("terminate/policy.json").schedule == Policy.load("terminate.json").schedule
    assert AutoModelForCausalLM.from_pretrained("truncated/model").config.num_hidden_layers == 3
    assert not Path("full/policy.json").exists()
    depths = [lines_of(name)[0]["depth"] for name in ("terminate", "truncated", "full")]
    assert depths[0] < 5
    assert depths[1:] == [3, LAYERS]
    for checkpoint in Path("terminate").glob("checkpoint-*"):  # else the folder is refused
        shutil.rmtree(checkpoint)
    call(monkeypatch, SHORT, "--output_dir terminate")
    assert not list(Path("terminate").rglob("policy.json")), "the policy of the weights that were there before"
    assert not Path("terminate/model/README.md").exists()


def test_a_teacher_is_followed_and_belongs_to_the_run(base: Path, monkeypatch):
    call(monkeypatch, SHORT, "--max_train_steps 20 --learning_rate 1e-2 --output_dir full")
    taught = "--model full/model --teacher full/model --teacher_weight 1 --output_dir taught"
    call(monkeypatch, SKIP, SHORT, "--max_train_steps 40 --learning_rate 1e-2", taught)
    lines = lines_of("taught")
    assert lines[-1]["teacher_gap"] < 0.5 * lines[0]["teacher_gap"]
    assert lines[0]["loss"] == lines[0]["teacher_gap"], "a weight of 1 leaves the answers out"
    more = "--max_train_steps 41 --learning_rate 1e-2 --model full/model --output_dir taught --resume_from_checkpoint latest"
    with pytest.raises(ValueError, match="another run"):
        call(monkeypatch, SKIP, SHORT, more)
    with pytest.raises(ValueError, match="another run"):
        call(monkeypatch, SKIP, SHORT, more, "--teacher full/model --teacher_weight 0.5")


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_attention_is_the_one_that_was_asked_for(kind: str, base: Path):
    model, _ = load_model(LanguageModelConfig(model="model", attn_implementation=kind))
    assert model.config._attn_implementation == kind


def test_dry_run(monkeypatch, capsys):
    call(monkeypatch, SKIP, "--dry-run")
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["warm_up"], resolved["horizon"], resolved["learning_rate"]) == (1, 4, 5e-4)


@pytest.mark.parametrize(
    "words, error",
    [
        ("--warm_up 1 --least 2 --output_dir x", r"\['warm_up', 'least'\] alone"),
        (f"{SKIP} --keep 2 --output_dir x", "at most one"),
        (SKIP, "output_dir=None"),
        ("--warm_up 1 --least 2 --most 5 --horizon 1 --output_dir x", "horizon=1"),
        ("--warm_up 2 --least 2 --most 5 --horizon 4 --output_dir x", "warm-up"),
        ("--warm_up 0 --least 2 --most 5 --horizon 4 --output_dir x", "warm-up"),
        ("--warm_up 1 --least 5 --most 4 --horizon 4 --output_dir x", "least=5"),
        ("--warm_up 1 --least 2 --most 7 --horizon 4 --output_dir x", "the model has 6"),
        ("--keep 6 --output_dir x", r"within 1\.\.5"),
        ("--policy calm.json --output_dir x", "criterion"),
        (f"{SKIP} --compile --output_dir x", "compile=True"),
        (
            f"{SKIP} --teacher model --teacher_weight 1.5 --output_dir x",
            r"teacher_weight=1.5, teacher='model', expected within \(0, 1\]",
        ),
        pytest.param(f"{SKIP} --lora_rank 0 --output_dir x", "rank=0", marks=needs_peft),
    ],
)
def test_bad_settings_end_in_words(base: Path, monkeypatch, words: str, error: str):
    calm(0.5, exits=(2,), score="margin", horizon=None).save("calm.json")
    with pytest.raises(ValueError, match=error):
        call(monkeypatch, words)
