"""The first layers of a stock classifier as a smaller stock classifier: what an exit has to beat at equal cost, once it is trained as long.

Here: cutting. Not here: training it. L layers.
"""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from ee_diffusion.encoder.families import family_of


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A copy with the embeddings, the first `num_layers` layers and the end of a classifier; the layers' order stays.

    Raises:
        ValueError: an unknown class, or not 1..L layers.
    """
    family, config = family_of(model), copy.deepcopy(model.config)
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(f"num_layers={num_layers} of a {family.class_name}, expected 1..{config.num_hidden_layers}")
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:  # ModernBERT names the kind of each layer
        config.layer_types = config.layer_types[:num_layers]
    smaller = type(model)._from_config(config)
    missing = smaller.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing, missing
    return smaller.train(model.training)
