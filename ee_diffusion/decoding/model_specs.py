"""The family table: what decoding must know of each causal language model class. Written down per class, never guessed from a shape.

Here: facts. Not here: what is done with them (hooks.py). R rows, N tokens, D width, H key-value heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb  # rotates whole heads and parts of them

from ee_diffusion.core.registry import add_row, family_row
from ee_diffusion.core.rows import FEWER, ROWS, following, lengths_of

Rotary = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class ModelSpec:
    """One class of causal language models.

    layers: path of the ModuleList of decoder layers. Each takes the hidden states (R, N, D) first and returns them.
    norm: `norm(model, hidden (R, N, D))` -> (R, N, D), what the model does between its last layer and its LM head.
    keys_values: `keys_values(layer, hidden (R, N, D), rotary)` -> the keys and values (R, H, N, D / heads) that the layer would put into
    the cache; `rotary`: the argument `position_embeddings` for those rows, None where the class has none.
    cache: name of the layer's argument that holds the cache.
    row_arguments: names of the layer's arguments that hold one entry per row of the whole batch (tensors, or tuples of them).
    inner: a module inside a layer that every executed row passes, and no other; work is counted there.
    """

    class_name: str
    layers: str
    norm: Callable[[PreTrainedModel, Tensor], Tensor]
    keys_values: Callable[[nn.Module, Tensor, Rotary], tuple[Tensor, Tensor]]
    cache: str = "past_key_values"
    row_arguments: tuple[str, ...] = ("attention_mask", "position_ids", "position_embeddings")
    inner: str = "mlp"


def _by_head(projected: Tensor, head_dim: int) -> Tensor:
    return projected.view(*projected.shape[:-1], -1, head_dim).transpose(1, 2)  # (R, H, N, head_dim)


def _rotated(keys: Tensor, rotary: Rotary) -> Tensor:
    return apply_rotary_pos_emb(keys[:, :0], keys, *rotary)[1]


def _llama_keys_values(layer: nn.Module, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    attention, hidden = layer.self_attn, layer.input_layernorm(hidden)
    keys = _by_head(attention.k_proj(hidden), attention.head_dim)
    return _rotated(keys, rotary), _by_head(attention.v_proj(hidden), attention.head_dim)


def _qwen3_keys_values(layer: nn.Module, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    attention, hidden = layer.self_attn, layer.input_layernorm(hidden)
    keys = attention.k_norm(attention.k_proj(hidden).view(*hidden.shape[:-1], -1, attention.head_dim)).transpose(1, 2)
    return _rotated(keys, rotary), _by_head(attention.v_proj(hidden), attention.head_dim)


def _opt_keys_values(layer: nn.Module, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    attention = layer.self_attn
    if layer.do_layer_norm_before:
        hidden = layer.self_attn_layer_norm(hidden)
    keys, values = attention.k_proj(hidden), attention.v_proj(hidden)
    return _by_head(keys, attention.head_dim), _by_head(values, attention.head_dim)


def _gpt2_keys_values(layer: nn.Module, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    attention = layer.attn  # one fused projection: the queries are computed with it
    _, keys, values = attention.c_attn(layer.ln_1(hidden)).split(attention.split_size, dim=2)
    return _by_head(keys, attention.head_dim), _by_head(values, attention.head_dim)


def _neox_keys_values(layer: nn.Module, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    attention = layer.attention  # one fused projection: the queries are computed with it
    fused = attention.query_key_value(layer.input_layernorm(hidden))
    _, keys, values = _by_head(fused, 3 * attention.head_size).chunk(3, dim=-1)
    return _rotated(keys, rotary), values


def _llama_norm(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return model.model.norm(hidden)


def _opt_norm(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    decoder = model.model.decoder
    if decoder.final_layer_norm is not None:
        hidden = decoder.final_layer_norm(hidden)
    if decoder.project_out is not None:
        hidden = decoder.project_out(hidden)
    return hidden


def _gpt2_norm(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return model.transformer.ln_f(hidden)


def _neox_norm(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return model.gpt_neox.final_layer_norm(hidden)


MODEL_SPECS: dict[str, ModelSpec] = {
    family.class_name: family
    for family in (
        ModelSpec(
            "LlamaForCausalLM", "model.layers", _llama_norm, _llama_keys_values
        ),  # SmolLM and SmolLM2 are of this class
        ModelSpec("MistralForCausalLM", "model.layers", _llama_norm, _llama_keys_values),
        ModelSpec("Qwen2ForCausalLM", "model.layers", _llama_norm, _llama_keys_values),
        ModelSpec("Qwen3ForCausalLM", "model.layers", _llama_norm, _qwen3_keys_values),
        ModelSpec("OPTForCausalLM", "model.decoder.layers", _opt_norm, _opt_keys_values, inner="fc1"),
        ModelSpec("GPT2LMHeadModel", "transformer.h", _gpt2_norm, _gpt2_keys_values),
        ModelSpec("GPTNeoXForCausalLM", "gpt_neox.layers", _neox_norm, _neox_keys_values, cache="layer_past"),
    )
}


def register_model(family: ModelSpec) -> None:
    """Make a class of causal language models known.

    Raises:
        ValueError: the class is known already, or something else than a row of this table (denoisers have their own).
    """
    if not isinstance(family, ModelSpec):
        raise ValueError(f"{family!r}, expected {__name__}.ModelSpec(...)")
    add_row(MODEL_SPECS, family.class_name, family, called="the family table")


def model_spec_of(model: PreTrainedModel) -> ModelSpec:
    """The table's row for a model.

    Raises:
        ValueError: an encoder-decoder; an unknown class; a model with sliding windows or other layers that forget positions, or with
            rotary position codes that depend on the longest position of a call.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder, expected a decoder-only causal language model")
    family = family_row(MODEL_SPECS, model, module=__name__)
    kinds = {
        type(layer).__name__ for layer in DynamicCache(config=model.config).layers if type(layer) is not DynamicLayer
    }
    if kinds:
        raise ValueError(
            f"{name} has cache layers {sorted(kinds)} (a sliding window?), expected layers that keep every position"
        )
    if rotary := _by_longest(model):
        raise ValueError(
            f"{name} has rotary position codes of type {', '.join(map(repr, rotary))}: their frequencies follow the longest position of "
            "a call, so what a token is given depends on the tokens it is read with; expected a type with fixed frequencies"
        )
    return family


