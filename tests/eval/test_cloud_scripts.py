"""The scripts of edge and cloud on a tiny model: answers, tokens and FLOPs, seconds over links, load."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from language import LAYERS
from tiny_language import text_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("grpc", reason="needs the extra cloud")

from ee_diffusion.decoding.fingerprint import fingerprint_of
from ee_diffusion.decoding.heads import LearnedExits
from ee_diffusion.edge_cloud.split import split_model
from eval import answers, cloud, cloud_clock, cloud_load, cloud_memory, prompt_sets

EXITS, TOKENS = (2, 4), 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model, its parts and exits, and three text sets of a few prompts."""
    folder = text_folder(tmp_path_factory.mktemp("cloud"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = "{% for message in messages %}w9 {{ message['content'] }} w10 {% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    split_model(model, folder / "parts", exits=EXITS)
    LearnedExits(EXITS, 32, adapter_width=4, made_for=fingerprint_of(model)).save(folder / "exits.safetensors")
    for name in ("instruct", "dialogsum", "truthfulqa"):
        (folder / "text" / name).mkdir(parents=True)
    alpaca = [{"instruction": f"w{i + 2}", "input": f"w{i + 3}", "output": f"w{i + 4}"} for i in range(21)]
    (folder / "text/instruct/llamafactory_alpaca_en_demo.json").write_text(json.dumps(alpaca))
    test = [{"dialogue": f"w{i + 2} w{i + 5}", "summary1": f"w{i + 7}"} for i in range(3)]
    train = [{"dialogue": f"w{i + 2} w{i + 6}", "summary": f"w{i + 7}"} for i in range(2)]
    for split, rows in (("test", test), ("dev", train)):
        (folder / f"text/dialogsum/dialogsum.{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with (folder / "text/truthfulqa/TruthfulQA.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["Question", "Best Answer"], ["w11 w12", "w13"], ["w14", "w15 w16"]])
    return folder


def call(monkeypatch: pytest.MonkeyPatch, module, **flags) -> None:
    words = [module.__name__]
    for name, value in flags.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    monkeypatch.setattr(sys, "argv", words)
    module.main()


def test_answers_are_the_models_own_and_a_stopped_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch):
    output = folder / "answers.json"
    given = {"model": folder / "model", "text_folder": folder / "text", "max_new_tokens": TOKENS, "output": output}
    call(monkeypatch, answers, **given, sets=["alpaca", "dialogsum"], split="train", count=3, batch_size=2)
    rows = json.loads(output.read_text())
    assert sorted(row["name"] for row in rows) == [
        *("alpaca/train/1", "alpaca/train/14", "alpaca/train/7", "dialogsum/train/0", "dialogsum/train/1"),
    ]
    assert all(row["prompt"].startswith("w9 ") and row["answer"] for row in rows)
    output.write_text(json.dumps(rows[:2]))
    call(monkeypatch, answers, **given, sets=["alpaca", "dialogsum"], split="train", count=3, batch_size=1)
    again = {row["name"]: row for row in json.loads(output.read_text())}
    assert again == {row["name"]: row for row in rows}
    with pytest.raises(ValueError, match="no train prompts"):
        call(monkeypatch, answers, **given, sets=["truthfulqa"], split="train")


def test_tokens_bytes_and_flops_beside_the_whole_model(folder: Path, monkeypatch: pytest.MonkeyPatch):
    given = {"model": folder / "model", "parts": folder / "parts", "text_folder": folder / "text", "count": 2}
    given |= {"max_new_tokens": TOKENS, "exits": folder / "exits.safetensors", "output_dir": folder / "quality"}
    names = ["always-float32", "always-int8", "sure-0.05", "alone"]
    call(monkeypatch, cloud, **given, candidates=names)
    report = json.loads((folder / "quality" / "cloud.json").read_text())
    rows = {(row["set"], row["candidate"]): row for row in report["rows"]}
    assert set(rows) == {(one, name) for one in ("alpaca", "dialogsum", "truthfulqa") for name in ("full", *names)}
    raw = cloud.read_rows(folder / "quality" / "rows.jsonl")
    for row in raw:
        positions = row["prompt_tokens"] + len(row["tokens"]) - 1
        if row["candidate"] == "always-float32":
            assert row["payload"] == positions * 32 * 4
        if row["candidate"] == "always-int8":
            assert row["payload"] == positions * (32 + 4)
    for name in ("alpaca", "dialogsum", "truthfulqa"):
        always = rows[name, "always-float32"]
        assert (always["asked"], always["rougeL_full"], always["differing_far"]) == (1, 1, 0)
        share = (LAYERS - EXITS[0]) / LAYERS  # of the layers; the head is part of both
        assert share < always["cloud_flops"] < 1
        assert rows[name, "alone"]["cloud_flops"] == 0 == rows[name, "alone"]["payload"]
        assert rows[name, "full"]["edge_flops"] == 0
        assert rows[name, "sure-0.05"]["cloud_flops"] < always["cloud_flops"]
    call(monkeypatch, cloud, **given, candidates=names)  # nothing is made again
    assert cloud.read_rows(folder / "quality" / "rows.jsonl") == raw
    with pytest.raises(ValueError, match="expected always-KIND"):
        cloud.candidate("often", "margin", EXITS)


