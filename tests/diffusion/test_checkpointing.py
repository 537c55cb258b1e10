"""Gradient checkpointing with exits: the same outputs and gradients as without, blocks computed again on the rows they ran on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_families import TINY, exits_for, inner_modules, inputs_of, model_named, residuals_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.distillation.objective import observe
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.model_specs import blocks_of

ROWS = [0, 1, 2, 3]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def reentrant(module: Callable, *args) -> object:
    return checkpoint(module, *args, use_reentrant=True)


def seen(model: nn.Module) -> list[int]:
    """Grows by the rows of every call of a module inside a block."""
    rows: list[int] = []

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        rows.append(len(args[0] if args else kwargs["hidden_states"]))

    for inner in inner_modules(model):
        inner.register_forward_pre_hook(count, with_kwargs=True)
    return rows


def gradients(
    model: nn.Module, exits: nn.Module, policy: Policy, enable: Callable[[], None], **options
) -> dict[str, Tensor]:
    """Of the summed output, by every parameter that has one; the output itself under "". The backward pass comes after detaching."""
    name = type(model).__name__
    arguments = inputs_of(name, ROWS) | (residuals_of(name, ROWS) if TINY[name].residuals else {})
    for parameter in (*model.parameters(), *exits.parameters()):
        parameter.grad = None
    with attach_exits(model, exits, **options) as attachment:
        enable()
        session = attachment.start(policy, rows=torch.arange(len(ROWS)), num_steps=1)
        with attachment.use(session.step(0, 700.0)):
            output = model(**arguments, return_dict=False)[0]
    output.square().mean().backward()
    named = {
        f"{kind}.{key}": one for kind, of in (("model", model), ("exits", exits)) for key, one in of.named_parameters()
    }
    return {"": output.detach()} | {key: one.grad for key, one in named.items() if one.grad is not None}


# diffusers checkpoints every class of the table but this one.
SUPPORTED = [name for name in TINY if name != "HunyuanDiT2DModel"]


@pytest.mark.parametrize("name", SUPPORTED)
def test_outputs_and_gradients_are_those_without(name: str):
    model = model_named(name)
    layers = len(blocks_of(model))
    exits, policy = exits_for(model), Policy(DepthTable(((1, layers, layers - 1, layers),)))
    rows = seen(model)
    expected = gradients(model, exits, policy, lambda: None)
    once = rows.copy()
    rows.clear()
    found = gradients(model, exits, policy, model.enable_gradient_checkpointing)
    assert rows[: len(once)] == once
    assert sorted(rows[len(once) :]) == sorted(once), "every block again, on the same rows"
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **CLOSE)
    with torch.no_grad():
        rows.clear()
        model(**inputs_of(name, ROWS))
    assert set(rows) == {len(ROWS)}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("function", [None, reentrant])
def test_enabled_before_or_after_attaching_and_with_ones_own_function(before: bool, function: Callable | None):
    model = model_named("DiTTransformer2DModel")
    exits, policy = exits_for(model), Policy(DepthTable(((1, 5, 0, 4),)))
    expected = gradients(model, exits, policy, lambda: None)

    def enable() -> None:
        model.enable_gradient_checkpointing(function)

    if before:
        enable()
    own = model._gradient_checkpointing_func
    found = gradients(model, exits, policy, (lambda: None) if before else enable)
    if before:
        assert model.__dict__["_gradient_checkpointing_func"] is own
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **CLOSE)


def test_scores_and_heads_after_the_tail():
    model = model_named("DiTTransformer2DModel")
    exits = DenoisingExits.for_transformer(model, (0, 1, 2, 3, 4))
    policy = Policy(Threshold(0.5), record_all=True)
    expected = gradients(model, exits, policy, lambda: None)
    found = gradients(model, exits, policy, model.enable_gradient_checkpointing)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **CLOSE)


def test_compiled_and_checkpointed():
    model = model_named("DiTTransformer2DModel")
    exits, policy = exits_for(model), Policy(DepthTable(((1, 5, 0, 4),)))
    expected = gradients(model, exits, policy, lambda: None)
    found = gradients(model, exits, policy, model.enable_gradient_checkpointing, compile_options={"backend": "eager"})
    torch._dynamo.reset()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **CLOSE)


def test_what_heads_see_in_training():
    """The distillation objective with adapters in the blocks: gradients come through hidden states that exits were shown."""
    model = model_named("DiTTransformer2DModel")
    inputs = inputs_of("DiTTransformer2DModel", ROWS)
    grown = []
    for enable in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        enable()
        model.zero_grad()
        prediction, heard = observe(model, (1, 3), inputs)
        (prediction.square().mean() + heard[0].square().mean() + heard[1].mean()).backward()
        grown.append({key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None})
    assert grown[0].keys() == grown[1].keys()
    for key, value in grown[0].items():
        torch.testing.assert_close(grown[1][key], value, **CLOSE)
