"""docs/decoding.md: its lines run as they stand, on a tiny model; a row of the family table that is wrong is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from language import MODELS, model_named
from tiny_language import text_folder
from torch import nn
from transformers import AutoModelForCausalLM
from tree import ROOT, python_blocks

from ee_diffusion.decoding.families import FAMILIES, check_family
from ee_diffusion.decoding.heads import LearnedExits

PAGE, MODEL = ROOT / "docs" / "decoding.md", "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKENS = torch.arange(2, 14).reshape(2, 6)


def test_the_lines_of_the_page_run(tmp_path: Path, monkeypatch, capsys):
    folder = text_folder(tmp_path) / "model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "exits").mkdir(parents=True)
    width = AutoModelForCausalLM.from_pretrained(folder).config.hidden_size
    LearnedExits((2, 4), width, adapter_width=8).save("runs/exits/exits.safetensors")
    monkeypatch.setattr("ee_diffusion.decoding.families.FAMILIES", FAMILIES | {})
    blocks = python_blocks(PAGE.read_text(encoding="utf-8"))
    assert [MODEL in block for block in blocks] == [True, False, False, False]
    names: dict = {}
    for block in blocks:
        exec(compile(block.replace(MODEL, str(folder)), "docs/decoding.md", "exec"), names)
    said = capsys.readouterr().out
    assert "generated_text" in said
    assert "tensor([" in said
    assert names["out"].drafted.sum() > 0


@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_the_table_holds(name: str):
    check_family(model_named(name), TOKENS)


LLAMA = FAMILIES["LlamaForCausalLM"]


def _twice(layer: nn.Module, hidden, rotary):
    keys, values = LLAMA.keys_values(layer, hidden, rotary)
    return keys, 2 * values


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"keys_values": _twice}, "other values than layer 0"),
        ({"keys_values": lambda layer, hidden, rotary: (hidden, hidden)}, "other keys than layer 0"),
        ({"norm": lambda model, hidden: hidden}, "other logits than the model"),
        ({"inner": "mlp.nothing"}, "has no module 'mlp.nothing'"),
        ({"inner": "self_attn"}, r"saw \[0, 0, 0, 0, 0, 0\] tokens, expected 12 at each"),  # gets its states by name
    ],
)
def test_a_wrong_row_is_told(change: dict, told: str, monkeypatch):
    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", replace(LLAMA, **change))
    with pytest.raises(ValueError, match=told):
        check_family(model_named("llama"), TOKENS)
