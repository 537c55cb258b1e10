"""A frontier that goes on where it was stopped, and its clock: what is kept, what never is, and times measured anew. At tiny size."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel
from ee_diffusion.diffusion.pipelines.sampling import Generated
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from eval import ablation, clock, finalists, frontier
from eval.harness import baselines, candidates

STEPS = 8


def saved(where: Path, *, null_class: int | None = 3) -> EarlyExitPipeline:
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "patch_size": 4, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}
    transformer = UViTTransformer2DModel(**sizes, num_classes=4, null_class=null_class)
    made = EarlyExitPipeline(transformer, DDIMScheduler(), DenoisingExits.for_transformer(transformer, (1, 2)))
    made.save_pretrained(where)
    return made


def run(script, *words: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EE_DIFFUSION_DATA", raising=False)
        patch.setattr(sys, "argv", ["script", *(str(word) for word in words)])
        script.main()


def rows_of(folder: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / "frontier.json").read_text())["rows"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A folder with a model and a frontier, and the words it was made with, without the place it went to."""
    where = tmp_path_factory.mktemp("frontier")
    saved(where / "model")
    words = ["--model", where / "model", "--count", 4, "--batch_size", 2, "--num_inference_steps", STEPS]
    words += ["--periods", 2, "--shares", 0.5, "--fitted_shares", 0.5, "--search_count", 2, "--gain_images", 2]
    words += ["--together_shares", 0.5]
    words += ["--fractions", 0.5, "--errors", 0.05, "--oracles", 0.05]
    run(frontier, *words, "--output_dir", where / "out")
    return where, words


@pytest.fixture
def copied(made: tuple[Path, list], tmp_path: Path) -> tuple[Path, list]:
    """A frontier of one's own to go on with, and its command line."""
    where, words = made
    shutil.copytree(where / "out", tmp_path / "out")
    return tmp_path / "out", [*words, "--output_dir", tmp_path / "out"]


class Told:
    """In the place of `generate`: draws nothing, and takes two seconds for the full model and half a second for all others."""

    def __init__(self, *, cached: bool = False):
        self.cached, self.sizes = cached, []

    def __call__(self, pipeline, chosen, labels, *, batch_size: int, num_inference_steps: int, **call) -> Generated:
        self.sizes.append((len(chosen), batch_size))
        full = not self.cached and num_inference_steps == STEPS and call["exit_policy"] is None
        return Generated(torch.zeros(len(chosen), 3, 16, 16), None, (2.0 if full else 0.5,))


def told(monkeypatch: pytest.MonkeyPatch) -> tuple[Told, Told]:
    own, theirs = Told(), Told(cached=True)
    monkeypatch.setattr(candidates, "generate", own)
    monkeypatch.setattr(baselines, "generate", theirs)
    return own, theirs


def test_a_stopped_frontier_draws_nothing_twice_and_takes_all_times_anew(copied, monkeypatch: pytest.MonkeyPatch):
    folder, words = copied
    before = rows_of(folder)
    own, theirs = told(monkeypatch)
    monkeypatch.setattr(candidates, "error_amplification", None)  # noted
    monkeypatch.setattr(candidates, "record", None)
    run(frontier, *words)
    after = rows_of(folder)
    assert "random_per_step of remembered 0.05" in after
    times = {name: row["time"] for name, row in after.items()}
    assert times == {name: 1 if name == "full" else 0.25 for name in before}
    assert {name: row["seconds"] for name, row in after.items()} == {
        name: 4 if name == "full" else 1 for name in before
    }
    assert len(own.sizes) + len(theirs.sizes) == 3 * len(before)  # one to warm up, two that count
    for name, row in after.items():
        assert row | {"time": 0, "seconds": 0} == before[name] | {"time": 0, "seconds": 0}
    run(frontier, *words, "--clock_images", 2)
    report = json.loads((folder / "frontier.json").read_text())
    assert report["settings"]["clock_images"] == 2
    assert len(own.sizes) + len(theirs.sizes) == 5 * len(before)


