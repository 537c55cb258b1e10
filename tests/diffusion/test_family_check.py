"""`check_model`: it holds for every class of the table and for classes that a user registers, and names what a row forgets."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import registered
import tiny_families
import torch
from factories import uvit
from torch import nn

from ee_diffusion.core.criteria import DepthTable
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.rows import ROWS, apart
from ee_diffusion.diffusion.hooks.forward_to_depth import answer_under
from ee_diffusion.diffusion.model_check import check_model
from ee_diffusion.diffusion.model_specs import MODEL_SPECS, ModelSpec, blocks_of, register_model

ALL = dict.fromkeys(tiny_families.TINY, tiny_families) | dict.fromkeys(registered.RIGHT, registered)
# Row arguments that these inputs do not give, or that only other kinds of the class have.
ABSENT = {"joint_attention_kwargs", "attention_kwargs", "modulate_index", "attention_mask"}
GIVEN = [
    (name, argument)
    for name in ALL
    for argument in (MODEL_SPECS | registered.RIGHT)[name].row_arguments
    if argument not in ABSENT
    or (argument == "attention_mask" and name.startswith(("Chroma", "Lumina2", "HunyuanVideo")))
]


@functools.cache
def tiny(name: str) -> nn.Module:
    """Made once; nobody changes it."""
    return ALL[name].model_named(name)


def inputs(name: str):
    return functools.partial(ALL[name].inputs_of, name)


@pytest.fixture
def rows(monkeypatch):
    """The table, with the four classes in it, to be changed."""
    known = MODEL_SPECS | registered.RIGHT
    monkeypatch.setattr("ee_diffusion.diffusion.model_specs.MODEL_SPECS", known)
    return known


@pytest.mark.parametrize("name", ALL)
def test_it_holds_for_the_table_and_for_right_rows(name: str, rows):
    model = tiny(name)
    before = [dict(module.__dict__) for module in model.modules()]
    check_model(model, inputs(name))
    for module, had in zip(model.modules(), before, strict=True):
        assert all(module.__dict__[key] is value for key, value in had.items())
        assert module.__dict__.keys() == had.keys()


@pytest.mark.parametrize("name, argument", GIVEN)
def test_a_forgotten_row_argument_is_named(name: str, argument: str, rows):
    rest = tuple(one for one in rows[name].row_arguments if one != argument)
    rows[name] = replace(rows[name], row_arguments=rest)
    with pytest.raises(ValueError, match=rf"the length of '{argument}.*follows the number of rows, and row_arguments"):
        check_model(tiny(name), inputs(name))
    rows[name] = replace(rows[name], keeps_exited_rows="its row arguments are not known")
    check_model(tiny(name), inputs(name))


@pytest.mark.parametrize(
    "name", ["CogView4Transformer2DModel", "AuraFlowTransformer2DModel", "ChromaTransformer2DModel"]
)
@torch.no_grad()
def test_one_row_broadcast_to_all_is_refused_in_a_run_too(name: str, rows):
    """Where one row of six goes on, a block multiplies it with the arguments of all six."""
    model = tiny(name)
    one_goes_on = Policy(DepthTable(((0, 0, len(blocks_of(model)), 0, 0, 0),)))
    expected = model(**inputs(name)([2]), return_dict=False)[0][0]
    assert apart(answer_under(model, one_goes_on, inputs(name)(ROWS))[2], expected) < 1e-4
    rows[name] = replace(rows[name], row_arguments=("attention_mask",) if name.startswith("Chroma") else ())
    with pytest.raises(
        ValueError, match="returned 6 rows for 1: an argument with one entry per row is not among row_arg"
    ):
        answer_under(model, one_goes_on, inputs(name)(ROWS))


WRONG = [
    ("FluxTransformer2DModel", {"returns": "image, text"}, "block 0 returns .* expected"),
    ("CogVideoXTransformer3DModel", {"returns": "text, image"}, "block 0 returns .* expected"),
    ("SD3Transformer2DModel", {"returns": "image"}, "block 0 returns .* expected"),
    ("DiTTransformer2DModel", {"returns": "text, image"}, "block 0 returns .* expected"),
    ("Flux2Transformer2DModel", {"concatenated": ()}, "block 2 returns .* expected"),
    ("FluxTransformer2DModel", {"concatenated": ("single_transformer_blocks",)}, "block 3 returns .* expected"),
    ("HunyuanDiT2DModel", {"earlier": {}}, "the length of 'skip'"),
    ("HunyuanDiT2DModel", {"earlier": {"skip": lambda layer, layers: layer - 1}}, "row . of a batch|fails"),
    ("DiTTransformer2DModel", {"tail": "proj_out_1"}, "an exit after|fails"),
    ("DiTTransformer2DModel", {"tail": "norm_end"}, "has no module 'norm_end'"),
    ("DiTTransformer2DModel", {"blocks": "blocks"}, "has no ModuleList 'blocks'"),
    ("DiTTransformer2DModel", {"inner": "attn9"}, "BasicTransformerBlock has no module 'attn9'"),
    ("SD3Transformer2DModel", {"inner": "attn.to_q"}, None),
    (
        "SD3Transformer2DModel",
        {"width": ("attention_head_dim",)},
        r"block 0 gets \(6, 16, 16\) first, expected \(6, N, 8\)",
    ),
    ("SD3Transformer2DModel", {"width": ("hidden",)}, r"no \['hidden'\] in its config"),
    ("SD3Transformer2DModel", {"row_arguments": ("temp",)}, r"row_arguments names \['temp'\]"),
    ("SD3Transformer2DModel", {"residuals": ("block_samples",)}, r"residuals names \['block_samples'\]"),
    ("CogView4Transformer2DModel", {"inner": "ff"}, r"'ff' of the blocks saw \[12, .* rows, expected \[6, "),
    ("FluxTransformer2DModel", {"single_blocks": None}, "an exit after|row . of a batch|fails"),
]


@pytest.mark.parametrize("name, change, words", WRONG, ids=str)
def test_other_mistakes_are_named(name: str, change: dict, words: str | None, rows):
    rows[name] = replace(rows[name], **change)
    if words is None:
        check_model(tiny(name), inputs(name))
        return
    with pytest.raises(ValueError, match=words):
        check_model(tiny(name), inputs(name))


def test_inputs_that_could_not_show_anything_are_refused(rows):
    name = "FluxTransformer2DModel"
    model, right = tiny(name), inputs(name)
    with pytest.raises(ValueError, match=r"rows of inputs.* have the same output"):
        check_model(model, lambda rows: right([0] * len(rows)))
    with pytest.raises(ValueError, match=r"alone is .* off from the row in a batch"):
        check_model(model, lambda rows: right([row + len(rows) for row in rows]))
    with pytest.raises(ValueError, match="expected a forward without them"):
        check_model(model, lambda rows: right(rows) | tiny_families.residuals_of(name, rows))
    with pytest.raises(ValueError, match="in train mode"):
        check_model(tiny_families.model_named(name).train(), right)
    with pytest.raises(ValueError, match=r"torch\.bfloat16, expected eval, float32"):
        check_model(tiny_families.model_named(name).bfloat16(), right)
    idle = tiny_families.model_named("DiTTransformer2DModel")
    for parameter in idle.transformer_blocks.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match="its blocks change nothing"):
        check_model(idle, inputs("DiTTransformer2DModel"))
    with pytest.raises(ValueError, match=r"a forward of \['sample'\], expected its arguments by name"):
        answer_under(model, Policy(), {"sample": torch.zeros(2)})
    with pytest.raises(ValueError, match="no family for Linear"):
        check_model(nn.Linear(2, 2), right)


def test_what_all_rows_share_may_be_as_long_as_the_batch(rows):
    """2 x 3 image tokens: the position codes have six entries, and go on having them with fewer rows."""
    name = "CogView4Transformer2DModel"

    def small(chosen: list[int]) -> dict:
        given = inputs(name)(chosen)
        return given | {"hidden_states": given["hidden_states"][:, :, :4, :6]}

    check_model(tiny(name), small)


def test_attached_and_off_is_the_model_itself():
    """A block that notices that it is attached."""
    model = tiny_families.model_named("DiTTransformer2DModel")

    def notice(block: nn.Module, args: tuple, kwargs: dict):
        return ((1.5 * args[0], *args[1:]), kwargs) if "forward" in vars(block) else None

    model.transformer_blocks[0].register_forward_pre_hook(notice, with_kwargs=True)
    with pytest.raises(
        ValueError, match=r"with exits attached that nobody takes it is [0-9.]+ off from the model itself"
    ):
        check_model(model, inputs("DiTTransformer2DModel"))


def test_a_uvit_without_long_skips():
    check_model(uvit(long_skips=False), functools.partial(tiny_families.inputs_of, "UViTTransformer2DModel"))


def test_a_registered_row_is_what_is_checked(rows):
    name = "CogView4Transformer2DModel"
    del rows[name]
    register_model(ModelSpec(name, "transformer_blocks", returns="image, text"))
    with pytest.raises(ValueError, match="the length of 'temb'"):
        check_model(tiny(name), inputs(name))
