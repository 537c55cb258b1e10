"""A truncated model is a stock model: saved and loaded by its own class, it says what an exit at that depth says, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import registered
import torch
from diffusers.utils import is_peft_available
from factories import uvit
from tiny_families import TINY, exits_for, forward, inputs_of, model_named

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.diffusion.hooks.attach import attach_exits, exit_summary
from ee_diffusion.diffusion.hooks.truncate import truncate
from ee_diffusion.diffusion.model_specs import MODEL_SPECS, blocks_of
from ee_diffusion.training.lora import add_lora

SKIPPING = ("UViTTransformer2DModel", "HunyuanDiT2DModel")
ROWS = [0, 1, 2]


@pytest.mark.parametrize("name", [name for name in TINY if name not in SKIPPING])
def test_it_is_the_exit_at_that_depth_as_a_stock_model(name: str, tmp_path):
    model, arguments = model_named(name), inputs_of(name, ROWS)
    for depth in {1, len(blocks_of(model)) // 2 + 1, len(blocks_of(model)) - 1}:
        with attach_exits(model, exits_for(model, rank=0)) as attachment:
            session = attachment.start(Policy(schedule=FixedDepth(depth)), rows=torch.arange(len(ROWS)), num_steps=1)
            with attachment.use(session.step(0, 700.0)):
                expected = forward(model, arguments)
            shallow = truncate(model, depth)
        shallow.save_pretrained(tmp_path / str(depth))
        loaded = getattr(diffusers, name).from_pretrained(tmp_path / str(depth))
        assert len(blocks_of(loaded)) == depth
        assert torch.equal(forward(loaded, arguments), expected)


def test_it_shares_nothing_and_keeps_dtype_and_mode():
    model = model_named("DiTTransformer2DModel").to(torch.bfloat16)
    before = [parameter.clone() for parameter in model.parameters()]
    shallow = truncate(model, 2)
    assert {parameter.dtype for parameter in shallow.parameters()} == {torch.bfloat16}
    assert not shallow.training
    with torch.no_grad():
        for parameter in shallow.parameters():
            parameter.zero_()
    assert all(map(torch.equal, before, model.parameters()))


def test_exits_stay_where_they_are():
    model = model_named("DiTTransformer2DModel")
    with attach_exits(model, exits_for(model)):
        assert len(blocks_of(truncate(model, 2))) == 2
        assert "exits after 0, 1" in exit_summary(model)


@pytest.mark.parametrize("depth", [0, 5, 6, -1, 2.0, True, "2", None])
def test_depths_that_are_none_are_refused(depth):
    with pytest.raises(ValueError, match=r"depth=.* expected an integer in 1\.\.4"):
        truncate(model_named("DiTTransformer2DModel"), depth)


@pytest.mark.parametrize("name", SKIPPING)
def test_long_skips_are_refused(name: str):
    with pytest.raises(ValueError, match="long skips"):
        truncate(model_named(name), 2)


def test_a_uvit_without_long_skips_is_a_shallow_uvit():
    model, arguments = uvit(long_skips=False), inputs_of("UViTTransformer2DModel", ROWS)
    assert len(blocks_of(truncate(model, 3, inputs=arguments))) == 3
    with pytest.raises(ValueError, match="num_layers=2, expected an odd number"):
        truncate(model, 2)


@pytest.fixture
def others(monkeypatch) -> None:
    """Four classes are registered, as a user would."""
    monkeypatch.setattr("ee_diffusion.diffusion.model_specs.MODEL_SPECS", MODEL_SPECS | registered.RIGHT)


@pytest.mark.parametrize("name", ["CogView4Transformer2DModel", "AuraFlowTransformer2DModel"])
def test_a_registered_class_is_compared_with_its_exit(name: str, others):
    model, arguments = registered.model_named(name), registered.inputs_of(name, ROWS)
    with pytest.raises(ValueError, match=r"registered by hand, .* give inputs="):
        truncate(model, 1)
    for depth in range(1, len(blocks_of(model))):
        shallow = truncate(model, depth, inputs=arguments)
        assert len(blocks_of(shallow)) == depth
        assert forward(shallow, arguments).isfinite().all()


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "ChromaTransformer2DModel",
            "alone are .* off from the exit there, .* its forward uses how many blocks there are",
        ),
        (
            "MochiTransformer3DModel",
            "the last block of a MochiTransformer3DModel has other weights than those before it",
        ),
    ],
)
def test_first_blocks_that_are_no_model_of_their_class_are_refused(name: str, words: str, others):
    model, arguments = registered.model_named(name), registered.inputs_of(name, ROWS)
    for depth in (1, 3):
        with pytest.raises(
            ValueError, match=rf"{words}.*its first {depth} blocks are no {name}; run it with FixedDepth"
        ):
            truncate(model, depth, inputs=arguments)


def test_lists_that_other_config_entries_count_are_named(monkeypatch):
    name = "AuraFlowTransformer2DModel"
    row = replace(registered.RIGHT[name], counts=("num_layers", "num_single_layers"))
    monkeypatch.setattr("ee_diffusion.diffusion.model_specs.MODEL_SPECS", {name: row})
    with pytest.raises(
        ValueError, match=r"has 2 joint_transformer_blocks, and num_layers=None in its config: name the"
    ):
        truncate(registered.model_named(name), 1, inputs=registered.inputs_of(name, ROWS))
    row = replace(registered.RIGHT[name], counts=("num_mmdit_layers",))
    monkeypatch.setattr("ee_diffusion.diffusion.model_specs.MODEL_SPECS", {name: row})
    with pytest.raises(ValueError, match=r"counts=\('num_mmdit_layers',\) .* expected a config entry for each of"):
        truncate(registered.model_named(name), 1, inputs=registered.inputs_of(name, ROWS))


def test_what_is_no_transformer_is_refused():
    with pytest.raises(ValueError, match="no family for Linear"):
        truncate(torch.nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="str has no transformer"):
        truncate("dit", 1)


@pytest.mark.skipif(not is_peft_available(), reason="needs peft (ee-diffusion[lora])")
def test_adapters_are_refused():
    with pytest.raises(ValueError, match="merge adapters first"):
        truncate(add_lora(model_named("DiTTransformer2DModel"), ["transformer_blocks"], rank=2), 2)
