"""A shallow model of its own: the first blocks of a transformer and its tail, saved and loaded as any stock model.

Here: the export. Not here: exits (heads.py, adapters.py), which a shallow model has none of.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from ee_diffusion.diffusion.attach import transformer_of
from ee_diffusion.diffusion.families import Family, blocks_of, family_of

# The config entries that count the blocks of a family's first and second list.
COUNTS = ("num_layers", "num_single_layers")


def truncate(model: nn.Module, depth: int) -> nn.Module:
    """A copy of the first `depth` blocks and the tail of a transformer: what an exit without a head of its own answers, as a stock model.

    Attached exits are not part of it, and stay where they are. Of SD3 the last block becomes one that returns no text, as that class
    wants it.

    Raises:
        ValueError: an unknown class; a depth that is not 1..L-1; a class whose later blocks take what earlier ones left (long skips): its
            first blocks are no model of that class; weights that are not its class's own (adapters: merge them first).
    """
    model = transformer_of(model)
    family, layers = family_of(model), len(blocks_of(model))
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth < layers:
        raise ValueError(f"depth={depth!r}, expected an integer in 1..{layers - 1}")
    if family.earlier:
        raise ValueError(
            f"the later blocks of a {family.class_name} take long skips from the earlier ones: its first {depth} blocks are no "
            f"{family.class_name}; run it with FixedDepth({depth}) instead"
        )
    counts = _counts(model, family, depth)
    shallow = type(model).from_config(dict(model.config) | counts)
    state = {name: value for name, value in model.state_dict().items() if _kept(name, family, counts)}
    if family.class_name == "SD3Transformer2DModel":
        state = _without_text(state, f"{family.blocks}.{depth - 1}.")
    try:
        shallow.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of this {family.class_name} are not those of its class; merge adapters first: {error}"
        ) from error
    return shallow.to(next(model.parameters()).device).train(model.training)


def _counts(model: nn.Module, family: Family, depth: int) -> dict[str, int]:
    """How many blocks each list keeps, by config entry."""
    left, counts = depth, {}
    for entry, name in zip(COUNTS, family.lists, strict=False):
        if model.config.get(entry) != len(getattr(model, name)):
            raise ValueError(f"{entry} in the config of {family.class_name} does not count its {name}")
        counts[entry] = min(left, len(getattr(model, name)))
        left -= counts[entry]
    return counts


def _kept(name: str, family: Family, counts: dict[str, int]) -> bool:
    for entry, blocks in zip(COUNTS, family.lists, strict=False):
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
