"""FLOPs: the formula against what torch counts while a tiny model runs, and against a count by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import CLASSES, LAYERS, NAMES, WIDTH, exits_for, model_named

from ee_diffusion.classification.attach import attach
from ee_diffusion.classification.costs import block_flops, costs_of, flops_of, path_flops, saliency_flops
from ee_diffusion.classification.methods import METHODS, confidence, jei_dnn, palbert
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth

TOKENS = 7
# ModernBERT's angles (positions x frequencies), before the first layer: a product below this version, made once for every layer
MULTIPLIED_ANGLES = Version(transformers.__version__) < Version("5.15")


def outside(name: str, model) -> int:
    """Products that are no part of a layer or an end: ALBERT's embedding projection, ViT's patches, angles of rotary positions."""
    patches = 2 * 4 * WIDTH * 3 * 4 * 4
    frequencies = WIDTH // model.config.num_attention_heads // 2
    angles = LAYERS * 2 * TOKENS * frequencies if MULTIPLIED_ANGLES else 0
    return {"Albert": 2 * TOKENS * 8 * WIDTH, "ViT": patches, "ModernBert": angles}.get(name, 0)


def length(name: str) -> int:
    """Tokens: of the text, or four patches and the first token."""
    return 5 if name == "ViT" else TOKENS


def counted(model, exits, policy: Policy):
    inputs = {"input_ids": torch.arange(3, 3 + TOKENS)[None]}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.ones(1, 3, 8, 8)}
    with FlopCounterMode(display=False) as counter, attach(model, exits, policy) as traces:
        model(**inputs)
    return counter.get_total_flops(), traces[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "method, policy",
    [("palbert", palbert(0.6)), ("palbert", confidence(0.6)), ("jei_dnn", jei_dnn(0.5)), ("pabee", confidence(0.9))],
)
def test_the_formula_is_what_torch_counts(name: str, method: str, policy: Policy):
    """All seven classes. Eager attention, so that both of its products are counted."""
    model = model_named(name, attn_implementation="eager")
    exits = exits_for(model, **METHODS[method].exits)
    for one in (policy, Policy(policy.criterion, record_all=True)):
        total, trace = counted(model, exits, one)
        costs = costs_of(model, exits, length(name), score=policy.criterion.score)
        assert flops_of(trace, costs).tolist() == [total - outside(name, model)]


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
    assert saliency_flops(7, hidden_size=16) == 2 * 7 * 7 * 16


def test_the_way_to_each_answer_grows_and_ends_above_one():
    model = model_named("Bert")
    exits = exits_for(model, head="linear", judge="statistics")
    costs = costs_of(model, exits, TOKENS, score="learned_confidence")
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


@pytest.mark.parametrize("changes", [{"share_att_key": True}, {"pos_att_type": ["c2p"]}, {"relative_attention": False}])
def test_kinds_of_relative_positions(changes: dict):
    model = model_named("DebertaV2", **changes | ({"position_buckets": -1} if len(changes) > 1 else {}))
    exits = exits_for(model, head="pooled", judge="none")
    total, trace = counted(model, exits, Policy())
    assert flops_of(trace, costs_of(model, exits, TOKENS, score=None)).tolist() == [total]


def test_the_way_of_each_text_is_what_its_own_costs_say():
    for name in ("Bert", "DebertaV2"):
        model = model_named(name)
        exits = exits_for(model, (1, 3), head="shared", judge="halting")
        lengths = torch.tensor([7, 3, 7])
        found = path_flops(model, exits, lengths, score="learned_confidence")  # (3, A)
        for row, tokens in zip(found, lengths.tolist(), strict=True):
            costs = costs_of(model, exits, tokens, score="learned_confidence")
            whole = costs.layers(LAYERS) + costs.tail
            assert row.tolist() == pytest.approx((costs.up_to(exits.depths, LAYERS) * whole).tolist())


def test_no_tokens_are_refused():
    model = model_named("Bert")
    with pytest.raises(ValueError, match="tokens=0"):
        costs_of(model, exits_for(model, head="shared", judge="none"), 0, score=None)
