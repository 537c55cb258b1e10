"""docs/adding-a-model.md: its recipes run as they stand, on a class that the package knows nothing about and on Chroma."""

from __future__ import annotations

import dataclasses

import pytest
import registered
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from factories import randomise
from torch import Tensor, nn
from tree import ROOT, python_blocks

from ee_diffusion.diffusion.model_specs import MODEL_SPECS

PAGE = ROOT / "docs" / "adding-a-model.md"


class MyBlock(nn.Module):
    """h + linear(h) t."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = nn.Linear(width, width)

    def forward(self, states: Tensor, temb: Tensor) -> Tensor:
        return states + self.attention(states) * temb[:, None]


class MyTransformer2DModel(ModelMixin, ConfigMixin):
    """A transformer that the package knows nothing about."""

    @register_to_config
    def __init__(self, hidden_size: int = 8, num_layers: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(MyBlock(hidden_size) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(hidden_size)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = timestep[:, None] / 1000
        for layer in self.layers:
            hidden_states = layer(hidden_states, temb)
        return (self.final_norm(hidden_states) * temb[:, None],)


@pytest.mark.parametrize("frozen", ["", "its row arguments are not known"])
def test_the_recipe_for_a_new_model(frozen: str, monkeypatch, capsys):
    recipe = next(block for block in python_blocks(PAGE.read_text(encoding="utf-8")) if "register_model(" in block)
    assert len(recipe.strip().splitlines()) < 20
    if frozen:
        recipe = recipe.replace('    row_arguments=("temb",),', f"    keeps_exited_rows={frozen!r},")
        assert frozen in recipe
    known = dict(MODEL_SPECS)
    monkeypatch.setattr("ee_diffusion.diffusion.model_specs.MODEL_SPECS", known)
    model = randomise(MyTransformer2DModel(), seed=1)
    names = {
        "transformer": model,
        "inputs": {"hidden_states": torch.randn(3, 4, 8), "timestep": torch.tensor([900, 500, 100])},
    }
    with torch.no_grad():
        exec(compile(recipe, str(PAGE), "exec"), names)
    assert "executed blocks per sample and step: 2.00 of 4 (50.0 %)" in capsys.readouterr().out
    assert dataclasses.asdict(known["MyTransformer2DModel"])["keeps_exited_rows"] == frozen
    assert "forward" not in model.__dict__


def test_the_worked_example_is_checked_as_it_stands(monkeypatch):
    recipe = next(block for block in python_blocks(PAGE.read_text(encoding="utf-8")) if "check_model(" in block)
    known = dict(MODEL_SPECS)
    monkeypatch.setattr("ee_diffusion.diffusion.model_specs.MODEL_SPECS", known)
    exec(compile(recipe, str(PAGE), "exec"), {})
    row = known.pop("ChromaTransformer2DModel")
    assert row == registered.RIGHT["ChromaTransformer2DModel"]
    for argument in ("temb", "attention_mask"):
        known.pop("ChromaTransformer2DModel", None)
        with pytest.raises(ValueError, match=f"the length of '{argument}'"):
            exec(compile(recipe.replace(f'"{argument}", ', "", 1), str(PAGE), "exec"), {})
