"""Tokens that left and take the upper layers later: what the slow way says, no key or value guessed, batched as alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from language import (
    EXITS,
    LAYERS,
    LENGTHS,
    MODELS,
    TOKENS,
    alone,
    generate,
    model_named,
    new_tokens,
    policy_named,
    prompts,
    recorded,
)
from transformers import DynamicCache

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.generate import early_exit_generate
from ee_diffusion.decoding.heads import SharedTail
from ee_diffusion.decoding.hooks import running_modules
from ee_diffusion.decoding.methods import calm, skipdecode
from ee_diffusion.decoding.parallel_recompute import ParallelRecomputeHook

DEPTH = EXITS[1]


def splitting(name: str, score: str = "margin") -> Policy:
    """A threshold between the scores at the exit, so that some leave and some do not, in the same step."""
    scores = recorded(name, score).scores[:, :, EXITS.index(DEPTH)].flatten().sort().values
    middle = len(scores) // 2
    return Policy(Threshold(float(scores[middle - 1 : middle + 1].mean()), score), exits=(DEPTH,))


def deferred(name: str, policy: Policy, inputs: dict | None = None, **more):
    return generate(model_named(name), policy, inputs, exit_missing="recompute", **more)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_full_model_with_some_answers_of_the_exit(name: str):
    """The slow way: the whole text through the plain model at every step; above the threshold the exit answers from its state."""
    model, policy = model_named(name), splitting(name)
    heads, out = SharedTail(model, (DEPTH,)), deferred(name, policy)
    assert len(out.trace.depths.unique()) == 2, "some leave, some do not"
    for row, length in enumerate(LENGTHS):
        ids, left = alone(row)["input_ids"], []
        for step in range(TOKENS):
            states = model(ids, output_hidden_states=True)
            logits, hidden = states.logits[:, -1], states.hidden_states[DEPTH][:, -1:]
            best = heads.answer(0, hidden, {}).softmax(-1).topk(2).values[0]
            if step and float(best[0] - best[1]) > policy.criterion.threshold:
                logits = heads.answer(0, hidden, {})
            left.append(
                logits is not states.logits and step > 0 and float(best[0] - best[1]) > policy.criterion.threshold
            )
            torch.testing.assert_close(out.logits[step][row], logits[0].float(), rtol=1e-4, atol=1e-5)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(new_tokens(out)[row], ids[0, length:])
        assert (out.trace.depths[:, row] == DEPTH).tolist() == left[1:]


@pytest.mark.parametrize("score", ["margin", "saturation"])
def test_batch_mates_do_not_matter_nor_ends(score: str):
    policy = splitting("llama", score)
    together = deferred("llama", policy)
    for row in range(len(LENGTHS)):
        own = deferred("llama", policy, alone(row))
        assert torch.equal(new_tokens(own)[0], new_tokens(together)[row])
        assert torch.equal(own.trace.depths[:, 0], together.trace.depths[:, row])
    end = int(new_tokens(together)[2, 2])
    short = deferred("llama", policy, eos_token_id=end).sequences[:, max(LENGTHS) :]
    for row, whole in enumerate(new_tokens(together)):
        places = (whole == end).nonzero()
        stop = int(places[0]) + 1 if len(places) else TOKENS
        assert torch.equal(short[row, :stop], whole[:stop])
        assert not short[row, stop:].any(), "padding after the end"


def test_saturation_looks_at_the_layer_before_and_positions_need_no_ids():
    out = deferred("llama", splitting("llama", "saturation"))
    expected = recorded("llama", "saturation").scores[0, EXITS.index(DEPTH)]  # of the same states: nobody has left yet
    torch.testing.assert_close(out.trace.scores[0, 0], expected)
    cache, ids = DynamicCache(), torch.zeros(2, 1, dtype=torch.int64)
    cache.update(torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8), 0)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert ParallelRecomputeHook._place(None, mask, cache, ids).tolist() == [[2], [4]]
    assert ParallelRecomputeHook._place(None, None, cache, ids).tolist() == [[4], [4]]


def test_upper_layers_run_once_for_each_position_and_only_when_needed():
    model, policy, counts = model_named("llama"), splitting("llama"), [0] * LAYERS
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, layer=layer: counts.__setitem__(layer, counts[layer] + args[0][..., 0].numel())
        )
        for layer, module in enumerate(running_modules(model))
    ]
    try:
        out = deferred("llama", policy)
    finally:
        for handle in handles:
            handle.remove()
    rows, prompt = len(LENGTHS), prompts()["input_ids"].numel()
    went_on = (out.trace.depths == LAYERS).any(1)  # (S,)
    last = int(went_on.nonzero()[-1])
    assert counts[:DEPTH] == [prompt + rows * (TOKENS - 1)] * DEPTH
    assert counts[DEPTH:] == [prompt + rows * (last + 1)] * (LAYERS - DEPTH), (
        "those that wait at the end are never read"
    )
    ran = out.trace.ran.sum((0, 1)) + torch.tensor([0] * DEPTH + [int(out.recomputed.sum())] * (LAYERS - DEPTH))
    assert (ran + prompt).tolist() == counts
    assert out.trace.keeps_exited_rows


def test_a_cache_whose_last_tokens_wait_can_be_used_again():
    """Those that wait at the end are in no layer of the cache: another generation reads them again, with or without exits."""
    model, always = model_named("llama"), Policy(Threshold(0.0, "max_probability"), exits=(DEPTH,))
    more = {"max_new_tokens": 3, "eos_token_id": None, "do_sample": False}
    for go_on in (
        {},
        {"custom_generate": early_exit_generate, "exit_policy": Policy(Threshold(1.0, "margin"), exits=(2,))},
    ):
        out = deferred("llama", always, alone(0))
        assert {layer.get_seq_length() for layer in out.past_key_values.layers} == {LENGTHS[0]}
        again = model.generate(out.sequences, past_key_values=out.past_key_values, **more | go_on)
        assert torch.equal(again, model.generate(out.sequences, **more))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_positions_are_those_of_the_caller(name: str):
    model, inputs = model_named(name), alone(0) | {"position_ids": 3 * torch.arange(LENGTHS[0])[None]}
    never = Policy(Threshold(1.0, "margin"), exits=(DEPTH,))
    stock = generate(model, Policy(), inputs)
    assert not torch.equal(stock.sequences, generate(model, Policy(), alone(0)).sequences)
    assert torch.equal(deferred(name, never, inputs).sequences, stock.sequences)
    other = torch.zeros_like(inputs["input_ids"])
    with pytest.raises(ValueError, match=r"arguments \['token_type_ids'\]"):
        deferred("gpt2", never, alone(0) | {"token_type_ids": other})


def test_nobody_leaving_is_the_model_and_the_model_is_restored():
    model = model_named("llama")
    before = [dict(module.__dict__) for module in model.modules()]
    never = Policy(Threshold(1.0, "margin"), exits=(DEPTH,))
    stock = generate(model, Policy())
    out = deferred("llama", never)
    assert torch.equal(out.sequences, stock.sequences)
    assert not out.recomputed.any()
    for module, had in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == had.keys()


@pytest.mark.parametrize(
    "policy,message",
    [
        (skipdecode(warm_up=1, least=2, most=5, horizon=5), "expected one exit"),
        (calm(0.5, exits=(1, 2), score="margin", horizon=None), r"exits \(1, 2\)"),
        (calm(0.5, exits=(0,), score="margin", horizon=None), "above depth 0"),
    ],
)
def test_policies_that_cannot_wait_are_refused(policy: Policy, message: str):
    with pytest.raises(ValueError, match=message):
        deferred("llama", policy)
    with pytest.raises(ValueError, match="exit_missing='guess'"):
        generate(model_named("llama"), policy_named("softmax", "llama"), exit_missing="guess")
    assert dataclasses.is_dataclass(policy)
