"""Tables in parts: what is written is read, what is missing is named, what was made from something else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from ee_diffusion.diffusion.distillation.shards import Parts

IDENTITY = {"model": "abc", "call": {"steps": 3, "scales": (1.0, 2.0)}}


def parts(folder: Path, **changes) -> Parts:
    return Parts(folder, IDENTITY | changes, count=3)


def tensors(number: int) -> dict[str, torch.Tensor]:
    return {"a": torch.arange(4) + number, "b": torch.full((2, 3), number, dtype=torch.bfloat16)}


def test_parts_come_back_in_order(tmp_path: Path):
    table = parts(tmp_path / "new")
    assert table.missing() == [0, 1, 2]
    for number in (2, 0, 1):
        table.write(number, tensors(number))
        assert number not in parts(tmp_path / "new").missing()
    for number, read in enumerate(parts(tmp_path / "new").read()):
        assert all(torch.equal(read[name], value) for name, value in tensors(number).items())
    assert table.nbytes == sum(path.stat().st_size for path in (tmp_path / "new").iterdir())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [f"part-0000{i}.safetensors" for i in range(3)]


def test_the_same_part_is_the_same_file(tmp_path: Path):
    for folder in ("one", "two"):
        parts(tmp_path / folder).write(0, tensors(0))
    one, two = (tmp_path / folder / "part-00000.safetensors" for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_missing_part_is_named(tmp_path: Path):
    table = parts(tmp_path)
    table.write(1, tensors(1))
    (tmp_path / ".part-00000.safetensors.partial").write_bytes(b"a killed run left this")
    with pytest.raises(ValueError, match=r"lacks parts \[0, 2\] of 3"):
        table.read()


def test_parts_of_something_else_are_refused_with_every_difference(tmp_path: Path):
    parts(tmp_path).write(0, tensors(0))
    with pytest.raises(ValueError, match=r"something else: call: came .*; model: came 'abd', the part has 'abc'"):
        parts(tmp_path, model="abd", call={"steps": 4}).missing()
    with pytest.raises(ValueError, match="parts: came 4, the part has 3"):
        Parts(tmp_path, IDENTITY, count=4).missing()


def test_a_truncated_or_foreign_part_is_refused(tmp_path: Path):
    table = parts(tmp_path)
    table.write(0, tensors(0))
    path = tmp_path / "part-00000.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-3], whole[:10], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable part"):
            table.missing()
    from_elsewhere = torch.zeros(2)
    save_plain(path, from_elsewhere)
    with pytest.raises(ValueError, match="no part of a table"):
        table.missing()


def save_plain(path: Path, value: torch.Tensor) -> None:
    path.write_bytes(save({"x": value}))


def test_numbers_out_of_range(tmp_path: Path):
    with pytest.raises(ValueError, match="count=0"):
        Parts(tmp_path, IDENTITY, count=0)
    with pytest.raises(ValueError, match=r"part 3, expected 0\.\.2"):
        parts(tmp_path).write(3, tensors(3))
