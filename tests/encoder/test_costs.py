"""FLOPs: the formula against what torch counts while a tiny model runs, and against a count by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import CLASSES, LAYERS, WIDTH, exits_for, model_named

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.encoder.attach import attach
from ee_diffusion.encoder.costs import block_flops, costs_of, flops_of, saliency_flops
from ee_diffusion.encoder.methods import EXITS, confidence, jei_dnn, palbert

TOKENS = 7


def counted(model, exits, policy: Policy):
    ids = torch.arange(3, 3 + TOKENS)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter, attach(model, exits, policy) as traces:
        model(input_ids=ids)
    return counter.get_total_flops(), traces[0]


@pytest.mark.parametrize("name", ["Bert", "Albert", "DistilBert"])
@pytest.mark.parametrize(
    "method, policy",
    [("palbert", palbert(0.6)), ("palbert", confidence(0.6)), ("jei_dnn", jei_dnn(0.5)), ("pabee", confidence(0.9))],
)
def test_the_formula_is_what_torch_counts(name: str, method: str, policy: Policy):
    """Eager attention, so that both of its products are counted. ALBERT's embedding projection is no part of a layer."""
    model = model_named(name, attn_implementation="eager")
    head, judge = EXITS[method]
    exits = exits_for(model, head=head, judge=judge)
    outside = 2 * TOKENS * 8 * WIDTH if name == "Albert" else 0
    for one in (policy, Policy(policy.criterion, record_all=True)):
        total, trace = counted(model, exits, one)
        assert flops_of(trace, costs_of(model, exits, TOKENS, score=policy.criterion.score)).tolist() == [
            total - outside
        ]


def test_a_constant_depth_costs_its_layers_and_one_answer():
    model = model_named("Bert", attn_implementation="eager")
    exits = exits_for(model, head="shared", judge="halting")
    total, trace = counted(model, exits, Policy(schedule=FixedDepth(2)))
    costs = costs_of(model, exits, TOKENS, score=None)
    assert flops_of(trace, costs).tolist() == [total]
    assert total == 2 * costs.block + costs.tail
    assert costs.up_to(exits.depths, LAYERS)[1] == pytest.approx(total / (LAYERS * costs.block + costs.tail))


def test_by_hand():
    projections, attention, inner = 4 * 2 * 7 * 16 * 16, 2 * 2 * 7 * 7 * 16, 2 * 2 * 7 * 16 * 24
    assert block_flops(7, hidden_size=16, inner_size=24) == projections + attention + inner
    assert block_flops(7, hidden_size=16, inner_size=24, kept=3) == projections + attention + 2 * 2 * 3 * 16 * 24
    assert saliency_flops(7, hidden_size=16) == 2 * 2 * 7 * 16 * 16 + 2 * 7 * 7 * 16


def test_the_way_to_each_answer_grows_and_ends_above_one():
    model = model_named("Bert")
    exits = exits_for(model, head="linear", judge="statistics")
    costs = costs_of(model, exits, TOKENS, score="judged")
    ways = costs.up_to(exits.depths, LAYERS)
    assert bool((ways.diff() > 0).all())
    whole = LAYERS * costs.block + costs.tail
    assert ways[-1] == pytest.approx(1 + 3 * (2 * WIDTH * CLASSES + 8) / whole)
    assert ways[1] == pytest.approx((2 * costs.block + 2 * (2 * WIDTH * CLASSES + 8)) / whole)
    assert ways[0] == pytest.approx((costs.block + 2 * WIDTH * CLASSES + 8) / whole)


def test_longer_texts_cost_more_than_in_proportion():
    model = model_named("Bert")
    exits = exits_for(model, head="linear", judge="statistics")
    assert costs_of(model, exits, 16, score=None).block > 2 * costs_of(model, exits, 8, score=None).block


@pytest.mark.parametrize("name, tokens, words", [("Bert", 0, "tokens=0"), ("ModernBert", 4, "gated")])
def test_refused(name, tokens, words):
    model = model_named(name)
    with pytest.raises(ValueError, match=words):
        costs_of(model, exits_for(model, head="shared", judge="none"), tokens, score=None)
