"""The decoding script, end to end on a tiny model on disk."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from language import LAYERS, VOCABULARY, model_named
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.risk_control import upper_bound
from ee_diffusion.core.schedules import FixedDepth, FixedLayers
from ee_diffusion.decoding.fingerprint import fingerprint_of
from ee_diffusion.decoding.generate import early_exit_generate
from ee_diffusion.decoding.methods import calm, skipdecode
from eval import decode, decode_modes, decoder


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
    facts = {(row["name"], row["batch"]): row for row in report["speed"]}
    assert facts["full", 2]["checks"] == facts["skip", 2]["checks"] == 0
    assert 0 < facts["calm", 2]["checks"] <= 2
    assert 0 < facts["calm", 2]["check_share"] < 1
    for name in ("full", "driver", "skip", "calm"):
        assert math.isfinite(facts[name, 2]["realised"])  # tests time nothing
    assert facts["lossless", 1]["realised"] is None
    quality = {row["name"]: row for row in report["quality"]}
    assert list(quality) == names
    for name in ("full", "driver", "lossless"):
        assert quality[name]["same_sequences"] == 1
        assert quality[name]["perplexity"] == pytest.approx(quality["full"]["perplexity"], rel=1e-5)
    ran = {name: row["layers"] for name, row in quality.items()}
    assert (ran["full"], ran["driver"], ran["lossless"]) == (LAYERS, LAYERS, None)
    assert 2 <= ran["skip"] <= 5
    assert "skip" in (folder / "out" / "decode.md").read_text()
    texts = json.loads((folder / "out" / "texts.json").read_text())
    assert texts["meanings"] == ["w3 w4", "w8"]
    for name, row in quality.items():
        assert len(texts["candidates"][name]["texts"]) == 2
        assert sum(texts["candidates"][name]["rougeL"]) / 2 == pytest.approx(row["rougeL"])


def test_some_candidates_alone(folder: Path, monkeypatch, capsys):
    words = ["--policies", folder / "skip.json", "--max_new_tokens", 6, "--count", 2, "--prompt", "w2 {mr}"]
    call(monkeypatch, folder, *words, "--repeats", 0)
    everything = {row["name"]: row for row in json.loads((folder / "out" / "decode.json").read_text())["quality"]}
    call(monkeypatch, folder, *words, "--repeats", 0, "--candidates", "skip")
    (alone,) = json.loads((folder / "out" / "decode.json").read_text())["quality"]
    assert alone == {key: value for key, value in everything["skip"].items() if not key.startswith("same_")}
    with pytest.raises(ValueError, match=r"candidates \['calm'\], expected some of \['full', 'driver', 'skip'\]"):
        call(monkeypatch, folder, *words, "--repeats", 0, "--candidates", "calm")
    with pytest.raises(ValueError, match="without full"):
        call(monkeypatch, folder, *words, "--repeats", 1, "--candidates", "skip")


def test_a_shape_can_be_timed_without_its_weights(folder: Path, monkeypatch, capsys):
    sizes = ["--batch_sizes", 1, "--repeats", 1, "--max_new_tokens", 3, "--count", 0, "--prompt", "w2 {mr}"]
    call(monkeypatch, folder, "--random_weights", "true", "--tokenizer", folder, *sizes)
    report = json.loads((folder / "out" / "decode.json").read_text())
    assert [row["layers"] for row in report["speed"]] == [LAYERS, LAYERS]
    assert report["quality"] == []


def test_perplexity_is_of_all_tokens_whatever_the_batches():
    assert decode.pooled([(2.0, 1), (8.0, 3)]) == pytest.approx((2 * 8**3) ** (1 / 4))


def test_what_is_missing_or_ambiguous_is_refused(folder: Path, monkeypatch):
    with pytest.raises(ValueError, match="two policies"):
        call(monkeypatch, folder, "--policies", folder / "skip.json", folder / "skip.json")
    with pytest.raises(ValueError, match="without --exit_depth"):
        call(monkeypatch, folder, "--assistant", "true")
    with pytest.raises(ValueError, match="max_new_tokens=1, expected at least 2"):
        call(monkeypatch, folder, "--max_new_tokens", 1)
    (folder / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected mr and ref"):
        call(monkeypatch, folder, "--text", folder / "other.csv")


def test_a_row_may_have_several_references(tmp_path: Path):
    file = tmp_path / "talks.jsonl"
    file.write_text('{"talk": "a", "one": "x", "two": "y"}\n{"talk": "b", "one": "z", "two": "x"}\n')
    columns = {"meaning_column": "talk", "reference_columns": ["one", "two"]}
    options = decoder.DecodeOptions(text=str(file), **columns)
    assert decoder.read_meanings(options) == {"a": ["x", "y"], "b": ["z", "x"]}
    columns["reference_columns"] = ["one", "three"]
    with pytest.raises(ValueError, match="expected talk and one and three"):
        decoder.read_meanings(decoder.DecodeOptions(text=str(file), **columns))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--text_batch_size", -2], "text_batch_size=-2, expected at least 1"),
        (["--count", -1], "count=-1, expected at least 0"),
        (["--batch_sizes", 0], "batch_sizes=.0., expected numbers of sequences"),
        (["--repeats", -1], "repeats=-1"),
        (["--policies", "lossless.json"], "names of other candidates"),
        (["--policies", "prompt.json"], "names of other candidates"),
        (["--mode", "lossless", "--exit_depth", 3, "--draft_tokens", 3, "--count", 0], "count=0, expected at least 1"),
    ],
)
def test_numbers_and_names_out_of_range_are_refused(folder: Path, monkeypatch, words: list, told: str):
    with pytest.raises(ValueError, match=told):
        call(monkeypatch, folder, *words)


@pytest.mark.parametrize(
    ("rows", "told"), [("mr,ref\n", "has no rows"), ("mr,ref\nw3\n", "expected text in mr and ref")]
)
def test_a_file_of_texts_without_texts_is_refused(folder: Path, tmp_path: Path, monkeypatch, rows: str, told: str):
    (tmp_path / "text.csv").write_text(rows)
    with pytest.raises(ValueError, match=told):
        call(monkeypatch, folder, "--text", tmp_path / "text.csv")


def test_help_says_what_the_modes_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decode", "--help"])
    with pytest.raises(SystemExit):
        decode.main()
    said = capsys.readouterr().out
    assert "--mode lossless" in said
    assert "default: 48" in said


def test_the_text_generation_pipeline_takes_exits_as_they_are(folder: Path):
    """Its words, alone and in a padded batch, are those of `generate` under the same policy."""
    generator = pipeline("text-generation", model=str(folder), device="cpu", dtype=torch.float64)
    generator.tokenizer.padding_side = "left"
    asked = ["w3 w4 w5", "w7", "w9 w8 w5 w3 w2"]
    early = {"custom_generate": early_exit_generate, "exit_policy": skipdecode(warm_up=1, least=2, most=5, horizon=4)}
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    alone = [generator(text, **early, **options)[0]["generated_text"] for text in asked]
    batch = generator(asked, batch_size=3, **early, **options)
    assert [found[0]["generated_text"] for found in batch] == alone
    for text, found in zip(asked, alone, strict=True):
        inputs = generator.tokenizer(text, return_tensors="pt")
        width = inputs["input_ids"].shape[1]
        ids = generator.model.generate(**inputs, **early, max_new_tokens=5, do_sample=False)
        assert found.split() == generator.tokenizer.decode(ids[0, width:], skip_special_tokens=True).split()
    plain = [found[0]["generated_text"] for found in generator(asked, **options)]
    assert plain != alone, "the policy changes something"


def test_lossless_mode_counts_what_is_equal(folder: Path, monkeypatch):
    drafts = ["--mode", "lossless", "--exit_depth", 3, "--draft_tokens", 3]
    call(
        monkeypatch, folder, *drafts, "--batch_sizes", 1, 2, "--max_new_tokens", 6, "--count", 2, "--prompt", "w2 {mr}"
    )
    rows = json.loads((folder / "out" / "decode.json").read_text())["lossless"]
    assert [(row["batch"], row["prompts"], row["equal"], row["far"]) for row in rows] == [(1, 2, 2, 0), (2, 2, 2, 0)]
    assert all(0 <= row["accepted"] <= row["drafted"] for row in rows)
    with pytest.raises(ValueError, match="without --exit_depth"):
        call(monkeypatch, folder, "--mode", "lossless")


def test_the_time_of_lossless_decoding_is_over_that_of_greedy_search(folder: Path, monkeypatch):
    """By a clock that only lossless decoding moves on quickly."""
    now, slow = [0.0], [False]
    written = decode_modes.Decoder.written

    def timed(self, name, inputs, **more):
        slow[0] = name == "lossless"
        now[0] += 3.0 if slow[0] else 1.0
        return written(self, name, inputs, **more)

    monkeypatch.setattr(decode_modes.Decoder, "written", timed)
    monkeypatch.setattr(decode_modes.time, "perf_counter", lambda: now[0])
    drafts = ["--mode", "lossless", "--exit_depth", 3, "--draft_tokens", 3, "--batch_sizes", 1, "--max_new_tokens", 4]
    call(monkeypatch, folder, *drafts, "--count", 2, "--prompt", "w2 {mr}")
    (row,) = json.loads((folder / "out" / "decode.json").read_text())["lossless"]
    assert row["time"] == 3.0


def test_a_difference_is_told_by_the_gap_at_its_first_place():
    logits = (torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0.0, 0.25, 0.5]]), torch.tensor([[9.0, 0.0, 0.0]]))
    greedy = torch.tensor([[0, 2, 0]])
    assert decode_modes.gaps_at_differences(greedy, greedy, logits) == [None]
    other, row = torch.tensor([[0, 1, 1]]), {"equal": 0, "near": 0, "far": 0, "largest_gap": None}
    assert decode_modes.gaps_at_differences(greedy, other, logits) == [0.25]
    for two, told in ((greedy, logits), (other, logits), (other, None)):
        decode_modes._count(row, greedy, two, told)
    assert row == {"equal": 1, "near": 0, "far": 2, "largest_gap": torch.inf}


def test_batch_mates_do_not_matter_to_any_candidate(folder: Path, monkeypatch):
    candidates = ["--policies", folder / "skip.json", folder / "calm.json", "--exit_depth", 3, "--draft_tokens", 3]
    (folder / "ragged.csv").write_text("mr,ref\nw3,w5\nw8 w4 w9,w9\nw5 w5,w3\n")
    words = ["--mode", "alone", "--max_new_tokens", 6, "--count", 3, "--text_batch_size", 2, "--prompt", "{mr}"]
    call(monkeypatch, folder, "--text", folder / "ragged.csv", *candidates, *words)
    rows = json.loads((folder / "out" / "decode.json").read_text())["alone"]
    assert [(row["name"], row["equal"], row["far"]) for row in rows] == [
        (name, 3, 0) for name in ("full", "driver", "skip", "calm", "lossless")
    ]


def test_policies_are_calibrated_on_half_of_the_prompts(folder: Path, monkeypatch):
    Policy(schedule=FixedDepth(LAYERS)).save(folder / "whole.json")
    Policy(schedule=FixedLayers(tuple(range(LAYERS)))).save(folder / "every.json")
    policies = ["--policies", folder / "whole.json", folder / "every.json", folder / "skip.json"]
    (folder / "many.csv").write_text("mr,ref\n" + "".join(f"w{i} w{i + 1},w{i}\n" for i in range(3, 43)))
    promise = ["--mode", "calibrate", "--risk", 0.3, "--delta", 0.1]
    words = [*policies, *promise, "--count", 40, "--max_new_tokens", 6, "--prompt", "{mr}"]
    call(monkeypatch, folder, "--text", folder / "many.csv", *words)
    safe, alike, bold = json.loads((folder / "out" / "decode.json").read_text())["calibration"]
    assert (safe["layers"], safe["loss"], safe["held_out_loss"], safe["certified"]) == (LAYERS, 0, 0, True)
    assert bold["layers"] < LAYERS
    assert bold["certified"] == (bold["p_value"] <= 0.1)
    assert bold["loss"] > 0
    assert safe["upper_bound"] == pytest.approx(upper_bound(torch.zeros(20), 0.1)), "of delta, not of the risk"
    assert (alike["certified"], bold["certified"]) == (True, False), "of so few prompts"
    written = Policy.load(folder / "out" / "policy.json")
    assert written.schedule == FixedLayers(tuple(range(LAYERS))), "the boldest certified one"
    assert written.made_for == (("model", fingerprint_of(AutoModelForCausalLM.from_pretrained(folder))),)
    with pytest.raises(ValueError, match="would be written over"):
        call(monkeypatch, folder, "--text", folder / "many.csv", *promise, "--policies", folder / "out" / "policy.json")
    call(monkeypatch, folder, "--text", folder / "many.csv", *words, "--loss", "risk")
    assert json.loads((folder / "out" / "decode.json").read_text())["calibration"][2]["loss"] != bold["loss"]
    few = [folder / "skip.json", "--mode", "calibrate", "--risk", 0.3, "--delta", 0.1, "--count", 4, "--prompt", "{mr}"]
    call(monkeypatch, folder, "--text", folder / "many.csv", "--max_new_tokens", 6, "--policies", *few)
    assert not (folder / "out" / "policy.json").exists(), "nothing was certified: no certificate of before is left"
    with pytest.raises(ValueError, match="risk=None"):
        call(monkeypatch, folder, "--mode", "calibrate", *policies)
    with pytest.raises(ValueError, match="within"):
        call(monkeypatch, folder, "--mode", "calibrate", *policies, "--risk", 1.5, "--delta", 0.1)
    with pytest.raises(ValueError, match="1 prompts"):
        call(monkeypatch, folder, *policies, *promise, "--count", 1)
    with pytest.raises(ValueError, match="mode='x'"):
        call(monkeypatch, folder, "--mode", "x")


def test_prompts_in_the_order_of_their_kinds_are_drawn_before_they_are_split(folder: Path, monkeypatch):
    """The file's first half loses everything, its second nothing: half a file would calibrate on one kind alone."""
    (folder / "kinds.csv").write_text("mr,ref\n" + "".join(f"w{i},w{i}\n" for i in range(3, 43)))

    def texts(decoder, name, chosen):
        return ["a" if name == "full" or int(prompt[1:]) >= 23 else "b" for prompt in chosen], 1.0

    monkeypatch.setattr(decode_modes, "_texts", texts)
    words = [
        "--policies",
        folder / "skip.json",
        "--mode",
        "calibrate",
        "--risk",
        0.3,
        "--delta",
        0.1,
        "--prompt",
        "{mr}",
    ]
    found = []
    for count, seed in ((40, 0), (20, 1), (20, 2)):
        call(monkeypatch, folder, "--text", folder / "kinds.csv", *words, "--count", count, "--seed", seed)
        (row,) = json.loads((folder / "out" / "decode.json").read_text())["calibration"]
        assert 0.1 < row["loss"] < 0.9
        assert 0.1 < row["held_out_loss"] < 0.9
        found.append(row)
    assert found[0]["loss"] + found[0]["held_out_loss"] == pytest.approx(1), "every prompt once"


def test_losses_are_those_of_the_texts():
    full, said, wanted = ["a b c d", "x y"], ["a b", "x y"], [["a b c d"], ["q"]]
    assert decode_modes.text_losses(said, full, wanted, kind="consistency").tolist() == pytest.approx([1 / 3, 0])
    assert decode_modes.text_losses(said, full, wanted, kind="risk").tolist() == pytest.approx([1 / 3, 0])
    assert decode_modes.text_losses(full, said, wanted, kind="risk").tolist() == [0, 0], "better than full is no loss"