def test_flops_are_counted_on_the_first_prompts_of_each_set():
    names = [prompt("alpaca", 3), prompt("truthfulqa", 1), prompt("alpaca", 5)]
    assert cloud.first_of_each(names, 1) == {"alpaca/test/3", "truthfulqa/test/1"}
    assert len(cloud.first_of_each(names, None)) == 3
    row = {
        "candidate": "full",
        "text": "a b",
        "reference": "a b",
        "tokens": [1, 2],
        "gaps": [0.1, 0.1],
        "prompt_tokens": 2,
    }
    some = [row | {"prompt": "alpaca/test/0", "cloud_flops": 8, "edge_flops": 0}]
    some += [row | {"prompt": "alpaca/test/1", "cloud_flops": None, "edge_flops": None}]
    some += [one | {"candidate": "alone"} for one in some]
    some[2] |= {"edge_flops": 2, "cloud_flops": 0}
    alone, full = cloud.summarise(some, seed=0)
    assert (alone["flops_prompts"], alone["edge_flops"], alone["cloud_flops"], alone["prompts"]) == (1, 0.25, 0, 2)
    assert (full["cloud_flops"], full["edge_flops"]) == (1, 0)


def prompt(name: str, place: int) -> cloud.Prompt:
    return cloud.Prompt(f"{name}/test/{place}", "text", "reference")


@pytest.mark.parametrize("cut", ["", '{"prompt": "b", "te', '{"kept": 1}\n', '{"kept": 1}\n{"prompt": "b"'])
def test_a_line_that_was_cut_short_is_made_again(tmp_path: Path, cut: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(cut)
    kept = cloud.read_rows(path)
    assert kept == [{"kept": 1}] * cut.count("\n")
    for row in ({"prompt": "b"}, {"prompt": "c"}):
        cloud.add_row(path, row)
    assert cloud.read_rows(path) == [*kept, {"prompt": "b"}, {"prompt": "c"}]


def test_where_an_answer_first_differs():
    assert cloud.first_difference([1, 2], [1, 2], [0.1, 0.2]) is None
    assert cloud.first_difference([1, 3, 5], [1, 2, 4], [0.1, 0.2, 0.3]) == (1, 0.2)


def test_the_break_even_is_where_the_line_crosses_one():
    def row(prompt: str, name: str, total: float, asked: int) -> dict:
        return {
            "prompt": prompt,
            "candidate": name,
            "round_trip": 0.05,
            "total": total,
            "asked": asked,
            "tokens": [0] * 10,
        }

    rows = []
    for place in range(4):  # total over whole: 0.5 + share, crossing 1 at a half
        prompt, whole = f"alpaca/{place}", 2.0 + place
        rows.append(row(prompt, "whole", whole, 10))
        rows += [row(prompt, f"sure-{asked}", whole * (0.5 + asked / 10), asked) for asked in (1, 4, 10)]
        rows += [row(prompt, "alone", whole / 2, 0), row(prompt, "naive", 9 * whole, 10)]  # that does not count
    (found,) = cloud_clock.break_even(rows, resamples=50, seed=0)
    assert found["share"] == pytest.approx(0.5)
    assert found["low"] == pytest.approx(0.5) == found["high"]
    assert found["prompts"] == 4
    assert cloud_clock.break_even(rows[:6], resamples=9, seed=0) == [], "one prompt has no interval"


@pytest.mark.slow
def test_seconds_over_links_between_processes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    given = {"model": folder / "model", "parts": folder / "parts", "text_folder": folder / "text", "count": 1}
    given |= {
        "sets": ["alpaca"],
        "max_new_tokens": TOKENS,
        "output_dir": folder / "clock",
        "round_trips": [0.002, 0.05],
    }
    call(monkeypatch, cloud_clock, **given, candidates=["whole", "naive", "always-float32", "alone"])
    rows = cloud.read_rows(folder / "clock" / "rows.jsonl")
    found = {(row["candidate"], row["round_trip"]): row for row in rows}
    assert len(found) == len(rows) == 8
    positions = found["naive", 0.05]["prompt_tokens"] + TOKENS - 1
    assert found["always-float32", 0.05]["payload"] == positions * 32 * 4
    assert found["naive", 0.05]["payload"] == sum(range(positions - TOKENS + 1, positions + 1)) * 32 * 4
    for round_trip in (0.002, 0.05):
        assert found["always-float32", round_trip]["tokens"] == found["whole", round_trip]["tokens"]
        assert found["naive", round_trip]["tokens"] == found["whole", round_trip]["tokens"]
    always = found["always-float32", 0.05]
    assert always["total"] > TOKENS * 0.05  # a round trip for every token at least
    assert found["whole", 0.05]["total"] > 0.05
    assert found["whole", 0.05]["total"] < TOKENS * 0.05


@pytest.mark.slow
def test_clients_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    call(
        monkeypatch,
        cloud_load,
        parts=folder / "parts",
        clients=[1, 8],
        prompt_tokens=6,
        new_tokens=4,
        output_dir=folder / "load",
    )
    rows = json.loads((folder / "load" / "cloud-load.json").read_text())["rows"]
    assert [(row["clients"], row["tokens"], row["lost"], row["left_bytes"]) for row in rows] == [
        (1, 4, 0, 0),
        (8, 32, 0, 0),
    ]


@pytest.mark.slow
def test_an_edge_takes_less_memory_than_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch):
    given = {"model": folder / "model", "parts": folder / "parts", "output_dir": folder / "memory"}
    call(monkeypatch, cloud_memory, **given, prompt_tokens=8, new_tokens=2)
    whole, edge = json.loads((folder / "memory" / "cloud-memory.json").read_text())["rows"]
    assert edge["weights_mb"] < whole["weights_mb"]
    assert min(edge["imported_mb"], whole["imported_mb"]) > 50
    assert edge["peak_mb"] >= edge["imported_mb"]


def test_prompts_of_training_and_testing_do_not_meet(folder: Path):
    for name in ("alpaca", "dialogsum"):
        texts = [
            {one.text for one in prompt_sets.read_prompts(folder / "text", name, split=s)} for s in ("train", "test")
        ]
        assert texts[0]
        assert texts[1]
        assert not texts[0] & texts[1]
