"""Drafts that are verified: the tokens of greedy search for every family and batch, nothing computed twice, what is refused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from language import LAYERS, LENGTHS, MODELS, TOKENS, Listener, alone, model_named, plain, prompts
from transformers import DynamicCache, PreTrainedModel

from ee_diffusion.decoding.heads import LearnedExits
from ee_diffusion.decoding.hooks import running_modules
from ee_diffusion.decoding.model_specs import layers_of
from ee_diffusion.decoding.self_speculative import SelfSpeculativeOutput, self_speculative_generate

EXIT, LONGER = 3, 13


@functools.cache
def well_drafted() -> PreTrainedModel:
    """A model whose upper layers change little, so that some drafts are right."""
    model = copy.deepcopy(model_named("llama"))
    with torch.no_grad():
        for layer in layers_of(model)[EXIT:]:
            layer.mlp.down_proj.weight.mul_(0.3)
            layer.self_attn.o_proj.weight.mul_(0.3)
    return model


def lossless(model, inputs=None, *, exit_depth: int = EXIT, draft_tokens: int = 4, **more) -> SelfSpeculativeOutput:
    options = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    inputs = prompts() if inputs is None else inputs
    modes = {"custom_generate": self_speculative_generate, "exit_depth": exit_depth, "draft_tokens": draft_tokens}
    return model.generate(**inputs, **modes, **options | more)


@pytest.mark.parametrize("name", MODELS)
def test_it_says_what_greedy_search_says(name: str):
    model = model_named(name)
    assert torch.equal(lossless(model, draft_tokens=3).sequences, plain(model).sequences)


@pytest.mark.parametrize("exit_depth,draft_tokens", [(1, 2), (2, 5), (EXIT, 4), (LAYERS - 1, 20)])
def test_for_every_depth_and_length_of_draft(exit_depth: int, draft_tokens: int):
    out = lossless(well_drafted(), exit_depth=exit_depth, draft_tokens=draft_tokens, max_new_tokens=LONGER)
    assert torch.equal(out.sequences, plain(well_drafted(), max_new_tokens=LONGER).sequences)
    assert (out.drafted <= out.verified * (draft_tokens - 1)).all()
    assert (out.drafted >= (out.verified - draft_tokens) * (draft_tokens - 1)).all(), "the last cycles have less room"
    assert (out.accepted <= out.drafted).all()
    assert (out.verified + out.accepted == LONGER - 1).all()


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_no_draft_is_beyond_the_models_positions(name: str):
    """Prompts that end where the model's positions do: drafts of the last cycles would be at positions that it does not have."""
    model, ids = model_named(name), torch.randint(2, 61, (2, 59))
    inputs = {"input_ids": ids, "attention_mask": torch.stack([torch.ones(59), torch.arange(59) >= 3]).long()}
    out = lossless(model, inputs, draft_tokens=5, max_new_tokens=5)
    assert torch.equal(out.sequences, plain(model, inputs, max_new_tokens=5).sequences)


def test_no_more_is_drafted_than_there_is_room_for():
    model, inputs = model_named("llama"), alone(0)
    out = lossless(model, inputs, draft_tokens=20, max_new_tokens=3)
    assert torch.equal(out.sequences, plain(model, inputs, max_new_tokens=3).sequences)
    assert int(out.drafted) <= 1, "two tokens are left after the prompt's: one draft and its check"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_positions_are_those_of_the_caller(name: str):
    model, inputs = model_named(name), alone(0) | {"position_ids": 3 * torch.arange(LENGTHS[0])[None]}
    stock = plain(model, inputs).sequences
    assert not torch.equal(stock, plain(model, alone(0)).sequences)
    assert torch.equal(lossless(model, inputs).sequences, stock)


