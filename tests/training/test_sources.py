"""Tables, keys, latents and mapped sources: what they hand out, where, and under which name."""

from __future__ import annotations

import pytest
import torch

from ee_diffusion.training.rng import Stream, normals, uniforms
from ee_diffusion.training.sources import KeySource, LatentSource, MappedSource, TableSource

KEYS = torch.tensor([5, -7, 5])


class Squares:
    def __len__(self) -> int:
        return 10

    def __getitem__(self, samples: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": samples**2}


def test_a_table_by_index_with_keys():
    source = TableSource(Squares(), "squares")
    batch = source.batch(torch.tensor([3, 1, 2]), KEYS)
    assert batch["x"].tolist() == [9, 1, 4]
    assert torch.equal(batch["key"], KEYS)
    assert (len(source), source.fingerprint()) == (10, "squares")


def test_keys_alone():
    source = KeySource(4)
    assert list(source.batch(torch.tensor([0, 1, 2]), KEYS)) == ["key"]
    assert (len(source), source.fingerprint()) == (4, "keys 4")
    with pytest.raises(ValueError, match="size=0"):
        KeySource(0)


def test_a_source_seen_through_a_function():
    source = MappedSource(TableSource(Squares(), "squares"), lambda batch: {"y": batch["x"] + batch["key"]}, "sums")
    assert source.batch(torch.tensor([3, 1, 2]), KEYS)["y"].tolist() == [14, -6, 9]
    assert (len(source), source.fingerprint()) == (10, "sums of squares")


def test_latents_draw_by_their_keys():
    latents, labels = torch.randn(5, 4, 2, 2).half(), torch.arange(5)
    source = LatentSource(latents, labels, "five")
    batch = source.batch(torch.tensor([4, 0, 4]), KEYS)
    assert torch.equal(batch["images"], latents[[4, 0, 4]].float())
    assert batch["class_labels"].tolist() == [4, 0, 4]
    assert torch.equal(batch["noise"], normals(KEYS, Stream.NOISE, (4, 2, 2)))
    assert torch.equal(batch["uniform"], uniforms(KEYS, Stream.TIMESTEP))
    assert torch.equal(batch["label_drop"], uniforms(KEYS, Stream.LABEL_DROP))
    assert torch.equal(batch["noise"][0], batch["noise"][2])
    assert (len(source), source.fingerprint()) == (5, "five")


@pytest.mark.parametrize(
    "latents, labels",
    [
        (torch.zeros(0, 4, 2, 2), torch.zeros(0, dtype=torch.long)),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, 4, 2, 2), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(3, 4, 2, 2), torch.zeros(3)),
    ],
)
def test_latents_that_do_not_fit(latents, labels):
    with pytest.raises(ValueError, match=r"expected .M, C, H, W. and integers"):
        LatentSource(latents, labels, "x")
