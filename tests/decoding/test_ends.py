"""How generations end: stop strings, sequences of a batch that end before others, and runs that may be very long."""

from __future__ import annotations

import functools
from string import ascii_letters, digits

import pytest
import torch
from language import (
    LAYERS,
    LENGTHS,
    TOKENS,
    VOCABULARY,
    alone,
    generate,
    model_named,
    new_tokens,
    plain,
    policy_named,
    prompts,
)
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import (
    FixedDepth,
    Periodic,
    PiecewiseDepth,
    PowerDecay,
    Schedule,
)
from ee_diffusion.decoding.methods import d3, skipdecode, uniform_skipping
from ee_diffusion.decoding.self_speculative import self_speculative_generate

NAME, PAD, MANY = "llama", 0, 1_000_000
DRAFTS = {"custom_generate": self_speculative_generate, "exit_depth": 4, "draft_tokens": 3, "output_logits": False}
NEVER = Policy(Threshold(1.0, "max_probability"), exits=(2,))
WAYS = {
    "propagate": functools.partial(generate, policy=Policy(schedule=FixedDepth(LAYERS))),
    "recompute": functools.partial(generate, policy=NEVER, exit_missing="recompute"),
    "lossless": functools.partial(plain, **DRAFTS),
}


class After(StoppingCriteria):
    """Ends a sequence when it has said one of some tokens after the prompt."""

    def __init__(self, *tokens: int):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], self.tokens) & (input_ids.shape[1] > max(LENGTHS))


def early() -> After:
    """Three sequences end at tokens of their own, the last goes on to the end of the run."""
    said = new_tokens(plain(model_named(NAME)))
    ends = [int(said[row, place]) for row, place in ((0, 1), (1, 2), (2, 4))]
    assert not torch.isin(said[3], torch.tensor(ends)).any()
    return After(*ends)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", [None, 1])
def test_sequences_that_a_criterion_ends_are_those_of_transformers(way: str, end: int | None):
    """Without an end token transformers goes on with all of a batch until each has ended; with one it pads."""
    model, criteria = model_named(NAME), StoppingCriteriaList([early()])
    stock = plain(model, stopping_criteria=criteria, eos_token_id=end).sequences
    assert (stock[0, max(LENGTHS) + 2 :] == PAD).all() == (end is not None)
    assert torch.equal(WAYS[way](model, stopping_criteria=criteria, eos_token_id=end).sequences, stock)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_goes_on_as_long_as_one_of_it(way: str):
    """All end before the run does, at different tokens."""
    model = model_named(NAME)
    said = new_tokens(plain(model))
    criteria = StoppingCriteriaList([After(*said[:, 2].tolist())])
    stock = plain(model, stopping_criteria=criteria).sequences
    assert stock.shape[1] < max(LENGTHS) + TOKENS
    assert torch.equal(WAYS[way](model, stopping_criteria=criteria).sequences, stock)


def letters() -> PreTrainedTokenizerFast:
    """A token is a letter or a digit."""
    words = {"<pad>": 0, "<end>": 1} | {sign: 2 + place for place, sign in enumerate((ascii_letters + digits)[:59])}
    tokenizer = Tokenizer(models.BPE(words, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


@pytest.mark.parametrize("way", WAYS)
def test_stop_strings(way: str):
    """As docs/decoding.md says: transformers keeps the tokenizer from a function of one's own, so the criterion is given."""
    model, tokenizer = model_named(NAME), letters()
    word = tokenizer.decode(new_tokens(plain(model, alone(0)))[0, 2:4])
    stock = plain(model, alone(0), stop_strings=[word], tokenizer=tokenizer).sequences
    assert stock.shape[1] == LENGTHS[0] + 4
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [word])])
    assert torch.equal(WAYS[way](model, inputs=alone(0), stopping_criteria=criteria).sequences, stock)
    with pytest.raises(ValueError, match="tokenizer"):
        WAYS[way](model, inputs=alone(0), stop_strings=[word], tokenizer=tokenizer)


@pytest.mark.parametrize("way", ["propagate", "recompute"])
@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "top_k": 7, "temperature": 0.7, "suppress_tokens": [PAD]}]
)
def test_what_has_ended_is_sure_of_its_padding(way: str, sampling: dict):
    """Its layers do not run, so there is nothing it says: neither zeros, which are every token alike, nor NaN."""
    model = model_named(NAME)
    ends = list(range(2, VOCABULARY, 3)) if sampling else [int(new_tokens(plain(model))[1, 2])]
    torch.manual_seed(1)
    out = WAYS[way](model, eos_token_id=ends, output_scores=True, **sampling)
    said = new_tokens(out)
    ended = torch.isin(said, torch.tensor(ends)).cumsum(1).bool()
    ended = torch.cat([torch.zeros(len(said), 1, dtype=torch.bool), ended[:, :-1]], dim=1)  # (R, T)
    assert ended.any()
    assert not ended.all(0).any()
    assert (said[ended] == PAD).all()
    logits = torch.stack(out.logits, dim=1)  # (R, T, V)
    assert logits.isfinite().all()
    sure = logits.softmax(-1)[..., PAD]
    assert (sure[ended] == 1).all()
    assert (sure[~ended] < 1).all()
    if not sampling:
        scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        assert (scores[ended] == 0).all(), "what is padded adds nothing to the likelihood of a text"


class Few(StoppingCriteria):
    """Ends everything after three tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= max(LENGTHS) + 3)


LONG = {
    "skipdecode": skipdecode(warm_up=1, least=2, most=5, horizon=5),
    "skipdecode, slow": skipdecode(warm_up=1, least=2, most=5, horizon=MANY),
    "d3": d3(0.9, first=2, least=3),
    "d3, slow": Policy(schedule=PowerDecay(0.999999, 2, None)),
    "uniform": uniform_skipping(3, num_layers=LAYERS),
    "fixed": Policy(schedule=FixedDepth(4)),
    "every second": Policy(schedule=Periodic(2, 1, depth=3)),
    "piecewise": Policy(schedule=PiecewiseDepth((2.0,), (5, 3))),
    "softmax": policy_named("softmax", NAME),
}


@pytest.mark.parametrize("name", LONG)
def test_the_longest_run_that_was_allowed_costs_nothing(name: str, monkeypatch):
    """Schedules are not asked about every step of a million before the first token."""
    model, policy, asked = model_named(NAME), LONG[name], [0]
    kind: type[Schedule] = type(policy.schedule)
    few = {"stopping_criteria": StoppingCriteriaList([Few()])}
    short = generate(model, policy, prompts(), max_new_tokens=9, **few) if "slow" not in name else None

    def counting(self, *args, layers=kind.layers, **kwargs):
        asked[0] += 1
        return layers(self, *args, **kwargs)

    monkeypatch.setattr(kind, "layers", counting)
    out = generate(model, policy, prompts(), max_new_tokens=MANY, **few)
    assert asked[0] < 1000
    assert out.sequences.shape[1] == max(LENGTHS) + 3
    assert short is None or torch.equal(out.sequences, short.sequences)


def test_drafts_cost_nothing_for_the_longest_run_either():
    few = StoppingCriteriaList([Few()])
    out = plain(model_named(NAME), **DRAFTS, max_new_tokens=MANY, stopping_criteria=few)
    assert torch.equal(out.sequences, plain(model_named(NAME), max_new_tokens=3).sequences)
