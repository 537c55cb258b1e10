"""The frontier at tiny size: every kind, what is kept when it goes on where it was stopped, and times, which never are."""

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
from eval import finalists, frontier
from eval.harness import baselines, drawing, step_caches
from eval.work import finalists as finalists_work
from eval.work import frontier as work

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
    return {row["name"]: row for row in json.loads((folder / "report.json").read_text())["tables"]["candidates"]}


def kept_of(folder: Path) -> dict[str, dict]:
    """The candidates by name, with the reports of their traces."""
    return {row["name"]: row for row in json.loads((folder / "candidates.json").read_text())["candidates"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A folder with a model and a frontier, and the words it was made with, without the place it went to."""
    where = tmp_path_factory.mktemp("frontier")
    saved(where / "model")
    words = ["--model", where / "model", "--count", 4, "--batch_size", 2, "--num_inference_steps", STEPS]
    words += ["--cache_intervals", 2, "--searched", 0.5, "--searched_fitted", 0.5, "--searched_joint", 0.5]
    words += ["--search_count", 2, "--amplification_images", 2]
    words += ["--fewer_steps", 0.5, "--error_thresholds", 0.05, "--oracles", 0.05]
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
    monkeypatch.setattr(drawing, "generate", own)
    monkeypatch.setattr(baselines, "generate", theirs)
    return own, theirs


def test_a_stopped_frontier_draws_nothing_twice_and_takes_all_times_anew(copied, monkeypatch: pytest.MonkeyPatch):
    folder, words = copied
    before = rows_of(folder)
    own, theirs = told(monkeypatch)
    monkeypatch.setattr(step_caches, "error_amplification", None)  # noted
    monkeypatch.setattr(step_caches, "record", None)
    run(frontier, *words)
    after = rows_of(folder)
    assert "random per step of error threshold 0.05" in after
    times = {name: row["time"] for name, row in after.items()}
    assert times == {name: 1 if name == "full" else 0.25 for name in before}
    assert {name: row["seconds"] for name, row in after.items()} == {
        name: 4 if name == "full" else 1 for name in before
    }
    rounds = len(before) + 1  # the controls are timed beside the full model once more
    assert len(own.sizes) + len(theirs.sizes) == 3 * rounds  # one to warm up, two that count
    for name, row in after.items():
        assert row | {"time": 0, "seconds": 0} == before[name] | {"time": 0, "seconds": 0}
    run(frontier, *words, "--clock_images", 2)
    assert json.loads((folder / "report.json").read_text())["settings"]["clock_images"] == 2
    assert len(own.sizes) + len(theirs.sizes) == 5 * rounds


def test_the_clock_in_other_batches(copied, monkeypatch: pytest.MonkeyPatch):
    folder, words = copied
    before = rows_of(folder)
    own, theirs = told(monkeypatch)
    run(frontier, *words, "--clock_images", 4, "--clock_batch_size", 4)
    assert {*own.sizes, *theirs.sizes} == {(4, 4)}
    for name, row in rows_of(folder).items():
        assert (row["time"], row["seconds"]) == ((1, 2) if name == "full" else (0.25, 0.5))
        assert row["psnr"] == before[name]["psnr"]
    with pytest.raises(ValueError, match="expected whole batches of 2"):
        run(frontier, *words, "--clock_images", 3)


def test_the_clock_measures_what_is_drawn(copied):
    folder, words = copied
    run(frontier, *words, "--clock_images", 2)
    rows = rows_of(folder)
    assert rows["full"]["time"] == 1
    assert all(row["time"] > 0 and row["seconds"] > 0 for row in rows.values())


def test_other_weights_are_drawn_with_anew(tmp_path: Path):
    words = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--num_inference_steps", STEPS]
    words += ["--count", 4, "--batch_size", 2, "--cache_intervals", 3]
    pipe = saved(tmp_path / "model")
    run(frontier, *words)
    first = rows_of(tmp_path / "out")
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.3)
    pipe.save_pretrained(tmp_path / "model")
    run(frontier, *words)
    assert rows_of(tmp_path / "out")["periodic cache 3"]["psnr"] != first["periodic cache 3"]["psnr"]


def test_decisions_for_the_whole_batch_are_alike_within_it(tmp_path: Path):
    saved(tmp_path / "model")
    words = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--num_inference_steps", STEPS]
    words += ["--count", 4, "--batch_size", 2, "--whole_batch", 0.05, "--error_budgets", 0.05, "--no_controls"]
    run(frontier, *words, "--amplification_images", 2)
    found = kept_of(tmp_path / "out")
    assert set(found) == {"full", "whole batch 0.05", "error budget 0.05"}
    whole = found["whole batch 0.05"]["report"]
    assert set(whole["spread_per_step"]) == {0}  # within each batch all images do the same, and so here between two
    assert whole["mean_executed"] >= found["error budget 0.05"]["report"]["mean_executed"]


def test_exits_fitted_anew_are_drawn_with_anew(copied):
    folder, words = copied
    before = rows_of(folder)
    assert before["periodic joint 2"]["psnr"] != before["periodic fitted 2"]["psnr"]
    (joint,) = (row for row in before.values() if row["kind"] == "searched_joint")
    (alone,) = (row for row in before.values() if row["kind"] == "searched_fitted")
    policies = kept_of(folder)
    assert policies[joint["name"]]["policy"] == policies[alone["name"]]["policy"]
    assert joint["psnr"] != alone["psnr"]
    shutil.rmtree(folder / "fitted")
    with pytest.raises(ValueError, match="holds exits fitted under"):
        run(frontier, *words, "--search_count", 3)
    shutil.rmtree(folder / "joint")
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
    report = json.loads((folder / "candidates.json").read_text())
    report["settings"]["model"] = str(tmp_path / "plain")
    (folder / "candidates.json").write_text(json.dumps(report))
    monkeypatch.setattr(work, "Measured", None)  # no work
    monkeypatch.setattr(finalists_work, "NamedExits", None)
    with pytest.raises(ValueError, match="null_class=None, expected"):
        run(frontier, "--model", tmp_path / "plain", "--output_dir", tmp_path / "other", "--fewer_steps", 0.5)
    words = ["--report", folder / "candidates.json", "--names", "4 steps", "--output_dir", tmp_path / "other"]
    with pytest.raises(ValueError, match="null_class=None, expected"):
        run(finalists, *words)


@pytest.mark.parametrize(
    "words",
    [
        ["--cache_intervals", 2, 2],
        ["--cache_intervals", 0],
        ["--fewer_steps", 0.5, 0.50],
        ["--fewer_steps", 0],
        ["--fewer_steps", 1.1],
        ["--searched", 1.0],
        ["--searched_epsilon", 0],
        ["--searched_fitted", "nan"],
        ["--error_thresholds", -0.1],
        ["--error_budgets", "nan"],
        ["--error_budgets", "inf"],
        ["--oracles", 0],
        ["--deediff", 1.5],
        ["--first_block", "nan"],
        ["--mag", 0],
        ["--taylor", 0],
        ["--taylor_second_order", 0],
        ["--count", 0],
        ["--search_count", 0],
        ["--amplification_images", 0],
        ["--amplification_every", 0],
        ["--reference_count", 0],
        ["--searched_joint", 1],
        ["--whole_batch", 0],
        ["--deediff_shares", 0],
        ["--released_threshold", 1.5],
        ["--calibration_count", 0],
        ["--other_caches", "name"],
        ["--clock_batch_size", 0],
        ["--decay", "nan"],
        ["--power", 1.5],
        ["--search_power", -1],
        ["--clock_images", 3, "--batch_size", 2],
        ["--clock_images", 0],
    ],
)
def test_numbers_out_of_range_are_refused_before_work(words: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(work, "load", None)  # no work
    error = {"--clock_images": "images for the clock of"}.get(words[0], words[0].strip("-") + "=")
    with pytest.raises(ValueError, match=error):
        run(frontier, "--output_dir", tmp_path, "--mag", 0.1, *words)


def test_the_verdict_names_the_best_that_is_not_slower():
    def row(name: str, kind: str, time: float, psnr: float) -> dict:
        return {"name": name, "kind": kind, "time": time, "psnr": psnr}

    rows = [row("full", "full", 1.0, 100), row("ours", "searched", 0.5, 40), row("oracle", "oracle", 0.4, 60)]
    rows += [row("slower", "fewer_steps", 0.6, 50), row("fast", "taylor", 0.505, 30), row("faster", "mag", 0.3, 20)]
    assert work.verdict(rows) == "- 2.00x: ours 40.0 dB; at most that time: fast 30.0 dB"
    assert work.verdict(rows[:4]) == "- 2.00x: ours 40.0 dB; at most that time: nothing else is as fast"
