"""Methods as policies: their rules against slow loops written from the papers, and models that decoding refuses."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ee_diffusion.core.criteria import DecayingThreshold, ExitPoint, Threshold
from ee_diffusion.decoding.methods import (
    calm,
    d3,
    depth_per_request,
    early_termination,
    skipdecode,
    uniform_skipping,
)
from ee_diffusion.decoding.model_specs import model_spec_of


def running(policy, step: int, num_layers: int) -> set[int]:
    layers = policy.schedule.layers(step, float(step), num_steps=100, num_layers=num_layers)
    return {layer for layer, runs in enumerate(layers) if runs}


@pytest.mark.parametrize("warm_up,least,most,horizon", [(1, 2, 6, 2), (2, 5, 24, 17), (3, 10, 28, 64), (1, 4, 4, 5)])
def test_skipdecode_is_its_formula(warm_up: int, least: int, most: int, horizon: int):
    num_layers, before = 30, set(range(30))
    policy = skipdecode(warm_up=warm_up, least=least, most=most, horizon=horizon)
    shallow = early_termination(least=least, most=most, horizon=horizon)
    for t in range(80):
        wanted = most - (most - least) * min(t, horizon - 1) / (horizon - 1)
        count = math.floor(wanted + 0.5)
        layers = running(policy, t, num_layers)
        assert layers == {*range(warm_up), *range(num_layers - (count - warm_up), num_layers)}
        assert running(shallow, t, num_layers) == set(range(count))
        assert layers <= before
        before = layers
    assert len(running(policy, 0, num_layers)) == most
    assert len(running(policy, horizon - 1, num_layers)) == least


def test_d3_is_its_formula():
    policy = d3(0.97, first=2, least=8)
    for t in range(80):
        count = max(8, math.floor(30 * 0.97**t))
        assert running(policy, t, 30) == {0, 1, *range(30 - (count - 2), 30)}


def test_uniform_skipping_is_even_and_keeps_both_ends():
    for count in range(2, 31):
        layers = sorted(running(uniform_skipping(count, num_layers=30), 5, 30))
        gaps = {b - a for a, b in pairwise(layers)}
        assert (len(layers), layers[0], layers[-1]) == (count, 0, 29)
        assert max(gaps) - min(gaps) <= 1


def test_calm_threshold_decays_with_the_position():
    policy = calm(0.8, exits=(2, 4), score="margin", horizon=40)
    assert policy.criterion == DecayingThreshold(0.8, 40, score="margin")
    assert calm(0.8, exits=(2, 4), score="margin", horizon=None).criterion == Threshold(0.8, "margin")
    for t in (0, 1, 7, 39, 200):
        limit = 0.9 * 0.8 + 0.1 * 0.8 * math.exp(-4 * t / 40)
        score = torch.tensor([limit - 1e-9, limit + 1e-9, math.nan], dtype=torch.float64)
        stop, _ = policy.criterion.decide(score, ExitPoint(t, 300, float(t), 2, 0), {})
        assert stop.tolist() == [False, True, False]


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: skipdecode(warm_up=1, least=2, most=6, horizon=1), "horizon=1"),
        (lambda: skipdecode(warm_up=2, least=2, most=6, horizon=9), "bottom=2"),
        (lambda: skipdecode(warm_up=0, least=2, most=6, horizon=9), "bottom=0"),
        (lambda: skipdecode(warm_up=1, least=7, most=6, horizon=9), "least <= most"),
        (lambda: early_termination(least=7, most=6, horizon=9), "least <= most"),
        (
            lambda: skipdecode(warm_up=1, least=2, most=31, horizon=9).schedule.plans(num_steps=3, num_layers=30),
            "within",
        ),
        (lambda: d3(1.1, first=1, least=4), "alpha"),
        (lambda: d3(0.9, first=4, least=4), "bottom=4"),
        (lambda: d3(0.9, first=1, least=31).schedule.plans(num_steps=3, num_layers=30), "least=31"),
        (lambda: uniform_skipping(1, num_layers=30), "count=1"),
        (lambda: uniform_skipping(31, num_layers=30), "count=31"),
        (lambda: calm(1.1, exits=(2,), score="margin", horizon=9), "outside"),
        (lambda: calm(0.5, exits=(2,), score="margins", horizon=9), "margins"),
        (lambda: calm(0.5, exits=(2,), score="margin", horizon=0), "horizon=0"),
        (lambda: depth_per_request((), exits=(2,)), "plan"),
        (lambda: depth_per_request((-1,), exits=(2,)), "plan"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_models_that_forget_or_encode_are_refused():
    sizes = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    windowed = MistralForCausalLM(MistralConfig(**sizes, num_hidden_layers=2, sliding_window=4))
    with pytest.raises(ValueError, match="sliding window"):
        model_spec_of(windowed)
    mixed = Qwen2Config(**sizes, num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match="sliding window"):
        model_spec_of(Qwen2ForCausalLM(mixed))
    both = T5ForConditionalGeneration(T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="encoder-decoder"):
        model_spec_of(both)
