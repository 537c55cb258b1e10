"""Keys and values of layers that did not run: a view of the cache for some rows, and layers that are closed for good.

Here: what stands in the cache. Not here: who leaves when (hooks.py). R rows of the batch, r running rows, H heads, N positions.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer

Part = tuple[Tensor, Tensor, Tensor]  # rows (r,), keys (r, H, 1, d), values (r, H, 1, d)


class ClosedLayer(DynamicLayer):
    """The place of a layer that a schedule has dropped: its memory is freed, and a position can no more be added."""

    def __init__(self, layer: int, seen: int):
        super().__init__()
        self.layer, self.seen = layer, seen

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        raise ValueError(
            f"layer {self.layer} was dropped by an exit policy after {self.seen} positions: this cache cannot be used at "
            "greater depth; start from an empty one"
        )


class RowsOfCache:
    """Stands in for the cache in one layer's call on some rows: writes the new position of every row, returns the call's own rows.

    `rows` (r,): the rows of the call; `others`: keys and values of rows outside it. A row in neither gets zeros (nobody reads them).
    """

    def __init__(self, cache: DynamicCache, rows: Tensor, *, num_rows: int, others: Sequence[Part]):
        self.cache, self.rows, self.num_rows, self.others = cache, rows, num_rows, others

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """keys and values (r, H, 1, d) of the running rows -> (r, H, N, d) with all positions."""
        parts = [(self.rows, keys, values), *self.others]
        keys, values = write_position(self.cache, layer, parts, num_rows=self.num_rows)
        return keys.index_select(0, self.rows), values.index_select(0, self.rows)


def write_position(cache: Cache, layer: int, parts: Sequence[Part], *, num_rows: int) -> tuple[Tensor, Tensor]:
    """Add one position to a layer for all rows, from the parts that know some of them -> keys and values (R, H, N, d)."""
    _, keys, values = parts[0]
    whole_keys, whole_values = (one.new_zeros((num_rows, *one.shape[1:])) for one in (keys, values))
    for rows, keys, values in parts:
        whole_keys.index_copy_(0, rows, keys)
        whole_values.index_copy_(0, rows, values)
    return cache.update(whole_keys, whole_values, layer)


def close_layer(cache: DynamicCache, layer: int) -> None:
    """Free a layer's keys and values and let nobody add to it; a closed layer stays as it is."""
    if isinstance(cache.layers[layer], ClosedLayer):
        return
    cache.layers[layer] = ClosedLayer(layer, cache.layers[layer].get_seq_length())


def check_cache(cache: object) -> None:
    """Raise ValueError unless exits can be used with this cache: a DynamicCache whose layers keep every position, none of them closed."""
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise ValueError(
            f"past_key_values is {type(cache).__name__}, expected a DynamicCache without offloading (use_cache=True)"
        )
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, ClosedLayer):
            raise ValueError(
                f"layer {index} of the cache was dropped by an exit policy after {layer.seen} positions; start from an empty cache"
            )
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"layer {index} of the cache is a {type(layer).__name__}, expected a DynamicLayer (no sliding window)"
            )


def check_asked_once(model: PreTrainedModel, config: GenerationConfig) -> None:
    """Raise ValueError unless a token is one forward with the cache: guidance asks the model in between, and one that trains with gradient
    checkpointing gets no cache from transformers."""
    if config.guidance_scale not in (None, 1):
        raise ValueError(f"guidance_scale={config.guidance_scale}: guidance asks the model in between, expected none")
    if model.training and model.is_gradient_checkpointing:
        raise ValueError("a model that trains with gradient checkpointing has no cache, expected model.eval() before")


def pads_ended(criteria: StoppingCriteriaList) -> bool:
    """Whether transformers' loop pads a sequence that a criterion has ended, beside others that go on; else it goes on too."""
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria)


def with_cache(model: PreTrainedModel, model_kwargs: dict) -> dict:
    """The arguments with a cache, where they ask for one: transformers 5.0 leaves making it to the model's first forward."""
    if model_kwargs.get("past_key_values") is not None or not model_kwargs.get("use_cache"):
        return model_kwargs
    return model_kwargs | {"past_key_values": DynamicCache(config=model.config.get_text_config(decoder=True))}
