"""Keys and values: complete wherever a layer will run again, closed and freed where none will, and what reuse is refused."""

from __future__ import annotations

import pytest
import torch
from language import LAYERS, LENGTHS, MODELS, TOKENS, alone, generate, model_named, plain, policy_named, prompts, run
from torch import nn
from transformers import DynamicCache, MistralConfig

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.decoding.kv_cache import ClosedLayer, check_cache
from ee_diffusion.decoding.model_specs import layers_of, model_spec_of

WIDEST = max(LENGTHS)


@pytest.mark.parametrize("name", MODELS)
def test_the_table_computes_what_a_layer_writes(name: str):
    """Keys and values from the family table are, bit for bit, those that the layer itself puts into the cache from the same state."""
    model = model_named(name)
    family, seen = model_spec_of(model), {}

    def hook(layer: int):
        def keep(module: nn.Module, args, kwargs):
            seen[layer] = (args[0] if args else kwargs["hidden_states"], kwargs.get("position_embeddings"))

        return keep

    layers = layers_of(model)
    handles = [module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer, module in enumerate(layers)]
    cache = model(**prompts(), use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    for layer, module in enumerate(layers):
        keys, values = family.keys_values(module, *seen[layer])
        assert torch.equal(keys, cache.layers[layer].keys)
        assert torch.equal(values, cache.layers[layer].values)


@pytest.mark.parametrize("policy", ["softmax", "requests", "up-and-down"])
def test_layers_that_may_run_again_miss_no_position(policy: str):
    cache = run("llama", policy).past_key_values
    check_cache(cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [WIDEST + TOKENS - 1] * LAYERS
    assert run("llama", policy).propagated.sum() > 0


def test_a_decode_goes_on_from_its_own_cache():
    """Two calls, the second one from the cache of the first: its prompt's forward reads one token."""
    policy, model = policy_named("requests", "llama"), model_named("llama")
    whole, first = run("llama", "requests"), generate(model, policy, max_new_tokens=4)
    mask = torch.cat([prompts()["attention_mask"], torch.ones(len(LENGTHS), 4, dtype=torch.long)], dim=1)
    inputs = {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": first.past_key_values}
    second = generate(model, policy, inputs, max_new_tokens=2)
    assert torch.equal(first.sequences, whole.sequences[:, : WIDEST + 4])
    assert second.sequences.shape[1] == WIDEST + 6
    assert second.past_key_values.get_seq_length() == WIDEST + 5


@pytest.mark.parametrize("policy", ["skipdecode", "termination", "d3", "uniform"])
def test_layers_that_drop_out_are_freed(policy: str):
    live = run("llama", policy)
    assert not live.propagated.any(), "a schedule whose layers only drop out needs no keys and values"
    planned, lengths = live.trace.planned, []
    for layer, kept in enumerate(live.past_key_values.layers):
        if planned[-1, layer]:
            lengths.append(kept.get_seq_length())
        else:
            assert isinstance(kept, ClosedLayer)
            assert kept.keys is None
            assert kept.seen == WIDEST + int(planned[:, layer].sum())
    assert lengths == [WIDEST + TOKENS - 1] * int(planned[-1].sum())


def test_memory_of_dropped_layers_stops_growing():
    """Numbers in the cache after every token, under SkipDecode and alone."""

    def sizes(policy: Policy) -> list[int]:
        return [
            sum(layer.keys.numel() for layer in out.past_key_values.layers if layer.keys is not None)
            for out in (generate(model_named("llama"), policy, alone(0), max_new_tokens=count) for count in (2, 7))
        ]

    one = 2 * 8  # key heads x head dimension
    assert sizes(Policy()) == [LAYERS * one * (7 + 1), LAYERS * one * (7 + 6)]
    # least = 2 of 6 layers after the horizon; five in the first step
    assert sizes(policy_named("skipdecode", "llama"))[1] == 2 * one * (7 + 6)


@pytest.mark.parametrize("policy", ["skipdecode", "uniform"])
def test_a_cache_with_dropped_layers_refuses_more_depth(policy: str):
    model = model_named("llama")
    out = generate(model, policy_named(policy, "llama"))
    again = {"input_ids": out.sequences, "past_key_values": out.past_key_values}
    for other in (policy_named("softmax", "llama"), policy_named(policy, "llama"), Policy()):
        with pytest.raises(ValueError, match="dropped by an exit policy"):
            generate(model, other, again)
    with pytest.raises(ValueError, match="dropped by an exit policy"):
        plain(model, again)
    with pytest.raises(ValueError, match="greater depth"):
        model(out.sequences[:, -1:], past_key_values=out.past_key_values)


def test_other_caches_are_refused():
    sliding = DynamicCache(config=model_named("mistral").config)
    check_cache(sliding)
    for wrong in (None, "cache"):
        with pytest.raises(ValueError, match="expected a DynamicCache"):
            check_cache(wrong)
    windowed = DynamicCache(config=MistralConfig(sliding_window=8, num_hidden_layers=2))
    with pytest.raises(ValueError, match="no sliding window"):
        check_cache(windowed)
    sliding.offloading = True
    with pytest.raises(ValueError, match="without offloading"):
        check_cache(sliding)


def test_full_depth_by_schedule_is_the_model():
    live = generate(model_named("llama"), Policy(schedule=FixedDepth(LAYERS)))
    assert torch.equal(live.sequences, plain(model_named("llama")).sequences)
    assert not live.propagated.any()
