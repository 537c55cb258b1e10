"""Reports and tables, whole files only; image sets read back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ee_diffusion.core.io import write_tensors, write_whole
from ee_diffusion.metrics.files import digest, read_images, to_bytes
from ee_diffusion.metrics.tables import environment, markdown_table, write_json, write_report


@dataclass(frozen=True)
class Facts:
    name: str
    values: torch.Tensor


def test_a_report_says_where_it_came_from_and_nothing_of_the_hour(tmp_path: Path):
    paths = [tmp_path / "deep" / "a.json", tmp_path / "b.json"]
    settings = {"facts": Facts("x", torch.tensor([1, 2])), "dtype": torch.float32, "at": Path("p")}
    tables = {"times": [{"name": "full", "time": 1.0}, {"name": "own", "time": 1 / 3, "fd": 2.0}], "none": []}
    for path in paths:
        told = write_report(
            path, title="A", command="run it", settings=settings, tables=tables, note="Of 2 images.", device="cpu"
        )
    report = json.loads(paths[0].read_text())
    assert list(report) == ["format", "title", "command", "settings", "environment", "tables", "note"]
    assert report["format"] == "ee_diffusion.report.1"
    assert report["settings"]["facts"] == {"name": "x", "values": [1, 2]}
    assert (report["settings"]["dtype"], report["settings"]["at"]) == ("torch.float32", "p")
    assert report["tables"] == {"times": [tables["times"][0], {"name": "own", "time": 0.333333, "fd": 2.0}]}
    assert report["environment"] == environment("cpu")
    assert report["environment"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["environment"]["threads"] == torch.get_num_threads()
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert (tmp_path / "b.md").read_text() == told
    assert told == (
        "# A\n\ntimes\n\n| name |   time |  fd |\n| ---- | -----: | --: |\n"
        "| full |      1 |   - |\n| own  | 0.3333 |   2 |\n\nOf 2 images.\n"
    )


@pytest.mark.parametrize(
    "path, value, error",
    [("a.json", {"mean": 1}, r"tables in \['psnr'\]"), ("a.json", [1], r"tables in"), ("a", 1, r"a \.json file")],
)
def test_a_report_that_does_not_fit_is_refused(path: str, value: object, error: str, tmp_path: Path):
    with pytest.raises(ValueError, match=error):
        write_report(tmp_path / path, title="A", command="c", settings={}, tables={"t": [{"psnr": value}]})
    assert not any(tmp_path.iterdir())


def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"value": 1})
    with pytest.raises(ValueError, match=r"JSON|float"):
        write_json(path, {"value": math.nan})
    with pytest.raises(TypeError, match="no place in a report"):
        write_json(path, {"value": object()})
    assert json.loads(path.read_text()) == {"value": 1}


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fails(beside: Path) -> None:
        beside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fails)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_markdown_table():
    rows = [
        {"name": "full", "time": 1.0, "count": 3, "psnr": None},
        {"name": "a|b", "time": 0.51234567, "count": 12, "psnr": 123456.7, "other": 1},
    ]
    assert markdown_table(rows) == (
        "| name |   time | count |   psnr |\n"
        "| ---- | -----: | ----: | -----: |\n"
        "| full |      1 |     3 |      - |\n"
        "| a\\|b | 0.5123 |    12 | 123457 |\n"
    )
    assert markdown_table(rows, ["other", "name"]).splitlines()[2:] == ["|     - | full |", "|     1 | a\\|b |"]
    with pytest.raises(ValueError, match="no row has"):
        markdown_table(rows, ["absent"])
    with pytest.raises(ValueError, match="no rows"):
        markdown_table([])


@pytest.mark.parametrize(
    "value, text", [(1e-9, "1e-09"), (0.0, "0"), (1e7, "1e+07"), (-1234.56, "-1235"), (math.nan, "nan")]
)
def test_numbers_in_a_table(value: float, text: str):
    assert markdown_table([{"it": value}]).splitlines()[2].strip("| ") == text


# --- image sets


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 8, 9), dtype=torch.uint8)


def test_images_come_back_from_every_kind_of_file(tmp_path: Path, images: torch.Tensor):
    labels, last = torch.tensor([3, 1, 2]), images.permute(0, 2, 3, 1).contiguous()
    np.savez(tmp_path / "a.npz", images=last.numpy(), labels=labels.numpy().astype(np.int32))
    np.savez(tmp_path / "b.npz", images=images.numpy())
    write_tensors(tmp_path / "a.safetensors", {"images": images, "labels": labels, "seeds": labels.clone()})
    for i in (2, 0, 1):
        Image.fromarray(last[i].numpy()).save(tmp_path / f"{i:03}.png")
    for name, expected in [("a.npz", labels), ("b.npz", None), ("a.safetensors", labels), ("", None)]:
        found, named = read_images(tmp_path / name)
        assert torch.equal(found, images)
        assert (named is None) == (expected is None)
        assert expected is None or torch.equal(named, expected)


def test_bad_image_sets_are_refused(tmp_path: Path, images: torch.Tensor):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "cut.safetensors").write_bytes(b"\x99\x00")
    write_tensors(tmp_path / "none.safetensors", {"pixels": images})
    write_tensors(tmp_path / "float.safetensors", {"images": images.float()})
    write_tensors(tmp_path / "labels.safetensors", {"images": images, "labels": torch.zeros(2, dtype=torch.long)})
    expected = {
        "absent": "does not exist",
        "empty": r"no \*\.png",
        "a.txt": "ends in '.txt'",
        "cut.safetensors": "not a readable",
        "none.safetensors": "expected 'images'",
        "float.safetensors": "expected uint8",
        "labels.safetensors": r"expected integers \(3,\)",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match=message):
            read_images(tmp_path / name)
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png has shape"):
        read_images(tmp_path)


def test_a_folder_scales_sixteen_bits_and_names_what_it_cannot_read(tmp_path: Path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "0.png")
    found, _ = read_images(tmp_path)
    assert torch.equal(found, torch.from_numpy(grey).expand(1, 3, 8, 8))
    whole = (tmp_path / "0.png").read_bytes()
    for broken in (whole[: len(whole) // 2 + 10], b"no image", b""):
        (tmp_path / "1.png").write_bytes(broken)
        with pytest.raises(ValueError, match=r"1\.png cannot be read as an image"):
            read_images(tmp_path)


def test_transparent_pixels_of_sixteen_bits_fall_on_white(tmp_path: Path):
    grey = np.full((2, 2), 257 * 100, np.uint16)
    grey[0, 0] = 5
    Image.fromarray(grey).save(tmp_path / "0.png", transparency=5)
    assert read_images(tmp_path)[0][0, 0].tolist() == [[255, 100], [100, 100]]


def test_a_damaged_npz_is_named(tmp_path: Path, images: torch.Tensor):
    np.savez_compressed(tmp_path / "a.npz", images=images.numpy())
    whole = (tmp_path / "a.npz").read_bytes()
    for broken in (whole[:-30], whole[:40], b"", b"no zip"):
        (tmp_path / "a.npz").write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.npz is not a readable \.npz"):
            read_images(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npz is not a readable \.npz"):
        read_images(tmp_path / "a.npz")


def test_to_bytes_rounds_and_refuses_other_ranges(images: torch.Tensor):
    assert torch.equal(to_bytes(images.float() / 255), images)
    assert torch.equal(to_bytes(images), images)
    assert to_bytes(torch.tensor([0.499 / 255, 0.501 / 255])).tolist() == [0, 1]
    for wrong in (torch.tensor([-0.1]), torch.tensor([1.1]), torch.tensor([math.nan]), torch.tensor([1])):
        with pytest.raises(ValueError, match="images"):
            to_bytes(wrong)


def test_the_digest_sees_names_dtypes_shapes_and_bits():
    base = {"a": torch.arange(6, dtype=torch.float32), "b": torch.tensor(1)}
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].reshape(2, 3), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"] + 1e-6, "b": base["b"]},
    ]
    assert len({digest(tensors) for tensors in [base, *others]}) == 5
    assert digest(dict(reversed(base.items()))) == digest(base)
