"""Every row of the family table on the real class at tiny size: off is the plain model, an exit is the truncated model, an image in a
batch is the image alone, skipped work is not executed, detaching restores; ControlNet samples do not touch rows that stopped."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_families import TINY, exits_for, forward, inner_modules, inputs_of, model_named, passing, residuals_of
from torch import Tensor, nn

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth, FixedLayers
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.hooks.attach import TransformerHook, attach_exits, detach_exits
from ee_diffusion.diffusion.model_specs import MODEL_SPECS, blocks_of, model_spec_of

ROWS = [0, 1, 2, 3, 4, 5]
WITH_RESIDUALS = [name for name, tiny in TINY.items() if tiny.residuals]
FROZEN = ["DiTTransformer2DModel", "SD3Transformer2DModel", "Flux2Transformer2DModel", "HunyuanDiT2DModel"]
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@functools.cache
def tiny(name: str) -> nn.Module:
    """Made once; nobody changes it."""
    return model_named(name)


def run(attachment: TransformerHook, policy: Policy, arguments: dict[str, Any]) -> tuple[Tensor, Trace]:
    """One step under a policy, a row an image."""
    rows = torch.arange(len(arguments["hidden_states"]))
    session = attachment.start(policy, rows=rows, num_steps=1)
    with attachment.use(session.step(0, 500.0)):
        output = forward(attachment.transformer, arguments)
    return output, session.trace()


def plan(*depths: int) -> Policy:
    return Policy(DepthTable((depths,)))


def mixed(num_layers: int) -> list[int]:
    """A depth for each of ROWS: early, middle, late and full ones."""
    return [num_layers, 1, num_layers - 1, 0, num_layers // 2, num_layers]


@contextmanager
def truncated(model: nn.Module, depth: int) -> Iterator[None]:
    """The model with its first `depth` blocks alone. A U-ViT pairs its blocks and DiT's tail uses its first: there the others pass on."""
    family = model_spec_of(model)
    if depth == 0 or family.class_name == "UViTTransformer2DModel":
        with passing(model, depth):
            yield
        return
    lists = {name: getattr(model, name) for name in family.lists}
    try:
        for name, blocks in lists.items():
            setattr(model, name, nn.ModuleList(blocks[:depth]))
            depth -= len(blocks[:depth])
        yield
    finally:
        for name, blocks in lists.items():
            setattr(model, name, blocks)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Rows that reached the module inside each block."""
    counts = [0] * len(blocks_of(model))

    def hook(layer: int, module, args, kwargs) -> None:
        counts[layer] += len(args[0] if args else kwargs["hidden_states"])

    handles = [
        inner.register_forward_pre_hook(functools.partial(hook, layer), with_kwargs=True)
        for layer, inner in enumerate(inner_modules(model))
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def test_every_family_is_tried():
    assert set(TINY) == set(MODEL_SPECS)


@pytest.mark.parametrize("name", TINY)
def test_off_is_the_plain_model_and_detaching_restores_it(name: str):
    model, arguments = tiny(name), inputs_of(name, ROWS)
    plain, keys = forward(model, arguments), list(model.state_dict())
    before = [dict(module.__dict__) for module in model.modules()]
    exits = exits_for(model, rank=2)
    with attach_exits(model, exits) as attachment:
        assert torch.equal(forward(model, arguments), plain), "attached, nothing asked for"
        for policy in (Policy(), Policy(Threshold(1.0)), Policy(Threshold(0.0), record_all=True)):
            output, trace = run(attachment, policy, arguments)
            assert torch.equal(output, plain)
            assert (trace.depths == len(blocks_of(model))).all()
        run(attachment, plan(*mixed(len(blocks_of(model)))), arguments)
        assert torch.equal(forward(model, arguments), plain)
    assert torch.equal(forward(model, arguments), plain)
    assert list(model.state_dict()) == keys
    for module, had in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == had.keys()
        assert all(module.__dict__[key] is value for key, value in had.items())


@pytest.mark.parametrize("name", TINY)
def test_an_exit_is_the_truncated_model(name: str):
    model, arguments = tiny(name), inputs_of(name, ROWS)
    outputs = {}
    for depth in range(len(blocks_of(model))):
        with attach_exits(model, exits_for(model, rank=0)) as attachment, counted(model) as work:
            outputs[depth], _ = run(attachment, Policy(schedule=FixedDepth(depth)), arguments)
        assert work == [len(ROWS) * (layer < depth) for layer in range(len(work))]
        with truncated(model, depth):
            assert torch.equal(outputs[depth], forward(model, arguments)), f"depth {depth}"
    assert not torch.allclose(outputs[0], outputs[1], **CLOSE)
    assert not torch.allclose(outputs[1], outputs[2], **CLOSE)


@pytest.mark.parametrize("name", TINY)
def test_each_row_is_its_own_truncated_model_and_nothing_else_is_executed(name: str):
    model, arguments = tiny(name), inputs_of(name, ROWS)
    depths = mixed(len(blocks_of(model)))
    with attach_exits(model, exits_for(model, rank=0)) as attachment, counted(model) as work:
        output, trace = run(attachment, plan(*depths), arguments)
    assert trace.depths.tolist() == [depths]
    assert work == [sum(depth > layer for depth in depths) for layer in range(len(work))]
    assert trace.ran.sum((0, 1)).tolist() == work
    for row, depth in enumerate(depths):
        with truncated(model, depth):
            torch.testing.assert_close(output[row], forward(model, inputs_of(name, [row]))[0], **CLOSE)


@pytest.mark.parametrize("name", TINY)
def test_an_image_in_a_batch_is_the_image_alone(name: str):
    """Learned exits: adapters before the tail and scores of the image's own tokens."""
    model = tiny(name)
    with attach_exits(model, exits_for(model, rank=2)) as attachment:
        scores = run(attachment, Policy(Threshold(0.5), record_all=True), inputs_of(name, ROWS))[1].scores
        assert scores.std(2).min() > 1e-3, "the scores of different images differ"
        best = scores[0].amax(0).sort().values  # (E,) the best score an image ever has
        policy = Policy(Threshold(float(best[1] + best[2]) / 2))
        output, trace = run(attachment, policy, inputs_of(name, ROWS))
        assert len(trace.depths.unique()) >= 2
        for row in ROWS:
            alone, its = run(attachment, policy, inputs_of(name, [row]))
            assert its.depths[0, 0] == trace.depths[0, row]
            torch.testing.assert_close(its.scores[:, :, 0], trace.scores[:, :, row], equal_nan=True, rtol=0, atol=1e-5)
            torch.testing.assert_close(alone[0], output[row], **CLOSE)