def test_exit_heads_draft():
    """Adapters change what is drafted, never what is said; heads that are not at the exit are refused."""
    model = well_drafted()
    exits = LearnedExits((1, EXIT), 32, adapter_width=4).double()
    for weight in exits.adapters.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(2))
    exits.bind(model)
    own, other = lossless(model, max_new_tokens=LONGER), lossless(model, max_new_tokens=LONGER, exit_heads=exits)
    assert torch.equal(other.sequences, own.sequences)
    assert other.accepted.sum() < own.accepted.sum()
    with pytest.raises(ValueError, match="exit heads are at depths"):
        lossless(model, exit_depth=2, exit_heads=exits)
    with pytest.raises(ValueError, match="another"):
        lossless(model_named("llama"), exit_heads=exits)


def test_batch_mates_do_not_matter():
    together = lossless(well_drafted(), max_new_tokens=LONGER)
    assert len(together.verified.unique()) > 1, "every sequence accepts alike: the batch was not tried"
    assert together.accepted.sum() > 0
    for row in range(len(LENGTHS)):
        one = lossless(well_drafted(), alone(row), max_new_tokens=LONGER)
        assert torch.equal(one.sequences[0, -LONGER:], together.sequences[row, -LONGER:])
        assert (one.verified, one.accepted) == (together.verified[row], together.accepted[row])


def test_the_callers_processors_and_ends():
    model = well_drafted()
    end = int(plain(model).sequences[2, -TOKENS + 2])
    options = {"eos_token_id": end, "repetition_penalty": 1.3, "min_new_tokens": 2, "max_new_tokens": LONGER}
    stock = plain(model, **options).sequences
    assert (stock == end).any()
    assert torch.equal(lossless(model, **options).sequences, stock)
    assert torch.equal(lossless(model, max_new_tokens=1).sequences, plain(model, max_new_tokens=1).sequences)


@pytest.mark.parametrize("inputs", [None, alone(0)], ids=["batch", "alone"])
def test_nothing_is_computed_twice(inputs):
    """Rows x positions inside each layer, and holes in the cache: none for one sequence, few for a batch."""
    model, counts = well_drafted(), [0] * LAYERS
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, layer=layer: counts.__setitem__(layer, counts[layer] + args[0][..., 0].numel())
        )
        for layer, module in enumerate(running_modules(model))
    ]
    cache = DynamicCache(config=model.config)
    out = lossless(model, inputs, past_key_values=cache, max_new_tokens=LONGER)
    for handle in handles:
        handle.remove()
    rows, width = (1, LENGTHS[0]) if inputs is not None else (len(LENGTHS), max(LENGTHS))
    assert counts == [rows * width + int((out.verified + out.drafted).sum())] * LAYERS
    lengths = {layer.get_seq_length() for layer in cache.layers}
    assert len(lengths) == 1
    if inputs is not None:
        assert lengths == {width + LONGER - 1}


def test_the_model_is_restored_and_the_streamer_hears_it():
    model, listener = well_drafted(), Listener()
    before = [dict(module.__dict__) for module in model.modules()]
    out = lossless(model, alone(1), exit_streamer=listener)
    assert [token for tokens in listener.heard for token in tokens] == out.sequences[0].tolist()
    assert listener.done == 1
    for module, had in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == had.keys()
    plain_ids = lossless(model, alone(1), return_dict_in_generate=False)
    assert torch.equal(plain_ids, out.sequences)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"exit_depth": 0}, "within 1..5"),
        ({"exit_depth": LAYERS}, "within 1..5"),
        ({"draft_tokens": 1}, "at least 2"),
        ({"draft_tokens": None}, "at least 2"),
        ({"exit_depth": 2.0}, "within 1..5"),
        ({"guidance_scale": 1.5}, "guidance"),
        ({"do_sample": True}, "expected greedy search"),
        ({"num_beams": 2}, "expected greedy search"),
        ({"output_logits": True}, "output_logits"),
        ({"use_cache": False}, "DynamicCache"),
        ({"exit_streamer": Listener()}, "expected one"),
        ({"output_hidden_states": True}, "output_hidden_states"),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        lossless(model_named("llama"), **options)


def test_a_cache_in_use_is_refused():
    model, cache = model_named("llama"), DynamicCache(config=model_named("llama").config)
    model(**alone(0), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="expected an empty one"):
        lossless(model, alone(0), past_key_values=cache)