def test_the_clock_of_a_report_anew_and_in_other_batches(copied, monkeypatch: pytest.MonkeyPatch):
    folder, _ = copied
    report = json.loads((folder / "frontier.json").read_text())
    before = {row["name"]: row for row in report["rows"]}
    (folder / "frontier.json").write_text(
        json.dumps(report | {"rows": [row | {"seconds": 7e7} for row in report["rows"]]})
    )
    own, theirs = told(monkeypatch)
    run(clock, "--report", folder / "frontier.json", "--images", 8, "--batch_size", 4)
    assert {*own.sizes, *theirs.sizes} == {(4, 4)}
    report = json.loads((folder / "frontier.json").read_text())
    assert {name: report["clock"][name] for name in ("images", "batches", "batch_size")} == {
        "images": 8,
        "batches": 2,
        "batch_size": 4,
    }
    for row in report["rows"]:
        assert (row["time"], row["seconds"]) == ((1, 4) if row["name"] == "full" else (0.25, 1))
        assert row["psnr"] == before[row["name"]]["psnr"]
    run(clock, "--report", folder / "frontier.json", "--images", 1)
    assert json.loads((folder / "frontier.json").read_text())["clock"]["batch_size"] == 1
    with pytest.raises(ValueError, match="expected whole batches of 2"):
        run(clock, "--report", folder / "frontier.json", "--images", 3)


def test_the_clock_draws_what_the_report_says(copied):
    folder, _ = copied
    run(clock, "--report", folder / "frontier.json", "--images", 2)
    rows = rows_of(folder)
    assert rows["full"]["time"] == 1
    assert all(row["time"] > 0 and row["seconds"] > 0 for row in rows.values())


def test_an_ablation_draws_anew_after_other_weights_only_and_takes_times_anew(tmp_path: Path, monkeypatch):
    words = [
        "--model",
        tmp_path / "model",
        "--output_dir",
        tmp_path / "out",
        "--num_inference_steps",
        STEPS,
        "--count",
        4,
    ]
    words += ["--batch_size", 2]
    pipe = saved(tmp_path / "model")
    run(ablation, *words)
    first = json.loads((tmp_path / "out" / "ablation.json").read_text())["rows"]
    with monkeypatch.context() as patch:
        patch.setattr(ablation, "generate", Told())
        run(ablation, *words)
    again = json.loads((tmp_path / "out" / "ablation.json").read_text())["rows"]
    assert [row["time"] for row in again] == [1 if row["name"] == "full" else 0.25 for row in first]
    assert [row["psnr"] for row in again] == [row["psnr"] for row in first]
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.3)
    pipe.save_pretrained(tmp_path / "model")
    run(ablation, *words)
    after = json.loads((tmp_path / "out" / "ablation.json").read_text())["rows"]
    name = "memory without uncertainty"
    assert (after[1]["name"], after[1]["psnr"] == first[1]["psnr"]) == (name, False)


def test_exits_fitted_anew_are_drawn_with_anew(copied):
    folder, words = copied
    before = rows_of(folder)
    assert before["periodic together 2"]["psnr"] != before["periodic fitted 2"]["psnr"]
    (together,) = (row for row in before.values() if row["kind"] == "searched together")
    (alone,) = (row for row in before.values() if row["kind"] == "searched fitted")
    assert together["policy"] == alone["policy"]
    assert together["psnr"] != alone["psnr"]
    shutil.rmtree(folder / "fitted")
    with pytest.raises(ValueError, match="holds exits fitted under"):
        run(frontier, *words, "--search_count", 3)
    shutil.rmtree(folder / "together")
    run(frontier, *words, "--search_count", 3)
    after = rows_of(folder)
    assert after["periodic fitted 2"]["psnr"] != before["periodic fitted 2"]["psnr"]
    assert after["periodic cache 2"]["psnr"] == before["periodic cache 2"]["psnr"]