@pytest.mark.parametrize("name", WITH_RESIDUALS)
def test_controlnet_samples_do_not_touch_rows_that_stopped(name: str):
    model = tiny(name)
    depths = mixed(len(blocks_of(model)))
    with attach_exits(model, exits_for(model, rank=0)) as attachment, counted(model) as work:
        output, _ = run(attachment, plan(*depths), inputs_of(name, ROWS) | residuals_of(name, ROWS))
    assert work == [sum(depth > layer for depth in depths) for layer in range(len(work))]
    for row, depth in enumerate(depths):
        residuals = residuals_of(name, [row])
        for argument, values in residuals.items():
            for place, value in enumerate(values):
                if after_layer(name, argument, place) >= depth:
                    value.zero_()
        with passing(model, depth):
            expected = forward(model, inputs_of(name, [row]) | residuals)
        torch.testing.assert_close(output[row], expected[0], **CLOSE)
    plain = forward(model, inputs_of(name, ROWS))
    assert not torch.allclose(output[0], plain[0], **CLOSE), "the samples do something"


def after_layer(name: str, argument: str, place: int) -> int:
    """The block after which a ControlNet sample is added (HunyuanDiT adds to the long skips, which a block that is left out ignores)."""
    if argument == "controlnet_single_block_samples":
        return place + len(tiny(name).transformer_blocks)
    return {"SanaTransformer2DModel": place + 1, "HunyuanDiT2DModel": -1}.get(name, place)


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_rows_give_the_same_answers_and_count_as_executed(name: str, monkeypatch):
    monkeypatch.setitem(
        MODEL_SPECS, name, replace(MODEL_SPECS[name], keeps_exited_rows="nobody knows its row arguments")
    )
    model, arguments = tiny(name), inputs_of(name, ROWS)
    num_layers = len(blocks_of(model))
    depths = mixed(num_layers)
    with attach_exits(model, exits_for(model, rank=0)) as attachment, counted(model) as work:
        output, trace = run(attachment, plan(*depths), arguments)
        assert "carried along (nobody knows its row arguments)" in attachment.summary()
    assert work == [len(ROWS)] * num_layers
    assert trace.ran.sum((0, 1)).tolist() == work
    report = trace.report()
    assert report.mean_executed == num_layers
    assert report.mean_needed < num_layers
    assert "nobody knows its row arguments" in report.summary()
    for row, depth in enumerate(depths):
        with truncated(model, depth):
            torch.testing.assert_close(output[row], forward(model, inputs_of(name, [row]))[0], **CLOSE)
    everybody = [1] * len(ROWS)
    with attach_exits(model, exits_for(model, rank=0)) as attachment, counted(model) as work:
        run(attachment, plan(*everybody), arguments)
    assert work == [len(ROWS)] + [0] * (num_layers - 1), "when nobody is left the blocks do not run"


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel", "CogVideoXTransformer3DModel"])
def test_holes_pass_text_and_image_on(name: str):
    model, arguments = tiny(name), inputs_of(name, ROWS)
    last = len(blocks_of(model)) - 1
    with attach_exits(model, exits_for(model, rank=0)) as attachment:
        output, trace = run(attachment, Policy(schedule=FixedLayers((0, 2, last))), arguments)
    blocks = blocks_of(model)
    with passing(model, 0):
        for layer in (0, 2, last):
            del blocks[layer].__dict__["forward"]
        try:
            expected = forward(model, arguments)
        finally:
            for layer in (0, 2, last):
                blocks[layer].__dict__["forward"] = None
    assert torch.equal(output, expected)
    assert trace.ran.sum((0, 1)).tolist() == [len(ROWS) * (layer in (0, 2, last)) for layer in range(last + 1)]


