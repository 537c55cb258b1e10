"""What decoding refuses before any work, in words, and what it takes; outputs where there is nothing to report."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from language import EXITS, LAYERS, TOKENS, Listener, alone, generate, model_named, plain, policy_named, prompts
from torch import Tensor

from ee_diffusion.core.criteria import DecayingThreshold, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth, FixedLayers, PowerDecay
from ee_diffusion.decoding.exit_objective import ExitObjective, TokenStates, exit_table
from ee_diffusion.decoding.generate import early_exit_generate
from ee_diffusion.decoding.heads import LearnedExits, SharedTail
from ee_diffusion.decoding.methods import calm, d3, depth_per_request, skipdecode, uniform_skipping
from ee_diffusion.decoding.model_specs import register_model
from ee_diffusion.decoding.self_speculative import self_speculative_generate
from ee_diffusion.decoding.skip_objective import SkipObjective
from ee_diffusion.diffusion.model_specs import MODEL_SPECS

CERTAIN = {"score": "confidence", "horizon": None}


@pytest.mark.parametrize(
    ("policy", "more", "told"),
    [
        (policy_named("skipdecode", "llama"), {"guidance_scale": 1.5}, "guidance_scale=1.5"),
        (Policy(Threshold(0.5, "saturation"), exits=(0, 2)), {}, "at depth 0"),
        (Policy(Threshold(0.5), exits=(2,)), {}, "learned exits"),
        (Policy(Threshold(0.5, "learned_confidence"), exits=(2,)), {}, "exits that judge"),
        (uniform_skipping(3, num_layers=4), {}, "chosen for a model of 4, this one has 6"),
        (Policy(schedule=FixedDepth(9)), {}, "the model has 6"),
        (calm(0.5, exits=(2,), **CERTAIN), {"exit_heads": LearnedExits}, "expected exits"),
    ],
)
def test_it_is_refused_before_the_model_runs(policy: Policy, more: dict, told: str):
    model, listener = model_named("llama"), Listener()
    handle = model.register_forward_pre_hook(lambda *args: pytest.fail("the model ran"))
    try:
        with pytest.raises(ValueError, match=told):
            generate(model, policy, exit_streamer=listener, **more)
    finally:
        handle.remove()
    assert not listener.heard, "a refused call streams no prompt"


@pytest.mark.parametrize("call", ["early", "lossless"])
def test_a_model_that_trains_without_a_cache_is_refused(call: str):
    model = copy.deepcopy(model_named("llama"))
    model.gradient_checkpointing_enable()
    ways = {
        "early": {"custom_generate": early_exit_generate, "exit_policy": policy_named("skipdecode", "llama")},
        "lossless": {"custom_generate": self_speculative_generate, "exit_depth": 2, "draft_tokens": 3},
    }
    options = {"max_new_tokens": 3, "do_sample": False}
    wanted = plain(model, alone(0), max_new_tokens=3).sequences
    if call == "lossless":
        assert torch.equal(model.generate(**alone(0), **ways[call], **options), wanted)
    with pytest.raises(ValueError, match=r"gradient checkpointing.*model\.eval\(\)"):
        model.train().generate(**alone(0), **ways[call], **options)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: skipdecode(warm_up="1", least=2, most=4, horizon=4), "bottom='1', expected a whole number"),
        (lambda: skipdecode(warm_up=1.5, least=2, most=4, horizon=4), r"bottom=1\.5, expected a whole number"),
        (lambda: skipdecode(warm_up=True, least=2, most=4, horizon=4), "bottom=True, expected a whole number"),
        (lambda: d3("0.9", first=1, least=2), "alpha="),
        (lambda: d3(True, first=1, least=2), "alpha="),
        (lambda: d3(0.9, first=1.5, least=2), r"bottom=1\.5, expected a whole number"),
        (lambda: uniform_skipping(2.5, num_layers=6), "whole numbers"),
        (lambda: uniform_skipping("3", num_layers=6), "whole numbers"),
        (lambda: calm(0.5, exits=2, score="margin", horizon=None), "exits=2"),
        (lambda: calm(0.5, exits=(), score="margin", horizon=None), "exits="),
        (lambda: calm(0.5, exits=(True,), score="margin", horizon=None), "whole numbers"),
        (lambda: calm(0.5, exits=(2,), score="negative_entropy", horizon=None), "score='negative_entropy'"),
        (
            lambda: calm((0.5, 0.6), exits=(2, 4), score="margin", horizon=10),
            r"threshold=\(0\.5, 0\.6\), expected a number",
        ),
        (lambda: DecayingThreshold((0.5, 0.6), 10), r"threshold=\(0\.5, 0\.6\), expected a number"),
        (lambda: Policy(exits=2), "exits=2"),
        (lambda: FixedLayers((0,), of=2.0), r"of=2\.0, expected a whole number"),
        (lambda: LearnedExits(2, 32), "depths=2"),
        (lambda: LearnedExits((2.5,), 32), "depths="),
        (lambda: LearnedExits((2,), "32"), "width='32'"),
        (lambda: LearnedExits((2,), 0), "width=0"),
        (lambda: LearnedExits((2,), 32, adapter_width=1.5), "adapter_width=1.5"),
        (lambda: SharedTail(model_named("llama"), (2, 2)), r"depths=\(2, 2\)"),
        (lambda: SharedTail(model_named("llama"), (4, 2)), r"depths=\(4, 2\)"),
        (lambda: SharedTail(model_named("llama"), (-1, 2)), r"depths=\(-1, 2\)"),
        (lambda: SharedTail(model_named("llama"), (LAYERS + 1,)), r"depths=\(7,\)"),
        (lambda: SkipObjective(model_named("llama"), Policy(schedule=FixedLayers((1, 3))), num_steps=8), "layer 0"),
        (lambda: register_model(MODEL_SPECS["DiTTransformer2DModel"]), "decoding.model_specs.ModelSpec"),
    ],
)
def test_numbers_of_another_kind_are_refused(make, told: str):
    with pytest.raises(ValueError, match=told):
        make()


def test_depths_may_be_a_list():
    with pytest.raises(ValueError, match="at least one"):
        calm(0.5, exits=[], score="margin", horizon=None)
    assert calm(0.5, exits=[2, 4], score="margin", horizon=None) == calm(
        0.5, exits=(2, 4), score="margin", horizon=None
    )
    assert depth_per_request((1, 2), exits=[1, 2]).exits == (1, 2)


def test_a_power_is_rounded_down_from_what_it_is():
    """50 x 0.58 is 29, though not in binary."""
    assert sum(PowerDecay(0.58, 1, None).layers(1, 1.0, num_steps=2, num_layers=50)) == 29
    assert sum(PowerDecay(0.575, 1, None).layers(1, 1.0, num_steps=2, num_layers=50)) == 28


def test_layers_chosen_for_a_model_know_it(tmp_path: Path):
    policy = uniform_skipping(3, num_layers=LAYERS)
    policy.save(tmp_path / "p.json")
    assert Policy.load(tmp_path / "p.json") == policy
    assert generate(model_named("llama"), policy).report.mean_executed == 3
    keep = Policy(schedule=FixedLayers((0, 1, 5)))
    assert generate(model_named("llama"), keep).report.mean_executed == 3


@pytest.mark.parametrize(
    ("policy", "more"), [(Policy(), {}), (policy_named("skipdecode", "llama"), {"max_new_tokens": 1})]
)
def test_where_nothing_is_to_report_there_is_none(policy: Policy, more: dict):
    out = generate(model_named("llama"), policy, **more)
    assert out.trace is None
    assert out.report is None


def test_what_is_said_of_a_run_is_short_and_no_item_of_the_output():
    out = generate(model_named("llama"), policy_named("skipdecode", "llama"))
    assert (
        repr(out.trace)
        == f"Trace({TOKENS - 1} steps, {len(prompts()['input_ids'])} samples, {LAYERS} blocks, exits [])"
    )
    assert out.propagated.shape == (TOKENS - 1, LAYERS)
    assert "propagated" not in dict(out.items()), "pipelines split items by sequence"


def test_exits_take_the_models_dtype_when_bound():
    model = copy.deepcopy(model_named("llama")).bfloat16()
    exits, policy = LearnedExits((2,), 32, adapter_width=4).bind(model), calm(0.1, exits=(2,), **CERTAIN)
    assert {weight.dtype for weight in exits.parameters()} == {torch.bfloat16}
    assert generate(model, policy, exit_heads=exits).report.num_steps == TOKENS - 1


def test_a_policy_that_is_off_refuses_nothing_of_that():
    model = copy.deepcopy(model_named("llama"))
    stock = plain(model, guidance_scale=1.5).sequences
    assert torch.equal(generate(model, Policy(), guidance_scale=1.5).sequences, stock)
    model.gradient_checkpointing_enable()
    assert generate(model.train(), Policy(), max_new_tokens=2).sequences.shape[1] == stock.shape[1] - TOKENS + 2


def test_an_exit_may_be_anywhere_below_the_models_end():
    exits = LearnedExits((LAYERS - 1,), 32, made_for="").double().bind(model_named("llama"))
    assert exits.depths == (LAYERS - 1,)
    some = LearnedExits(EXITS, 32, made_for="abc").double().at(EXITS[:1])
    assert (some.made_for, some.classifiers[0].weight.dtype) == ("abc", torch.float64)


@pytest.mark.parametrize("content", [b"{}", b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_what_is_no_file_of_exits_or_states_is_told(content: bytes, tmp_path: Path):
    (tmp_path / "junk").write_bytes(content)
    with pytest.raises(ValueError, match="junk is not a readable file of exits"):
        LearnedExits.load(tmp_path / "junk")
    with pytest.raises(ValueError, match="junk is not a readable store of states"):
        TokenStates.load(tmp_path / "junk", name="x")


def token_states(count: int) -> TokenStates:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(count, len(EXITS), 32, generator=generator).double()
    numbers = torch.arange(count)
    return TokenStates(hidden, 3 * hidden[:, -1], numbers, numbers[:, None] + torch.arange(8), "s")


def test_held_out_states_are_apart_from_the_others():
    first, last = token_states(10).split(3)
    assert first.labels.tolist() == list(range(7))
    assert last.labels.tolist() == [7, 8, 9]


def test_how_often_the_sure_are_right_is_of_the_sure_alone():
    model, states = copy.deepcopy(model_named("llama")), token_states(12)
    model.lm_head.weight.data.mul_(4)  # sharp
    exits = LearnedExits(EXITS, 32).double().bind(model)
    said = [exits.answer(exit, states.hidden[:, exit, None], {}).softmax(-1) for exit in range(len(EXITS))]
    sharp = torch.stack([one.amax(-1) for one in said])  # (K, M)
    best = torch.stack([one.argmax(-1) for one in said], 1)  # (M, K)
    likely = torch.cat([best[:, :1], states.likely[:, 1:]], 1)
    likely[::3, 0] = (likely[::3, 0] + 1) % 61  # every third is another token
    states = TokenStates(states.hidden, states.final, states.labels, likely, "s")
    sure = sharp[0] > 0.9
    assert 0 < int(sure.sum()) < 12, "some are sure, some are not"
    row = exit_table(ExitObjective(model, exits, teacher="model"), states, batch_size=5)[0]
    same: Tensor = best[:, 0] == likely[:, 0]
    assert row["sure"] == pytest.approx(sure.double().mean().item())
    assert row["same_if_sure"] == pytest.approx(same[sure].double().mean().item())


def test_padding_runs_no_layer_in_training():
    rule = skipdecode(warm_up=1, least=2, most=5, horizon=5)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    runs = SkipObjective(model_named("llama"), rule, num_steps=6).pattern(mask, torch.tensor([2, 2]))
    assert runs[0].any(-1).all()
    assert runs[1].any(-1).tolist() == [True, True, True, False, False, False]
