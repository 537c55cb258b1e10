"""docs/decoding.md: its lines run as they stand, on a tiny model; a row of the family table that is wrong is told."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from language import LAYERS, MODELS, generate, model_named
from tiny_language import text_folder
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from tree import ROOT, python_blocks

from ee_diffusion.decoding.heads import LearnedExits
from ee_diffusion.decoding.methods import depth_per_request
from ee_diffusion.decoding.model_specs import MODEL_SPECS, check_model, layers_of

PAGE, MODEL = ROOT / "docs" / "decoding.md", "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKENS = torch.arange(2, 14).reshape(2, 6)


def test_the_lines_of_the_page_run(tmp_path: Path, monkeypatch, capsys):
    folder = text_folder(tmp_path) / "model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "exits").mkdir(parents=True)
    width = AutoModelForCausalLM.from_pretrained(folder).config.hidden_size
    LearnedExits((2, 4), width, adapter_width=8).save("runs/exits/exits.safetensors")
    monkeypatch.setattr("ee_diffusion.decoding.model_specs.MODEL_SPECS", MODEL_SPECS | {})
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
    check_model(model_named(name), TOKENS)


LLAMA = MODEL_SPECS["LlamaForCausalLM"]


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
        ({"cache": "layer_past"}, r"layer 0 gets the cache as \['past_key_values'\], expected cache='layer_past'"),
        (
            {"row_arguments": ("position_ids", "position_embeddings")},
            "the length of 'attention_mask', an argument of lay",
        ),
        (
            {"row_arguments": ("attention_mask", "position_ids")},
            "the length of 'position_embeddings.0', an argument of",
        ),
    ],
)
def test_a_wrong_row_is_told(change: dict, told: str, monkeypatch):
    monkeypatch.setitem(MODEL_SPECS, "LlamaForCausalLM", replace(LLAMA, **change))
    with pytest.raises(ValueError, match=told):
        check_model(model_named("llama"), TOKENS)


class ShiftedLayer(LlamaDecoderLayer):
    """Adds what all rows have an entry of: one row becomes as many."""

    def forward(self, hidden_states, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(hidden_states, attention_mask, position_ids, **kwargs) + position_ids[..., None] / 10


def test_one_row_broadcast_to_all_is_refused_in_a_run_too(monkeypatch):
    """Where one row of four goes on, a layer meets the positions of all four."""
    model, one_goes_on = copy.deepcopy(model_named("llama")), depth_per_request((1, LAYERS, 1, 1), exits=(1,))
    for layer in layers_of(model):
        layer.__class__ = ShiftedLayer
    check_model(model, TOKENS)
    generate(model, one_goes_on)
    known = replace(LLAMA, row_arguments=("attention_mask", "position_embeddings"))
    monkeypatch.setitem(MODEL_SPECS, "LlamaForCausalLM", known)
    with pytest.raises(ValueError, match="the length of 'position_ids', an argument of layer 0, follows the number of"):
        check_model(model, TOKENS)
    with pytest.raises(ValueError, match="LlamaForCausalLM returned 4 rows for 1: an argument with one entry per row"):
        generate(model, one_goes_on)


def test_a_single_token_is_too_few():
    with pytest.raises(ValueError, match=r"tokens \(2, 1\), expected \(R, N\) with N at least 2"):
        check_model(model_named("llama"), TOKENS[:, :1])


def test_layers_that_return_more_than_hidden_states_are_told(monkeypatch):
    model = copy.deepcopy(model_named("llama"))
    layer = layers_of(model)[-1]
    handle = layer.register_forward_hook(lambda module, args, made: (made, None))
    monkeypatch.setattr(model.model, "norm", FirstOf(model.model.norm))
    with pytest.raises(ValueError, match="layer 5 returns tuple, expected hidden states"):
        check_model(model, TOKENS)
    handle.remove()


class FirstOf(nn.Module):
    """Takes the first of a tuple, as a model does whose layers return one."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, hidden):
        return self.norm(hidden[0] if isinstance(hidden, tuple) else hidden)
