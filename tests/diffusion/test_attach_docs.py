"""docs/attach.md: its table is the family table, its recipes run as they stand."""

from __future__ import annotations

import torch
from stock import dit_pipeline
from tree import ROOT, python_blocks

from ee_diffusion import CachedOutputExits, Policy
from ee_diffusion.diffusion.model_table import family_table

PAGE = ROOT / "docs" / "attach.md"


def test_the_table_is_current():
    page = PAGE.read_text(encoding="utf-8")
    shown = page.split("<!-- family table -->\n")[1].split("\n<!-- end of the family table -->")[0]
    assert shown == family_table(), "write what `python -m ee_diffusion.diffusion.model_table` prints"


def test_the_recipes_for_memory(tmp_path, monkeypatch, capsys):
    """Both, one after the other as on the page, at fewer steps: on a tiny DiT, whose classes are the real one's."""
    monkeypatch.chdir(tmp_path)
    pipe = dit_pipeline()
    names = {"torch": torch, "pipe": pipe}
    for recipe in python_blocks(PAGE.read_text(encoding="utf-8"))[:2]:
        recipe = recipe.replace("num_inference_steps=50", "num_inference_steps=8").replace("[20]", "[4]")
        exec(compile(recipe, str(PAGE), "exec"), names)
    assert capsys.readouterr().out.count("executed blocks per sample and step: 2.00 of 4 (50.0 %)") == 2
    assert Policy.load("20-of-50.json").schedule.depths.count(4) == 4
    CachedOutputExits.from_pretrained("cache").check_fits(pipe.transformer)
    assert "forward" not in vars(pipe.transformer)