def test_fitted_exits_of_other_weights_are_refused_and_of_unknown_ones_said(copied):
    folder, words = copied
    path = folder / "fitted" / "settings.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"weights": "0123"}))
    with pytest.raises(ValueError, match="holds exits fitted under"):
        run(frontier, *words)
    path.write_text(json.dumps({name: value for name, value in known.items() if name != "weights"}))
    with pytest.warns(UserWarning, match="does not say for which weights"):
        run(frontier, *words)
    with pytest.raises(ValueError, match="holds exits fitted under"), pytest.warns(UserWarning, match="does not say"):
        run(frontier, *words, "--search_count", 3)


def test_a_model_without_a_null_class_is_refused_before_work(copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, _ = copied
    saved(tmp_path / "plain", null_class=None)
    report = json.loads((folder / "frontier.json").read_text())
    report["settings"]["model"] = str(tmp_path / "plain")
    (folder / "frontier.json").write_text(json.dumps(report))
    for script in (frontier, ablation, clock, finalists):
        monkeypatch.setattr(script, "load_memory", None)  # no work
    asked = ["--model", tmp_path / "plain", "--output_dir", tmp_path / "other"]
    with pytest.raises(ValueError, match="null_class=None, expected"):
        run(frontier, *asked)
    with pytest.raises(ValueError, match="null_class=None, expected"):
        run(ablation, *asked)
    with pytest.raises(ValueError, match="null_class=None, expected"):
        run(clock, "--report", folder / "frontier.json", "--images", 2)
    with pytest.raises(ValueError, match="null_class=None, expected"):
        run(finalists, "--report", folder / "frontier.json", "--names", "4 steps", "--output_dir", tmp_path / "other")


@pytest.mark.parametrize(
    "words",
    [
        ["--periods", 2, 2],
        ["--periods", 0],
        ["--fractions", 0.5, 0.50],
        ["--fractions", 0],
        ["--fractions", 1.1],
        ["--shares", 1.0],
        ["--noise_shares", 0],
        ["--fitted_shares", "nan"],
        ["--errors", -0.1],
        ["--budgets", "nan"],
        ["--budgets", "inf"],
        ["--oracles", 0],
        ["--thresholds", 1.5],
        ["--first_block", "nan"],
        ["--mag", 0],
        ["--taylor", 0],
        ["--taylor_second_order", 0],
        ["--count", 0],
        ["--search_count", 0],
        ["--gain_images", 0],
        ["--gain_every", 0],
        ["--reference_count", 0],
        ["--decay", "nan"],
        ["--power", 1.5],
        ["--search_power", -1],
        ["--clock_images", 3, "--batch_size", 2],
        ["--clock_images", 0],
    ],
)
def test_numbers_out_of_range_are_refused_before_work(words: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frontier, "load", None)  # no work
    said = {"--clock_images": "images for the clock of"}.get(words[0], words[0].strip("-") + "=")
    with pytest.raises(ValueError, match=said):
        run(frontier, "--output_dir", tmp_path, *words)


def test_the_verdict_names_the_best_that_is_not_slower():
    def row(name: str, kind: str, time: float, psnr: float) -> dict:
        return {"name": name, "kind": kind, "time": time, "psnr": {"mean": psnr}}

    rows = [row("full", "full", 1.0, 100), row("ours", "searched", 0.5, 40), row("oracle", "oracle", 0.4, 60)]
    rows += [row("slower", "fewer_steps", 0.6, 50), row("fast", "taylor", 0.505, 30), row("faster", "mag", 0.3, 20)]
    assert frontier.verdict(rows) == "- 2.00x: ours 40.0 dB; at most that time: fast 30.0 dB"
    assert frontier.verdict(rows[:4]) == "- 2.00x: ours 40.0 dB; at most that time: nothing else is as fast"
