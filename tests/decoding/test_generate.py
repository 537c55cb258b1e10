"""Decoding with exits: off and on against transformers' own loop, against a slow loop, alone and in a batch, work counted inside layers."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from language import (
    EXITS,
    LAYERS,
    LENGTHS,
    MODELS,
    POLICIES,
    SCHEDULED,
    TOKENS,
    VOCABULARY,
    Listener,
    alone,
    discarding,
    generate,
    model_named,
    new_tokens,
    plain,
    policy_named,
    prompts,
    run,
)
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ee_diffusion.core.criteria import SampledExit, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import replay
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.decoding.fingerprint import fingerprint_of
from ee_diffusion.decoding.generate import early_exit_generate
from ee_diffusion.decoding.hooks import running_modules
from ee_diffusion.decoding.methods import depth_per_request
from ee_diffusion.decoding.model_specs import layers_of

NEVER = Policy(Threshold(1.0, "max_probability"), exits=EXITS)
# every policy on one model, a criterion and a schedule on every other
CASES = [
    (model, policy) for model in MODELS for policy in (POLICIES if model == "llama" else ("softmax", "skipdecode"))
]
DECIDED = [case for case in CASES if case[0] == "llama" or case[1] == "softmax"]
ROWS = (1, 3)  # padded ones


def same_generation(one, other) -> bool:
    logits = all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))
    return torch.equal(one.sequences, other.sequences) and logits


# --- law 1 and 2


@pytest.mark.parametrize("name", MODELS)
def test_off_is_the_model_bit_for_bit(name: str):
    model = copy.deepcopy(model_named(name)).float()
    stock = plain(model)
    assert same_generation(generate(model, Policy()), stock)
    never = generate(model, NEVER)
    assert same_generation(never, stock)
    assert (never.trace.depths == LAYERS).all()
    assert not never.propagated.any()


def test_sampling_draws_what_the_model_alone_draws():
    options = {"do_sample": True, "top_k": 7, "temperature": 1.7, "repetition_penalty": 1.2, "min_new_tokens": 3}
    for policy in (Policy(), NEVER, Policy(schedule=FixedDepth(LAYERS))):
        torch.manual_seed(3)
        stock = plain(model_named("llama"), **options)
        torch.manual_seed(3)
        assert same_generation(generate(model_named("llama"), policy, **options), stock)


@pytest.mark.parametrize("policy", ["softmax", "skipdecode"])
def test_leaving_restores_the_model(policy: str):
    model = model_named("llama")
    before, keys = plain(model), list(model.state_dict())
    attributes = [dict(module.__dict__) for module in model.modules()]
    generate(model, policy_named(policy, "llama"))

    class Failing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 9:
                raise RuntimeError("stop here")
            return scores

    with pytest.raises(RuntimeError, match="stop here"):
        generate(model, policy_named(policy, "llama"), logits_processor=LogitsProcessorList([Failing()]))
    assert same_generation(plain(model), before)
    assert list(model.state_dict()) == keys
    for module, had in zip(model.modules(), attributes, strict=True):
        assert module.__dict__.keys() == had.keys()
        assert all(module.__dict__[name] is value for name, value in had.items())


# --- what an exit answers, and keys and values


@pytest.mark.parametrize("name,policy", CASES)
def test_it_is_the_slow_loop(name: str, policy: str):
    """Every sequence alone, every layer run, and above its depth only its keys and values kept."""
    model, live = model_named(name), run(name, policy)
    for row in ROWS:
        holes = [tuple(layers) for layers in live.trace.planned.tolist()] if policy in SCHEDULED else None
        with discarding(model, live.trace.depths[:, row].tolist(), holes):
            slow = plain(model, alone(row))
        for found, expected in zip(live.logits, slow.logits, strict=True):
            torch.testing.assert_close(found[row], expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(new_tokens(live)[row], new_tokens(slow)[0])


@pytest.mark.parametrize("name,policy", DECIDED)
def test_batch_mates_do_not_matter(name: str, policy: str):
    together = run(name, policy)
    if policy not in (*SCHEDULED, "up-and-down"):
        assert any(len(depths.unique()) >= 2 for depths in together.trace.depths), "the policy does not split the batch"
    for row in ROWS:
        by_request = policy_named(policy, name)
        if policy == "requests":
            depths = (by_request.criterion.depths[0][row],)
            by_request = depth_per_request(depths, exits=by_request.exits)
        one = generate(model_named(name), by_request, alone(row))
        assert torch.equal(one.trace.depths[:, 0], together.trace.depths[:, row])
        assert torch.equal(new_tokens(one)[0], new_tokens(together)[row])


def test_drawn_exits_belong_to_the_prompt():
    """Alone as in a batch, and one prompt's draws are not another's."""
    model, rule = model_named("llama"), Policy(SampledExit(3, "max_probability"), exits=EXITS)
    together = generate(model, rule, prompts()).trace
    assert len(set(together.samples.tolist())) == len(LENGTHS)
    for row in range(len(LENGTHS)):
        one = generate(model, rule, alone(row)).trace
        assert one.samples.tolist() == [together.samples[row]]
        assert torch.equal(one.depths[:, 0], together.depths[:, row])
    state = rule.criterion.start(together.samples, step=0, previous=None)
    assert len(state["drawn"].unique()) == len(LENGTHS)


# --- laws 3, 6, 7


@pytest.mark.parametrize("policy", POLICIES)
def test_replay_and_saved_policies_decide_alike(policy: str, tmp_path: Path):
    live, rule = run("llama", policy), policy_named(policy, "llama")
    assert torch.equal(replay(live.trace, rule), live.trace.depths)
    rule.save(tmp_path / "policy.json")
    loaded = Policy.load(tmp_path / "policy.json")
    assert loaded == rule
    assert same_generation(generate(model_named("llama"), loaded), live)


@pytest.mark.parametrize("name,policy", DECIDED)
def test_skipped_work_is_not_executed(name: str, policy: str):
    model, rule = model_named(name), policy_named(policy, name)  # made before anything is counted
    counts = torch.zeros(TOKENS, LAYERS, dtype=torch.int64)
    calls = [0]

    def on_model(*_):
        calls[0] += 1

    def counting(layer: int):
        def hook(module, args):
            rows = args[0].shape[0] if args[0].ndim == 3 or calls[0] > 1 else len(LENGTHS)
            counts[calls[0] - 1, layer] += rows

        return hook

    handles = [model.register_forward_pre_hook(on_model)]
    handles += [
        module.register_forward_pre_hook(counting(layer)) for layer, module in enumerate(running_modules(model))
    ]
    try:
        out = generate(model, rule)
        trace = out.trace
    finally:
        for handle in handles:
            handle.remove()
    assert counts[0].tolist() == [len(LENGTHS)] * LAYERS, "the prompt is read at full depth"
    assert torch.equal(counts[1:], trace.ran.sum(1))
    assert torch.equal(trace.ran.bool(), trace.needed)
    assert trace.report().mean_executed < LAYERS
    written = out.propagated + trace.ran.sum(1)  # (S, L): a layer knows every row of a step, or none: it was dropped
    assert ((written == len(LENGTHS)) | (written == 0)).all()
    assert (written[:, 0] == len(LENGTHS)).all()


def test_heads_are_evaluated_where_needed():
    """A softmax check is the answer; saturation needs no head but for those who leave; a schedule none but its own."""
    head, rows = model_named("llama").lm_head, []
    for policy in ("softmax", "saturation", "termination", "skipdecode"):
        rule = policy_named(policy, "llama")
        rows.clear()
        handle = head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        trace = generate(model_named("llama"), rule).trace
        handle.remove()
        full, left = int((trace.depths == LAYERS).sum()), int((trace.depths < LAYERS).sum())
        checks = int(trace.measured.sum())
        expected = {"softmax": checks + full, "saturation": left + full}.get(policy, left + full)
        assert sum(rows) - len(LENGTHS) == expected, policy
        assert int(trace.answered.sum()) == expected - full


# --- sequences that end, the caller's processors, criteria and streamers


def test_a_sequence_that_ended_takes_no_part():
    model = model_named("llama")
    end = int(new_tokens(plain(model))[1, 2])  # a token that the second sequence will say
    stock = plain(model, eos_token_id=end)
    ended = (new_tokens(stock) == end).cumsum(1).bool()[:, :-1].T  # (S, R)
    full = generate(model, Policy(schedule=FixedDepth(LAYERS)), eos_token_id=end)
    assert torch.equal(full.sequences, stock.sequences)
    assert ended.any()
    assert not ended.all()
    assert torch.equal(full.trace.depths == -1, ended)
    assert not full.trace.ran[ended].any()
    assert full.report.mean_executed == LAYERS
    policy = policy_named("softmax", "llama")
    live = generate(model, policy, eos_token_id=end)
    assert torch.equal(replay(live.trace, policy), live.trace.depths)


def test_the_callers_criteria_end_it():
    class Enough(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([row.shape[0] >= 10 for row in input_ids])

    out = generate(
        model_named("llama"),
        policy_named("skipdecode", "llama"),
        stopping_criteria=StoppingCriteriaList([Enough()]),
    )
    assert out.sequences.shape[1] == 10
    assert len(out.trace.depths) == 2
    one = generate(model_named("llama"), policy_named("skipdecode", "llama"), max_new_tokens=1)
    assert one.trace is None
    assert torch.equal(new_tokens(one), new_tokens(run("llama", "skipdecode"))[:, :1])


@pytest.mark.parametrize("policy", [Policy(), NEVER], ids=["off", "never"])
def test_a_streamer_hears_the_prompt_and_every_token(policy: Policy):
    listener = Listener()
    out = generate(model_named("llama"), policy, alone(0), exit_streamer=listener)
    assert listener.heard[0] == alone(0)["input_ids"][0].tolist()
    assert [token for tokens in listener.heard[1:] for token in tokens] == new_tokens(out)[0].tolist()
    assert listener.done == 1


def test_it_returns_tokens_when_no_dictionary_is_asked_for():
    out = generate(model_named("llama"), policy_named("softmax", "llama"), return_dict_in_generate=False)
    assert torch.equal(out, run("llama", "softmax").sequences)


def test_several_sequences_from_one_prompt():
    out = generate(model_named("llama"), policy_named("softmax", "llama"), do_sample=True, num_return_sequences=2)
    assert out.trace.depths.shape == (TOKENS - 1, 2 * len(LENGTHS))


# --- bad input


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_beams": 2, "output_logits": False}, "beam_search"),
        ({"prompt_lookup_num_tokens": 2}, "assisted"),
        ({"use_cache": False}, "DynamicCache"),
        ({"cache_implementation": "static"}, "StaticCache"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_what_exits_cannot_do_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        generate(model_named("llama"), policy_named("softmax", "llama"), **options)


def test_an_attention_that_cannot_drop_rows_is_refused():
    model = copy.deepcopy(model_named("llama"))
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="attention implementation 'flex_attention'"):
        generate(model, policy_named("softmax", "llama"))


@pytest.mark.parametrize(
    "policy,message",
    [
        (Policy(Threshold(0.5, "margin"), exits=(2, LAYERS)), "expected below 6"),
        (Policy(Threshold(0.5, "margin")), "no exits"),
        (Policy(Threshold(0.5), exits=(2,)), "LearnedExits"),
        (Policy(schedule=FixedDepth(0)), "layer 0"),
        (Policy(schedule=FixedDepth(LAYERS + 1)), "the model has 6"),
    ],
)
def test_policies_that_do_not_fit_are_refused(policy: Policy, message: str):
    with pytest.raises(ValueError, match=message):
        generate(model_named("llama"), policy)
    assert same_generation(plain(model_named("llama")), generate(model_named("llama"), Policy()))


def test_a_policy_fitted_for_another_model_is_refused():
    model, rule = model_named("llama"), policy_named("skipdecode", "llama")
    own = dataclasses.replace(rule, made_for=(("model", fingerprint_of(model)),))
    assert same_generation(generate(model, own), run("llama", "skipdecode"))
    with pytest.raises(ValueError, match="another model"):
        generate(model_named("mistral"), own)
    with pytest.raises(ValueError, match="another model"):
        generate(model_named("mistral"), Policy(made_for=own.made_for))
    with pytest.raises(ValueError, match="sampler='ddim'"):
        generate(model, dataclasses.replace(rule, made_for=(("sampler", "ddim"),)))


def test_the_policy_must_be_given():
    with pytest.raises(TypeError, match="exit_policy"):
        model_named("llama").generate(**prompts(), custom_generate=early_exit_generate)
    with pytest.raises(ValueError, match="exit_policy=None, expected a Policy"):
        generate(model_named("llama"), None)  # type: ignore[arg-type]


def test_depths_for_another_number_of_requests_are_refused():
    with pytest.raises(ValueError, match="plan for 4"):
        generate(
            model_named("llama"), policy_named("requests", "llama"), {"input_ids": torch.ones(5, 3, dtype=torch.long)}
        )


def test_the_tiny_models_are_what_they_should_be():
    for name in MODELS:
        assert len(layers_of(model_named(name))) == LAYERS
        assert model_named(name).config.vocab_size == VOCABULARY
