"""Images from parquet and folders: pixels exact, bad columns, labels and files refused in words."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ee_diffusion.pixels import rgb
from ee_diffusion.training.config import ImageDataConfig
from ee_diffusion.training.datasets import ImageSource, find_data_files, load_image_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pictures(count: int, size: tuple[int, int] = (8, 8)) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def parquet(folder: Path, labels: list | None = None, **columns) -> Path:
    columns = columns or {"image": pictures(6), "label": [0, 1, 2, 0, 1, 2] if labels is None else labels}
    features = None
    if "image" in columns and columns["image"] and isinstance(columns["image"][0], Image.Image):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(_kind(columns["label"]))})
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(folder / "part.parquet")
    return folder / "part.parquet"


def _kind(labels: list) -> str:
    return {int: "int64", float: "float64", str: "string"}[type(labels[0])]


def config(file: Path, **changes) -> ImageDataConfig:
    return ImageDataConfig(**{"train_data_files": [str(file)], "resolution": 8} | changes)


def test_parquet_pixels_and_labels_are_exact(tmp_path: Path):
    source = load_image_source(config(parquet(tmp_path), random_flip=False), 3)
    expected = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures(6)])).permute(0, 3, 1, 2)
    assert torch.equal(source.images, expected)
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    batch = source.batch(torch.tensor([4]), torch.tensor([0]))
    torch.testing.assert_close(batch["images"][0], expected[4] / 127.5 - 1)


def test_unconditional_needs_no_labels(tmp_path: Path):
    source = load_image_source(config(parquet(tmp_path), label_column="none such"), None)
    assert source.labels is None
    assert "class_labels" not in source.batch(torch.tensor([0]), torch.tensor([0]))


def test_a_folder_of_images_with_a_folder_per_class(tmp_path: Path):
    for number, picture in enumerate(pictures(4, (12, 10))):
        (tmp_path / f"data/class{number % 2}").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / f"data/class{number % 2}/{number}.png")
    source = load_image_source(ImageDataConfig(train_data_dir=str(tmp_path / "data"), resolution=8), 2)
    assert tuple(source.images.shape) == (4, 3, 8, 8)
    assert sorted(source.labels.tolist()) == [0, 0, 1, 1]


def test_transparency_falls_on_white(tmp_path: Path):
    (tmp_path / "data").mkdir()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "data" / "clear.png")
    source = load_image_source(ImageDataConfig(train_data_dir=str(tmp_path / "data"), resolution=8), None)
    assert source.images.min() == 255


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path):
    """257 v is what v is in 16 bits; the ramp between is rounded."""
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    eight = np.arange(64, dtype=np.uint8).reshape(8, 8)
    (tmp_path / "data").mkdir()
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / "data" / "0.png")
    Image.fromarray(ramp).save(tmp_path / "data" / "1.tiff")
    Image.fromarray(eight).save(tmp_path / "data" / "2.png")
    source = load_image_source(ImageDataConfig(train_data_dir=str(tmp_path / "data"), resolution=8), None)
    assert torch.equal(source.images[0], source.images[2])
    assert source.images[1, 0].tolist() == np.floor(ramp.astype(np.float64) * 255 / 65535 + 0.5).tolist()


def tiff(pixels: bytes, *, bits: int, photometric: int) -> Image.Image:
    """2 x 1 pixels, as other programs write them."""
    facts = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    body = pixels + bytes(len(pixels) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in facts.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(body))
    return Image.open(io.BytesIO(head + body + struct.pack("<H", len(facts)) + entries + bytes(4)))


def test_white_is_what_a_file_says_it_is():
    deep = struct.pack("<HH", 65535, 257 * 3)
    assert np.asarray(rgb(tiff(deep, bits=16, photometric=1)))[0, :, 0].tolist() == [255, 3]
    assert np.asarray(rgb(tiff(deep, bits=16, photometric=0)))[0, :, 0].tolist() == [0, 252], "white is zero"
    twelve = bytes([0xFF, 0xF8, 0x00])  # 4095 and 2048
    assert np.asarray(rgb(tiff(twelve, bits=12, photometric=1)))[0, :, 0].tolist() == [255, 128]


def test_one_value_of_sixteen_bits_may_be_transparent():
    file = io.BytesIO()
    Image.fromarray(np.array([[1000, 257 * 7]], np.uint16)).save(file, format="PNG", transparency=1000)
    assert np.asarray(rgb(Image.open(file)))[0, :, 0].tolist() == [255, 7], "on white"


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused_by_their_file(tmp_path: Path, dtype):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "0.png")
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "data" / "odd.tiff")
    with pytest.raises(ValueError, match=r"odd\.tiff.*does not say what white is"):
        load_image_source(ImageDataConfig(train_data_dir=str(tmp_path / "data"), resolution=8), None)


def test_a_damaged_image_is_named(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for number, picture in enumerate(pictures(3)):
        picture.save(tmp_path / "data" / f"{number}.png")
    whole = (tmp_path / "data" / "1.png").read_bytes()
    config_of_folder = ImageDataConfig(train_data_dir=str(tmp_path / "data"), resolution=8)
    for broken in (whole[: len(whole) // 2], b"no image", b""):
        (tmp_path / "data" / "1.png").write_bytes(broken)
        with pytest.raises(ValueError, match=r"row 1 \(.*1\.png\).*cannot be read as an image"):
            load_image_source(config_of_folder, None)
    features = datasets.Features({"image": datasets.Image()})
    stored = [{"bytes": whole, "path": None}, {"bytes": whole[:60], "path": None}]
    datasets.Dataset.from_dict({"image": stored}, features=features).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"row 1 of train_data_files=.*bad\.parquet.*cannot be read as an image"):
        load_image_source(config(tmp_path / "bad.parquet"), None)


def test_a_damaged_parquet_file_is_named(tmp_path: Path):
    file = parquet(tmp_path)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"part\.parquet"):
        load_image_source(config(file), 3)


@pytest.mark.parametrize(
    "changes, num_classes, told",
    [
        ({"image_column": "img"}, None, "no column 'img'.*'image', 'label'"),
        ({"label_column": "class"}, 3, "no column 'class'"),
        ({"image_column": "label"}, None, "expected images"),
        ({}, 2, r"span 0\.\.2, expected 0\.\.1"),
    ],
)
def test_columns_and_labels_that_do_not_fit(tmp_path: Path, changes, num_classes, told):
    with pytest.raises(ValueError, match=told):
        load_image_source(config(parquet(tmp_path), **changes), num_classes)


def test_labels_that_are_no_integers(tmp_path: Path):
    with pytest.raises(ValueError, match="expected integers"):
        load_image_source(config(parquet(tmp_path, labels=["a"] * 6)), 3)
    with pytest.raises(ValueError, match="expected integers"):
        load_image_source(config(parquet(tmp_path, labels=[0.5] * 6)), 3)


def test_negative_labels(tmp_path: Path):
    with pytest.raises(ValueError, match=r"span -1\.\.1"):
        load_image_source(config(parquet(tmp_path, labels=[-1, 0, 1, 0, 0, 0])), 3)


def test_no_rows(tmp_path: Path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": [], "label": []}, features=features).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="hold no rows"):
        load_image_source(config(tmp_path / "none.parquet"), 3)


def test_exactly_one_origin():
    with pytest.raises(ValueError, match="nowhere, expected one of"):
        load_image_source(ImageDataConfig(), None)
    with pytest.raises(ValueError, match="expected one of"):
        load_image_source(ImageDataConfig(dataset_name="a", train_data_dir="b"), None)
    with pytest.raises(ValueError, match="is no folder"):
        load_image_source(ImageDataConfig(train_data_dir="/no/such"), None)


def test_files_are_found_as_given_then_below_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("b.parquet", "a.parquet"):
        (tmp_path / name).touch()
    assert find_data_files(str(tmp_path / "*.parquet")) == [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    monkeypatch.setenv("EE_DIFFUSION_DATA", str(tmp_path))
    assert find_data_files("a.parquet") == [str(tmp_path / "a.parquet")]
    with pytest.raises(ValueError, match="no data files match"):
        find_data_files("c-*.parquet")


@pytest.mark.parametrize(
    "images", [torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 4), torch.zeros(3)]
)
def test_a_source_of_something_else_is_refused(images):
    with pytest.raises(ValueError, match=r"expected uint8 \(M, C, H, W\)"):
        ImageSource(images, None, random_flip=False)


def test_fingerprints_name_the_content():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    plain = ImageSource(images, labels, random_flip=False).fingerprint()
    assert plain == ImageSource(images.clone(), labels.clone(), random_flip=False).fingerprint()
    assert plain != ImageSource(images, labels, random_flip=True).fingerprint()
    assert plain != ImageSource(images + 1, labels, random_flip=False).fingerprint()
    assert plain != ImageSource(images, labels + 1, random_flip=False).fingerprint()


@pytest.mark.data
def test_cifar10(data_folder: Path):
    files = [str(data_folder / "cifar10" / "test-*.parquet")]
    wanted = ImageDataConfig(train_data_files=files, image_column="img", max_train_samples=50)
    source = load_image_source(wanted, 10)
    assert tuple(source.images.shape) == (50, 3, 32, 32)
    assert source.labels.max() <= 9
