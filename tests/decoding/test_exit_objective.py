"""Exits on a frozen causal model: states are the model's own, losses those of a slow loop, adapters answer as written, batched as alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from language import EXITS, LENGTHS, alone, generate, model_named, prompts

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.exit_objective import (
    LIKELY,
    ExitObjective,
    TokenStates,
    collect_states,
    exit_table,
    tokens_to_look_at,
)
from ee_diffusion.decoding.fingerprint import fingerprint_of
from ee_diffusion.decoding.heads import LearnedExits

TEXTS, PROMPTS = ((5, 9, 11, 30, 8), (7, 3, 2, 14)), (2, 3)


def exits_on(model, inner: int | None = 8, seed: int = 5) -> LearnedExits:
    """Exits with random weights."""
    exits = LearnedExits(EXITS, 32, adapter_width=inner, made_for=fingerprint_of(model)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in exits.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return exits.bind(model)


def states_of(model) -> TokenStates:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in TEXTS], batch_first=True)
    mask = (ids > 0).long()
    batch = {"input_ids": ids, "attention_mask": mask, "prompt_length": torch.tensor(PROMPTS)}
    return collect_states(model, [batch], EXITS, name="states")


def test_states_are_those_of_each_text_alone():
    model, place = model_named("llama"), 0
    states = states_of(model)
    for text, prompt in zip(TEXTS, PROMPTS, strict=True):
        out = model(torch.tensor([text]), output_hidden_states=True)
        for position in range(prompt - 1, len(text) - 1):
            wanted = torch.stack([out.hidden_states[depth][0, position] for depth in EXITS])
            assert torch.allclose(states.hidden[place], wanted, atol=1e-9)
            logits = model.get_output_embeddings()(states.final[place])
            assert torch.allclose(logits, out.logits[0, position], atol=1e-9)
            assert int(states.labels[place]) == text[position + 1]
            place += 1
    assert place == len(states) == 3 + 1


@pytest.mark.parametrize("teacher", ["model", "labels"])
def test_the_loss_is_that_of_a_slow_loop(teacher: str):
    model = copy.deepcopy(model_named("llama"))
    exits, states = exits_on(model), states_of(model)
    objective = ExitObjective(model, exits, teacher=teacher)
    terms = objective(states[torch.arange(len(states))])
    said_terms = {name: value.item() for name, value in terms.items()}
    head, norm, total = model.lm_head.weight, model.model.norm, 0.0
    for exit, depth in enumerate(EXITS):
        answers = sures = 0.0
        adapter, classifier = exits.adapters[exit], exits.classifiers[exit]
        for row in range(len(states)):
            h = states.hidden[row, exit]
            rms = h / (h.square().mean() + 1e-6).sqrt()
            inner = adapter.down.weight @ (rms * adapter.norm.weight) + adapter.down.bias
            adapted = h + adapter.up.weight @ (inner / (1 + (-inner).exp())) + adapter.up.bias
            said = (head @ norm(adapted[None])[0]).softmax(0).detach()
            full = (head @ states.final[row]).softmax(0).detach()
            if teacher == "model":
                answers += sum(float(p) * math.log(float(p) / float(q)) for p, q in zip(full, said, strict=True))
            else:
                answers -= math.log(float(said[states.labels[row]]))
            sure = 1 / (1 + math.exp(-float((classifier.weight[0] @ rms + classifier.bias[0]).detach())))
            sures -= math.log(sure if said.argmax() == full.argmax() else 1 - sure)
        assert said_terms[f"answer_{depth}"] == pytest.approx(answers / len(states), abs=1e-6)
        assert said_terms[f"sure_{depth}"] == pytest.approx(sures / len(states), abs=1e-6)
        total += (answers + sures) / len(states)
    assert said_terms["loss"] == pytest.approx(total, abs=1e-5)
    terms["loss"].backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert all(weight.grad is not None for weight in exits.parameters())
    table = exit_table(objective, states, batch_size=3)
    for row, depth in zip(table, EXITS, strict=True):
        assert row["loss"] == pytest.approx(said_terms[f"answer_{depth}"], abs=1e-9)
        assert row["same"] == pytest.approx(said_terms[f"same_{depth}"], abs=1e-9)


def keyed(states: TokenStates, key: int = 3) -> dict[str, torch.Tensor]:
    return states[torch.arange(len(states))] | {"key": torch.arange(len(states)) + key}


@pytest.mark.parametrize("teacher", ["model", "labels"])
def test_a_loss_over_all_tokens_drawn_is_the_loss_over_all(teacher: str):
    model = copy.deepcopy(model_named("llama"))
    exits, states = exits_on(model), states_of(model)
    vocabulary = model.lm_head.out_features
    whole = ExitObjective(model, exits, teacher=teacher)(keyed(states))
    drawn = ExitObjective(model, exits, teacher=teacher, sampled_tokens=vocabulary)(keyed(states))
    for name, value in whole.items():
        assert drawn[name].item() == pytest.approx(value.item(), abs=1e-6), name


def test_a_loss_over_some_tokens_is_that_of_a_slow_loop():
    model = copy.deepcopy(model_named("llama"))
    exits, states = exits_on(model), states_of(model)
    batch, count, vocabulary = keyed(states), 6, model.lm_head.out_features
    terms = ExitObjective(model, exits, teacher="model", sampled_tokens=count)(batch)
    classes, shift = tokens_to_look_at(batch, vocabulary, count)
    known = {*states.likely.flatten().tolist(), *states.labels.tolist()}
    assert known < set(classes.tolist())
    assert len(classes) == len(known) + count
    weight = {c: 1.0 if c in known else (vocabulary - len(known)) / count for c in classes.tolist()}
    assert torch.allclose(shift.exp(), torch.tensor([weight[c] for c in classes.tolist()]))
    for exit, depth in enumerate(EXITS):
        total = 0.0
        for row in range(len(states)):
            said = exits.answer(exit, states.hidden[row, exit][None, None], {})[0].detach().tolist()
            full = model.lm_head(states.final[row]).detach().tolist()
            sums = [sum(w * math.exp(of[c]) for c, w in weight.items()) for of in (said, full)]
            for c, w in weight.items():
                p, q = w * math.exp(full[c]) / sums[1], w * math.exp(said[c]) / sums[0]
                total += p * math.log(p / q)
        assert terms[f"answer_{depth}"].item() == pytest.approx(total / len(states), abs=1e-6)


def test_drawn_tokens_are_given_by_the_batchs_keys_and_estimate_the_softmaxs_sum():
    model = model_named("llama")
    states, vocabulary = states_of(model), model.lm_head.out_features
    logits = model.lm_head(states.final)[0].detach()
    same = [tokens_to_look_at(keyed(states, 3), vocabulary, 8)[0] for _ in range(2)]
    other, _ = tokens_to_look_at(keyed(states, 4), vocabulary, 8)
    assert torch.equal(*same)
    assert not torch.equal(same[0], other)
    estimates = []
    for key in range(400):
        classes, shift = tokens_to_look_at(keyed(states, key), vocabulary, 8)
        estimates.append((logits[classes] + shift).exp().sum())
    error = torch.stack(estimates).std() / 20
    assert abs(torch.stack(estimates).mean() - logits.exp().sum()) < 4 * error


def test_likely_tokens_are_the_models_best():
    model = model_named("llama")
    states = states_of(model)
    assert torch.equal(states.likely, model.lm_head(states.final).topk(LIKELY).indices)
    with pytest.raises(ValueError, match="sampled_tokens=0"):
        ExitObjective(model, exits_on(model), teacher="model", sampled_tokens=0)


def test_fresh_adapters_are_the_models_own_tail():
    model = model_named("llama")
    fresh = LearnedExits(EXITS, 32, adapter_width=8).double().bind(model)
    bare = LearnedExits(EXITS, 32).double().bind(model)
    hidden = torch.randn(3, 2, 32, dtype=torch.float64)
    assert torch.equal(fresh.answer(1, hidden, {}), bare.answer(1, hidden, {}))
    assert torch.equal(fresh.confidence(1, hidden, {}), fresh.confidence(1, hidden[:, 1:], {})), "of the last token"


def test_adapters_answer_in_a_batch_as_alone():
    model = model_named("llama")
    exits, policy = exits_on(model), Policy(Threshold(0.5, "confidence"), exits=EXITS)
    out = generate(model, policy, exit_heads=exits)
    assert len(set(out.trace.depths.flatten().tolist())) > 1, "some leave, some do not"
    for row in range(len(LENGTHS)):
        own = generate(model, policy, alone(row), exit_heads=exits)
        width = prompts()["input_ids"].shape[1]
        assert torch.equal(own.sequences[0, LENGTHS[row] :], out.sequences[row, width:])
        assert torch.equal(own.trace.depths[:, 0], out.trace.depths[:, row])
    plain = generate(model, policy, exit_heads=exits_on(model, inner=None))
    assert not torch.equal(plain.sequences, out.sequences), "adapters change what is said"


def test_what_was_made_for_other_weights_is_refused(tmp_path: Path):
    model, other = model_named("llama"), copy.deepcopy(model_named("llama"))
    assert fingerprint_of(other.bfloat16()) == fingerprint_of(model)
    other.model.norm.weight.data.mul_(1.1)
    exits = exits_on(model)
    with pytest.raises(ValueError, match="fingerprints"):
        exits.bind(other)
    exits.save(tmp_path / "exits")
    loaded = LearnedExits.load(tmp_path / "exits")
    assert (loaded.adapter_width, loaded.made_for) == (8, fingerprint_of(model))
    with pytest.raises(ValueError, match="fingerprints"):
        loaded.bind(other)
    states_of(model).save(tmp_path / "states")
    assert torch.equal(TokenStates.load(tmp_path / "states", name="states").hidden, states_of(model).hidden)
    with pytest.raises(ValueError, match="expected 'others'"):
        TokenStates.load(tmp_path / "states", name="others")
    with pytest.raises(ValueError, match="held_out=4 of 4"):
        states_of(model).split(4)
