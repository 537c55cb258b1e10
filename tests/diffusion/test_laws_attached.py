"""The laws for attached U-ViT and DiT, exits as the paper writes them (output space) and as released (hidden space):
every criterion, one row per image and two of them under guidance, leaving together and apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import LAYOUTS, driver_named, recorded
from laws import LAWS, Case, cases, off_is_the_base_model

DRIVERS = ("uvit-paper", "uvit-released", "dit-paper", "dit-released")


@pytest.mark.parametrize("case", cases(DRIVERS), ids=str)
@pytest.mark.parametrize("law", LAWS)
def test_law(law: str, case: Case, tmp_path: Path):
    LAWS[law](case, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_law_1_off_is_the_base_model(driver: str, layout: str):
    off_is_the_base_model(driver_named(driver), LAYOUTS[layout])


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_images_score_is_its_least_safe_rows(driver: str):
    apart = recorded(driver, "separate").scores.unflatten(2, (2, -1))  # (S, K, 2, E)
    assert (apart[:, :, 0] - apart[:, :, 1]).abs().max() > 1e-3
    torch.testing.assert_close(recorded(driver, "joint").scores, apart.amin(2))