def _by_longest(model: PreTrainedModel) -> list[str]:
    """The types of a model's rotary codes whose frequencies transformers recomputes in a forward, from the longest position in it."""
    given = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    sets = (
        [given] if "rope_type" in given else [one for one in given.values() if isinstance(one, dict)]
    )  # by kind of layer
    types = {one.get("rope_type", "default") for one in sets}
    return sorted(kind for kind in types if "dynamic" in kind or kind == "longrope")


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a model, in order. Raises ValueError as `model_spec_of` does."""
    return list(model.get_submodule(model_spec_of(model).layers))


@torch.no_grad()
def check_model(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Hold a model's row of the table against the model itself, on tokens (R, N) without padding, N at least 2: `layers`, `inner`,
    `keys_values`, `norm`; and in a decode step of padded rows `cache` and `row_arguments`: every argument of a layer whose length follows
    the number of rows must be named.

    Raises:
        ValueError: as `model_spec_of`; other tokens; an inner module that does not see every token once; layers whose keys and values, or a
            tail whose logits, are not what the row says; a layer that does not get the cache by that name, gets an argument of all rows
            that is not named, or returns something else than hidden states of its shape.
    """
    family, layers, name = model_spec_of(model), layers_of(model), type(model).__name__
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"tokens {tuple(input_ids.shape)}, expected (R, N) with N at least 2")
    states: list[tuple[Tensor, Rotary]] = []
    passed, last = [0] * len(layers), []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append((args[0] if args else kwargs["hidden_states"], kwargs.get("position_embeddings")))

    def counting(index: int) -> Callable:
        def count(module: nn.Module, args: tuple) -> None:
            passed[index] += args[0][..., 0].numel() if args else 0

        return count

    try:
        inner = [layer.get_submodule(family.inner) for layer in layers]
    except AttributeError as error:
        raise ValueError(f"{name}: a layer has no module {family.inner!r} ({error})") from error
    handles = [layers[-1].register_forward_hook(lambda module, args, made: last.append(made))]
    handles += [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    handles += [module.register_forward_pre_hook(counting(index)) for index, module in enumerate(inner)]
    cache = DynamicCache(config=model.config)
    try:
        logits = model(input_ids, past_key_values=cache, use_cache=True).logits  # (R, N, V)
    finally:
        for handle in handles:
            handle.remove()
    if passed != [input_ids.numel()] * len(layers):
        raise ValueError(f"{name}: {family.inner!r} saw {passed} tokens, expected {input_ids.numel()} at each layer")
    for index, (layer, held) in enumerate(zip(layers, cache.layers, strict=True)):
        made = dict(zip(("keys", "values"), family.keys_values(layer, *states[index]), strict=True))
        for part, computed in made.items():
            if not _alike(computed, getattr(held, part)):
                raise ValueError(f"{name}: keys_values makes other {part} than layer {index} puts into the cache")
    if not _alike(model.get_output_embeddings()(family.norm(model, last[0])), logits):
        raise ValueError(f"{name}: norm and the LM head make other logits than the model")
    _check_arguments(model, family, input_ids)


def _check_arguments(model: PreTrainedModel, family: ModelSpec, input_ids: Tensor) -> None:
    """Whether layers get the cache and what follows the rows by the names of the row, and return hidden states of their shape."""
    name, many, few = type(model).__name__, *(_step(model, family, input_ids, len(rows)) for rows in (ROWS, FEWER))
    for layer, (seen, fewer) in enumerate(zip(many, few, strict=True)):
        caches = [argument for argument, value in seen.named.items() if value is seen.cache]
        if caches != [family.cache]:
            raise ValueError(f"{name}: layer {layer} gets the cache as {caches}, expected cache={family.cache!r}")
        others = [dict(lengths_of(one.named)) for one in (seen, fewer)]
        unnamed = [path for path in following(*others) if path.split(".")[0] not in family.row_arguments]
        if unnamed:
            raise ValueError(
                f"{name}: the length of {unnamed[0]!r}, an argument of layer {layer}, follows the number of rows, and "
                f"row_arguments={family.row_arguments} do not name it"
            )
        if not isinstance(seen.returned, Tensor) or seen.returned.shape != seen.hidden.shape:
            kind = tuple(seen.returned.shape) if isinstance(seen.returned, Tensor) else type(seen.returned).__name__
            raise ValueError(f"{name}: layer {layer} returns {kind}, expected hidden states {tuple(seen.hidden.shape)}")


@dataclass(frozen=True)
class _Seen:
    """One call of a layer: its hidden states (R, 1, D), its other arguments, what it returned; and the model's cache."""

    hidden: Tensor
    named: dict[str, Any]
    returned: Any
    cache: DynamicCache


def _step(model: PreTrainedModel, family: ModelSpec, input_ids: Tensor, rows: int) -> list[_Seen]:
    """Each layer's call in the step that reads the last of the tokens, for so many rows; every second one begins with padding."""
    ids = input_ids[torch.arange(rows) % len(input_ids)]  # (R, N)
    mask = torch.ones_like(ids)
    mask[1::2, 0] = 0
    places, cache, seen = (mask.cumsum(-1) - 1).clamp(min=0), DynamicCache(config=model.config), list[_Seen]()
    takes_places = "position_ids" in inspect.signature(type(model).forward).parameters

    def read(start: int, end: int) -> None:
        given = {"position_ids": places[:, start:end]} if takes_places else {}
        model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **given)

    def keep(layer: nn.Module, args: tuple, kwargs: dict, returned: Any) -> None:
        names = [*inspect.signature(type(layer).forward).parameters][1:]
        named = dict(zip(names, args, strict=False)) | kwargs
        seen.append(_Seen(named.pop(names[0]), named, returned, cache))

    read(0, ids.shape[1] - 1)
    handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in model.get_submodule(family.layers)]
    try:
        read(ids.shape[1] - 1, ids.shape[1])
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _alike(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-3, atol=1e-3)
