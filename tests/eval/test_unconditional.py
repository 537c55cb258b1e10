"""Models without classes, and with classes but no class for "none", through the whole journey: fitted, exported, drawn, traded off,
calibrated, put on the frontier. At tiny size and without guidance, which they cannot have."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from ee_diffusion.cli import main as cli
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.distillation.deediff_objective import DiffusionObjective
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.exits.oracle import OracleExits
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel
from ee_diffusion.diffusion.pipelines.sampling import classes_of
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.splits import balanced_labels, shuffled_labels
from ee_diffusion.training.datasets import ImageSource
from eval import frontier, generate, guarantee, latency, uncertainty
from train import export, fit_exits, fit_step_cache
from train.train_uvit import ValidationConfig
from train.work.fit_exits import conditions_of
from train.work.uvit import draw

STEPS = 6
KINDS = {"unconditional": {}, "classes": {"num_classes": 4}, "one": {"num_classes": 1, "null_class": 0}}
LABELS = {"unconditional": None, "classes": [0, 1, 2, 3], "one": [0, 0, 0, 0]}
CALL = ("--guidance_scale", 1, "--num_inference_steps", STEPS)


def made(kind: str) -> EarlyExitPipeline:
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "patch_size": 4, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}
    transformer = UViTTransformer2DModel(**sizes, **KINDS[kind])
    exits = DenoisingExits.for_transformer(transformer, (1, 2))
    for module in exits.uncertainty_modules:
        torch.nn.init.normal_(module.weight, std=1.0)
    pipe = EarlyExitPipeline(transformer, DDIMScheduler(), exits)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(kind) / "model"
    made(kind).save_pretrained(folder)
    return folder


def run(script, *words: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EE_DIFFUSION_DATA", raising=False)
        patch.setattr(sys, "argv", ["script", *(str(word) for word in words)])
        script.main()


def test_the_classes_that_are_drawn(kind: str):
    count = classes_of(made(kind), 1.0)
    assert balanced_labels(4, count) == LABELS[kind]
    assert (shuffled_labels(4, count, seed=0) is None) == (LABELS[kind] is None)
    if kind == "one":
        assert conditions_of(fit_exits.FitConfig(model="m"), made(kind).transformer) == [0]
        assert classes_of(made(kind), 2.0) == 1, "its class is none, and guidance leads nowhere"
        return
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 .* null_class=None, expected .*, or guidance_scale=1"):
        classes_of(made(kind), 2.0)


def test_it_is_exported_with_policies(model: Path, tmp_path: Path):
    run(export, "--model", model, "--output_dir", tmp_path / "out", *CALL, "--count", 4, "--budgets", 0.7)
    pipe = EarlyExitPipeline.from_pretrained(tmp_path / "out")
    policy = Policy.load(tmp_path / "out" / "policies" / "blocks-70.json")
    assert pipe.transformer.config.num_classes == made_config(model)["num_classes"]
    assert 0 < policy.criterion.threshold < 1


def test_exits_are_fitted_on_a_data_set(model: Path, kind: str, tmp_path: Path):
    """With labels, where the model has classes; none of them is dropped where there is no class for "none"."""
    columns = {"image": datasets.Image(), "label": datasets.Value("int64")}
    rows = {"image": [Image.new("RGB", (16, 16), (60 * one, 0, 0)) for one in range(4)], "label": LABELS["one"]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).to_parquet(tmp_path / "some.parquet")
    words = ["--model", model, *CALL, "--output_dir", tmp_path / "out", "--states", "dataset", "--class_drop", 0.1]
    words += ["--train_data_files", tmp_path / "some.parquet", "--label_column", "label", "--resolution", 16]
    words += ["--train_batch_size", 2, "--exit_depths", 1, "--max_train_steps", 2, "--held_out", 2]
    run(fit_exits, *words)
    assert (tmp_path / "out" / "exits").is_dir()


def made_config(model: Path) -> dict:
    return {"num_classes": None, **json.loads((model / "transformer" / "config.json").read_text())}


def test_images_are_drawn_and_kept(model: Path, kind: str, tmp_path: Path):
    words = ["--model", model, "--output_dir", tmp_path, *CALL, "--count", 4, "--batch_size", 3, "--device", "cpu"]
    run(generate, *words, "--exit_threshold", 0.5)
    found = load_file(tmp_path / "samples.safetensors")
    assert found["images"].shape == (4, 3, 16, 16)
    assert (found["labels"].tolist() if "labels" in found else None) == LABELS[kind]
    assert Trace.load(tmp_path / "trace.safetensors").rows.tolist() == [[1] * 4] * STEPS


def reported(folder: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / "report.json").read_text())["tables"]["candidates"]}


def test_shares_of_the_blocks_beside_their_controls(model: Path, tmp_path: Path):
    words = ["--model", model, "--output_dir", tmp_path, *CALL, "--count", 4, "--calibration_count", 4]
    run(frontier, *words, "--batch_size", 2, "--deediff_shares", 0.7)
    rows, name = reported(tmp_path), "deediff at 0.7 of the blocks"
    assert rows["full"]["psnr"] == 100
    kept = json.loads((tmp_path / "candidates.json").read_text())["candidates"]
    assert [one["report"]["num_samples"] for one in kept if one["name"] == name] == [4]
    assert {f"static of {name}", f"fewer steps of {name}"} <= rows.keys()


GOALS = {
    "searched": ("--kind", "static_cache_schedule", "--values", 0.3, 0.5, "--search_count", 2),
    "budgeted": ("--kind", "accumulated_error_budget", "--values", 0.01, 1.0),
    "deediff": ("--kind", "deediff", "--values", 0.1, 0.9),
}


@pytest.mark.parametrize("goal", GOALS)
def test_it_is_calibrated(goal: str, model: Path, kind: str, tmp_path: Path):
    policy, memory = tmp_path / "policy.json", tmp_path / "memory"
    fit = ("--fit_cache", memory) if goal == "searched" else ()
    words = ["calibrate", "--model", model, *CALL, "--count", 4, "--batch_size", 2, "--output", policy]
    words += [*GOALS[goal], *fit, "--budget", 0.99]
    assert cli.main([str(word) for word in words]) == 0
    pipe = EarlyExitPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if fit:
        pipe.exits = CachedOutputExits.from_pretrained(memory)
    elif goal == "budgeted":
        pipe.exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    size = {"batch_size": 2} if LABELS[kind] is None else {"class_labels": LABELS[kind][:2]}
    drawn = pipe(**size, num_inference_steps=STEPS, exit_policy=Policy.load(policy), output_type="pt")
    assert drawn.report.fraction_executed < 1
    with pytest.raises(ValueError, match="the policy was calibrated for"):
        pipe(**size, num_inference_steps=STEPS + 1, exit_policy=Policy.load(policy))


def test_it_is_put_on_the_frontier_and_clocked_again(model: Path, kind: str, tmp_path: Path):
    if kind == "one":
        pytest.skip("takes seconds, and is as the one with classes")
    words = ["--model", model, "--output_dir", tmp_path / "out", *CALL, "--count", 2, "--batch_size", 1]
    words += ["--search_count", 2, "--amplification_images", 2, "--cache_intervals", 2, "--searched", 0.5]
    words += ["--searched_joint", 0.5, "--error_thresholds", 0.05, "--oracles", 0.05, "--error_budgets", 0.05]
    words += ["--fewer_steps", 0.5, "--mag", 0.06]
    run(frontier, *words)
    rows = reported(tmp_path / "out")
    kinds = {"full", "oracle", "error_threshold", "searched", "searched_joint", "error_budget", "mag"}
    assert kinds <= {row["kind"] for row in rows.values()}
    assert all(torch.tensor(row["psnr"]).isfinite() for row in rows.values())
    run(frontier, *words, "--clock_images", 1)


def test_what_else_is_fitted_and_measured(model: Path, tmp_path: Path):
    words = ["--model", model, *CALL, "--skip", 0.5, "--iterations", 2]
    run(fit_step_cache, *words, "--output_dir", tmp_path / "memory", "--count", 2, "--linear_prediction")
    memory = tmp_path / "memory" / "exits"
    sampling = ["--model", model, *CALL, "--batch_size", 2]
    run(latency, "profile", *sampling, "--output_dir", tmp_path / "hot")
    words = [
        "--memory",
        memory,
        "--count",
        8,
        "--values",
        0.01,
        0.1,
        "--cap",
        1,
        "--calibration_count",
        4,
        "--delta",
        0.5,
    ]
    run(guarantee, *sampling, "--output_dir", tmp_path / "guarantee", *words, "--resamplings", 2, "--risks", 0.5)


def test_guidance_is_refused_before_work(model: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if kind == "one":
        pytest.skip("has a null class")
    monkeypatch.setattr(UViTTransformer2DModel, "forward", lambda *_, **__: pytest.fail("the model was asked"))
    for script, *words in ((export,), (generate,), (frontier, "--fewer_steps", 0.5), (fit_step_cache,)):
        with pytest.raises(ValueError, match=r"null_class=None, expected .* or guidance_scale=1"):
            run(script, "--model", model, "--output_dir", tmp_path / "out", "--guidance_scale", 4, *words)


def test_uncertainty_is_looked_at_and_training_draws(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe, images = made(kind), torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    known = ImageSource(images, None if LABELS[kind] is None else torch.tensor(LABELS[kind]), random_flip=False)
    monkeypatch.setattr(uncertainty, "load_image_source", lambda config, num_classes: {16: known}[config.resolution])
    monkeypatch.setattr(uncertainty, "HELD_OUT", {"test": range(4)})
    seen, labels = uncertainty.held_out(uncertainty.UncertaintyOptions(), pipe.transformer.config.num_classes, size=16)
    assert (None if labels is None else labels.tolist()) == LABELS[kind]
    monkeypatch.setattr(uncertainty, "HELD_OUT", {"test": range(2, 6)})
    with pytest.raises(ValueError, match="hold 4 images, expected more than 5: those from 2 on are held out"):
        uncertainty.held_out(uncertainty.UncertaintyOptions(), None, size=16)
    assert uncertainty.observe(pipe, seen, labels, 500, seed=0)[0].shape == (2, 4)
    objective = DiffusionObjective(pipe.transformer, pipe.exits, pipe.scheduler, mode="frozen", class_drop=0.0)
    config = ValidationConfig(validation_images=2, validation_inference_steps=2, validation_guidance_scale=1.0)
    draw(3, objective, config, folder=tmp_path)
    assert (tmp_path / "step-000003-full.png").is_file()


def test_an_oracle_of_an_unconditional_model_asks_without_labels():
    pipe = made("unconditional")
    memory = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    sample, time = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 500])
    found = OracleExits(memory, pipe.transformer).extrapolate(None, sample, time)
    said = pipe.transformer(sample, time).sample
    torch.testing.assert_close(found["true"], memory.clean_of(sample, said, time))
