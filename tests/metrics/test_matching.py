"""Tower match: ranks and their interval against slow loops, the loss against its formula, a tower that learns, files, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ee_diffusion.metrics.retrieval import (
    ImageTower,
    MatchingObjective,
    contrastive_loss,
    jittered,
    load_tower,
    ranks,
    retrieval,
    save_tower,
)


def unit(*shape: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_ranks_against_a_slow_loop_and_ties_count_against():
    images, texts = unit(20, 5, seed=0), unit(8, 5, seed=1)
    own = torch.arange(20) % 8
    expected = []
    for image, place in zip(images.double(), own.tolist(), strict=True):
        similar = [sum(float(a) * float(b) for a, b in zip(image, text, strict=True)) for text in texts.double()]
        expected.append(sum(value >= similar[place] - 1e-15 for value in similar))
    assert ranks(images, own, texts).tolist() == expected
    assert ranks(torch.ones(1, 2), torch.tensor([0]), torch.ones(4, 2)).tolist() == [4]


def test_retrieval_of_perfect_blind_and_mixed_images():
    texts = torch.eye(40)
    perfect = retrieval(texts, torch.arange(40), texts)
    assert (perfect.at_1, perfect.at_1_low, perfect.at_10, perfect.median_rank) == (1, 1, 1, 1)
    blind = retrieval(unit(4000, 40, seed=2), torch.arange(4000) % 40, texts)
    assert (blind.chance_at_1, blind.chance_at_10, blind.images, blind.captions) == (1 / 40, 1 / 4, 4000, 40)
    assert blind.at_1_low <= 1 / 40 <= blind.at_1_high
    assert blind.at_10_low <= 1 / 4 <= blind.at_10_high
    half = retrieval(texts.repeat_interleave(2, dim=0), torch.tensor([0, 0] * 40), texts)
    assert half.at_1 == 2 / 80
    assert (half.at_1_low, half.at_1_high) == (half.at_1, half.at_1), "one caption alone leaves nothing to resample"
    few = retrieval(texts[:6], torch.tensor([0, 1, 2, 4, 5, 3]), texts)
    assert few.at_1_low < few.at_1 == 0.5 < few.at_1_high


def test_the_loss_is_its_formula_and_a_caption_is_not_its_own_negative():
    images, texts, captions = unit(5, 4, seed=3), unit(5, 4, seed=4), torch.tensor([0, 1, 0, 2, 3])
    texts[2] = texts[0]
    total = 0.0
    for left, right in ((images, texts), (texts, images)):
        for i in range(5):
            own = 7.0 * float(left[i].double() @ right[i].double())
            others = [j for j in range(5) if j == i or captions[j] != captions[i]]
            total += math.log(sum(math.exp(7.0 * float(left[i].double() @ right[j].double())) for j in others)) - own
    found = contrastive_loss(images.double(), texts.double(), captions, scale=7.0)
    assert abs(float(found) - total / 10) < 1e-6


def test_a_tower_learns_colours_and_judges_each_image_alone(tmp_path: Path):
    torch.manual_seed(0)
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)
    captions = torch.arange(12) % 4
    images = colours[captions][:, :, None, None].expand(12, 3, 16, 16).contiguous()
    texts = unit(4, 6, seed=5)
    objective = MatchingObjective(ImageTower(6, (8, 8), texts.mean(dim=0)))
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    batch = {"images": images, "texts": texts[captions], "captions": captions}
    for _ in range(20):
        optimizer.zero_grad()
        objective(batch)["loss"].backward()
        optimizer.step()
    tower = objective.tower.eval().requires_grad_(False)
    seen = tower(images.float() / 255)
    assert retrieval(seen, captions, tower.texts(texts)).at_1 == 1
    torch.testing.assert_close(seen[:1], tower(images[:1].float() / 255), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(12))
    save_tower(tmp_path / "tower.safetensors", tower, {"steps": 20})
    loaded, facts = load_tower(tmp_path / "tower.safetensors")
    assert facts == {"steps": 20}
    assert torch.equal(loaded(images.float() / 255), seen)
    assert torch.equal(loaded.texts(texts), tower.texts(texts))


def test_jitter_moves_images_and_stays_in_range():
    images = torch.rand(4, 3, 16, 16)
    moved = jittered(images)
    assert moved.shape == images.shape
    assert ((moved >= 0) & (moved <= 1)).all()
    assert (moved - images).abs().mean() > 0.05
    flat = torch.full((2, 3, 16, 16), 0.5)
    assert (jittered(flat) - flat).abs().mean() < 0.1, "nothing but noise on an even image"


def test_bad_input_ends_in_words(tmp_path: Path):
    with pytest.raises(ValueError, match="no tower at"):
        load_tower(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(ValueError, match="no readable safetensors"):
        load_tower(tmp_path / "bad.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no image tower"):
        load_tower(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected at least one and"):
        ImageTower(4, (), torch.zeros(4))
    with pytest.raises(ValueError, match=r"images are torch\.uint8"):
        ImageTower(4, (8,), torch.zeros(4))(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected some in 0\.\.1"):
        ranks(torch.ones(1, 2), torch.tensor([2]), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"expected \(B, V\)"):
        ranks(torch.ones(1, 3), torch.tensor([0]), torch.ones(2, 2))
    with pytest.raises(ValueError, match="NaN"):
        ranks(torch.full((1, 2), math.nan), torch.tensor([0]), torch.ones(2, 2))
