"""The laws for the plain loop over a toy stack, answers in both spaces:
every criterion, one row per image and two of them under guidance, leaving together and apart."""

from __future__ import annotations

from pathlib import Path

import laws
import pytest
import torch
from factories import LAYOUTS, driver_named, recorded, run
from laws import LAWS, Case, cases, off_is_the_base_model

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy

DRIVERS = ("plain-output", "plain-hidden")


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


def test_a_near_case_of_law_4_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch):
    """One image's score lies 5e-6 beside the threshold, and alone it falls on the other side; further off that is no excuse."""
    driver, layout = driver_named("plain-output"), LAYOUTS["single"]
    score = float(recorded("plain-output", "single").scores[0, 0].max())
    together = run(driver, Policy(Threshold(score + 5e-6)), layout)
    lower = Policy(Threshold(score - 5e-6))
    monkeypatch.setattr(laws, "run", lambda driver, policy, layout, images: run(driver, lower, layout, images))
    with pytest.warns(UserWarning, match="near cases of law 4: 1 in Threshold"):
        assert laws.batch_mates_do_not_matter(driver, Policy(Threshold(score + 5e-6)), layout, together) == 1
    far = Policy(Threshold(score + 5e-5))
    with pytest.raises(AssertionError):
        laws.batch_mates_do_not_matter(driver, far, layout, run(driver, far, layout))