def test_nested_row_arguments_go_with_their_rows():
    """An IP adapter's tokens travel to Flux' blocks as a list inside `joint_attention_kwargs`."""
    model, name = tiny("FluxTransformer2DModel"), "FluxTransformer2DModel"
    seen = []
    originals = [block.attn.processor for block in blocks_of(model)]

    class Spy:
        def __init__(self, original):
            self.original = original

        def __call__(self, attention, hidden_states, *args, marks=None, **kwargs):
            seen.append((len(hidden_states), marks[0][:, 0].tolist()))
            return self.original(attention, hidden_states, *args, **kwargs)

    arguments = inputs_of(name, ROWS) | {"joint_attention_kwargs": {"marks": [torch.arange(6.0)[:, None]]}}
    for block, original in zip(blocks_of(model), originals, strict=True):
        block.attn.processor = Spy(original)
    try:
        with attach_exits(model, exits_for(model, rank=0)) as attachment:
            run(attachment, plan(6, 1, 2, 6, 3, 3), arguments)
    finally:
        for block, original in zip(blocks_of(model), originals, strict=True):
            block.attn.processor = original
    assert seen[1] == (5, [0, 2, 3, 4, 5])
    assert seen[2] == (4, [0, 3, 4, 5])
    assert seen[3] == (2, [0, 3])


def test_an_argument_that_is_no_row_argument_is_refused(monkeypatch):
    name = "DiTTransformer2DModel"
    wrong = replace(MODEL_SPECS[name], row_arguments=("timestep", "class_labels", "cross_attention_kwargs"))
    monkeypatch.setitem(MODEL_SPECS, name, wrong)
    model, depths = tiny(name), [1, 5, 5, 5, 5, 5]
    arguments = inputs_of(name, ROWS) | {"cross_attention_kwargs": {"mask": torch.zeros(4)}}
    with (
        attach_exits(model, exits_for(model, rank=0)) as attachment,
        pytest.raises(
            ValueError, match=r"'cross_attention_kwargs\.mask' has 4 entries, expected one for each of 6 rows"
        ),
    ):
        run(attachment, plan(*depths), arguments)
    detached = forward(model, inputs_of(name, ROWS))
    assert detached.isfinite().all()
    with pytest.raises(ValueError, match="no exits are attached"):
        detach_exits(model)
