"""Exit heads of language models: the model's own tail at a depth, learned certainties, saving, and what does not fit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from language import EXITS, LAYERS, LENGTHS, MODELS, TOKENS, alone, discarding, generate, model_named, plain, prompts
from safetensors.torch import save_file

from ee_diffusion.core import scores
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import replay
from ee_diffusion.decoding.heads import LearnedExits, SharedTail
from ee_diffusion.decoding.model_specs import ModelSpec, layers_of, model_spec_of, register_model


def learned(model) -> LearnedExits:
    exits = LearnedExits(EXITS, 32).double()
    with torch.no_grad():
        for classifier in exits.classifiers:
            classifier.weight.mul_(4)
    return exits.bind(model)


@pytest.mark.parametrize("name", MODELS)
def test_the_shared_tail_is_that_of_the_model(name: str):
    model, states = model_named(name), []
    handle = layers_of(model)[-1].register_forward_hook(lambda module, args, output: states.append(output))
    logits = model(**prompts()).logits
    handle.remove()
    heads = SharedTail(model, EXITS)
    torch.testing.assert_close(heads.answer(0, states[0], {}), logits[:, -1], rtol=1e-12, atol=1e-12)
    classes = torch.tensor([[5, 0, 60], [1, 2, 3], [9, 9, 8], [0, 1, 2]])
    found = heads.answer_among(0, states[0], classes)
    torch.testing.assert_close(found, logits[:, -1].gather(1, classes), rtol=1e-12, atol=1e-12)


def test_an_lm_heads_bias_is_in_the_answers_among_some_tokens():
    model = copy.deepcopy(model_named("llama"))
    head = torch.nn.Linear(32, model.config.vocab_size, bias=True).double()
    model.set_output_embeddings(head)
    heads, hidden = SharedTail(model, EXITS), torch.randn(len(LENGTHS), 3, 32, dtype=torch.float64)
    whole = heads.answer(0, hidden, {})
    classes = torch.tensor([[5, 0], [1, 2], [9, 8], [0, 1]])
    torch.testing.assert_close(heads.answer_among(0, hidden, classes), whole.gather(1, classes), rtol=1e-12, atol=1e-12)
    same = heads.answer_among(0, hidden, torch.tensor([7, 3]))
    torch.testing.assert_close(same, whole[:, [7, 3]], rtol=1e-12, atol=1e-12)


def test_learned_exits_decide():
    model = model_named("llama")
    exits = learned(model)
    everything = generate(model, Policy(Threshold(0.5), record_all=True), exit_heads=exits).trace
    threshold = float(everything.scores.nanmedian())
    policy = Policy(Threshold(threshold))
    live = generate(model, policy, exit_heads=exits)
    assert live.trace.exits.tolist() == list(EXITS)
    assert len(live.trace.depths.unique()) >= 2
    assert torch.equal(replay(live.trace, policy), live.trace.depths)
    row = 1
    inputs = {name: value[row : row + 1, -4:] for name, value in prompts().items()}
    with discarding(model, live.trace.depths[:, row].tolist(), None):
        slow = plain(model, inputs)
    assert torch.equal(slow.sequences[0, -TOKENS:], live.sequences[row, -TOKENS:])


@torch.no_grad()
def test_saturation_looks_at_the_layer_before():
    """Scores of a decode are cosines of the plain model's own hidden states at the tokens that were read."""
    model = model_named("llama")
    policy = Policy(Threshold(0.5, "saturation"), exits=EXITS, record_all=True)
    out = generate(model, policy, alone(0))
    states = model(
        out.sequences, output_hidden_states=True
    ).hidden_states  # (1, N, D) after 0..L layers; the last one normed
    for step, found in enumerate(out.trace.scores):
        place = LENGTHS[0] + step
        for depth, score in zip(EXITS, found, strict=True):
            wanted = torch.cosine_similarity(states[depth][0, place], states[depth - 1][0, place], dim=0)
            assert float(score) == pytest.approx(float(wanted), abs=1e-6)


@torch.no_grad()
def test_a_pruned_vocabulary_is_that_of_the_first_check(monkeypatch: pytest.MonkeyPatch):
    """Scores against the plain model's hidden states: the five best tokens at depth 1 are those that depths 2 and 4 look at."""
    monkeypatch.setattr("ee_diffusion.core.scores.SCORES", dict(scores.SCORES))
    scores.register_score("five", scores.pruned_probability(5), low=0.0, high=1.0)
    model, heads = model_named("llama"), SharedTail(model_named("llama"), EXITS)
    policy = Policy(Threshold(0.5, "five"), exits=EXITS, record_all=True)
    out = generate(model, policy, alone(0))
    states = model(out.sequences, output_hidden_states=True).hidden_states
    for step, found in enumerate(out.trace.scores):
        logits = [heads.answer(0, states[depth][:, LENGTHS[0] + step][:, None], {})[0] for depth in EXITS]
        best = logits[0].topk(5).indices
        for score, one in zip(found, logits, strict=True):
            assert float(score) == pytest.approx(float(one[best].softmax(0).max()), abs=1e-6)
    rows = len(out.trace.depths)
    assert out.trace.answered.sum(0).tolist() == [rows, 0, 0], "all tokens are looked at once a step"


def test_learned_exits_are_saved_and_loaded(tmp_path: Path):
    model = model_named("llama")
    exits = learned(model)
    exits.float().save(tmp_path / "exits.safetensors")
    loaded = LearnedExits.load(tmp_path / "exits.safetensors").bind(model)
    assert (loaded.depths, loaded.width) == (EXITS, 32)
    hidden = torch.randn(3, 1, 32).double()
    exits.double()  # as the loaded ones are since they were bound
    for exit in range(len(EXITS)):
        assert torch.equal(loaded.confidence(exit, hidden, {}), exits.confidence(exit, hidden, {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exits.safetensors"]
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a readable file of exits: it is no file of exits"):
        LearnedExits.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        LearnedExits.load(tmp_path)


def test_exits_of_another_model_are_refused():
    model, other = model_named("llama"), model_named("qwen2")
    policy = Policy(Threshold(0.5))
    with pytest.raises(ValueError, match="bind"):
        generate(model, policy, exit_heads=LearnedExits(EXITS, 32))
    with pytest.raises(ValueError, match="another"):
        generate(model, policy, exit_heads=learned(other))
    with pytest.raises(ValueError, match="another"):
        generate(model, policy, exit_heads=SharedTail(other, EXITS))
    with pytest.raises(ValueError, match="expected exits"):
        generate(model, policy, exit_heads="exits.safetensors")
    with pytest.raises(ValueError, match="width 16"):
        LearnedExits(EXITS, 16).bind(model)
    with pytest.raises(ValueError, match="6 layers"):
        LearnedExits((LAYERS,), 32).bind(model)
    for depths in ((3, 2), (-1, 2), (2, 2), ()):
        with pytest.raises(ValueError, match="ascending"):
            LearnedExits(depths, 32)


def test_families_can_be_added_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ee_diffusion.decoding.model_specs.MODEL_SPECS", {})
    model = model_named("llama")
    with pytest.raises(ValueError, match="register_model"):
        model_spec_of(model)
    row = ModelSpec("LlamaForCausalLM", "model.layers", lambda model, hidden: hidden, lambda *_: None)
    register_model(row)
    assert model_spec_of(model) is row
    with pytest.raises(ValueError, match="already"):
        register_model(row)
