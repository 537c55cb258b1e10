"""A shallow model of its own: the first blocks of a transformer and its tail, saved and loaded as any stock model.

Here: the export. Not here: exits (deediff.py, adapter.py), which a shallow model has none of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.rows import alike, apart
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.diffusion.hooks.attach import transformer_of
from ee_diffusion.diffusion.hooks.forward_to_depth import answer_under, forward_of
from ee_diffusion.diffusion.model_specs import TESTED, ModelSpec, blocks_of, model_spec_of


def truncate(model: nn.Module, depth: int, *, inputs: Mapping[str, Any] | None = None) -> nn.Module:
    """A copy of the first `depth` blocks and the tail of a transformer: what an exit without a head of its own answers, as a stock model.

    Attached exits are not part of it, and stay where they are. Of SD3 the last block becomes one that returns no text, as that class
    wants it.

    Args:
        inputs: the arguments of one forward, on which the shallow model is compared with the exit at that depth. Needed for a class that
            is registered by hand: its forward may count its blocks (Chroma's does), and then its first blocks say something else.

    Raises:
        ValueError: an unknown class; a depth that is not 1..L-1; a class whose later blocks take what earlier ones left (long skips), whose
            last block is unlike the others, or whose forward counts its blocks: its first blocks are no model of that class; a
            registered class without inputs; weights that are not its class's own (adapters: merge them first); with inputs, exits that
            are attached.
    """
    model = transformer_of(model)
    family, layers = model_spec_of(model), len(blocks_of(model))
    name = family.class_name
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth < layers:
        raise ValueError(f"depth={depth!r}, expected an integer in 1..{layers - 1}")
    no_model = f"its first {depth} blocks are no {name}; run it with FixedDepth({depth}) instead"
    if family.earlier and model.config.get("long_skips", True):
        raise ValueError(f"the later blocks of a {name} take long skips from the earlier ones: {no_model}")
    if inputs is None and name not in TESTED:
        raise ValueError(
            f"{name} is registered by hand, and its forward may count its blocks: give inputs=, the arguments of one forward, on which its "
            f"first {depth} blocks are compared with the exit after them"
        )
    counts = _counts(model, family, depth)
    shallow = type(model).from_config(dict(model.config) | counts)
    state = {key: value for key, value in model.state_dict().items() if _kept(key, family, counts)}
    if name == "SD3Transformer2DModel":
        state = _without_text(state, f"{family.blocks}.{depth - 1}.")
    _check_weights(state, shallow.state_dict(), family, counts, no_model=no_model)
    shallow.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    shallow = shallow.to(next(model.parameters()).device).train(model.training)
    if inputs is not None:
        _compare(model, shallow, depth, inputs, no_model=no_model)
    return shallow


@torch.no_grad()
def _compare(model: nn.Module, shallow: nn.Module, depth: int, inputs: Mapping[str, Any], *, no_model: str) -> None:
    expected = answer_under(model, Policy(schedule=FixedDepth(depth)), inputs)
    found = forward_of(shallow, inputs)
    if not alike(found, expected):
        raise ValueError(
            f"the first {depth} blocks of {type(model).__name__} alone are {apart(found, expected):.2g} off from the exit there, which "
            f"says up to {float(expected.abs().max()):.2g}: its forward uses how many blocks there are, so {no_model}"
        )


def _check_weights(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    family: ModelSpec,
    counts: Mapping[str, int],
    *,
    no_model: str,
) -> None:
    shapes, expected = ({key: value.shape for key, value in one.items()} for one in (state, wanted))
    differing = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
    if not differing:
        return
    name, last = (
        family.class_name,
        tuple(f"{blocks}.{count - 1}." for blocks, count in zip(family.lists, counts.values(), strict=True) if count),
    )
    if all(key.startswith(last) for key in differing):
        raise ValueError(
            f"the last block of a {name} has other weights than those before it ({differing[0]}): {no_model}"
        )
    raise ValueError(
        f"the weights of this {name} are not those of its class ({differing[0]}, in all {len(differing)}); merge adapters first"
    )


def _counts(model: nn.Module, family: ModelSpec, depth: int) -> dict[str, int]:
    """How many blocks each list keeps, by config entry."""
    left, counts = depth, {}
    if len(family.counts) < len(family.lists):
        raise ValueError(
            f"counts={family.counts} of {family.class_name}, expected a config entry for each of {family.lists}"
        )
    for entry, name in zip(family.counts, family.lists, strict=False):
        blocks = len(getattr(model, name))
        if model.config.get(entry) != blocks:
            raise ValueError(
                f"{family.class_name} has {blocks} {name}, and {entry}={model.config.get(entry)} in its config: name the entries that "
                "count its lists, Family(counts=...)"
            )
        counts[entry] = min(left, blocks)
        left -= counts[entry]
    return counts


def _kept(name: str, family: ModelSpec, counts: dict[str, int]) -> bool:
    for entry, blocks in zip(family.counts, family.lists, strict=False):
        found = re.match(rf"{blocks}\.(\d+)\.", name)
        if found is not None:
            return int(found[1]) < counts[entry]
    return True


def _without_text(state: dict[str, torch.Tensor], last: str) -> dict[str, torch.Tensor]:
    """SD3's last block reads the text and does not return it: its norm keeps shift and scale for the attention, the other way round."""
    kept = {}
    for name, value in state.items():
        inside = name.removeprefix(last) if name.startswith(last) else ""
        if inside.startswith(("ff_context.", "norm2_context.", "attn.to_add_out.")):
            continue
        if inside.startswith("norm1_context.linear."):
            shift, scale = value.chunk(6)[:2]
            value = torch.cat([scale, shift])
        kept[name] = value
    return kept
