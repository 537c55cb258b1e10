"""What images are compared with: CIFAR-10 only where it fits, another set where one is named, and its name beside every figure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.distribution import Statistics, frechet_distance
from ee_diffusion.metrics.features import InceptionFeatures, ResNetFeatures, extract
from ee_diffusion.metrics.perceptual import LPIPS
from ee_diffusion.metrics.reference_models import CifarResNet
from ee_diffusion.metrics.references import read_statistics, reference
from eval import end_to_end, finalists, frontier, metrics
from eval.harness import real_images
from eval.harness.options import ReferenceOptions
from eval.harness.real_images import judge_of
from eval.work import frontier as work

COUNT, SIDE = 70, (32, 32)  # more images than resnet20 has features


def noise(count: int, side: int, seed: int) -> Tensor:
    """(count, 3, side, side) uint8 of another brightness for each seed."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100 + 50 * seed, (count, 3, side, side), dtype=torch.uint8, generator=draw)


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def to_parquet(images: Tensor, path: Path, column: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({column: datasets.Image()})
    datasets.Dataset.from_dict({column: pictures(images)}, features=features).to_parquet(path)


@pytest.fixture
def network() -> ResNetFeatures:
    torch.manual_seed(0)
    return ResNetFeatures(CifarResNet(1)).eval()


@pytest.fixture
def place(tmp_path: Path, network: ResNetFeatures, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a CIFAR-10 (seed 0) and small networks in the place of trained ones, and other real images (seed 1)."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("EE_DIFFUSION_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    for module in (real_images, metrics):
        monkeypatch.setattr(module, "resnet20_features", lambda _: network)
        monkeypatch.setattr(module, "load_classifier", lambda *_, **__: network.classifier)
    monkeypatch.setattr(real_images, "load_lpips", lambda _: LPIPS((2, 2, 2, 2, 2)).eval())
    to_parquet(noise(COUNT, 32, 0), tmp_path / "data" / "cifar10" / "train-0.parquet", "img")
    to_parquet(noise(COUNT, 32, 1), tmp_path / "other.parquet", "picture")
    (tmp_path / "others").mkdir()
    for number, picture in enumerate(pictures(noise(COUNT, 32, 1))):
        picture.save(tmp_path / "others" / f"{number:03}.png")
    reference(tmp_path / "other.safetensors", noise(COUNT, 32, 1), network, keep=0, batch_size=40)
    return tmp_path


def options(place: Path, **changes) -> ReferenceOptions:
    return ReferenceOptions(**{"data": str(place / "data"), "cache_dir": str(place / "cache")} | changes)


@pytest.mark.parametrize(
    "named, seed, told",
    [
        ({}, 0, "CIFAR-10 train"),
        ({"reference_dir": "others"}, 1, "others"),
        ({"reference_files": ["other.parquet"], "reference_column": "picture"}, 1, "other.parquet"),
        ({"reference_statistics": "other.safetensors"}, 1, "other.safetensors"),
    ],
)
def test_the_reference_that_is_named_is_the_one_behind_the_distance(place, network, named, seed, told):
    judge = judge_of(options(place, **named), size=SIDE, num_classes=10)
    drawn = noise(70, 32, 2)
    found = judge(drawn.float() / 255, drawn.float() / 255, torch.arange(70) % 10)
    real = Statistics.of(extract(network, noise(COUNT, 32, seed), batch_size=40))
    expected = frechet_distance(extract(network, drawn, batch_size=70), real)
    assert found["fd"]["value"] == pytest.approx(expected.value, rel=1e-6)
    assert (found["fd"]["reference"], found["fd"]["reference_count"]) == (told, COUNT)
    assert f"FD: against {told}, {COUNT} real images." in judge.note()
    assert ("accuracy" in found) == (seed == 0)
    assert ("No accuracy: the classes of" in judge.note()) == (seed != 0)


@pytest.mark.parametrize(
    "asked, left, told",
    [
        ({"size": (28, 28)}, {"lpips", "fd", "accuracy"}, "No lpips: images are 28x28, at least 31x31 are needed"),
        ({"size": (64, 64)}, {"fd", "accuracy"}, "No fd: images are 64x64 and the judging network looks at 32x32"),
        ({"size": (8, 8)}, {"ssim", "lpips", "fd", "accuracy"}, "No ssim: images are 8x8, at least 11x11"),
        (
            {"channels": 1},
            {"lpips", "fd", "accuracy"},
            "No lpips: images have 1 channels and the judging networks look at 3",
        ),
        ({"num_classes": 100}, {"fd", "accuracy"}, "the model draws 100 classes, which are not the 10 of CIFAR-10"),
        ({"num_classes": None}, {"accuracy"}, "No accuracy: the model is unconditional"),
        (
            {"class_names": list("0123456789")},
            {"fd", "accuracy"},
            "the model's classes (0, 1, 2, ...) are not CIFAR-10's",
        ),
        ({"class_names": [name.title() for name in real_images.CIFAR_NAMES]}, set(), "Accuracy: of CIFAR-10's classes"),
    ],
)
def test_figures_that_do_not_fit_are_left_out_by_name(place, asked, left, told):
    size = asked.get("size", SIDE)
    judge = judge_of(options(place), **{"size": size, "num_classes": 10} | asked)
    assert set(judge.left_out) == left
    assert told in judge.note()
    images = torch.rand(6, asked.get("channels", 3), *size)
    assert set(judge(images, images, torch.arange(6))) == {"psnr", "ssim", "lpips", "fd", "accuracy"} - left


def test_another_reference_judges_any_classes_and_as_many_images_as_are_asked_for(place, network):
    judge = judge_of(options(place, reference_dir="others", reference_count=COUNT - 3), size=SIDE, num_classes=100)
    assert set(judge.left_out) == {"accuracy"}
    assert judge.reference.count == COUNT - 3
    real = Statistics.of(extract(network, noise(COUNT, 32, 1)[: COUNT - 3], batch_size=40))
    torch.testing.assert_close(judge.reference.mean, real.mean)


def test_other_images_are_brought_to_the_size_of_the_generated_ones(place):
    assert real_images.real_images(options(place, reference_dir="others"), 64).shape == (COUNT, 3, 64, 64)
    kept = real_images.real_images(options(place), 64)
    assert torch.equal(kept, noise(COUNT, 32, 0)), "CIFAR-10's as they are"


def test_without_a_data_folder_the_note_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("EE_DIFFUSION_DATA", raising=False)
    judge = judge_of(ReferenceOptions(), size=SIDE, num_classes=10)
    assert set(judge.left_out) == {"lpips", "fd", "accuracy"}
    assert "No fd: no data folder" in judge.note()
    with pytest.raises(ValueError, match="no FD against mine: no data folder"):
        judge_of(ReferenceOptions(reference_dir="mine"), size=SIDE, num_classes=10)


def test_a_named_reference_is_never_ignored(place):
    with pytest.raises(ValueError, match="no FD against others: images are 28x28"):
        judge_of(options(place, reference_dir="others"), size=(28, 28), num_classes=10)
    for wrong in (
        {"reference_dir": "others", "reference_files": ["other.parquet"]},
        {"reference_dir": "others", "reference": "test"},
        {"reference": "validation"},
        {"reference_count": 1},
    ):
        with pytest.raises(ValueError, match="expected"):
            options(place, **wrong)


def test_statistics_of_another_network_or_without_features_are_refused(place, network):
    with pytest.raises(ValueError, match=r"keeps 0 features one by one, expected 4"):
        read_statistics("other.safetensors", network, keep=4)
    with torch.no_grad():
        network.classifier.conv1.weight += 1
    with pytest.raises(ValueError, match="not said to be of ResNetFeatures with these weights"):
        read_statistics("other.safetensors", network)
    for broken, told in ((b"", "damaged"), (b"no", "damaged")):
        (place / "bad.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match=told):
            read_statistics("bad.safetensors", network)
    with pytest.raises(ValueError, match="expected an existing"):
        read_statistics("absent.npz", network)


def test_statistics_of_other_programs_serve_the_inception_network(place, network):
    inception = InceptionFeatures(nn.AdaptiveAvgPool2d(2)).eval()
    inception.num_features = 12
    real, drawn = (extract(inception, noise(COUNT, 16, seed), batch_size=40) for seed in (1, 2))
    known = Statistics.of(real)
    np.savez("fid.npz", mu=known.mean.numpy(), sigma=known.covariance.numpy())
    found = frechet_distance(drawn, read_statistics("fid.npz", inception).statistics)
    assert found.value == pytest.approx(frechet_distance(drawn, known).value, rel=1e-6)
    assert found.reference_count is None
    np.savez("fid.npz", mu=known.mean.numpy(), sigma=known.covariance.numpy(), count=COUNT)
    assert read_statistics("fid.npz", inception).statistics.count == COUNT
    with pytest.raises(ValueError, match="is of the Inception network"):
        read_statistics("fid.npz", network)
    for wrong, told in (
        ({"mu": np.zeros(11), "sigma": np.eye(11)}, r"'mu': \(11,\)"),
        ({"mu": np.zeros(12)}, "expected 'mu'"),
        ({"mu": np.zeros(12), "sigma": np.eye(11)}, r"covariance \(11, 11\)"),
        ({"mu": np.full(12, np.nan), "sigma": np.eye(12)}, "NaN"),
    ):
        np.savez("fid.npz", **wrong)
        with pytest.raises(ValueError, match=told):
            read_statistics("fid.npz", inception)
    Path("fid.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"fid\.npz is not a readable"):
        read_statistics("fid.npz", inception)


# --- scripts


def call(monkeypatch, script, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *(str(word) for word in words)])
    script.main()


@pytest.mark.parametrize("script", [metrics, frontier, end_to_end, finalists])
def test_every_script_takes_the_same_flags(script, monkeypatch, capsys):
    needed = {end_to_end: ["--model", "a", "--exits", "b", "--output_dir", "c"]}
    needed[finalists] = ["--report", "a", "--names", "b", "--output_dir", "c"]
    asked = ["--reference_files", "a", "b", "--reference_column", "c", "--reference_count", 7, "--cache_dir", "d"]
    with pytest.raises(SystemExit):
        call(monkeypatch, script, *needed.get(script, []), *asked, "--dry-run")
    found = json.loads(capsys.readouterr().out)
    assert (found["reference_files"], found["reference_column"], found["reference_count"]) == (["a", "b"], "c", 7)
    with pytest.raises(ValueError, match="expected one of them"):
        call(monkeypatch, script, *needed.get(script, []), *asked, "--reference_dir", "e")


def measure(place: Path, monkeypatch, images: Tensor, labels: Tensor | None, *words: object) -> str:
    save_file({"images": images} | ({} if labels is None else {"labels": labels}), place / "drawn.safetensors")
    asked = ["--images", place / "drawn.safetensors", "--output_dir", place / "out", "--data", place / "data"]
    call(monkeypatch, metrics, *asked, "--cache_dir", place / "cache", "--device", "cpu", *words)
    return (place / "out" / "metrics.md").read_text()


def test_metrics_against_another_reference(place, network, monkeypatch):
    drawn = noise(70, 32, 2)
    table = measure(place, monkeypatch, drawn, None, "--metrics", "fd", "--reference_dir", place / "others")
    assert table.splitlines()[2].split("|")[4].strip() == "others"
    report = json.loads((place / "out" / "report.json").read_text())
    real = Statistics.of(extract(network, noise(COUNT, 32, 1), batch_size=40))
    expected = frechet_distance(extract(network, drawn, batch_size=64), real)
    assert report["fd"]["value"] == pytest.approx(expected.value, rel=1e-6)
    assert report["reference"] == "others"
    table = measure(place, monkeypatch, drawn, torch.arange(70) % 10)
    assert [line.split("|")[4].strip() for line in table.splitlines()[2:]] == ["CIFAR-10 train", "CIFAR-10's classes"]


@pytest.mark.parametrize(
    "side, labels, words, told",
    [
        (28, None, "--metrics fd", "images are 28x28 and the judging network looks at 32x32"),
        (64, "own", "--metrics accuracy", "images are 64x64"),
        (32, "own", "--reference_dir others", "accuracy knows CIFAR-10's 10 classes, the reference is others"),
        (32, "more", "--metrics accuracy", r"labels span 0\.\.10"),
        (32, None, "--metrics accuracy", "accuracy needs labels"),
        (32, None, "--metrics kid --kid_subset_size 71", r"expected 2\.\.70"),
        (32, None, "--metrics fd --max_images 1", "distances need at least 2"),
    ],
)
def test_metrics_refuse_before_work(place, monkeypatch, side, labels, words, told):
    monkeypatch.setattr(metrics, "measured", None)  # no work
    own = {None: None, "own": torch.arange(70) % 10, "more": torch.arange(70) % 11}[labels]
    with pytest.raises(ValueError, match=told):
        measure(place, monkeypatch, noise(70, side, 2), own, *words.split())
    assert not (place / "out").exists()


def test_a_grey_model_is_traded_off(place, monkeypatch):
    torch.manual_seed(0)
    sizes = {"sample_size": 32, "patch_size": 16, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}
    transformer = UViTTransformer2DModel(**sizes, in_channels=1)
    exits = DenoisingExits.for_transformer(transformer, (1, 2))
    EarlyExitPipeline(transformer, DDIMScheduler(), exits).save_pretrained(place / "model")
    words = ["--model", place / "model", "--output_dir", place / "out", "--count", 2, "--calibration_count", 2]
    words += ["--num_inference_steps", 2, "--deediff_shares", 0.7, "--batch_size", 2, "--guidance_scale", 1]
    call(monkeypatch, frontier, *words, "--data", place / "data")
    assert "No fd: images have 1 channels" in (place / "out" / "report.md").read_text()


def test_a_model_of_28_pixels_goes_the_whole_way(place, monkeypatch):
    torch.manual_seed(0)
    sizes = {"sample_size": 28, "patch_size": 14, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}
    transformer = UViTTransformer2DModel(**sizes, num_classes=4, null_class=3)
    exits = DenoisingExits.for_transformer(transformer, (1, 2))
    EarlyExitPipeline(transformer, DDIMScheduler(), exits).save_pretrained(place / "model")
    words = ["--model", place / "model", "--output_dir", place / "out", "--count", 2, "--calibration_count", 2]
    words += ["--data", place / "data", "--num_inference_steps", 2, "--deediff_shares", 0.7, "--batch_size", 2]
    call(monkeypatch, frontier, *words)
    told = (place / "out" / "report.md").read_text()
    assert "No lpips: images are 28x28, at least 31x31 are needed." in told
    assert "No fd: images are 28x28" in told
    monkeypatch.setattr(work, "Measured", None)  # nothing is drawn
    with pytest.raises(ValueError, match="no FD against others: images are 28x28"):
        call(monkeypatch, frontier, *words, "--reference_dir", "others")
