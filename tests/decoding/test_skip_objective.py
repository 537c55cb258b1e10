"""Training under a schedule computes what generation under it computes: same logits, same layers, for every family."""

from __future__ import annotations

import copy

import pytest
import torch
from language import LAYERS, LENGTHS, MODELS, SCHEDULED, TOKENS, alone, generate, model_named, policy_named
from transformers.utils import is_peft_available

from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.hooks import running_modules
from ee_diffusion.decoding.methods import calm, skipdecode
from ee_diffusion.decoding.skip_objective import SkipObjective
from ee_diffusion.training.lora import add_lora, merged


@torch.no_grad()
def generated(name: str, policy: Policy) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """A training batch of what each prompt alone generates, padded on the right, and the logits (T, V) of each generation."""
    texts, logits = [], []
    for row in range(len(LENGTHS)):
        out = generate(model_named(name), policy, alone(row))
        texts.append(out.sequences[0])
        logits.append(torch.cat(out.logits))  # float32: transformers keeps them so
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # generated ids may be 0, too
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "prompt_length": torch.tensor(LENGTHS)}, logits


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", [*SCHEDULED, "up-and-down"])
def test_training_runs_what_generation_runs(name: str, policy: str):
    rule, model = policy_named(policy, name), model_named(name)
    batch, wanted = generated(name, rule)
    objective = SkipObjective(model, rule, num_steps=TOKENS - 1).eval()
    runs = objective.pattern(batch["attention_mask"], batch["prompt_length"])
    logits = objective.head(objective.states(batch["input_ids"], runs))
    for row, length in enumerate(LENGTHS):
        assert torch.allclose(logits[row, length - 1 : length - 1 + TOKENS], wanted[row].double(), atol=1e-5)
    full = SkipObjective(model, Policy(), num_steps=TOKENS - 1).eval()
    assert not torch.allclose(full.head(full.states(batch["input_ids"], runs)), logits, atol=1e-3), (
        "the pattern changes something"
    )


@torch.no_grad()
def test_the_loss_is_the_answers_and_layers_are_left_out():
    rule, model = skipdecode(warm_up=1, least=2, most=5, horizon=5), model_named("llama")
    batch, logits = generated("llama", rule)
    counts: list[int] = []
    handles = [
        m.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1])) for m in running_modules(model)
    ]
    try:
        terms = SkipObjective(model, rule, num_steps=TOKENS).eval()(batch)
    finally:
        for handle in handles:
            handle.remove()
    # greedy text is the most likely one: its loss is that of each step's best token
    best = torch.cat([one.log_softmax(-1).amax(-1) for one in logits])
    assert float(terms["loss"]) == pytest.approx(-float(best.mean()), abs=1e-5)
    assert float(terms["accuracy"]) == 1
    depths = [5, 4, 3, 2, 2, 2]  # of the tokens that are read: rounded 5, 4.25, 3.5, 2.75, 2 with halves up
    table = SkipObjective(model, rule, num_steps=TOKENS).table.sum(1).tolist()
    assert float(terms["depth"]) == pytest.approx(sum(table[: len(depths)]) / len(depths))
    longest = max(LENGTHS) + TOKENS
    assert counts[0] == longest, "a layer that always runs sees every position"
    assert min(counts) == max(LENGTHS) + 1 - 1, "one that never runs in an answer sees the prompts alone"


