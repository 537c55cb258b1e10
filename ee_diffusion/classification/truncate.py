"""Truncate a stock classifier to its first layers: the baseline that an exit has to beat at equal cost, once it is trained as long.

Here: truncating. Not here: training it. L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ee_diffusion.classification.attach import recorded_states
from ee_diffusion.classification.model_specs import TESTED, model_spec_of
from ee_diffusion.core.rows import alike, apart


def truncate(model: PreTrainedModel, num_layers: int, *, inputs: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A copy with the embeddings, the first `num_layers` layers and the end of a classifier; the layers' order stays.

    Args:
        inputs: the arguments of one forward, on which the smaller model is compared with the model's output after those layers. Needed
            for a class that is registered by hand: its forward may look at how many layers there are.

    Raises:
        ValueError: an unknown class, or not 1..L layers; an ALBERT of several groups, which it deals out over all its layers; a registered
            class without inputs; weights that are not its class's own (adapters: merge them first); with inputs, another output.
    """
    spec, config = model_spec_of(model), copy.deepcopy(model.config)
    name, layers = spec.class_name, config.num_hidden_layers
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or not 1 <= num_layers <= layers:
        raise ValueError(f"num_layers={num_layers!r} of a {name}, expected 1..{layers}")
    groups = getattr(config, "num_hidden_groups", 1)
    if groups > 1 and num_layers < layers:
        raise ValueError(
            f"a {name} of {groups} groups deals them out over all its layers: its first {num_layers} of {layers} are no {name}; "
            "expected one of a single group"
        )
    if inputs is None and name not in TESTED:
        raise ValueError(
            f"{name} is registered by hand, and its forward may look at how many layers there are: give inputs=, the arguments of one "
            f"forward, on which its first {num_layers} layers are compared with its output after them"
        )
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:  # ModernBERT names the kind of each layer
        config.layer_types = config.layer_types[:num_layers]
    smaller = type(model)._from_config(config).to(next(model.parameters()).device)
    smaller.load_state_dict(_kept(model, smaller, num_layers))
    if inputs is not None:
        _compare(model, smaller, num_layers, inputs)
    return smaller.train(model.training)


def _kept(model: PreTrainedModel, smaller: PreTrainedModel, num_layers: int) -> dict[str, Tensor]:
    """The weights without those of the layers that are left out.

    Raises:
        ValueError: weights that the class does not have, or that it has and are missing, or have another shape.
    """
    blocks = {id(block) for block in model_spec_of(model).blocks(model)}
    names = [name for name, module in model.named_modules() if id(module) in blocks]
    dropped = tuple(f"{name}." for name in names[num_layers:])  # ALBERT's one block is used by all layers
    kept = {key: value for key, value in model.state_dict().items() if not key.startswith(dropped)}
    shapes, expected = ({key: value.shape for key, value in one.items()} for one in (kept, smaller.state_dict()))
    differing = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
    if differing:
        raise ValueError(
            f"the weights of this {type(model).__name__} are not those of its class ({differing[0]}, in all {len(differing)}); merge "
            "adapters first"
        )
    return kept


@torch.no_grad()
def _compare(model: PreTrainedModel, smaller: PreTrainedModel, num_layers: int, inputs: Mapping[str, Any]) -> None:
    spec, whole = model_spec_of(model), copy.deepcopy(model).eval()
    depth = num_layers * spec.num_layers(model) // model.config.num_hidden_layers
    with recorded_states(whole) as states:  # what enters each layer, (R, N, D)
        expected = whole(**inputs).logits
    if depth < len(states):
        expected = spec.classify(whole, spec.pool(whole, states[depth], inputs.get("attention_mask")))
    found = smaller.eval()(**inputs).logits
    if not alike(found, expected):
        raise ValueError(
            f"the first {num_layers} layers of {spec.class_name} alone are {apart(found, expected):.2g} off from its output after "
            f"them, up to {float(expected.abs().max()):.2g}: its forward looks at how many layers there are"
        )
