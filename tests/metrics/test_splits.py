"""Seeds and held-out images of one purpose never serve another; pictures are files that a reader can open."""

from itertools import combinations

import numpy as np
import pytest
import torch
from factories import pipeline
from PIL import Image

from ee_diffusion.metrics.figures import exit_map, image_grid, save_figure
from ee_diffusion.metrics.splits import HELD_OUT, SEEDS, balanced_labels, seeds


@pytest.mark.parametrize("table", [SEEDS, HELD_OUT])
def test_purposes_share_nothing(table):
    assert {"calibrate", "test"} <= set(table)
    for one, other in combinations(table, 2):
        assert not set(table[one]) & set(table[other])


def test_seeds_of_a_purpose():
    assert seeds("test", 3, first=2) == [2_000_002, 2_000_003, 2_000_004]
    assert not set(seeds("calibrate", 1000)) & set(seeds("test", 1000))


@pytest.mark.parametrize("arguments", [("fit", 0), ("nothing", 1), ("test", 1_000_001)])
def test_what_there_is_not_is_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        seeds(*arguments)


def test_labels_are_balanced():
    assert balanced_labels(7, 3) == [0, 1, 2, 0, 1, 2, 0]


def test_pictures(tmp_path):
    out = pipeline()([0, 1], num_inference_steps=4, exit_threshold=0.5, output_type="pt")
    save_figure(exit_map(out.trace), tmp_path / "map.png")
    shade = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 8, 8)
    save_figure(image_grid(shade, columns=3, scale=4), tmp_path / "grid.png")
    assert np.asarray(Image.open(tmp_path / "map.png").convert("L")).std() > 0
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    assert pixels.shape == (2 * 10 * 4, 3 * 10 * 4)
    assert [int(pixels[20, 20 + 40 * i]) for i in range(3)] == pytest.approx([0, 64, 128], abs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "map.png"]  # nothing half-written beside