def test_a_teacher_is_followed_where_answers_are():
    rule, model, teacher = skipdecode(warm_up=1, least=2, most=5, horizon=5), model_named("llama"), model_named("llama")
    teacher = copy.deepcopy(teacher)
    for weight in teacher.parameters():
        weight.data = weight.data + 0.02 * torch.randn(
            weight.shape, generator=torch.Generator().manual_seed(weight.numel())
        )
    batch, said = generated("llama", rule)
    alone_ = SkipObjective(model, rule, num_steps=TOKENS)
    taught = SkipObjective(model, rule, num_steps=TOKENS, teacher=teacher, teacher_weight=0.25)
    plain, terms = alone_(batch), taught(batch)
    gaps = []  # KL of each answer's token, row by row, from the teacher's own forward of that row
    for row, length in enumerate(LENGTHS):
        text = batch["input_ids"][row : row + 1, : length + TOKENS]
        known = teacher(text).logits[0, length - 1 : length - 1 + TOKENS].double().softmax(-1)
        own = said[row].double().log_softmax(-1)
        gaps.append((known * (known.log() - own)).sum(-1))
    gap = float(torch.cat(gaps).mean())
    assert gap > 0.001
    assert terms["teacher_gap"].item() == pytest.approx(gap, rel=1e-3)
    assert terms["loss"].item() == pytest.approx(0.75 * plain["loss"].item() + 0.25 * gap, rel=1e-3)
    assert set(taught.state_dict()) == set(alone_.state_dict()), "the teacher is in no checkpoint"
    taught(batch)["loss"].backward()
    assert all(weight.grad is None and not weight.requires_grad for weight in teacher.parameters())
    own = SkipObjective(model, Policy(), num_steps=TOKENS, teacher=copy.deepcopy(model))
    assert abs(own(batch)["teacher_gap"].item()) < 1e-6
    for weight in model.parameters():
        weight.grad = None


def test_gradients_pass_by_skipped_layers():
    """Against finite differences: a weight of a layer that only some positions run."""
    rule, model = skipdecode(warm_up=1, least=2, most=5, horizon=5), copy.deepcopy(model_named("llama"))
    batch, _ = generated("llama", rule)
    objective = SkipObjective(model, rule, num_steps=TOKENS)
    objective(batch)["loss"].backward()
    for layer in (0, 2, 5):
        weight = model.model.layers[layer].mlp.down_proj.weight
        found, step, losses = float(weight.grad[3, 4]), 1e-3, []  # its norms compute in float32
        for sign in (1, -1):
            with torch.no_grad():
                weight[3, 4] += sign * step
                losses.append(float(objective(batch)["loss"]))
                weight[3, 4] -= sign * step
        assert found == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=2e-2)


@pytest.mark.skipif(not is_peft_available(), reason="needs peft (ee-diffusion[lora])")
def test_adapters_change_nothing_when_fresh_and_are_merged():
    model = copy.deepcopy(model_named("qwen2"))
    ids = torch.tensor([[5, 9, 11, 30]])
    before, keys = model(ids).logits, set(model.state_dict())
    add_lora(model, ["model.layers"], rank=2)
    assert torch.equal(model(ids).logits, before)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    objective = SkipObjective(model, Policy(), num_steps=4)
    assert len(objective.state_dict()) == len(trained), "frozen weights stay out of checkpoints"
    for weight in objective.trained:
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    adapted, plain = model(ids).logits, merged(model)
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert torch.allclose(plain(ids).logits, adapted, atol=1e-9)
    assert set(plain.state_dict()) == keys
    assert merged(plain) is plain
    with pytest.raises(ValueError, match="rank=0"):
        add_lora(plain, ["model.layers"], rank=0)
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        add_lora(copy.deepcopy(model_named("gpt2")), ["transformer.h"], rank=2)


def test_policies_that_cannot_be_trained_under_are_refused():
    model = model_named("llama")
    with pytest.raises(ValueError, match="teacher_weight=0, expected"):
        SkipObjective(model, Policy(), num_steps=4, teacher_weight=0)
    with pytest.raises(ValueError, match="criterion"):
        SkipObjective(model, calm(0.5, exits=(2,), score="margin", horizon=None), num_steps=4)
    with pytest.raises(ValueError, match=f"the model has {LAYERS} blocks"):
        SkipObjective(model, skipdecode(warm_up=1, least=2, most=9, horizon=5), num_steps=4)


def test_without_peft_adapters_are_refused_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ee_diffusion.training.lora.is_peft_available", lambda: False)
    model = model_named("qwen2")
    assert merged(model) is model
    with pytest.raises(ImportError, match=r"ee-diffusion\[lora\]"):
        add_lora(model, ["model.layers"], rank=2)
