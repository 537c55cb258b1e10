"""A causal language model cut to its first layers: the truncated control."""

from __future__ import annotations

from transformers import PreTrainedModel

from ee_diffusion.decoding.model_specs import layers_of, model_spec_of


def truncate(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Keep the first `num_layers` decoder layers, in place.

    Raises:
        ValueError: not fewer layers than the model has, or none; a class whose config has no `num_hidden_layers`.
    """
    layers = len(layers_of(model))
    if not 1 <= num_layers < layers:
        raise ValueError(f"num_layers={num_layers}, expected within 1..{layers - 1}: the model has {layers} layers")
    if "num_hidden_layers" not in model.config.to_dict():
        raise ValueError(f"the config of {type(model).__name__} has no num_hidden_layers, expected one to set")
    name = model_spec_of(model).layers
    model.set_submodule(name, model.get_submodule(name)[:num_layers])
    model.config.num_hidden_layers = num_layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:num_layers]
    return model
