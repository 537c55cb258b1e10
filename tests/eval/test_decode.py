"""The decoding script, end to end on a tiny model on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from language import LAYERS, VOCABULARY, model_named
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, pipeline
from tree import ROOT

from ee_diffusion.decoding.generate import early_exit_generate
from ee_diffusion.decoding.methods import calm, skipdecode

sys.path.insert(0, str(ROOT / "eval"))  # as it is when a script runs

import decode


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with its tokenizer, two policies and a CSV of meanings."""
    folder = tmp_path_factory.mktemp("language")
    model_named("llama").save_pretrained(folder)
    words = {"<pad>": 0, "</s>": 1} | {f"w{index}": index for index in range(2, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    skipdecode(warm_up=1, least=2, most=5, horizon=4).save(folder / "skip.json")
    calm(0.05, exits=(2, 4), score="margin", horizon=None).save(folder / "calm.json")
    (folder / "text.csv").write_text("mr,ref\nw3 w4,w5 w6\nw3 w4,w7\nw8,w9 w10\n")
    return folder


def call(monkeypatch, folder: Path, *words: object) -> None:
    options = {"model": folder, "text": folder / "text.csv", "output_dir": folder / "out", "device": "cpu"}
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["decode", *given, *(str(word) for word in words)])
    decode.main()


def test_every_candidate_is_timed_counted_and_scored(folder: Path, monkeypatch, capsys):
    policies = ["--policies", folder / "skip.json", folder / "calm.json"]
    drafts = ["--exit_depth", 3, "--draft_tokens", 3, "--assistant", "true"]
    sizes = ["--batch_sizes", 1, 2, "--repeats", 1, "--max_new_tokens", 6, "--count", 2, "--prompt", "w2 {mr}"]
    call(monkeypatch, folder, *policies, *drafts, *sizes)
    report = json.loads((folder / "out" / "decode.json").read_text())
    names = ["full", "driver", "skip", "calm", "lossless"]
    assert [row["name"] for row in report["speed"]] == [*names, "assistant", *names]
    layers = {(row["name"], row["batch"]): row["layers"] for row in report["speed"]}
    assert layers["full", 2] == layers["driver", 2] == LAYERS
    assert layers["skip", 1] == layers["skip", 2] == (5 + 4 + 3 + 2 + 2) / 5
    assert 2 <= layers["calm", 2] <= LAYERS
    assert layers["lossless", 1] >= LAYERS
    quality = {row["name"]: row for row in report["quality"]}
    assert list(quality) == names
    for name in ("full", "driver", "lossless"):
        assert quality[name]["same_sequences"] == 1
        assert quality[name]["perplexity"] == pytest.approx(quality["full"]["perplexity"], rel=1e-5)
    assert "skip" in (folder / "out" / "decode.md").read_text()


def test_a_shape_can_be_timed_without_its_weights(folder: Path, monkeypatch, capsys):
    sizes = ["--batch_sizes", 1, "--repeats", 1, "--max_new_tokens", 3, "--count", 0, "--prompt", "w2 {mr}"]
    call(monkeypatch, folder, "--random_weights", "true", "--tokenizer", folder, *sizes)
    report = json.loads((folder / "out" / "decode.json").read_text())
    assert [row["layers"] for row in report["speed"]] == [LAYERS, LAYERS]
    assert report["quality"] == []


def test_what_is_missing_or_ambiguous_is_refused(folder: Path, monkeypatch):
    with pytest.raises(ValueError, match="two policies"):
        call(monkeypatch, folder, "--policies", folder / "skip.json", folder / "skip.json")
    with pytest.raises(ValueError, match="without --exit_depth"):
        call(monkeypatch, folder, "--assistant", "true")
    (folder / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected mr and ref"):
        call(monkeypatch, folder, "--text", folder / "other.csv")


def test_the_text_generation_pipeline_takes_exits_as_they_are(folder: Path):
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    policy = skipdecode(warm_up=1, least=2, most=5, horizon=4)
    plain = generator("w3 w4 w5", **options)[0]["generated_text"]
    early = generator("w3 w4 w5", custom_generate=early_exit_generate, exit_policy=policy, **options)
    assert len(early[0]["generated_text"].split()) == len(plain.split())
